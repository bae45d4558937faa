//! Compiles the protocol between replicas without protoc; what is stored and sent comes from the crates that store it.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=../store/proto");
    println!("cargo::rerun-if-changed=../core/proto");
    println!("cargo::rerun-if-changed=../../api/proto/etcd");
    println!("cargo::rerun-if-changed=build.rs");
    let descriptors = protox::compile(
        ["clustermesh/raft/v1/raft.proto"],
        [
            "proto",
            "../store/proto",
            "../core/proto",
            "../../api/proto",
        ],
    )?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .bytes(".")
        .btree_map(".")
        .extern_path(".clustermesh.store.v1", "::clustermesh_store::pb")
        .extern_path(".clustermesh.core.v1", "::clustermesh_core::pb")
        .extern_path(".mvccpb", "::clustermesh_api::etcd::mvcc")
        .extern_path(".authpb", "::clustermesh_api::etcd::auth")
        .extern_path(".etcdserverpb", "::clustermesh_api::etcd::rpc")
        .compile_fds(descriptors)?;
    Ok(())
}
