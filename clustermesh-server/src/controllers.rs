//! What the leader does by itself: own records, the join of services, compaction of what is stale.

pub mod identities;
pub mod own_records;
pub mod services;
pub mod sessions;
