//! Generated messages of `clustermesh.store.v1`, described in store.proto.
#![expect(
    missing_docs,
    reason = "generated; the .proto files carry the comments"
)]

include!(concat!(env!("OUT_DIR"), "/clustermesh.store.v1.rs"));
