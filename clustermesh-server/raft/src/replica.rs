//! The handle of a running replica.

mod bootstrap;
mod hash_kv;
mod recover;
mod start;

pub use recover::REVISION_BUMP;
pub(crate) use recover::{close, recover_state, write_empty_log, write_snapshot};

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use clustermesh_core::{State, pb};
use clustermesh_store::{MemoryLog, Node, ReplicaId, SledLog};
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Instant, WatchReceiver},
};
use parking_lot::Mutex;

use crate::{
    Types,
    answer::{Answer, Committed},
    config::{CLOSE_TIMEOUT_MS, ROUTE_RETRY_PAUSE},
    error::{ProposeError, ReadError, StartError},
    forward::Router,
    group::AuthChanges,
    handler::Bound,
    membership::{Handover, MemberError},
    metrics::Metrics,
    peer::{AsideError, CallError, target},
    proposal::Proposer,
    reads::Readers,
    shared::Shared,
    state_machine::StateMachine,
    task::Stopper,
    watch::{Hub, WatchSpec, Watcher},
    wire::{
        self, MemberUpdate, call_request::Call, call_response::Answer as PeerAnswer,
        member_change::Change,
    },
};

/// A lease as the leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseTime {
    /// TTL as granted, seconds.
    pub granted_ttl_s: i64,
    /// Time that is left.
    pub remaining: Duration,
    /// Attached keys, sorted.
    pub keys: Vec<Bytes>,
}

/// A replica of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: ReplicaId,
    /// How it is reached.
    pub node: Node,
    /// Whether it votes.
    pub voter: bool,
}

/// How a replica is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// This replica.
    pub replica_id: ReplicaId,
    /// Id of the group.
    pub cluster_id: u64,
    /// Current term.
    pub term: u64,
    /// The leader, when one is known.
    pub leader: Option<ReplicaId>,
    /// Whether this replica believes to lead.
    pub is_leader: bool,
    /// Last index in the log.
    pub last_log_index: u64,
    /// Last applied index.
    pub applied_index: u64,
    /// Main revision.
    pub revision: i64,
    /// Compact revision.
    pub compact_revision: i64,
    /// Live and historic data in memory, bytes: the same on every replica.
    pub state_bytes: u64,
    /// Limit for `state_bytes` while this replica leads; 0 for none.
    pub quota_bytes: u64,
    /// The log's files, bytes.
    pub log_bytes: u64,
    /// The newest snapshot's last index.
    pub snapshot_index: u64,
    /// On the leader: how long ago a quorum answered it.
    pub last_quorum_ack: Option<Duration>,
    /// Elsewhere: how long ago the leader was heard.
    pub last_leader_contact: Option<Duration>,
    /// Whether this replica does not vote.
    pub is_learner: bool,
    /// Why the replica has stopped by itself, if it has.
    pub failure: Option<String>,
    /// All replicas.
    pub members: Vec<Member>,
}

enum LogHandle<R: AsyncRuntime> {
    Sled(SledLog<R, Answer>),
    Memory(MemoryLog),
}

pub(crate) struct Inner<R: AsyncRuntime> {
    replica_id: ReplicaId,
    quota_bytes: u64,
    pub(crate) raft: Raft<Types<R>, StateMachine<R>>,
    shared: Arc<Shared<R>>,
    hub: Arc<Hub>,
    bound: Arc<Bound<R>>,
    router: Arc<Router<R>>,
    timeout: Duration,
    proposer: Proposer<R>,
    readers: Readers<R>,
    stopper: Stopper<R>,
    /// Gone once the replica was shut down.
    log: Mutex<Option<LogHandle<R>>>,
}

impl<R: AsyncRuntime> Drop for Inner<R> {
    fn drop(&mut self) {
        self.stopper.stop();
    }
}

/// A running replica. Clones are handles of the same one; it ends with [`Replica::shutdown`].
pub struct Replica<R: AsyncRuntime> {
    pub(crate) inner: Arc<Inner<R>>,
}

