//! Generated messages of the log and of snapshots.
#![expect(
    missing_docs,
    reason = "generated; the .proto files carry the comments"
)]

use crate::limits::{BATCH_FORMAT, BATCH_FORMAT_QUOTA};

include!(concat!(env!("OUT_DIR"), "/clustermesh.core.v1.rs"));

impl From<proposal::Command> for Proposal {
    /// A proposal that names nobody: refused while auth is enabled.
    fn from(command: proposal::Command) -> Self {
        Self {
            command: Some(command),
            ..Self::default()
        }
    }
}

/// What the proposing leader adds to an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leader {
    /// Its replica id.
    pub id: u64,
    /// Its wall clock, ms since 1970.
    pub time_unix_ms: i64,
    /// Its limit for live and historic bytes; 0 for none.
    pub quota_bytes: u64,
    /// Feature level of its state: below 1 not all replicas know a quota.
    pub feature_level: u32,
}

impl Batch {
    /// An entry of `leader`, in the oldest format that holds it.
    #[must_use]
    pub const fn new(leader: Leader, proposals: Vec<Proposal>) -> Self {
        let has_quota = leader.feature_level >= 1 && leader.quota_bytes != 0;
        Self {
            format: if has_quota {
                BATCH_FORMAT_QUOTA
            } else {
                BATCH_FORMAT
            },
            leader_time_unix_ms: leader.time_unix_ms,
            proposals,
            quota_bytes: if has_quota { leader.quota_bytes } else { 0 },
            leader_id: if has_quota { leader.id } else { 0 },
        }
    }
}

impl Proposal {
    /// A proposal of the server itself, which no user's permissions bind.
    #[must_use]
    pub fn system(command: proposal::Command) -> Self {
        Self {
            system: true,
            ..command.into()
        }
    }
}
