//! What clients saw and what replicas applied, in the order in which it happened.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use clustermesh_core::{EventGroup, EventKind};
use clustermesh_oracle::{Change, Committed, Moment, Operation, Watched};
use parking_lot::Mutex;

use crate::runtime::elapsed;

/// Faults noted of one run, most.
const MAX_FAULTS: usize = 10;

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
            key: Bytes::copy_from_slice(event.key()),
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
        let mut inner = self.0.lock();
        // One wrong thing is seen again and again.
        if inner.faults.len() < MAX_FAULTS && !inner.faults.contains(&fault) {
            inner.faults.push(fault);
        }
    }

    /// What must not have happened, so far.
    pub fn faults(&self) -> Vec<String> {
        self.0.lock().faults.clone()
    }

    /// Notes what a replica has applied: every replica must have the same.
    pub fn note_applied(&self, replica: usize, groups: &[Arc<EventGroup>], compact_revision: i64) {
        let mut faults = Vec::new();
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
                faults.push(fault);
            }
        }
        drop(inner);
        faults.into_iter().for_each(|fault| self.fault(fault));
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
