//! Judges what clients and watchers were told by what was committed: every write by the revision that it got, every read by
//! the revision that it was answered at, and their order by who was answered before whom was asked.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::history::{Action, Answer, Committed, Operation, Seen, Watched};

/// Faults told of one run, most.
const MAX_FAULTS: usize = 10;
/// A clock may gain one part in so many.
const CLOCK_RATE_PART: u32 = 100;

/// Versions of a key: revision and value, `None` for a deletion.
type Versions<'h> = BTreeMap<&'h Bytes, Vec<(i64, Option<&'h Bytes>)>>;

struct Oracle<'h> {
    committed: &'h BTreeMap<i64, Committed>,
    versions: Versions<'h>,
    /// Where each value was written.
    written: BTreeMap<&'h Bytes, Vec<(i64, &'h Bytes)>>,
    compaction: i64,
    faults: Vec<String>,
}

impl<'h> Oracle<'h> {
    fn new(committed: &'h BTreeMap<i64, Committed>, compaction: i64) -> Self {
        let mut versions: Versions<'h> = BTreeMap::new();
        let mut written: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut faults = Vec::new();
        let mut next = 2;
        for (revision, group) in committed {
            if *revision != next {
                faults.push(format!("no replica had revision {next}"));
            }
            next = revision + 1;
            for change in &group.changes {
                let value = change.value.as_ref();
                versions
                    .entry(&change.key)
                    .or_default()
                    .push((*revision, value));
                if let Some(value) = value {
                    written
                        .entry(value)
                        .or_default()
                        .push((*revision, &change.key));
                }
            }
        }
        Self {
            committed,
            versions,
            written,
            compaction,
            faults,
        }
    }

