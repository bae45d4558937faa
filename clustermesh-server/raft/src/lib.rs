//! openraft wired to core and store: batcher, reads, leases, watch hub.
//!
//! [`Replica`] is the handle that a process uses. Nothing here names an async runtime: tasks, clocks and randomness come
//! from openraft's `AsyncRuntime`, the type parameter `R`.

mod answer;
mod backup;
mod backup_file;
mod batcher;
mod check_data;
mod compaction;
mod config;
mod contact;
mod divergence;
mod entries;
mod error;
mod expiry;
mod forward;
mod group;
#[cfg(test)]
mod group_tests;
mod handler;
mod hash_kv;
mod hashes;
mod identity;
mod lease;
mod maintenance;
mod membership;
mod metrics;
#[cfg(feature = "mutants")]
pub mod mutants;
mod network;
mod peer;
mod pending;
mod proposal;
mod reads;
mod replica;
mod shared;
mod state_machine;
mod task;
#[cfg(test)]
mod test_support;
mod watch;
pub mod wire;

pub use answer::{Answer, Committed};
pub use backup_file::{BackupError, BackupFile, BackupSummary, Restore, Restored};
pub use check_data::{CheckReport, Finding, Severity, SnapshotFound, check_data};
pub use clustermesh_store::{DiskFault, DiskFaults, Node, ReplicaId, SnapshotFile, StoreError};
pub use config::{
    AutoCompaction, DEFAULT_QUOTA_BYTES, DEFAULT_SNAPSHOT_LOG_BYTES, Data, InitialMember,
    MemoryData, ReplicaConfig, Start, wall_clock,
};
pub use error::{ProposeError, ReadError, StartError, WatchEnd};
pub use group::AuthChanges;
pub use handler::PeerHandler;
pub use membership::MemberError;
pub use metrics::Metrics;
pub use peer::{AsideError, NoPeers, Target, Transport, TransportError};
pub use replica::{LeaseTime, Member, REVISION_BUMP, Replica, Status};
pub use watch::{EventFilter, WatchEvents, WatchItem, WatchSpec, Watcher};

/// openraft's types as this crate uses them.
pub type Types<R> = clustermesh_store::TypeConfig<R, Answer>;
