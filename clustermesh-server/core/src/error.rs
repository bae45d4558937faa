//! Errors of requests, with etcd's gRPC codes and texts, and errors that stop a replica.

use thiserror::Error;

const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const ABORTED: i32 = 10;
const OUT_OF_RANGE: i32 = 11;
const DATA_LOSS: i32 = 15;

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
    /// The quota for live and historic bytes is reached, or the NOSPACE alarm stands.
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    /// The CORRUPT alarm stands.
    #[error("etcdserver: corrupt cluster")]
    Corrupt,
    /// Not all replicas can apply this yet.
    #[error("etcdserver: not capable")]
    NotCapable,
    /// Auth cannot be enabled without a user `root`.
    #[error("etcdserver: root user does not exist")]
    RootUserNotExist,
    /// Auth cannot be enabled while `root` lacks the role of that name.
    #[error("etcdserver: root user does not have root role")]
    RootRoleNotExist,
    /// A user of this name is there already.
    #[error("etcdserver: user name already exists")]
    UserAlreadyExist,
    /// No user was named: without a token or a certificate, or in the request.
    #[error("etcdserver: user name is empty")]
    UserEmpty,
    /// No such user.
    #[error("etcdserver: user name not found")]
    UserNotFound,
    /// A role of this name is there already.
    #[error("etcdserver: role name already exists")]
    RoleAlreadyExist,
    /// No such role.
    #[error("etcdserver: role name not found")]
    RoleNotFound,
    /// No role was named.
    #[error("etcdserver: role name is empty")]
    RoleEmpty,
    /// Wrong name or password.
    #[error("etcdserver: authentication failed, invalid user ID or password")]
    AuthFailed,
    /// A grant without permission.
    #[error("etcdserver: permission not given")]
    PermissionNotGiven,
    /// The user's roles do not cover it.
    #[error("etcdserver: permission denied")]
    PermissionDenied,
    /// The user does not have the role that was to be taken.
    #[error("etcdserver: role is not granted to the user")]
    RoleNotGranted,
    /// The role does not have the permission that was to be taken.
    #[error("etcdserver: permission is not granted to the role")]
    PermissionNotGranted,
    /// There are no tokens while auth is disabled.
    #[error("etcdserver: authentication is not enabled")]
    AuthNotEnabled,
    /// Would lock everyone out, or a permission for an impossible range.
    #[error("etcdserver: invalid auth management")]
    InvalidAuthMgmt,
    /// Users or roles changed after the caller was found out; asking again finds him out anew.
    #[error("etcdserver: revision of auth store is old")]
    AuthOldRevision,
    /// One of the lists that the group keeps is full.
    #[error("clustermesh: there may be {limit} {what} at most; remove some first")]
    ListFull {
        /// What the list holds.
        what: &'static str,
        /// Its limit.
        limit: usize,
    },
    /// A copy of a peer would grow past its limit.
    #[error(
        "clustermesh: the copy of peer {cluster} would hold {wanted} {what}, {limit} are allowed; raise the limit or let the peer export less"
    )]
    PeerQuotaExceeded {
        /// Name of the peer.
        cluster: String,
        /// `records` or `bytes`.
        what: &'static str,
        /// What it would have.
        wanted: u64,
        /// Its limit.
        limit: u64,
    },
    /// A recovery must raise the revision, and not past what can be counted.
    #[error("clustermesh: a recovery cannot raise revision {revision} by {bump}")]
    RecoveryRevision {
        /// Revision now.
        revision: i64,
        /// Wanted increase.
        bump: i64,
    },
    /// The group got its cluster id before.
    #[error("clustermesh: the cluster id is already set")]
    ClusterIdAlreadySet,
    /// 0 cannot be a cluster id.
    #[error("clustermesh: a cluster id of 0 is not allowed; choose a random one")]
    ClusterIdZero,
    /// A peer copy without a cluster name.
    #[error("clustermesh: the copy of a peer names no cluster")]
    PeerClusterMissing,
    /// A step of a peer's copy does not follow the last one that was applied: what it was made of is not what is there any more.
    #[error(
        "clustermesh: step {found} of the copy of peer {cluster} is not the next one, {wanted} is; read the cursor and go on from there"
    )]
    PeerCopyOutOfOrder {
        /// Name of the peer.
        cluster: String,
        /// Number of the refused step; 0 for none.
        found: u64,
        /// Number of the next step.
        wanted: u64,
    },
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
            Self::PermissionDenied => PERMISSION_DENIED,
            Self::NoSpace | Self::ListFull { .. } | Self::PeerQuotaExceeded { .. } => {
                RESOURCE_EXHAUSTED
            }
            Self::Corrupt => DATA_LOSS,
            Self::PeerCopyOutOfOrder { .. } => ABORTED,
            Self::LeaseExists
            | Self::NotCapable
            | Self::RootUserNotExist
            | Self::RootRoleNotExist
            | Self::UserAlreadyExist
            | Self::UserNotFound
            | Self::RoleAlreadyExist
            | Self::RoleNotFound
            | Self::RoleNotGranted
            | Self::PermissionNotGranted
            | Self::AuthNotEnabled
            | Self::ClusterIdAlreadySet => FAILED_PRECONDITION,
            Self::EmptyKey
            | Self::KeyNotFound
            | Self::ValueProvided
            | Self::LeaseProvided
            | Self::TooManyOps
            | Self::DuplicateKey
            | Self::InvalidSortOption
            | Self::RequestTooLarge
            | Self::UserEmpty
            | Self::RoleEmpty
            | Self::AuthFailed
            | Self::PermissionNotGiven
            | Self::InvalidAuthMgmt
            | Self::AuthOldRevision
            | Self::RecoveryRevision { .. }
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
    /// All replicas were said to know what this build does not.
    #[error(
        "the group goes to feature level {wanted}, this build knows up to {known}: upgrade this replica"
    )]
    UnknownFeatureLevel {
        /// Level of the entry.
        wanted: u32,
        /// Newest level known here.
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