    fn fault(&mut self, fault: String) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        }
    }

    /// The value of a key at a revision, and when it was written.
    fn at(&self, key: &Bytes, revision: i64) -> Option<(Bytes, i64)> {
        let versions = self.versions.get(key)?;
        let (at, value) = versions.iter().rev().find(|(at, _)| *at <= revision)?;
        value.map(|value| (value.clone(), *at))
    }

    /// Every written value has at most one revision, an acknowledged one exactly that which was told.
    fn check_write(&mut self, operation: &Operation, key: &Bytes, value: &Bytes) {
        let places = self.written.get(value).cloned().unwrap_or_default();
        let wrong = match &operation.answer {
            Answer::Written { revision, .. } => places != [(*revision, key)],
            Answer::Unknown => places.len() > 1 || places.iter().any(|(_, at)| *at != key),
            _ => !places.is_empty(),
        };
        if wrong {
            self.fault(format!(
                "{operation:?}, but that value was written at {places:?}"
            ));
        }
    }

    fn check_read(&mut self, operation: &Operation, key: &Bytes, at: i64) {
        match &operation.answer {
            Answer::Read { revision, found } => {
                let at = if at > 0 { at } else { *revision };
                let wanted = self.at(key, at);
                if *found != wanted {
                    self.fault(format!("{operation:?}, but at {at} it was {wanted:?}"));
                }
            }
            Answer::Compacted if at == 0 || at >= self.compaction => {
                self.fault(format!("{operation:?}, but nobody compacted that"));
            }
            _ => {}
        }
    }

    fn check_operation(&mut self, operation: &Operation) {
        match &operation.action {
            Action::Put { key, value, .. } => self.check_write(operation, key, value),
            Action::Swap {
                key,
                value,
                expected,
            } => {
                self.check_write(operation, key, value);
                let last = |revision| self.at(key, revision).map_or(0, |(_, at)| at);
                match &operation.answer {
                    Answer::Written { revision, .. } if last(revision - 1) != *expected => {
                        self.fault(format!("{operation:?}, although the key was another"));
                    }
                    Answer::Read { revision, .. } if last(*revision) == *expected => {
                        self.fault(format!("{operation:?}, although the key was as expected"));
                    }
                    Answer::Read { .. } => self.check_read(operation, key, 0),
                    _ => {}
                }
            }
            Action::Delete { key } => {
                if let Answer::Written { revision, deleted } = operation.answer {
                    let before = self.at(key, revision - 1).is_some();
                    let after = self.at(key, revision).is_some();
                    if after || (deleted == 1 && !before) {
                        self.fault(format!(
                            "{operation:?}, but before it {before}, after it {after}"
                        ));
                    }
                }
            }
            Action::Get { key, revision, .. } => self.check_read(operation, key, *revision),
            Action::Revoke { lease } => {
                if let Answer::Written { revision, .. } = operation.answer {
                    self.check_revoked(operation, *lease, revision);
                }
            }
            Action::Compact { .. } | Action::Grant { .. } | Action::KeepAlive { .. } => {}
        }
    }

    /// What hung on the lease is gone when that is said, and nothing comes to hang on it again.
    fn check_revoked(&mut self, operation: &Operation, lease: i64, revision: i64) {
        let key = leased_key(lease);
        let versions = self.versions.get(&key).map_or(&[][..], Vec::as_slice);
        let later = versions
            .iter()
            .find(|(at, value)| *at > revision && value.is_some())
            .map(|(at, _)| *at);
        let left = self.at(&key, revision).map(|(_, at)| at);
        if let Some(at) = left.or(later) {
            self.fault(format!(
                "{operation:?}, but its key is there, of revision {at}"
            ));
        }
    }

    /// What was asked after another answer has at least that answer's revision, a write a greater one.
    fn check_order(&mut self, operations: &[Operation]) {
        enum Side {
            Asked,
            Answered,
        }
        let mut moments: Vec<(u64, Side, &Operation)> = Vec::new();
        for operation in operations {
            moments.push((operation.asked, Side::Asked, operation));
            moments.push((operation.answered, Side::Answered, operation));
        }
        moments.sort_by_key(|(moment, ..)| *moment);
        let mut floor = 0;
        let mut floors: BTreeMap<u64, i64> = BTreeMap::new();
        for (_, side, operation) in moments {
            let Some((revision, writes)) = ordered_revision(operation) else {
                continue;
            };
            match side {
                Side::Asked => drop(floors.insert(operation.asked, floor)),
                Side::Answered => {
                    let least = floors.get(&operation.asked).copied().unwrap_or(0);
                    if revision < least + i64::from(writes) {
                        self.fault(format!(
                            "{operation:?}, although revision {least} was answered before it was asked"
                        ));
                    }
                    floor = floor.max(revision);
                }
            }
        }
    }

    /// A client at one replica never goes back, while that runs.
    fn check_endpoints(&mut self, operations: &[Operation]) {
        let mut newest: BTreeMap<(usize, u64), i64> = BTreeMap::new();
        for operation in operations {
            let (Answer::Read { revision, .. } | Answer::Written { revision, .. }) =
                operation.answer
            else {
                continue;
            };
            let last = newest
                .entry((operation.client, operation.life))
                .or_default();
            let before = *last;
            *last = before.max(revision);
            if revision < before {
                self.fault(format!(
                    "{operation:?}, although this client was at revision {before} there"
                ));
            }
        }
    }

    fn check_watched(&mut self, watched: &Watched) {
        let wanted = |key: &Bytes| *key >= watched.first && *key < watched.end;
        let mut last = watched.from - 1;
        let mut faults = Vec::new();
        for seen in &watched.seen {
            let (upto, revision) = match seen {
                Seen::Events(revision, _) => (revision - 1, *revision),
                Seen::Progress(revision) => (*revision, *revision),
            };
            let missed = self
                .committed
                .range(last + 1..(upto + 1).max(last + 1))
                .find(|(_, group)| group.changes.iter().any(|change| wanted(&change.key)));
            if let Some((missed, _)) = missed {
                faults.push(format!("it has {seen:?} without {missed} before"));
            }
            if let Seen::Events(_, changes) = seen {
                if revision <= last {
                    faults.push(format!("it has {seen:?} after {last}"));
                }
                let group = self.committed.get(&revision);
                let all = group.into_iter().flat_map(|group| &group.changes);
                let all = all.filter(|change| wanted(&change.key));
                if !all
                    .map(|change| (&change.key, &change.value))
                    .eq(changes.iter().map(|change| (&change.key, &change.value)))
                {
                    faults.push(format!("it has {seen:?}, which is not what was committed"));
                }
            }
            last = last.max(revision);
        }
        if let Some(compacted) = watched.compacted
            && (compacted <= last + 1 || compacted > self.compaction)
        {
            faults.push(format!(
                "it ended as compacted at {compacted} after {last}, with compaction at {}",
                self.compaction
            ));
        }
        for fault in faults {
            self.fault(format!(
                "a watcher of {:?} to {:?} from {}: {fault}",
                watched.first, watched.end, watched.from
            ));
        }
    }

    /// No lease ends before its TTL after the last time that it was kept alive, but by a revocation; after that nobody keeps it alive.
    fn check_leases(&mut self, operations: &[Operation]) {
        let mut revocations: BTreeMap<i64, Vec<&Operation>> = BTreeMap::new();
        for operation in operations {
            if let Action::Revoke { lease } = operation.action {
                revocations.entry(lease).or_default().push(operation);
            }
        }
        let mut gone = BTreeMap::new();
        for (revision, group) in self.committed {
            for change in &group.changes {
                if change.value.is_none() && change.key.starts_with(b"lease/") {
                    gone.insert(change.key.clone(), (*revision, group.seen_at));
                }
            }
        }
        for operation in operations {
            let (Action::Grant { lease, ttl_s } | Action::KeepAlive { lease, ttl_s }) =
                operation.action
            else {
                continue;
            };
            if operation.answer != Answer::Done {
                continue;
            }
            let revocations = revocations.get(&lease).map_or(&[][..], Vec::as_slice);
            let ended = |revocation: &&&Operation| {
                matches!(revocation.answer, Answer::Written { .. })
                    && revocation.answered < operation.asked
            };
            if let Some(revocation) = revocations.iter().find(ended) {
                self.fault(format!("{operation:?} after {revocation:?}"));
            }
            let Some((revision, seen_at)) = gone.get(&leased_key(lease)) else {
                continue;
            };
            // One without an answer may have done it, too.
            if revocations
                .iter()
                .any(|revocation| revocation.asked_at <= *seen_at)
            {
                continue;
            }
            // By the leader's clock, which may run a little fast.
            let ttl = std::time::Duration::from_secs(ttl_s.unsigned_abs());
            let least = operation.asked_at + ttl - ttl / CLOCK_RATE_PART;
            if *seen_at < least {
                self.fault(format!(
                    "{operation:?}, but the lease had ended at revision {revision} by {seen_at:?}"
                ));
            }
        }
    }
}

