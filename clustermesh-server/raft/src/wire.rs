//! Generated messages of `clustermesh.raft.v1`, described in raft.proto.
#![expect(
    missing_docs,
    reason = "generated; the .proto files carry the comments"
)]

include!(concat!(env!("OUT_DIR"), "/clustermesh.raft.v1.rs"));
