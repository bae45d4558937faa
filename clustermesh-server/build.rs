//! Compiles the service between replicas without protoc, whose messages come from `clustermesh-raft`, and what the servers say beside it.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=raft/proto");
    println!("cargo::rerun-if-changed=store/proto");
    println!("cargo::rerun-if-changed=core/proto");
    println!("cargo::rerun-if-changed=../api/proto");
    println!("cargo::rerun-if-changed=build.rs");
    let descriptors = protox::compile(
        [
            "clustermesh/raft/v1/raft.proto",
            "clustermesh/server/v1/news.proto",
        ],
        [
            "proto",
            "raft/proto",
            "store/proto",
            "core/proto",
            "../api/proto",
        ],
    )?;
    tonic_prost_build::configure()
        .extern_path(".clustermesh.raft.v1", "::clustermesh_raft::wire")
        .extern_path(".clustermesh.store.v1", "::clustermesh_store::pb")
        .extern_path(".clustermesh.core.v1", "::clustermesh_core::pb")
        .extern_path(".clustermesh.v1", "::clustermesh_api::v1")
        .extern_path(".mvccpb", "::clustermesh_api::etcd::mvcc")
        .extern_path(".authpb", "::clustermesh_api::etcd::auth")
        .extern_path(".etcdserverpb", "::clustermesh_api::etcd::rpc")
        .compile_fds(descriptors)?;
    Ok(())
}
