//! Generated messages of `clustermesh.store.v1`, described in store.proto.

include!(concat!(env!("OUT_DIR"), "/clustermesh.store.v1.rs"));
