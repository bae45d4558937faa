//! Durability: Raft log and vote on sled, snapshots as files, and an in-memory twin.

mod codec;
mod data_dir;
mod error;
mod faults;
mod folder;
mod log;
pub mod pb;
mod snapshot;
mod types;

pub use data_dir::{DataDir, Identity, NewDataDir};
pub use error::StoreError;
pub use faults::{DiskFault, DiskFaults};
pub use log::{Closed, LogStats, MAX_ENTRY_BYTES, MAX_READ_BYTES, MemoryLog, SledLog};
pub use snapshot::{MAX_CHUNK_BYTES, SnapshotFile, SnapshotReader, SnapshotStore, SnapshotWriter};
pub use types::{
    Command, CommittedLeaderId, Entry, LogId, Membership, Node, Origin, ReplicaId, Reply,
    SnapshotMeta, StoredMembership, TypeConfig, Vote,
};

/// The stored messages and their conversions, for the protocol between replicas.
pub mod wire {
    pub use crate::codec::{
        CodecError, entry_from_pb, entry_to_pb, log_id_from_pb, log_id_to_pb, membership_from_pb,
        membership_to_pb, node_from_pb, node_to_pb, record_from_bytes, record_to_bytes, seal,
        stored_membership_from_pb, unseal, vote_from_pb, vote_to_pb,
    };
}
