//! Pure MVCC keyspace: transactions, leases, watch matching, compaction, snapshots.
//!
//! [`State`] is what every replica of a cluster holds. It changes only by [`State::apply`], a pure function of the state, the entry and the
//! entry's term: no clock, randomness or I/O, so that equal logs give equal states. Semantics, error texts and codes are those of etcd's v3 API.

mod apply;
pub mod auth;
pub mod check;
mod error;
mod group;
mod hash;
mod hash_kv;
mod index;
mod key_range;
mod keyspace;
mod lease;
pub mod limits;
#[cfg(any(test, feature = "model"))]
pub mod model;
pub mod pb;
mod peer;
mod pin;
mod range;
pub mod snapshot;
mod state;
mod txn;
mod version;
pub mod watch;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod test_support;

pub use apply::{Applied, CursorChange, Outcome, ProposalResult};
pub use error::{ApplyError, Compacted, KvError};
pub use hash_kv::{CompactionHashes, HashCursor, KvHash, MAX_COMPACTION_HASHES};
pub use key_range::KeyRange;
pub use lease::LeaseView;
pub use peer::{PeerCursor, PeerUsage};
pub use snapshot::{SnapshotCursor, SnapshotError, SnapshotLoader};
pub use state::State;
pub use txn::is_read_only;
pub use version::{EventGroup, EventKind, StoredEvent, Version};
pub use watch::{WatchId, WatchIndex};
