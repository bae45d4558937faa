//! Who belongs to the group: learners join, are promoted, replaced and removed, one change at a time, by the leader.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use clustermesh_core::{pb, pb::proposal::Command};
use clustermesh_store::{Node, ReplicaId, wire};
use openraft::{
    ChangeMembers, Raft,
    async_runtime::{AsyncRuntime, Instant, WatchReceiver},
    errors::{ChangeMembershipError, ClientWriteError, RaftError},
    metrics::RaftMetrics,
    raft::ClientWriteResponse,
};
use rand::Rng;

use crate::{
    Types,
    config::{
        CAUGHT_UP_ENTRIES, MAX_LEARNERS, MAX_MEMBERS, MEMBERS_POLL, READ_INDEX_TIMEOUT,
        ROUTE_RETRY_PAUSE,
    },
    error::refuse,
    forward::Router,
    peer::{CallError, target},
    proposal::Proposer,
    reads::Readers,
    shared::Shared,
    state_machine::StateMachine,
    task::Stop,
    wire::{
        Hello, MemberChange, MemberUpdate, Refusal, call_request::Call, call_response::Answer,
        member_change::Change, refusal::Reason,
    },
};

/// Why the membership was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// No replica has this id.
    #[error("no replica of the group has this id")]
    NotFound,
    /// A replica at this address is a member already.
    #[error("a replica at this address is a member already")]
    Exists,
    /// A learner that lags cannot vote yet.
    #[error("the learner has not caught up with the leader yet")]
    NotReady,
    /// Only learners are promoted.
    #[error("the replica votes already")]
    NotLearner,
    /// The group is as large as it may be.
    #[error("a group has at most {MAX_MEMBERS} members, {MAX_LEARNERS} of them learners")]
    TooMany,
    /// Other replicas could not reach this one.
    #[error(
        "this server runs a group of one without a port for others; give it a [replica] section first"
    )]
    NoPeerPort,
    /// One change at a time.
    #[error("another change of the membership is under way; try again later")]
    InProgress,
    /// Without it nobody would be left to vote, or too few of those that are up.
    #[error("too few of the remaining replicas are up to form a majority")]
    NoQuorum,
    /// Nobody leads; nothing was changed.
    #[error("the group has no leader")]
    NoLeader,
    /// The change may have happened or not.
    #[error("the outcome is unknown; list the members to see it")]
    Unknown,
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
}

impl MemberError {
    /// What another replica is told.
    pub(crate) fn refusal(&self) -> Refusal {
        let reason = match self {
            Self::NotFound => Reason::MemberNotFound,
            Self::Exists => Reason::MemberExists,
            Self::NotReady => Reason::LearnerNotReady,
            Self::NotLearner => Reason::NotLearner,
            Self::TooMany => Reason::TooManyMembers,
            Self::NoPeerPort => Reason::Invalid,
            Self::InProgress => Reason::ChangeInProgress,
            Self::NoQuorum => Reason::LastVoter,
            Self::NoLeader => Reason::NotLeader,
            Self::Unknown => Reason::UnknownOutcome,
            Self::Stopped => Reason::NotReady,
        };
        refuse(reason, self.to_string())
    }

    fn from_refusal(refusal: &Refusal) -> Self {
        match refusal.reason() {
            Reason::MemberNotFound => Self::NotFound,
            Reason::MemberExists => Self::Exists,
            Reason::LearnerNotReady => Self::NotReady,
            Reason::NotLearner => Self::NotLearner,
            Reason::TooManyMembers => Self::TooMany,
            Reason::Invalid => Self::NoPeerPort,
            Reason::ChangeInProgress => Self::InProgress,
            Reason::LastVoter => Self::NoQuorum,
            Reason::NotLeader | Reason::NotReady => Self::NoLeader,
            _ => Self::Unknown,
        }
    }
}

/// What became of a leadership that was to be handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handover {
    /// Another replica leads, or will.
    Done,
    /// No other voter answers, of so many that there are.
    Nobody {
        /// Voters beside this replica.
        others: usize,
    },
    /// The process's log says why.
    Failed,
}

