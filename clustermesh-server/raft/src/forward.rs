//! Finds the leader for what a replica cannot do alone: proposals go there, and are answered when they are applied here.

use std::{sync::Arc, time::Duration};

use clustermesh_store::{Node, ReplicaId};
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Instant, Mpsc, Select2, Watch, WatchReceiver},
    metrics::RaftServerMetrics,
};

use crate::{
    Types,
    config::{LEADER_CHANGE_GRACE, MAX_FORWARDS_IN_FLIGHT, ROUTE_RETRY_PAUSE},
    entries::Entries,
    error::{ProposeError, ReadError},
    metrics::add,
    peer::{CallError, Links, target},
    pending::Pending,
    proposal::{Stays, Waiting},
    shared::Progress,
    state_machine::StateMachine,
    task::Stop,
    wire::{Forward, ForwardedProposal, call_request::Call, call_response::Answer},
};

/// Knows the leader.
pub(crate) struct Router<R: AsyncRuntime> {
    pub(crate) own: ReplicaId,
    pub(crate) raft: Raft<Types<R>, StateMachine<R>>,
    pub(crate) links: Arc<Links<R>>,
    pub(crate) entries: Entries<R>,
    pub(crate) pending: Arc<Pending<R>>,
    pub(crate) progress: <R::Watch as Watch>::Receiver<Progress>,
}

/// One that this replica has heard of and cannot address does not count: it has not heard of the group's members yet.
fn leader_with_node<R: AsyncRuntime>(
    metrics: &RaftServerMetrics<Types<R>>,
) -> Option<(ReplicaId, &Node)> {
    let leader = metrics.current_leader?;
    let node = metrics.membership_config.membership().get_node(&leader)?;
    Some((leader, node))
}

