//! A disk that loses power, and what is proven on it.
//!
//! [`disk`] is a model of a disk with a volatile cache; [`mount`] puts it below real processes with FUSE. On it run the
//! real log, votes and snapshots of a replica ([`workload`], in a process of its own), power is cut at a random moment
//! ([`rig`]), and what the next process finds must be what was acknowledged ([`model`]).

pub mod disk;
pub mod model;
pub mod mount;
pub mod protocol;
pub mod rig;
pub mod throughput;
pub mod workload;