/// The key that hangs on a lease.
fn leased_key(lease: i64) -> Bytes {
    format!("lease/{lease:x}").into()
}

/// The revision that orders an operation, and whether it made it.
fn ordered_revision(operation: &Operation) -> Option<(i64, bool)> {
    match (&operation.action, &operation.answer) {
        (Action::Put { .. } | Action::Swap { .. }, Answer::Written { revision, .. }) => {
            Some((*revision, true))
        }
        (Action::Delete { .. }, Answer::Written { revision, deleted }) => {
            Some((*revision, *deleted > 0))
        }
        (Action::Swap { .. }, Answer::Read { revision, .. })
        | (Action::Revoke { .. }, Answer::Written { revision, .. }) => Some((*revision, false)),
        (
            Action::Get {
                linearizable: true, ..
            },
            Answer::Read { revision, .. },
        ) => Some((*revision, false)),
        _ => None,
    }
}

/// What was wrong, the first few faults.
#[must_use]
pub fn check(
    operations: &[Operation],
    watched: &[Watched],
    committed: &BTreeMap<i64, Committed>,
    compaction: i64,
) -> Vec<String> {
    let mut oracle = Oracle::new(committed, compaction);
    for operation in operations {
        oracle.check_operation(operation);
    }
    oracle.check_order(operations);
    oracle.check_endpoints(operations);
    for watched in watched {
        oracle.check_watched(watched);
    }
    oracle.check_leases(operations);
    oracle.faults
}

#[cfg(test)]
mod tests;
