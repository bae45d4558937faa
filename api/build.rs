//! Compiles the protobuf contract without protoc: messages always, gRPC clients and servers apart, so that pure crates build without tonic.

use protox::prost::Message;
use std::{env, error::Error, fs, path::PathBuf};

const PROTOS: [&str; 12] = [
    "etcd/kv.proto",
    "etcd/rpc.proto",
    "etcd/authpb.proto",
    "etcd/auth.proto",
    "etcd/cluster.proto",
    "etcd/maintenance.proto",
    "etcd/lock.proto",
    "etcd/election.proto",
    "clustermesh/v1/session.proto",
    "clustermesh/v1/stream.proto",
    "clustermesh/v1/mesh.proto",
    "clustermesh/v1/local.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=build.rs");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let messages = out.join("messages");
    fs::create_dir_all(&messages)?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .bytes(".")
        .btree_map(".")
        .out_dir(&messages)
        .compile_fds(descriptors.clone())?;

    if env::var_os("CARGO_FEATURE_GRPC").is_some() {
        let services = out.join("services");
        fs::create_dir_all(&services)?;
        fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
        // Every message is taken from the first pass, so this one emits services only.
        tonic_prost_build::configure()
            .out_dir(&services)
            .extern_path(".mvccpb", "crate::etcd::mvcc")
            .extern_path(".authpb", "crate::etcd::auth")
            .extern_path(".etcdserverpb", "crate::etcd::rpc")
            .extern_path(".v3lockpb", "crate::etcd::lock")
            .extern_path(".v3electionpb", "crate::etcd::election")
            .extern_path(".clustermesh.v1", "crate::v1")
            .compile_fds(descriptors)?;
    }
    Ok(())
}