impl<R: AsyncRuntime> Clone for Replica<R> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<R: AsyncRuntime> Replica<R> {
    /// Id of this replica.
    #[must_use]
    pub fn id(&self) -> ReplicaId {
        self.inner.replica_id
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<R>> {
        &self.inner.shared
    }

    /// Whether users' permissions are checked, as applied here. Waits for nothing.
    #[must_use]
    pub fn is_auth_enabled(&self) -> bool {
        self.inner.shared.group.is_auth_enabled()
    }

    /// Grows with every change of users, roles or of whether permissions are checked. Waits for nothing.
    #[must_use]
    pub fn auth_version(&self) -> u64 {
        self.inner.shared.group.auth_version()
    }

    /// Changes whenever users, roles or whether permissions are checked change, before any later event reaches a watcher.
    #[must_use]
    pub fn auth_changes(&self) -> AuthChanges<R> {
        self.inner.shared.group.auth_changes()
    }

    pub(crate) fn raft(&self) -> &Raft<Types<R>, StateMachine<R>> {
        &self.inner.raft
    }

    /// Proposes a change, wherever the leader is, and waits until it is applied here. The id 0 of a lease grant is replaced by a random one.
    ///
    /// # Errors
    /// [`ProposeError`]; only [`ProposeError::Unknown`], [`ProposeError::Timeout`] and [`ProposeError::Stopped`] leave open whether it was committed.
    pub async fn propose(&self, proposal: pb::Proposal) -> Result<Committed, ProposeError> {
        self.check_may_propose()?;
        self.inner.proposer.propose(proposal).await
    }

    /// Proposes a change if this replica leads, for tasks that only a leader does.
    ///
    /// # Errors
    /// As [`Replica::propose`]; [`ProposeError::NotLeader`] at once where another replica leads.
    pub async fn propose_as_leader(
        &self,
        proposal: pb::Proposal,
    ) -> Result<Committed, ProposeError> {
        self.check_may_propose()?;
        self.inner.proposer.propose_as_leader(proposal).await
    }

    /// What a proposal comes to is told from the state here.
    fn check_may_propose(&self) -> Result<(), ProposeError> {
        self.check_not_diverged()
            .map_err(|_| ProposeError::Diverged)
    }

    /// The term in which this replica leads. What other leaders decided before is all applied once [`Replica::linearize`] returns.
    #[must_use]
    pub fn leading_term(&self) -> Option<u64> {
        self.inner.router.entries.leading_term()
    }

    /// Returns once this replica has applied everything that was committed when it was called. Waiting callers share rounds.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn linearize(&self) -> Result<(), ReadError> {
        self.check_not_diverged()?;
        self.inner.readers.linearize().await
    }

    /// Whether what is applied here may be served.
    ///
    /// # Errors
    /// [`ReadError::Diverged`]: the group found other data here than elsewhere.
    pub fn check_not_diverged(&self) -> Result<(), ReadError> {
        if self.inner.shared.diverged.load(Ordering::Acquire) {
            return Err(ReadError::Diverged);
        }
        Ok(())
    }