/// The member that is reached there.
fn at<'n>(
    nodes: &'n BTreeMap<ReplicaId, Node>,
    peer_url: &str,
) -> Option<(&'n ReplicaId, &'n Node)> {
    nodes.iter().find(|(_, node)| node.peer_url == peer_url)
}

/// Changes the membership.
pub(crate) struct Members<R: AsyncRuntime> {
    pub(crate) router: Arc<Router<R>>,
    pub(crate) shared: Arc<Shared<R>>,
    pub(crate) readers: Readers<R>,
    pub(crate) proposer: Proposer<R>,
    /// Kinds of entry that this replica knows.
    pub(crate) feature_level: u32,
    pub(crate) timeout: Duration,
    /// A voter that did not answer for this long counts as down.
    pub(crate) silence: Duration,
}

impl<R: AsyncRuntime> Clone for Members<R> {
    fn clone(&self) -> Self {
        Self {
            router: self.router.clone(),
            shared: self.shared.clone(),
            readers: self.readers.clone(),
            proposer: self.proposer.clone(),
            feature_level: self.feature_level,
            timeout: self.timeout,
            silence: self.silence,
        }
    }
}

impl<R: AsyncRuntime> Members<R> {
    fn raft(&self) -> &Raft<Types<R>, StateMachine<R>> {
        &self.router.raft
    }

    pub(crate) fn nodes(&self) -> (BTreeMap<ReplicaId, Node>, BTreeSet<ReplicaId>) {
        let metrics = self.raft().server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        let nodes = membership
            .nodes()
            .map(|(id, node)| (*id, node.clone()))
            .collect();
        (nodes, membership.voter_ids().collect())
    }

