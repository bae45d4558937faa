//! Compiles the log's and the snapshot's protobuf without protoc; etcd's messages come from `clustermesh-api`.

use std::error::Error;

const PROTOS: [&str; 2] = [
    "clustermesh/core/v1/entry.proto",
    "clustermesh/core/v1/snapshot.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=../../api/proto/etcd");
    println!("cargo::rerun-if-changed=build.rs");
    let descriptors = protox::compile(PROTOS, ["proto", "../../api/proto"])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .bytes(".")
        .btree_map(".")
        .extern_path(".mvccpb", "::clustermesh_api::etcd::mvcc")
        .extern_path(".authpb", "::clustermesh_api::etcd::auth")
        .extern_path(".etcdserverpb", "::clustermesh_api::etcd::rpc")
        .compile_fds(descriptors)?;
    Ok(())
}