    /// Reads the state as applied here. Keep it short: apply waits meanwhile.
    pub fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.inner.shared.applied.read().state)
    }

    /// Starts a watch. List at revision R and watch from R + 1 for a gapless view.
    #[must_use]
    pub fn watch(&self, spec: WatchSpec) -> Watcher<R> {
        Watcher::new(self.inner.shared.clone(), self.inner.hub.clone(), spec)
    }

    /// Gives a lease its full TTL again, once leadership is confirmed; `None` when there is no such lease, or it is expiring.
    ///
    /// # Errors
    /// [`ReadError`]: the leader keeps leases alive, and cannot be reached.
    pub async fn keep_alive(&self, id: i64) -> Result<Option<Duration>, ReadError> {
        self.lease_time(id, true).await
    }

    /// A lease and the time that it has left; `None` when there is no such lease. The leader knows it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn time_to_live(&self, id: i64) -> Result<Option<LeaseTime>, ReadError> {
        self.linearize().await?;
        let Some(view) = self.read(|state| state.lease(id)) else {
            return Ok(None);
        };
        let remaining = self.lease_time(id, false).await?.unwrap_or(Duration::ZERO);
        Ok(Some(LeaseTime {
            granted_ttl_s: view.granted_ttl_s,
            remaining,
            keys: view.keys,
        }))
    }

    async fn lease_time(&self, id: i64, keep_alive: bool) -> Result<Option<Duration>, ReadError> {
        let inner = &self.inner;
        let deadline = R::Instant::now() + inner.timeout;
        let question = Call::LeaseTime(wire::LeaseTime { id, keep_alive });
        loop {
            match inner
                .router
                .ask_leader(&question, deadline, inner.timeout)
                .await?
            {
                Some(PeerAnswer::LeaseTime(answer)) => {
                    let left = u64::try_from(answer.remaining_ms).unwrap_or(0);
                    return Ok(answer.found.then_some(Duration::from_millis(left)));
                }
                Some(_) => return Err(ReadError::NotLeader { leader: None }),
                None => {}
            }
            self.linearize().await?;
            // Leadership may have gone meanwhile.
            if inner.shared.leases.is_leader() {
                return Ok(if keep_alive {
                    inner.shared.leases.renew(id)
                } else {
                    inner.shared.leases.remaining(id)
                });
            }
            if R::Instant::now() >= deadline {
                return Err(ReadError::NotLeader { leader: None });
            }
            let own = Some(inner.replica_id);
            if !inner.router.other_leader(own, ROUTE_RETRY_PAUSE).await {
                return Err(ReadError::Stopped);
            }
        }
    }

    /// Adds a replica at `node.peer_url` as learner and returns its id; with `join_as_voter` it votes once it has caught up, and with `replaces` that
    /// replica goes then.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn add_member(&self, node: Node) -> Result<ReplicaId, MemberError> {
        let add = Change::Add(clustermesh_store::wire::node_to_pb(&node));
        self.inner.bound.members.change(add).await
    }

    /// Makes a voter of a learner that has caught up.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn promote_member(&self, id: ReplicaId) -> Result<(), MemberError> {
        let members = &self.inner.bound.members;
        members.change(Change::Promote(id)).await.map(drop)
    }

    /// Removes a replica for good: its id is never used again.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn remove_member(&self, id: ReplicaId) -> Result<(), MemberError> {
        let members = &self.inner.bound.members;
        members.change(Change::Remove(id)).await.map(drop)
    }

    /// Changes how a replica is described.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn update_member(&self, id: ReplicaId, node: Node) -> Result<(), MemberError> {
        let update = Change::Update(MemberUpdate {
            id,
            node: Some(clustermesh_store::wire::node_to_pb(&node)),
        });
        self.inner.bound.members.change(update).await.map(drop)
    }

    /// Moves leadership to a voter.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), MemberError> {
        let members = &self.inner.bound.members;
        members.change(Change::TransferLeader(to)).await.map(drop)
    }

    /// Before a planned stop: if this replica leads, another voter that has the whole log takes over.
    pub async fn resign(&self) {
        if let Handover::Nobody { others: 1.. } = self.inner.bound.members.hand_over().await {
            tracing::info!(
                "leadership is handed over to nobody, since no other voter answers: the group has no leader until a majority runs"
            );
        }
    }

    /// Tells the process of another replica something that is not for the log; see [`PeerHandler::on_aside`](crate::PeerHandler::on_aside).
    ///
    /// # Errors
    /// [`AsideError`].
    pub async fn tell(
        &self,
        to: ReplicaId,
        message: Bytes,
        timeout: Duration,
    ) -> Result<(), AsideError> {
        let inner = &self.inner;
        let (nodes, _) = inner.bound.members.nodes();
        let node = nodes.get(&to).ok_or(AsideError::Unknown)?;
        let call = Call::Aside(wire::Aside { message });
        let target = target(to, node);
        match inner.bound.links.call(&target, call, timeout).await {
            Ok(PeerAnswer::Done(_)) => Ok(()),
            Ok(_) => Err(AsideError::Failed("an answer of another kind".into())),
            Err(CallError::Refused(refusal)) => Err(AsideError::Refused(refusal.message)),
            Err(error) => Err(AsideError::Failed(error.to_string())),
        }
    }

    /// Counters, for the process to export.
    #[must_use]
    pub fn metrics(&self) -> Arc<Metrics> {
        self.inner.shared.metrics.clone()
    }

    /// How this replica is, as it knows now.
    #[must_use]
    pub fn status(&self) -> Status {
        let log_bytes = match &*self.inner.log.lock() {
            Some(LogHandle::Sled(log)) => log.stats().bytes,
            Some(LogHandle::Memory(log)) => log.stats().bytes,
            None => 0,
        };
        let receiver = self.inner.raft.metrics();
        let metrics = receiver.borrow_watched().clone();
        let applied = self.inner.shared.applied.read();
        // openraft tells of a change a moment after it is applied; before a start has found its leader it knows of more.
        let told = &metrics.membership_config;
        let membership = if applied.membership.log_id() > told.log_id() {
            &applied.membership
        } else {
            told
        };
        let voters: Vec<ReplicaId> = membership.voter_ids().collect();
        let is_leader = metrics.state.is_leader();
        // A group of one needs no other's answer, and openraft does not stamp its own.
        let alone = is_leader && voters == [self.inner.replica_id];
        let stamped = metrics
            .last_quorum_acked
            .map(|at| at.into_inner().elapsed());
        let last_quorum_ack = if alone { Some(Duration::ZERO) } else { stamped };
        let last_leader_contact = metrics
            .current_leader
            .filter(|_| !is_leader)
            .and_then(|leader| self.inner.shared.contact.age(leader));
        let failure = if self.inner.bound.links.is_removed() {
            let id = self.inner.replica_id;
            Some(StartError::Removed { id }.to_string())
        } else if let Err(error) = self.check_not_diverged() {
            Some(error.to_string())
        } else {
            let state = metrics.running_state.as_ref();
            state.err().map(ToString::to_string)
        };
        Status {
            replica_id: self.inner.replica_id,
            cluster_id: applied.state.cluster_id(),
            term: metrics.current_term,
            leader: metrics.current_leader,
            is_leader,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            applied_index: applied.last.map_or(0, |last| last.index),
            revision: applied.state.revision(),
            compact_revision: applied.state.compact_revision(),
            state_bytes: applied.state.approximate_bytes(),
            quota_bytes: self.inner.quota_bytes,
            log_bytes,
            snapshot_index: metrics.snapshot.map_or(0, |snapshot| snapshot.index),
            last_quorum_ack,
            last_leader_contact,
            is_learner: !voters.contains(&self.inner.replica_id),
            failure,
            members: membership
                .nodes()
                .map(|(id, node)| Member {
                    id: *id,
                    node: node.clone(),
                    voter: voters.contains(id),
                })
                .collect(),
        }
    }

    /// Resolves when the replica has stopped by itself or was shut down.
    pub async fn stopped(&self) {
        // Of all that Raft says of itself only this is little; what ends it, ends it too.
        let mut metrics = self.inner.raft.server_metrics();
        while !self.inner.router.has_ended() && metrics.changed().await.is_ok() {}
    }

    /// Takes a snapshot now, whatever the size of the log.
    ///
    /// # Errors
    /// [`ReadError::Stopped`].
    pub async fn snapshot(&self) -> Result<(), ReadError> {
        self.inner
            .raft
            .trigger()
            .snapshot()
            .await
            .map_err(|_| ReadError::Stopped)
    }

    /// Stops the replica: ends watchers, answers what waits, closes the log. Done when the data may be opened again.
    pub async fn shutdown(&self) {
        self.inner.hub.close();
        self.inner.bound.ending.store(true, Ordering::Release);
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::error!(%error, "raft did not stop in order");
        }
        self.inner.stopper.stop();
        let Some(log) = self.inner.log.lock().take() else {
            return;
        };
        if let LogHandle::Sled(log) = log {
            let closed = log.closed();
            drop(log);
            let mut waited_ms = 0;
            while !closed.is_closed() && waited_ms < CLOSE_TIMEOUT_MS {
                R::sleep(Duration::from_millis(1)).await;
                waited_ms += 1;
            }
            if !closed.is_closed() {
                tracing::warn!("the log is still in use by a task that has not ended");
            }
        }
        self.inner.bound.identity.close();
    }
}

#[cfg(test)]
mod tests;
