//! Generated messages of the log and of snapshots.
#![expect(
    missing_docs,
    reason = "generated; the .proto files carry the comments"
)]

include!(concat!(env!("OUT_DIR"), "/clustermesh.core.v1.rs"));