    /// Changes it wherever the leader is, and returns once this replica has applied the change; the id of an added replica.
    pub(crate) async fn change(&self, change: Change) -> Result<ReplicaId, MemberError> {
        let deadline = R::Instant::now() + self.timeout;
        let change = MemberChange {
            change: Some(change),
        };
        loop {
            if self.router.has_ended() {
                return Err(MemberError::Stopped);
            }
            let leader = self.router.leader();
            let changed = match &leader {
                Some((id, _)) if *id == self.router.own => self.change_here(change.clone()).await,
                Some((id, node)) => self.change_there(*id, node, change.clone()).await,
                None => Err(MemberError::NoLeader),
            };
            match changed {
                Ok((id, index)) => {
                    let applied = self.readers.wait_applied(index);
                    // A replica that removed itself applies no more.
                    let _applied_or_late = R::timeout_at(deadline, applied).await;
                    return Ok(id);
                }
                // Nothing was changed: it may be asked again.
                Err(MemberError::NoLeader | MemberError::InProgress)
                    if R::Instant::now() < deadline =>
                {
                    let leader = leader.map(|(id, _)| id);
                    if !self.router.other_leader(leader, ROUTE_RETRY_PAUSE).await {
                        return Err(MemberError::Stopped);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn change_there(
        &self,
        leader: ReplicaId,
        node: &Node,
        change: MemberChange,
    ) -> Result<(ReplicaId, u64), MemberError> {
        let call = Call::MemberChange(change);
        match self
            .router
            .links
            .call(&target(leader, node), call, self.timeout)
            .await
        {
            Ok(Answer::MemberChange(answer)) => Ok((answer.id, answer.index)),
            Ok(_) => Err(MemberError::Unknown),
            Err(CallError::Refused(refusal)) => Err(MemberError::from_refusal(&refusal)),
            Err(error) if error.nothing_happened() => Err(MemberError::NoLeader),
            Err(_) => Err(MemberError::Unknown),
        }
    }

    /// Changes it as the leader; the id of an added replica and the index of the change.
    pub(crate) async fn change_here(
        &self,
        change: MemberChange,
    ) -> Result<(ReplicaId, u64), MemberError> {
        if !self.router.leads() {
            return Err(MemberError::NoLeader);
        }
        match change.change {
            Some(Change::Add(node)) => self.add(wire::node_from_pb(&node)).await,
            Some(Change::Promote(id)) => Ok((id, self.promote(id).await?)),
            Some(Change::Remove(id)) => Ok((id, self.remove(id).await?)),
            Some(Change::Update(MemberUpdate { id, node })) => {
                let node = node.as_ref().map(wire::node_from_pb).unwrap_or_default();
                Ok((id, self.update(id, node).await?))
            }
            Some(Change::TransferLeader(id)) => Ok((id, self.transfer(id).await?)),
            None => Err(MemberError::Unknown),
        }
    }

    async fn write(
        &self,
        change: ChangeMembers<ReplicaId, Node>,
        retain: bool,
    ) -> Result<u64, MemberError> {
        let changing = self.raft().change_membership(change, retain);
        match R::timeout(self.timeout, changing).await {
            Ok(changed) => index_of(changed),
            Err(_) => Err(MemberError::Unknown),
        }
    }

    /// Whether a member is one for good: what a leader has only proposed, its successor may undo.
    fn is_applied(&self, id: ReplicaId, node: &Node) -> bool {
        let applied = self.shared.applied.read();
        applied.membership.membership().get_node(&id) == Some(node)
    }

    async fn add(&self, node: Node) -> Result<(ReplicaId, u64), MemberError> {
        let (nodes, voters) = self.nodes();
        if nodes
            .get(&self.router.own)
            .is_none_or(|own| own.peer_url.is_empty())
        {
            return Err(MemberError::NoPeerPort);
        }
        if let Some((id, known)) = at(&nodes, &node.peer_url) {
            return Err(if self.is_applied(*id, known) {
                MemberError::Exists
            } else {
                MemberError::InProgress
            });
        }
        if nodes.len() >= MAX_MEMBERS || nodes.len() - voters.len() >= MAX_LEARNERS {
            return Err(MemberError::TooMany);
        }
        if node.replaces != 0 && !nodes.contains_key(&node.replaces) {
            return Err(MemberError::NotFound);
        }
        let id = loop {
            let id = R::thread_rng().next_u64();
            let used = self.shared.applied.read().state.is_removed_member(id);
            if id != 0 && !used && !nodes.contains_key(&id) {
                break id;
            }
        };
        let adding = self.raft().add_learner(id, node, false);
        match R::timeout(self.timeout, adding).await {
            Ok(added) => Ok((id, index_of(added)?)),
            Err(_) => Err(MemberError::Unknown),
        }
    }

    /// Entries that a replica lacks, on the leader.
    fn lag(&self, id: ReplicaId) -> Option<u64> {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        let matched = metrics.replication.as_ref()?.get(&id)?.as_ref()?.index;
        Some(metrics.last_log_index.unwrap_or(0).saturating_sub(matched))
    }

    async fn promote(&self, id: ReplicaId) -> Result<u64, MemberError> {
        let (nodes, voters) = self.nodes();
        if !nodes.contains_key(&id) {
            return Err(MemberError::NotFound);
        }
        if voters.contains(&id) {
            return Err(MemberError::NotLearner);
        }
        if self.lag(id).is_none_or(|lag| lag > CAUGHT_UP_ENTRIES) {
            return Err(MemberError::NotReady);
        }
        self.write(ChangeMembers::AddVoterIds([id].into()), true)
            .await
    }

    async fn remove(&self, id: ReplicaId) -> Result<u64, MemberError> {
        let (nodes, voters) = self.nodes();
        if !nodes.contains_key(&id) {
            return Err(MemberError::NotFound);
        }
        if !voters.contains(&id) {
            return self
                .write(ChangeMembers::RemoveNodes([id].into()), false)
                .await;
        }
        let left: Vec<_> = voters.into_iter().filter(|voter| *voter != id).collect();
        let up = left.iter().filter(|voter| self.is_up(**voter)).count();
        if up <= left.len() / 2 {
            return Err(MemberError::NoQuorum);
        }
        self.write(ChangeMembers::RemoveVoters([id].into()), false)
            .await
    }

    fn is_up(&self, voter: ReplicaId) -> bool {
        if voter == self.router.own {
            return true;
        }
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        self.answers(voter, &metrics)
    }

    /// Whether another voter answered this leader a short while ago.
    fn answers(&self, voter: ReplicaId, metrics: &RaftMetrics<Types<R>>) -> bool {
        let heard = metrics
            .heartbeat
            .as_ref()
            .and_then(|heartbeats| heartbeats.get(&voter))
            .and_then(|at| at.as_ref())
            .map(|at| at.into_inner().elapsed());
        heard.is_some_and(|age| age < self.silence)
    }

    async fn update(&self, id: ReplicaId, node: Node) -> Result<u64, MemberError> {
        let (nodes, _) = self.nodes();
        if !nodes.contains_key(&id) {
            return Err(MemberError::NotFound);
        }
        let taken = |(other, known): (&ReplicaId, &Node)| {
            *other != id && !node.peer_url.is_empty() && known.peer_url == node.peer_url
        };
        if nodes.iter().any(taken) {
            return Err(MemberError::Exists);
        }
        self.write(ChangeMembers::SetNodes([(id, node)].into()), true)
            .await
    }

    async fn transfer(&self, to: ReplicaId) -> Result<u64, MemberError> {
        let (_, voters) = self.nodes();
        if !voters.contains(&to) {
            return Err(MemberError::NotFound);
        }
        let mut metrics = self.raft().metrics();
        let index = metrics.borrow_watched().last_log_index.unwrap_or(0);
        if to == self.router.own {
            return Ok(index);
        }
        self.raft()
            .trigger()
            .transfer_leader(to)
            .await
            .map_err(|_| MemberError::Stopped)?;
        let moved = async {
            while metrics.borrow_and_update().current_leader != Some(to) {
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        match R::timeout(self.timeout, moved).await {
            Ok(true) => Ok(index),
            Ok(false) => Err(MemberError::Stopped),
            Err(_) => Err(MemberError::Unknown),
        }
    }

    /// If this replica leads, the voter that has most of the log takes over, of those that answer.
    pub(crate) async fn hand_over(&self) -> Handover {
        let own = self.router.own;
        let (next, others) = {
            let metrics = self.raft().metrics();
            let metrics = metrics.borrow_watched();
            if !metrics.state.is_leader() {
                return Handover::Done;
            }
            let mut others: BTreeSet<ReplicaId> = metrics.membership_config.voter_ids().collect();
            others.remove(&own);
            let next = metrics.replication.as_ref().and_then(|replication| {
                replication
                    .iter()
                    .filter(|(id, _)| others.contains(id) && self.answers(**id, &metrics))
                    .max_by_key(|(_, matched)| matched.as_ref().map(|matched| matched.index))
                    .map(|(id, _)| *id)
            });
            (next, others.len())
        };
        let Some(next) = next else {
            return Handover::Nobody { others };
        };
        match self.change(Change::TransferLeader(next)).await {
            Ok(_) => Handover::Done,
            Err(error) => {
                tracing::warn!(%error, "leadership was not handed over");
                Handover::Failed
            }
        }
    }

    /// Once all members know more kinds of entry than the group uses, it may use them.
    async fn raise_feature_level(&self, nodes: &BTreeMap<ReplicaId, Node>) {
        let mut known = self.feature_level;
        if self.shared.group.feature_level() >= known {
            return;
        }
        for (id, node) in nodes.iter().filter(|(id, _)| **id != self.router.own) {
            let hello = Call::Hello(Hello {});
            let links = &self.router.links;
            match links
                .call(&target(*id, node), hello, READ_INDEX_TIMEOUT)
                .await
            {
                Ok(Answer::Hello(answer)) => known = known.min(answer.feature_level),
                // It may be one that knows less.
                _ => return,
            }
        }
        let before = self.shared.group.feature_level();
        if known <= before {
            return;
        }
        let level = pb::FeatureLevel { level: known };
        let proposal = pb::Proposal::system(Command::FeatureLevel(level));
        match self.proposer.propose_as_leader(proposal).await {
            Ok(_) => tracing::info!(
                before,
                now = known,
                "all replicas know more: the group's feature level rises"
            ),
            Err(error) => tracing::debug!(%error, "the feature level rises a little later"),
        }
    }

    /// The id of a replica that joins: of the member added for its address that never started, else of a new one.
    pub(crate) async fn join(&self, node: Node) -> Result<ReplicaId, MemberError> {
        // What was just added may not be applied here yet.
        self.readers
            .linearize()
            .await
            .map_err(|_| MemberError::NoLeader)?;
        let (nodes, _) = self.nodes();
        match at(&nodes, &node.peer_url) {
            Some((id, known)) if !self.is_applied(*id, known) => Err(MemberError::InProgress),
            Some((id, known)) if known.name.is_empty() => Ok(*id),
            Some(_) => Err(MemberError::Exists),
            None => {
                // Its name comes when it runs: until then it may ask again.
                let unstarted = Node {
                    name: String::new(),
                    ..node
                };
                self.change(Change::Add(wire::node_to_pb(&unstarted))).await
            }
        }
    }

    /// What the leader does by itself: learners that caught up vote, and what they replace goes.
    async fn look_after(&self) {
        let (nodes, voters) = self.nodes();
        self.raise_feature_level(&nodes).await;
        for (id, node) in &nodes {
            let votes = voters.contains(id);
            let done = if node.join_as_voter && !votes {
                if node.name.is_empty() || self.lag(*id).is_none_or(|lag| lag > CAUGHT_UP_ENTRIES) {
                    continue;
                }
                tracing::info!(replica = %format_args!("{id:016x}"), name = node.name, "the learner has caught up and becomes a voter");
                self.promote(*id).await
            } else if votes && node.replaces != 0 && nodes.contains_key(&node.replaces) {
                tracing::info!(replica = %format_args!("{:016x}", node.replaces), "the replica is replaced and goes");
                self.remove(node.replaces).await
            } else {
                continue;
            };
            if let Err(error) = done {
                tracing::debug!(%error, "the membership is changed a little later");
            }
            return;
        }
    }

    /// Looks after the members while this replica leads.
    pub(crate) async fn run(self, stop: Stop<R>) {
        while stop.or(R::sleep(MEMBERS_POLL)).await.is_some() {
            if self.router.leads() && stop.or(self.look_after()).await.is_none() {
                return;
            }
        }
    }

    /// Tells the group how this replica is reached now.
    pub(crate) async fn publish(self, node: Node, stop: Stop<R>) {
        let own = self.router.own;
        loop {
            // As applied: what a leader has only proposed, its successor may undo.
            let known = {
                let applied = self.shared.applied.read();
                applied.membership.membership().get_node(&own).cloned()
            };
            let Some(known) = known else {
                // Not a member yet, or no more.
                if stop.or(R::sleep(MEMBERS_POLL)).await.is_none() {
                    return;
                }
                continue;
            };
            let wanted = Node {
                name: node.name.clone(),
                peer_url: node.peer_url.clone(),
                client_urls: node.client_urls.clone(),
                join_as_voter: known.join_as_voter,
                replaces: known.replaces,
            };
            if known == wanted {
                return;
            }
            let update = Change::Update(MemberUpdate {
                id: own,
                node: Some(wire::node_to_pb(&wanted)),
            });
            match stop.or(self.change(update)).await {
                Some(Ok(_)) | None => return,
                Some(Err(error)) => {
                    tracing::debug!(%error, "this replica's addresses are told a little later");
                    if stop.or(R::sleep(MEMBERS_POLL)).await.is_none() {
                        return;
                    }
                }
            }
        }
    }
}

type Written<R> =
    Result<ClientWriteResponse<Types<R>>, RaftError<Types<R>, ClientWriteError<Types<R>>>>;

fn index_of<R: AsyncRuntime>(written: Written<R>) -> Result<u64, MemberError> {
    match written {
        Ok(response) => Ok(response.log_id.index),
        Err(RaftError::Fatal(_)) => Err(MemberError::Stopped),
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
            Err(MemberError::NoLeader)
        }
        Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => {
            Err(match error {
                ChangeMembershipError::LearnerNotFound(_) => MemberError::NotFound,
                ChangeMembershipError::EmptyMembership(_) => MemberError::NoQuorum,
                _ => MemberError::InProgress,
            })
        }
        Err(RaftError::APIError(_)) => Err(MemberError::Unknown),
    }
}
