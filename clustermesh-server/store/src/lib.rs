//! Durability: Raft log and vote on sled, snapshots as files, and an in-memory twin.

mod codec;
mod data_dir;
mod error;
mod log;
mod pb;
mod snapshot;
mod types;

pub use data_dir::{DataDir, Identity};
pub use error::StoreError;
pub use log::{Closed, LogStats, MAX_ENTRY_BYTES, MAX_READ_BYTES, MemoryLog, SledLog};
pub use snapshot::{MAX_CHUNK_BYTES, SnapshotFile, SnapshotReader, SnapshotStore, SnapshotWriter};
pub use types::{
    Command, CommittedLeaderId, Entry, LogId, Membership, Node, ReplicaId, Reply, SnapshotMeta,
    StoredMembership, TypeConfig, Vote,
};
