//! Deadlines of leases on the leader, by its monotonic clock.
//!
//! The replicated state knows granted TTLs only. A leader gives every lease its full TTL anew when it begins to lead, so a change of leader
//! never shortens a lease.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use clustermesh_core::{Outcome, ProposalResult, State, pb, pb::proposal::Command};
use openraft::async_runtime::{AsyncRuntime, Instant, Watch, WatchSender};
use parking_lot::Mutex;

use crate::config::{LEASE_RETRY_MS, MAX_EXPIRED_LEASES_PER_ENTRY};

struct Lease<I> {
    ttl: Duration,
    /// When it expires; `None` while its expiry is being proposed.
    deadline: Option<I>,
}

struct Table<I> {
    /// The term in which this replica leads.
    term: Option<u64>,
    leases: HashMap<i64, Lease<I>>,
    deadlines: BTreeSet<(I, i64)>,
}

impl<I: Instant> Table<I> {
    fn set(&mut self, id: i64, ttl_s: i64, now: I) {
        self.remove(id);
        let ttl = Duration::from_secs(u64::try_from(ttl_s).unwrap_or(0));
        let deadline = now + ttl;
        self.leases.insert(
            id,
            Lease {
                ttl,
                deadline: Some(deadline),
            },
        );
        self.deadlines.insert((deadline, id));
    }

    fn remove(&mut self, id: i64) {
        if let Some(Lease {
            deadline: Some(deadline),
            ..
        }) = self.leases.remove(&id)
        {
            self.deadlines.remove(&(deadline, id));
        }
    }

    fn fill(&mut self, state: &State, now: I) {
        self.leases.clear();
        self.deadlines.clear();
        for (id, ttl_s) in state.leases() {
            self.set(id, ttl_s, now);
        }
    }
}

/// Deadlines of all leases while this replica leads.
pub(crate) struct LeaseKeeper<R: AsyncRuntime> {
    table: Mutex<Table<R::Instant>>,
    /// Raised when the next deadline may be earlier.
    changed: Mutex<<R::Watch as Watch>::Sender<u64>>,
}

impl<R: AsyncRuntime> LeaseKeeper<R> {
    pub(crate) fn new() -> Self {
        let table = Table {
            term: None,
            leases: HashMap::new(),
            deadlines: BTreeSet::new(),
        };
        Self {
            table: Mutex::new(table),
            changed: Mutex::new(R::Watch::channel(0).0),
        }
    }

    /// Hears when the next deadline may be earlier.
    pub(crate) fn changes(&self) -> <R::Watch as Watch>::Receiver<u64> {
        self.changed.lock().subscribe()
    }

    fn notify(&self) {
        self.changed.lock().send_if_modified(|changes| {
            *changes = changes.wrapping_add(1);
            true
        });
    }

    /// This replica leads in `term` from now on, or does not lead (`None`). The caller holds the state's lock.
    pub(crate) fn lead(&self, term: Option<u64>, state: &State) {
        {
            let mut table = self.table.lock();
            if table.term == term {
                return;
            }
            table.term = term;
            if term.is_some() {
                table.fill(state, R::Instant::now());
            } else {
                table.leases.clear();
                table.deadlines.clear();
            }
        }
        self.notify();
    }

    /// Whether this replica leads, as far as it knows.
    pub(crate) fn is_leader(&self) -> bool {
        self.table.lock().term.is_some()
    }

    /// The state was replaced by a snapshot's.
    pub(crate) fn replace(&self, state: &State) {
        let mut table = self.table.lock();
        if table.term.is_some() {
            table.fill(state, R::Instant::now());
        }
    }

    /// Follows an entry that is being applied.
    pub(crate) fn observe(&self, batch: &pb::Batch, outcomes: &[ProposalResult]) {
        let mut granted = false;
        for (proposal, outcome) in batch.proposals.iter().zip(outcomes) {
            match (&proposal.command, &outcome.result) {
                (_, Ok(Outcome::LeaseGrant(response))) => {
                    let mut table = self.table.lock();
                    if table.term.is_some() {
                        table.set(response.id, response.ttl, R::Instant::now());
                        granted = true;
                    }
                }
                (Some(Command::LeaseRevoke(request)), Ok(_)) => {
                    self.table.lock().remove(request.id)
                }
                (_, Ok(Outcome::LeaseExpire { expired })) => {
                    let mut table = self.table.lock();
                    expired.iter().for_each(|id| table.remove(*id));
                }
                _ => {}
            }
        }
        if granted {
            self.notify();
        }
    }

    /// Gives a lease its full TTL again and returns it; `None` when there is no such lease, or it is expiring.
    pub(crate) fn renew(&self, id: i64) -> Option<Duration> {
        let now = R::Instant::now();
        let mut table = self.table.lock();
        let lease = table.leases.get_mut(&id)?;
        let old = lease.deadline?;
        if old <= now {
            return None;
        }
        let (ttl, deadline) = (lease.ttl, now + lease.ttl);
        lease.deadline = Some(deadline);
        table.deadlines.remove(&(old, id));
        table.deadlines.insert((deadline, id));
        Some(ttl)
    }

    /// Time until a lease expires; zero while its expiry is under way; `None` for no such lease.
    pub(crate) fn remaining(&self, id: i64) -> Option<Duration> {
        let table = self.table.lock();
        let lease = table.leases.get(&id)?;
        let now = R::Instant::now();
        Some(lease.deadline.map_or(Duration::ZERO, |deadline| {
            deadline.saturating_duration_since(now)
        }))
    }

    /// Leases past their deadline, at most one entry's worth, with the term to expire them in.
    pub(crate) fn take_expired(&self) -> Option<(u64, Vec<i64>)> {
        let now = R::Instant::now();
        let mut table = self.table.lock();
        let term = table.term?;
        let mut ids = Vec::new();
        while ids.len() < MAX_EXPIRED_LEASES_PER_ENTRY {
            let Some((deadline, id)) = table
                .deadlines
                .first()
                .copied()
                .filter(|(deadline, _)| *deadline <= now)
            else {
                break;
            };
            table.deadlines.remove(&(deadline, id));
            if let Some(lease) = table.leases.get_mut(&id) {
                lease.deadline = None;
            }
            ids.push(id);
        }
        (!ids.is_empty()).then_some((term, ids))
    }

    /// Leases whose expiry failed are tried again a little later.
    pub(crate) fn retry(&self, term: u64, ids: &[i64]) {
        let deadline = R::Instant::now() + Duration::from_millis(LEASE_RETRY_MS);
        let mut table = self.table.lock();
        if table.term != Some(term) {
            return;
        }
        for id in ids {
            if let Some(lease) = table.leases.get_mut(id)
                && lease.deadline.is_none()
            {
                lease.deadline = Some(deadline);
                table.deadlines.insert((deadline, *id));
            }
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<R::Instant> {
        self.table
            .lock()
            .deadlines
            .first()
            .map(|(deadline, _)| *deadline)
    }
}
