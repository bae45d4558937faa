//! Errors that callers of a replica handle.

use clustermesh_core::{ApplyError, SnapshotError};
use clustermesh_store::{LogId, Node, ReplicaId, StoreError};

use crate::wire::{Refusal, refusal::Reason};

/// What another replica is told instead of an answer.
pub(crate) fn refuse(reason: Reason, message: impl Into<String>) -> Refusal {
    Refusal {
        reason: reason.into(),
        message: message.into(),
    }
}

/// Why a proposal has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another replica leads, or none does: nothing was proposed, so it may be sent there.
    #[error("this replica is not the leader")]
    NotLeader {
        /// The leader, when one is known.
        leader: Option<(ReplicaId, Node)>,
    },
    /// The proposal may have been committed or not: it must not simply be sent again.
    #[error("the outcome is unknown: leadership changed while the proposal was under way")]
    Unknown,
    /// There is no answer in time: the proposal may have been committed or not.
    #[error("the outcome is unknown: no answer in time")]
    Timeout,
    /// Too many proposals wait; nothing was proposed.
    #[error("{limit} proposals are waiting already; try again later")]
    QueueFull {
        /// How many may wait.
        limit: usize,
    },
    /// The proposal is too large; nothing was proposed.
    #[error("a proposal of {size_bytes} bytes is over the limit of {limit_bytes} bytes")]
    TooLarge {
        /// Its size, bytes.
        size_bytes: usize,
        /// The limit, bytes.
        limit_bytes: usize,
    },
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
    /// This replica's data differs from its group's, so its answer would be wrong; nothing was proposed.
    #[error("{}", ReadError::Diverged)]
    Diverged,
}

impl ProposeError {
    /// What another replica is told.
    pub(crate) fn refusal(&self) -> Refusal {
        let reason = match self {
            Self::NotLeader { .. } => Reason::NotLeader,
            Self::Unknown | Self::Timeout => Reason::UnknownOutcome,
            Self::QueueFull { .. } => Reason::Busy,
            Self::TooLarge { .. } => Reason::Invalid,
            Self::Stopped | Self::Diverged => Reason::NotReady,
        };
        refuse(reason, self.to_string())
    }
}

impl ReadError {
    /// What another replica is told.
    pub(crate) fn refusal(&self) -> Refusal {
        let reason = match self {
            Self::NotLeader { .. } => Reason::NotLeader,
            Self::NoQuorum => Reason::NoQuorum,
            Self::QueueFull { .. } => Reason::Busy,
            Self::Stopped | Self::Diverged => Reason::NotReady,
        };
        refuse(reason, self.to_string())
    }
}

/// Why a linearizable read cannot be served here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Another replica leads, or none does.
    #[error("this replica is not the leader")]
    NotLeader {
        /// The leader, when one is known.
        leader: Option<(ReplicaId, Node)>,
    },
    /// The leader did not reach a quorum.
    #[error("the leader has no quorum")]
    NoQuorum,
    /// Too many readers wait.
    #[error("{limit} readers are waiting already; try again later")]
    QueueFull {
        /// How many may wait.
        limit: usize,
    },
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
    /// The group found that this replica's data differs from the others': see the CORRUPT alarm.
    #[error(
        "this replica's data differs from its group's; remove it from the group (clustermesh member remove), empty its data folder and let it join again"
    )]
    Diverged,
}

/// Why a watch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WatchEnd {
    /// What comes next was compacted away.
    #[error("the next revision is compacted; history begins at {compact_revision}")]
    Compacted {
        /// Lowest revision that is still there.
        compact_revision: i64,
    },
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
}

/// Why a replica did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data folder cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A setting is wrong.
    #[error("setting {name}: {reason}")]
    Config {
        /// Name of the setting.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The snapshot cannot be loaded.
    #[error("snapshot: {0}")]
    Snapshot(#[from] SnapshotError),
    /// The log no longer reaches back to the newest valid snapshot.
    #[error(
        "the log begins after {purged}, but the newest valid snapshot ends at {snapshot}; restore this replica from its group or a backup"
    )]
    Gap {
        /// Last entry gone from the log.
        purged: LogId,
        /// Last entry of the snapshot, or "nothing".
        snapshot: String,
    },
    /// openraft refused to start or to initialise the group.
    #[error("raft: {0}")]
    Raft(String),
    /// The group has no leader in time.
    #[error("no leader within {seconds} s; check that a majority of the group is up and reachable")]
    NoLeader {
        /// How long was waited, seconds.
        seconds: u64,
    },
    /// The group has another replica under this name or address.
    #[error(
        "the group knows {name:?} at {peer_url} as replica {known:016x}, but this data folder is empty: an emptied replica must not come back under its old id; remove the old member (clustermesh member remove), then start this one with `join`"
    )]
    Emptied {
        /// Name of this replica.
        name: String,
        /// Its address.
        peer_url: String,
        /// The id that the group knows.
        known: ReplicaId,
    },
    /// The list of first members cannot be used.
    #[error("initial_cluster: {0}")]
    InitialCluster(String),
    /// No member could be asked, or the group refuses.
    #[error("cannot join the group: {0}")]
    Join(String),
    /// The group has removed this replica.
    #[error(
        "replica {id:016x} was removed from the group and cannot come back; empty its data folder and start it with `join` to add it as a new one"
    )]
    Removed {
        /// Its id.
        id: ReplicaId,
    },
    /// The first entry of the group was refused.
    #[error("the group could not be given its id: {0}")]
    Bootstrap(String),
}

/// Why a committed entry could not be applied: the replica stops.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EntryError {
    #[error("log entry {log_id} cannot be decoded: {reason}; upgrade this replica")]
    Decode {
        log_id: LogId,
        reason: prost::DecodeError,
    },
    #[error("log entry {log_id} cannot be applied: {reason}")]
    Apply { log_id: LogId, reason: ApplyError },
}

impl From<EntryError> for std::io::Error {
    fn from(error: EntryError) -> Self {
        Self::other(error)
    }
}
