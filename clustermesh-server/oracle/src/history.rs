//! What clients were told, what watchers got and what was committed.

use std::time::Duration;

use bytes::Bytes;

/// A moment: its number in the order of all moments.
pub type Moment = u64;

/// One change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: Bytes,
    /// Its new value; `None` for a deletion.
    pub value: Option<Bytes>,
    /// The lease that it hangs on, or hung on; 0 for none.
    pub lease: i64,
}

/// What a client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write a value that nobody else writes.
    Put {
        /// The key.
        key: Bytes,
        /// The value.
        value: Bytes,
        /// The lease; 0 for none.
        lease: i64,
    },
    /// Write a value if the key was last changed at this revision (0: does not exist); else read it.
    Swap {
        /// The key.
        key: Bytes,
        /// The value.
        value: Bytes,
        /// The revision expected.
        expected: i64,
    },
    /// Delete a key.
    Delete {
        /// The key.
        key: Bytes,
    },
    /// Read a key.
    Get {
        /// The key.
        key: Bytes,
        /// Whether it is linearizable.
        linearizable: bool,
        /// The revision; 0 for the newest.
        revision: i64,
    },
    /// Compact at a revision.
    Compact {
        /// The revision.
        revision: i64,
    },
    /// Grant a lease.
    Grant {
        /// Its id.
        lease: i64,
        /// Its time, s.
        ttl_s: i64,
    },
    /// Keep a lease alive.
    KeepAlive {
        /// Its id.
        lease: i64,
        /// Its time, s.
        ttl_s: i64,
    },
    /// End a lease.
    Revoke {
        /// Its id.
        lease: i64,
    },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Nobody knows.
    Unknown,
    /// It was not done.
    Refused,
    /// A write was done.
    Written {
        /// Revision of the answer.
        revision: i64,
        /// Keys deleted.
        deleted: i64,
    },
    /// A key was read: its value and mod revision, if it exists.
    Read {
        /// Revision of the answer.
        revision: i64,
        /// What was there.
        found: Option<(Bytes, i64)>,
    },
    /// It is compacted, by this replica's account.
    Compacted,
    /// Done, with no revision to tell.
    Done,
}

/// One operation of a client.
#[derive(Debug, Clone)]
pub struct Operation {
    /// Who.
    pub client: usize,
    /// Which replica was asked.
    pub replica: usize,
    /// In which of its lives.
    pub life: u64,
    /// When it was asked.
    pub asked: Moment,
    /// When it was asked, on the clock.
    pub asked_at: Duration,
    /// When it was answered.
    pub answered: Moment,
    /// What was asked.
    pub action: Action,
    /// What came of it.
    pub answer: Answer,
}

/// One thing that a watcher got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Events of one revision.
    Events(i64, Vec<Change>),
    /// Everything up to here was delivered.
    Progress(i64),
}

/// What one watcher got, from a revision on, through all replicas that it was at.
#[derive(Debug, Clone)]
pub struct Watched {
    /// First key wanted.
    pub first: Bytes,
    /// The key after the last one wanted.
    pub end: Bytes,
    /// First revision wanted.
    pub from: i64,
    /// In the order of arrival.
    pub seen: Vec<Seen>,
    /// It ended because history was compacted up to here.
    pub compacted: Option<i64>,
}

/// A revision as the first replica that was looked at had it.
#[derive(Debug, Clone)]
pub struct Committed {
    /// Its changes.
    pub changes: Vec<Change>,
    /// When it was first seen.
    pub seen_at: Duration,
}
