//! Limits of requests and formats, with their units.

pub use clustermesh_api::limits::MAX_TXN_OPS;

/// Version of [`crate::pb::Batch`] with nothing but keys, leases and copies.
pub const BATCH_FORMAT: u32 = 1;

/// Newest version of [`crate::pb::Batch`] that this build writes and understands: the one with a quota.
pub const BATCH_FORMAT_QUOTA: u32 = 2;

/// Version of [`crate::pb::SnapshotChunk`] with nothing but keys, leases and copies.
pub const SNAPSHOT_FORMAT: u32 = 1;

/// Newest version of [`crate::pb::SnapshotChunk`] that this build writes and understands: the one with what feature level 1 adds.
pub const SNAPSHOT_FORMAT_GROUP: u32 = 2;

/// How [`crate::State::hash_beside_keys`] is taken; to be raised when it is taken of more or otherwise,
/// but for what all replicas begin to have with a feature level.
pub const BESIDE_KEYS_FORMAT: u32 = 1;

/// Newest feature level that this build knows: which kinds of entry it can apply.
///
/// * 0: keys, leases, copies of peers.
/// * 1: auth, alarms and quota, downgrade, recovery, removed members.
/// * 2: the steps of a peer's copy are numbered.
/// * 3: so is its end, and numbers go on after it.
pub const FEATURE_LEVEL: u32 = 3;

/// Feature level from which on the steps of a peer's copy are numbered: a replica that does not know the numbers would apply what others refuse.
pub const NUMBERED_COPIES_LEVEL: u32 = 2;

/// The same for the end of a copy: what forgets a peer has a number, and a copy that begins anew goes on after it.
pub const NUMBERED_FORGETS_LEVEL: u32 = 3;

/// Deepest nesting of a transaction, itself included. etcd bounds it by [`MAX_TXN_OPS`] alone; a decoder of protobuf does not go that deep.
pub const MAX_TXN_DEPTH: usize = 32;

/// [`MAX_TXN_OPS`] for what a log entry may hold: transactions that the server plans itself (a list of manifests, say) are larger than what
/// clients may send.
pub const MAX_APPLIED_TXN_OPS: usize = 65_536;

/// Encoded size of one request (etcd's `--max-request-bytes`).
pub const MAX_REQUEST_BYTES: usize = 1_572_864;

/// Longest lease TTL (etcd's `MaxLeaseTTL`).
pub const MAX_LEASE_TTL_SECONDS: i64 = 9_000_000_000;

/// Shortest lease TTL; a shorter wish is raised to it (what etcd derives from its default election timeout).
pub const MIN_LEASE_TTL_SECONDS: i64 = 2;

/// What one stored version counts beside its key and value in [`crate::State::approximate_bytes`].
pub const VERSION_OVERHEAD_BYTES: u64 = 192;

/// What one lease counts in [`crate::State::approximate_bytes`].
pub const LEASE_OVERHEAD_BYTES: u64 = 64;

/// Users.
pub const MAX_AUTH_USERS: usize = 10_000;

/// Roles.
pub const MAX_AUTH_ROLES: usize = 10_000;

/// Permissions of one role.
pub const MAX_ROLE_PERMISSIONS: usize = 4096;

/// Tokens of all users; past it the oldest go.
#[cfg(not(test))]
pub const MAX_AUTH_TOKENS: usize = 16_384;

/// In tests few, so that requests meet a full table.
#[cfg(test)]
pub const MAX_AUTH_TOKENS: usize = 4;

/// Alarms: two kinds of each replica there ever was.
pub const MAX_ALARMS: usize = 256;

/// Ids of removed replicas, which stay for ever.
pub const MAX_REMOVED_MEMBERS: usize = 65_536;

/// Compacted events that applying one entry drops: bounds what a compaction adds to the time of each.
#[cfg(not(test))]
pub const DROPPED_EVENTS_PER_ENTRY: usize = 1024;

/// In tests few, so that requests meet a state that is partly dropped.
#[cfg(test)]
pub const DROPPED_EVENTS_PER_ENTRY: usize = 3;

/// Keys looked at in one step of a hash: bounds the time under the read lock.
#[cfg(not(test))]
pub const MAX_HASHED_CHUNK_KEYS: usize = 4096;

/// In tests few, so that a hash takes several steps.
#[cfg(test)]
pub const MAX_HASHED_CHUNK_KEYS: usize = 2;

/// Keys looked at for one snapshot chunk: bounds the time under the read lock where few of them belong to the snapshot.
pub const MAX_SNAPSHOT_CHUNK_KEYS: usize = 16_384;
