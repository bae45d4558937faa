//! What clients saw and what replicas applied, in the order in which it happened.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use clustermesh_core::{EventGroup, EventKind};
use parking_lot::Mutex;

use crate::runtime::elapsed;

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

#[derive(Debug, Default)]
struct Inner {
    moment: Moment,
    operations: Vec<Operation>,
    watched: Vec<Watched>,
    committed: BTreeMap<i64, Committed>,
    faults: Vec<String>,
}

/// Everything that happened.
#[derive(Debug, Clone, Default)]
pub struct History(Arc<Mutex<Inner>>);

/// The changes of events.
pub fn changes<'e>(
    events: impl IntoIterator<Item = &'e clustermesh_core::StoredEvent>,
) -> Vec<Change> {
    events
        .into_iter()
        .map(|event| Change {
            key: event.key().clone(),
            value: (event.kind() == EventKind::Put).then(|| event.kv().value()),
            lease: match event.kind() {
                EventKind::Put => event.kv().lease(),
                EventKind::Delete => event.prev().map_or(0, |prev| prev.lease()),
            },
        })
        .collect()
}

impl History {
    /// The next moment.
    pub fn moment(&self) -> Moment {
        let mut inner = self.0.lock();
        inner.moment += 1;
        inner.moment
    }

    /// Notes an operation.
    pub fn note(&self, operation: Operation) {
        self.0.lock().operations.push(operation);
    }

    /// Notes what a watcher got.
    pub fn note_watched(&self, watched: Watched) {
        self.0.lock().watched.push(watched);
    }

    /// Notes something that must not happen.
    pub fn fault(&self, fault: String) {
        self.0.lock().faults.push(fault);
    }

    /// What must not have happened, so far.
    pub fn faults(&self) -> Vec<String> {
        self.0.lock().faults.clone()
    }

    /// Notes what a replica has applied: every replica must have the same.
    pub fn note_applied(&self, replica: usize, groups: &[Arc<EventGroup>], compact_revision: i64) {
        let mut inner = self.0.lock();
        for group in groups {
            let changes = changes(&group.events);
            let Some(known) = inner.committed.get(&group.revision) else {
                let seen_at = elapsed();
                inner
                    .committed
                    .insert(group.revision, Committed { changes, seen_at });
                continue;
            };
            let same = known.changes.len() == changes.len()
                && known.changes.iter().zip(&changes).all(|(known, change)| {
                    // At the compact revision what was before is gone.
                    (&known.key, &known.value) == (&change.key, &change.value)
                        && (known.lease == change.lease
                            || change.value.is_none() && group.revision <= compact_revision)
                });
            if !same {
                let fault = format!(
                    "replica {replica} has at revision {} {changes:?}, another one had {:?}",
                    group.revision, known.changes
                );
                inner.faults.push(fault);
            }
        }
    }

    /// The newest revision seen.
    pub fn newest(&self) -> i64 {
        let inner = self.0.lock();
        inner
            .committed
            .last_key_value()
            .map_or(1, |(newest, _)| *newest)
    }

    /// All of it, at the end.
    pub fn end(&self) -> (Vec<Operation>, Vec<Watched>, BTreeMap<i64, Committed>) {
        let mut inner = self.0.lock();
        (
            std::mem::take(&mut inner.operations),
            std::mem::take(&mut inner.watched),
            std::mem::take(&mut inner.committed),
        )
    }
}