impl<R: AsyncRuntime> Router<R> {
    /// The leader, if this replica knows it and where it is.
    pub(crate) fn leader(&self) -> Option<(ReplicaId, Node)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        leader_with_node(&metrics).map(|(leader, node)| (leader, node.clone()))
    }

    /// Raft has ended here, as after a failure of the disk: this replica promises nothing any more, not even what another one would keep.
    pub(crate) fn has_ended(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.running_state.is_err()
    }

    pub(crate) fn leads(&self) -> bool {
        self.raft
            .server_metrics()
            .borrow_watched()
            .state
            .is_leader()
    }

    /// Waits until another replica leads than `leader`, a little while at most: either way the caller looks again. False once Raft has ended
    /// here, as after a failure of the disk: then there is nothing to wait for, and looking again would be a busy loop.
    #[must_use]
    pub(crate) async fn other_leader(&self, leader: Option<ReplicaId>, most: Duration) -> bool {
        let mut metrics = self.raft.server_metrics();
        let changed = async move {
            loop {
                let known = leader_with_node(&metrics.borrow_and_update()).map(|(id, _)| id);
                if known != leader {
                    return true;
                }
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
        };
        R::timeout(most, changed).await.unwrap_or(true)
    }

    /// Proposes where the leader is; again only when surely nothing was proposed.
    pub(crate) async fn route(&self, mut batch: Vec<Waiting<R>>, stop: &Stop<R>) {
        let Some(deadline) = batch.first().map(|waiting| waiting.deadline) else {
            return;
        };
        let (done, _unheard) = R::Mpsc::channel::<()>(MAX_FORWARDS_IN_FLIGHT);
        loop {
            if self.has_ended() {
                for waiting in batch {
                    waiting.tell(Err(ProposeError::Stopped));
                }
                return;
            }
            let leader = self.leader();
            if leader.as_ref().is_none_or(|(id, _)| *id != self.own) {
                batch = refuse_staying(batch, &leader);
                if batch.is_empty() {
                    return;
                }
            }
            let refused = match &leader {
                Some((id, _)) if *id == self.own => {
                    self.entries.submit(batch).await.settle(&done).await
                }
                Some((id, node)) => self.forward(*id, node, batch, deadline, stop).await,
                None => Some(batch),
            };
            let Some(left) = refused else {
                return;
            };
            batch = left;
            if R::Instant::now() >= deadline {
                for waiting in batch {
                    waiting.tell(Err(ProposeError::NotLeader {
                        leader: leader.clone(),
                    }));
                }
                return;
            }
            let pause = self.other_leader(leader.map(|(id, _)| id), ROUTE_RETRY_PAUSE);
            if stop.or(pause).await != Some(true) {
                for waiting in batch {
                    waiting.tell(Err(ProposeError::Stopped));
                }
                return;
            }
        }
    }

    /// Sends a batch to the leader; hands it back when nothing was proposed.
    async fn forward(
        &self,
        leader: ReplicaId,
        node: &Node,
        batch: Vec<Waiting<R>>,
        deadline: R::Instant,
        stop: &Stop<R>,
    ) -> Option<Vec<Waiting<R>>> {
        add(&self.entries.metrics.forwards_total, 1);
        let proposals: Vec<ForwardedProposal> = batch
            .into_iter()
            .map(|waiting| {
                let proposal = Some(waiting.proposal.clone());
                ForwardedProposal {
                    request_id: self.pending.add(waiting),
                    proposal,
                }
            })
            .collect();
        let ids: Vec<u64> = proposals
            .iter()
            .map(|proposal| proposal.request_id)
            .collect();
        let left = deadline.saturating_duration_since(R::Instant::now());
        let target = target(leader, node);
        let call = self
            .links
            .call(&target, Call::Forward(Forward { proposals }), left);
        let deposed = async {
            let _other_or_ended = self.other_leader(Some(leader), left).await;
            // The answer may be on its way.
            R::sleep(LEADER_CHANGE_GRACE).await;
        };
        let answered = match stop.or(R::select2(call, deposed)).await {
            Some(Select2::First(answered)) => answered,
            Some(Select2::Second(())) => Err(CallError::Timeout(left)),
            None => {
                self.pending.tell_rest(&ids, &Err(ProposeError::Unknown));
                return None;
            }
        };
        match answered {
            Ok(Answer::Forward(answer)) => {
                #[cfg(feature = "mutants")]
                for id in &ids {
                    if let Some(committed) = crate::mutants::outcome(self.own, *id) {
                        self.pending.tell_rest(&[*id], &Ok(committed));
                    }
                }
                let mut progress = self.progress.clone();
                let applied = progress.wait_until(|progress| progress.next_index > answer.index);
                let wait = R::timeout_at(deadline, applied);
                let _stopped_or_late = stop.or(wait).await;
                // Committed, but this replica took it over in a snapshot, or is too far behind.
                self.unknown(&ids, ProposeError::Timeout);
                None
            }
            Err(error) if error.nothing_happened() => {
                tracing::debug!(leader, %error, "nothing was proposed, another leader is looked for");
                Some(self.pending.rest(&ids))
            }
            Ok(_) | Err(_) => {
                self.unknown(&ids, ProposeError::Unknown);
                None
            }
        }
    }

    fn unknown(&self, ids: &[u64], error: ProposeError) {
        let unknown = self.pending.tell_rest(ids, &Err(error));
        add(&self.entries.metrics.proposals_unknown_total, unknown);
    }

    /// Asks the leader something that may be asked twice; `None` when this replica leads.
    pub(crate) async fn ask_leader(
        &self,
        call: &Call,
        deadline: R::Instant,
        patience: Duration,
    ) -> Result<Option<Answer>, ReadError> {
        loop {
            if self.has_ended() {
                return Err(ReadError::Stopped);
            }
            let leader = self.leader();
            match &leader {
                Some((id, _)) if *id == self.own => return Ok(None),
                Some((id, node)) => {
                    match self
                        .links
                        .call(&target(*id, node), call.clone(), patience)
                        .await
                    {
                        Ok(answer) => return Ok(Some(answer)),
                        Err(error) => {
                            tracing::debug!(leader = id, %error, "the leader does not answer");
                        }
                    }
                }
                None => {}
            }
            if R::Instant::now() >= deadline {
                return Err(ReadError::NotLeader { leader });
            }
            let leader = leader.map(|(id, _)| id);
            if !self.other_leader(leader, ROUTE_RETRY_PAUSE).await {
                return Err(ReadError::Stopped);
            }
        }
    }
}

/// What is for a leader only goes no further. So does what another replica forwarded: that one looks for the leader itself.
fn refuse_staying<R: AsyncRuntime>(
    batch: Vec<Waiting<R>>,
    leader: &Option<(ReplicaId, Node)>,
) -> Vec<Waiting<R>> {
    let mut rest = Vec::with_capacity(batch.len());
    for waiting in batch {
        if waiting.stays != Stays::Anywhere {
            waiting.tell(Err(ProposeError::NotLeader {
                leader: leader.clone(),
            }));
        } else {
            rest.push(waiting);
        }
    }
    rest
}
