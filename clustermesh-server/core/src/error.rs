//! Errors of requests, with etcd's gRPC codes and texts, and errors that stop a replica.

use thiserror::Error;

const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;

/// Why a request was refused; it changed nothing. Texts are etcd's where etcd has the error (`rpctypes/error.go`).
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum KvError {
    /// The wanted revision lies below the compact revision.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// The wanted revision was not reached yet.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    /// A request names no key.
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// `ignore_value` or `ignore_lease` on a key that does not exist, or an empty operation in a transaction.
    #[error("etcdserver: key not found")]
    KeyNotFound,
    /// A value beside `ignore_value`.
    #[error("etcdserver: value is provided")]
    ValueProvided,
    /// A lease beside `ignore_lease`.
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    /// More operations in a transaction than [`crate::limits::MAX_TXN_OPS`].
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    /// One transaction would write one key twice.
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    /// An unknown sort order or target.
    #[error("etcdserver: invalid sort option")]
    InvalidSortOption,
    /// The encoded request is larger than [`crate::limits::MAX_REQUEST_BYTES`].
    #[error("etcdserver: request is too large")]
    RequestTooLarge,
    /// No such lease.
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    /// A lease of this id is there already.
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    /// TTL above [`crate::limits::MAX_LEASE_TTL_SECONDS`].
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,
    /// The group got its cluster id before.
    #[error("clustermesh: the cluster id is already set")]
    ClusterIdAlreadySet,
    /// 0 cannot be a cluster id.
    #[error("clustermesh: a cluster id of 0 is not allowed; choose a random one")]
    ClusterIdZero,
    /// A peer copy without a cluster name.
    #[error("clustermesh: the copy of a peer names no cluster")]
    PeerClusterMissing,
    /// A peer copy would write outside the ranges of copies.
    #[error(
        "clustermesh: the copy of peer {cluster} may not write {key}; only cilium/cache/, cilium/synced/{cluster}/ and cilium/cluster-config/{cluster}"
    )]
    PeerKeyNotAllowed {
        /// Name of the peer.
        cluster: String,
        /// The refused key, with unprintable bytes escaped.
        key: String,
    },
}

impl KvError {
    /// Number of the gRPC status code.
    #[must_use]
    pub const fn code(&self) -> i32 {
        match self {
            Self::Compacted | Self::FutureRevision | Self::LeaseTtlTooLarge => OUT_OF_RANGE,
            Self::LeaseNotFound => NOT_FOUND,
            Self::LeaseExists | Self::ClusterIdAlreadySet => FAILED_PRECONDITION,
            Self::EmptyKey
            | Self::KeyNotFound
            | Self::ValueProvided
            | Self::LeaseProvided
            | Self::TooManyOps
            | Self::DuplicateKey
            | Self::InvalidSortOption
            | Self::RequestTooLarge
            | Self::ClusterIdZero
            | Self::PeerClusterMissing
            | Self::PeerKeyNotAllowed { .. } => INVALID_ARGUMENT,
        }
    }
}

/// A committed entry that this build cannot apply: the replica must stop, never skip it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ApplyError {
    /// The entry was written by a newer build.
    #[error("log entry has format {found}, this build knows up to {known}: upgrade this replica")]
    UnknownFormat {
        /// Format of the entry.
        found: u32,
        /// Newest format known here.
        known: u32,
    },
    /// A proposal holds no command that this build knows.
    #[error("proposal {position} of a log entry holds an unknown command: upgrade this replica")]
    UnknownCommand {
        /// Index of the proposal in its batch.
        position: usize,
    },
}

/// Wanted history starts below the compact revision.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("etcdserver: mvcc: required revision has been compacted")]
pub struct Compacted {
    /// Lowest revision from which history is still there.
    pub compact_revision: i64,
}
