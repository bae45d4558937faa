//! What a replica's folder must hold: everything acknowledged, and some beginning of what was under way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::protocol::{Ballot, Found, Message, Op, Place, Run};

/// The log as its operations make it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Log {
    vote: Option<Ballot>,
    purged: Option<Place>,
    terms: BTreeMap<u64, u64>,
}

impl Log {
    fn last(&self) -> Option<Place> {
        self.terms
            .last_key_value()
            .map(|(index, term)| Place {
                term: *term,
                index: *index,
            })
            .or(self.purged)
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Append(Run { first, last, term }) => {
                self.terms.extend((first..=last).map(|index| (index, term)));
            }
            Op::Truncate(keep) => {
                let from = keep.map_or(0, |keep| keep.index + 1);
                self.terms.retain(|index, _| *index < from);
            }
            Op::Purge(upto) => {
                self.terms.retain(|index, _| *index > upto.index);
                self.purged = self.purged.max(Some(upto));
            }
            Op::Vote(ballot) => self.vote = Some(ballot),
            Op::Snapshot(_) => {}
        }
    }

    fn holds(&self, found: &Found) -> bool {
        let terms: BTreeMap<u64, u64> = found
            .entries
            .iter()
            .flat_map(|run| (run.first..=run.last).map(|index| (index, run.term)))
            .collect();
        self.vote == found.vote
            && self.purged == found.purged
            && self.terms == terms
            && self.last() == found.last
    }
}

/// Expectations of one folder over many lives of its process.
#[derive(Debug, Default)]
pub struct Model {
    exists: bool,
    log: Log,
    /// Begun and not acknowledged, with the committed mark at that time.
    under_way: VecDeque<(Op, Option<Place>)>,
    /// Every vote ever acknowledged.
    votes: BTreeMap<u64, u64>,
    committed: Option<Place>,
    /// The committed mark that must be there at least.
    committed_at_least: Option<Place>,
    marks: BTreeSet<Place>,
    snapshot_at_least: Option<Place>,
    snapshots: BTreeSet<Place>,
    acknowledged: u64,
}

impl Model {
    /// Operations acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Takes what a process told.
    ///
    /// # Errors
    /// What was promised and is not so.
    pub fn take(&mut self, message: &Message) -> Result<(), String> {
        match message {
            Message::Found(found) => self.found(found),
            Message::Begin(op) => {
                if let Op::Snapshot(place) = op {
                    self.snapshots.insert(*place);
                }
                self.under_way.push_back((*op, self.committed));
                Ok(())
            }
            Message::Done => self.done(),
            Message::Committed(place) => {
                self.committed = self.committed.max(Some(*place));
                self.marks.insert(*place);
                Ok(())
            }
            Message::Failed(_) => Ok(()),
        }
    }

    fn done(&mut self) -> Result<(), String> {
        let (op, committed) = self
            .under_way
            .pop_front()
            .ok_or("an acknowledgement of nothing")?;
        self.acknowledged += 1;
        self.log.apply(&op);
        match op {
            Op::Snapshot(place) => {
                self.snapshot_at_least = self.snapshot_at_least.max(Some(place));
            }
            Op::Vote(Ballot { term, candidate }) => {
                let first = *self.votes.entry(term).or_insert(candidate);
                if first != candidate {
                    return Err(format!(
                        "voted twice in term {term}: for {first}, then for {candidate}"
                    ));
                }
                self.committed_at_least = self.committed_at_least.max(committed);
            }
            _ => self.committed_at_least = self.committed_at_least.max(committed),
        }
        Ok(())
    }

    fn found(&mut self, found: &Found) -> Result<(), String> {
        if found.created && self.exists {
            return Err("the folder holds no replica any more".into());
        }
        self.exists = true;
        self.log = self.possible(found)?;
        self.under_way.clear();

        let at_least = self.committed_at_least.min(found.last);
        let known = found
            .committed
            .is_none_or(|mark| self.marks.contains(&mark) || Some(mark) == found.last);
        if found.committed < at_least || !known {
            return Err(format!(
                "committed mark {:?} found, {at_least:?} was durable",
                found.committed
            ));
        }
        self.committed = found.committed;
        self.committed_at_least = found.committed;

        let known = found
            .snapshot
            .is_none_or(|snapshot| self.snapshots.contains(&snapshot));
        if found.snapshot < self.snapshot_at_least || !known {
            return Err(format!(
                "snapshot {:?} found, {:?} was acknowledged",
                found.snapshot, self.snapshot_at_least
            ));
        }
        self.snapshot_at_least = found.snapshot;
        Ok(())
    }

    /// The state after some beginning of what was under way that is what was found.
    fn possible(&self, found: &Found) -> Result<Log, String> {
        let mut log = self.log.clone();
        if log.holds(found) {
            return Ok(log);
        }
        for (op, _) in &self.under_way {
            if let Op::Append(run) = op {
                for index in run.first..=run.last {
                    log.terms.insert(index, run.term);
                    if log.holds(found) {
                        return Ok(log);
                    }
                }
            }
            if let Op::Truncate(keep) = op {
                // Records go one by one, from the end.
                let keep = keep.map(|keep| keep.index);
                while log.terms.last_key_value().map(|(index, _)| *index) > keep {
                    log.terms.pop_last();
                    if log.holds(found) {
                        return Ok(log);
                    }
                }
            }
            log.apply(op);
            if log.holds(found) {
                return Ok(log);
            }
        }
        Err(format!(
            "found vote {:?}, purged {:?}, last {:?}, entries {:?}; acknowledged were vote {:?}, purged {:?}, last {:?}, \
             first {:?}, and under way {:?}",
            found.vote,
            found.purged,
            found.last,
            found.entries,
            self.log.vote,
            self.log.purged,
            self.log.last(),
            self.log.terms.first_key_value(),
            self.under_way
        ))
    }
}

#[cfg(test)]
mod tests;
