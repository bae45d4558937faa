//! Looks at what replicas have applied: each goes on without holes, none goes back, all apply the same.

use std::{sync::atomic::Ordering, time::Duration};

use clustermesh_raft::Replica;

use crate::{
    member::{Member, Running},
    runtime::{SimRuntime, elapsed},
    world::World,
};

/// A replica says within this that its disk has failed.
const MAX_FAILURE_DELAY: Duration = Duration::from_secs(1);
/// After its disk has failed, a replica acknowledges nothing that it was asked later than this.
pub const MAX_LAST_WORDS: Duration = Duration::from_millis(100);

impl World {
    /// Looks at what every replica has applied since the last look.
    pub fn spy(&self) {
        for member in &self.members {
            let data = member.data();
            let mut running = member.running.lock();
            let Some(running) = running.as_mut() else {
                continue;
            };
            running.look_at_disk(&data);
            if let Some(at) = running.disk_failed {
                self.disk_failures.lock().entry(running.life).or_insert(at);
            }
            let Some(replica) = running.replica.clone() else {
                continue;
            };
            self.check_history(member.index, running, &replica);
            self.check_status(member, running, &replica);
            if let Some(access) = &self.access {
                let index = member.index;
                if let Err(fault) = replica.read(|state| access.note(state)) {
                    self.history.fault(format!("replica {index}: {fault}"));
                }
            }
            if let Some(copies) = &self.copies {
                let index = member.index;
                if let Err(fault) = replica.read(|state| copies.check(running.life, state)) {
                    self.history.fault(format!("replica {index}: {fault}"));
                }
            }
        }
    }

    fn check_history(&self, index: usize, running: &mut Running, replica: &Replica<SimRuntime>) {
        let (revision, compact_revision, history) = replica.read(|state| {
            let after = running.spied.max(state.compact_revision() - 1);
            (
                state.revision(),
                state.compact_revision(),
                state.history(after, usize::MAX),
            )
        });
        let fault = |fault: String| self.history.fault(format!("replica {index} {fault}"));
        if compact_revision > self.compaction.load(Ordering::Relaxed).max(1) {
            fault(format!(
                "is compacted at {compact_revision}, which nobody asked for"
            ));
        }
        if revision < running.spied {
            fault(format!(
                "went back from revision {} to {revision}",
                running.spied
            ));
        }
        let Ok(groups) = history else {
            fault("has no history".to_owned());
            return;
        };
        let mut next = running.spied.max(compact_revision - 1) + 1;
        for group in &groups {
            if group.revision != next {
                fault(format!("has no revision {next}, but {}", group.revision));
            }
            next = group.revision + 1;
        }
        if next != revision + 1 {
            fault(format!(
                "is at revision {revision}, its history ends before {next}"
            ));
        }
        self.history.note_applied(index, &groups, compact_revision);
        running.spied = revision;
    }

    fn check_status(&self, member: &Member, running: &mut Running, replica: &Replica<SimRuntime>) {
        let index = member.index;
        let failure = replica.status().failure;
        if failure.is_some() && member.data().faults().is_faulty() {
            // A snapshot that cannot be written ends a replica as well as a log that cannot.
            running.disk_failed.get_or_insert_with(elapsed);
        }
        match (failure, running.disk_failed) {
            (Some(failure), _) if failure.contains("was removed") => {
                self.check_asked_to_remove(index, replica.id());
                running.removed = true;
            }
            (Some(failure), None) => {
                self.history
                    .fault(format!("replica {index} has stopped: {failure}"));
            }
            (None, Some(at))
                if elapsed() > at + MAX_FAILURE_DELAY && !self.is_paused(running.life) =>
            {
                self.history.fault(format!(
                    "replica {index} goes on although its disk failed at {at:?}"
                ));
            }
            _ => {}
        }
    }
}
