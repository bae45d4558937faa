//! The receiving end: checks who speaks, and hands messages to the replica.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clustermesh_core::pb::Proposal;
use clustermesh_store::{Node, ReplicaId, wire};
use futures_util::{
    FutureExt, StreamExt,
    stream::{self, BoxStream},
};
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Instant, WatchReceiver},
    raft::TransferLeaderRequest,
};
use parking_lot::Mutex;

use crate::{
    Types, divergence,
    error::refuse,
    identity::IdentityKeeper,
    membership::Members,
    peer::{
        Incoming, Links, append_from_wire, append_result_to_wire, vote_answer_to_wire,
        vote_from_wire,
    },
    proposal::Proposer,
    reads::Readers,
    shared::Shared,
    state_machine::StateMachine,
    wire::{
        AppendRequest, AppendResponse, CallRequest, CallResponse, Compare, CompareAnswer, Done,
        ForwardAnswer, Header, HelloAnswer, JoinAnswer, LeaseTime, LeaseTimeAnswer,
        MemberChangeAnswer, ReadIndexAnswer, Refusal, SnapshotAnswer, SnapshotOffsetAnswer,
        SnapshotPart, TransferLeader, append_response, call_request::Call, call_response::Answer,
        refusal::Reason,
    },
};

/// Refusals that are told within [`REFUSALS_TOLD_INTERVAL`]: one for each sender and reason.
const MAX_REFUSALS_TOLD: usize = 64;
/// After so long each is told anew: what goes on is said again, and what has only begun finds room.
const REFUSALS_TOLD_INTERVAL: Duration = Duration::from_secs(600);

/// Whose messages were refused, and for which reason: senders try again many times a second.
#[derive(Debug)]
pub(crate) struct Refused<I>(Mutex<Told<I>>);

#[derive(Debug)]
struct Told<I> {
    since: Option<I>,
    refusals: BTreeSet<(ReplicaId, i32)>,
}

impl<I> Default for Refused<I> {
    fn default() -> Self {
        Self(Mutex::new(Told {
            since: None,
            refusals: BTreeSet::new(),
        }))
    }
}

impl<I: Instant> Refused<I> {
    fn is_news(&self, from: ReplicaId, reason: i32, now: I) -> bool {
        let mut told = self.0.lock();
        let is_over = |since: I| now.saturating_duration_since(since) >= REFUSALS_TOLD_INTERVAL;
        if told.since.is_none_or(is_over) {
            told.since = Some(now);
            told.refusals.clear();
        }
        told.refusals.len() < MAX_REFUSALS_TOLD && told.refusals.insert((from, reason))
    }
}

/// What a running replica answers with.
pub(crate) struct Bound<R: AsyncRuntime> {
    pub(crate) own: ReplicaId,
    pub(crate) cluster_name: String,
    pub(crate) node: Node,
    /// Kinds of entry that this replica knows.
    pub(crate) feature_level: u32,
    pub(crate) asides: Asides,
    pub(crate) raft: Raft<Types<R>, StateMachine<R>>,
    pub(crate) shared: Arc<Shared<R>>,
    pub(crate) proposer: Proposer<R>,
    pub(crate) readers: Readers<R>,
    pub(crate) identity: Arc<IdentityKeeper>,
    pub(crate) links: Arc<Links<R>>,
    pub(crate) members: Members<R>,
    pub(crate) incoming: Incoming,
    pub(crate) refused: Refused<R::Instant>,
    /// The replica is being shut down: what still comes is refused, and Raft is not asked any more.
    pub(crate) ending: AtomicBool,
}

/// Takes what the process of another replica says; an error is its answer.
type AsideListener = dyn Fn(ReplicaId, Bytes) -> Result<(), String> + Send + Sync;

/// Where messages for the process go, once it listens.
pub(crate) type Asides = Arc<Mutex<Option<Arc<AsideListener>>>>;

/// What other replicas send goes in here; clones serve the same replica. It refuses until the replica runs, and after it has ended.
pub struct PeerHandler<R: AsyncRuntime> {
    slot: Arc<Mutex<Weak<Bound<R>>>>,
    asides: Asides,
}

impl<R: AsyncRuntime> Clone for PeerHandler<R> {
    fn clone(&self) -> Self {
        Self {
            slot: self.slot.clone(),
            asides: self.asides.clone(),
        }
    }
}

impl<R: AsyncRuntime> Default for PeerHandler<R> {
    fn default() -> Self {
        Self {
            slot: Arc::new(Mutex::new(Weak::new())),
            asides: Asides::default(),
        }
    }
}

impl<R: AsyncRuntime> std::fmt::Debug for PeerHandler<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerHandler")
    }
}

fn not_ready() -> Refusal {
    refuse(
        Reason::NotReady,
        "the replica has not begun yet, or it has ended",
    )
}

fn invalid(reason: impl std::fmt::Display) -> Refusal {
    refuse(Reason::Invalid, reason.to_string())
}

fn stopped(error: impl std::fmt::Display) -> Refusal {
    refuse(Reason::NotReady, error.to_string())
}

impl<R: AsyncRuntime> PeerHandler<R> {
    pub(crate) fn bind(&self, bound: &Arc<Bound<R>>) {
        *self.slot.lock() = Arc::downgrade(bound);
    }

    pub(crate) fn asides(&self) -> Asides {
        self.asides.clone()
    }

    /// Hands `listener` what the processes of other replicas say with [`Replica::tell`](crate::Replica::tell): who, and what. It must not block.
    pub fn on_aside(
        &self,
        listener: impl Fn(ReplicaId, Bytes) -> Result<(), String> + Send + Sync + 'static,
    ) {
        *self.asides.lock() = Some(Arc::new(listener));
    }

    fn bound(&self) -> Result<Arc<Bound<R>>, Refusal> {
        let bound = self.slot.lock().upgrade();
        bound
            .filter(|bound| !bound.has_ended())
            .ok_or_else(not_ready)
    }

    /// Answers a question of another replica.
    pub async fn call(&self, request: CallRequest) -> CallResponse {
        let answered = match self.bound() {
            Ok(bound) => bound.call(request).await,
            Err(refusal) => Err(refusal),
        };
        CallResponse {
            answer: Some(answered.unwrap_or_else(Answer::Refusal)),
        }
    }

    /// Takes a leader's entries; the answers come in the order of the requests.
    pub fn append(
        &self,
        mut requests: BoxStream<'static, AppendRequest>,
    ) -> BoxStream<'static, AppendResponse> {
        let handler = self.clone();
        let opened = async move {
            let opened = async {
                let first = requests.next().await.ok_or_else(|| invalid("no request"))?;
                let bound = handler.bound()?;
                bound.check(first.header.as_ref())?;
                let from = first.header.map_or(0, |header| header.from);
                Ok((first, bound, from))
            };
            match opened.await {
                Ok((first, bound, from)) => {
                    let requests = stream::once(async move { first }).chain(requests);
                    bound.append(from, requests.boxed())
                }
                Err(refusal) => {
                    let answer = append_response::Answer::Refusal(refusal);
                    stream::once(async move {
                        AppendResponse {
                            answer: Some(answer),
                        }
                    })
                    .boxed()
                }
            }
        };
        opened.flatten_stream().boxed()
    }

    /// Takes a leader's snapshot and installs it.
    pub async fn install_snapshot(&self, parts: BoxStream<'static, SnapshotPart>) -> CallResponse {
        let installed = match self.bound() {
            Ok(bound) => bound.install_snapshot(parts).await,
            Err(refusal) => Err(refusal),
        };
        CallResponse {
            answer: Some(installed.unwrap_or_else(Answer::Refusal)),
        }
    }
}

impl<R: AsyncRuntime> Bound<R> {
    fn has_ended(&self) -> bool {
        self.ending.load(Ordering::Acquire) || self.members.router.has_ended()
    }

    /// A message must be meant for this replica of this group, and come from one that was not removed.
    fn check(&self, header: Option<&Header>) -> Result<(), Refusal> {
        self.judge(header).inspect_err(|refusal| {
            let from = header.map_or(0, |header| header.from);
            if self.refused.is_news(from, refusal.reason, R::Instant::now()) {
                tracing::warn!(from = %format_args!("{from:016x}"), reason = refusal.message, "messages of another replica are refused");
            }
        })
    }

    fn judge(&self, header: Option<&Header>) -> Result<(), Refusal> {
        let header = header.ok_or_else(|| invalid("no header"))?;
        if header.to != self.own {
            return Err(refuse(
                Reason::WrongReplica,
                format!(
                    "this is replica {:016x}, the message is for {:016x}; a data folder was replaced, or the address is another one's",
                    self.own, header.to
                ),
            ));
        }
        self.check_removed(header.from)?;
        self.identity
            .check_or_adopt(header.cluster_id)
            .map_err(|(reason, message)| refuse(reason, message))
    }

    fn check_removed(&self, from: ReplicaId) -> Result<(), Refusal> {
        if self.shared.applied.read().state.is_removed_member(from) {
            return Err(refuse(
                Reason::Removed,
                format!("replica {from:016x} was removed from the group"),
            ));
        }
        Ok(())
    }

    async fn call(&self, request: CallRequest) -> Result<Answer, Refusal> {
        let call = request.call.ok_or_else(|| invalid("no question"))?;
        let header = request.header.as_ref();
        match (&call, header) {
            // Whoever asks this knows the address only.
            (Call::Hello(_) | Call::Join(_), Some(header)) if header.to == 0 => {
                self.check_removed(header.from)?;
            }
            _ => self.check(header)?,
        }
        let from = header.map_or(0, |header| header.from);
        match call {
            Call::Hello(_) => self.hello().await.map(Answer::Hello),
            Call::Append(append) => {
                let request = append_from_wire::<R>(append).map_err(invalid)?;
                let mut results = Box::pin(self.raft.stream_append(stream::iter([request])));
                let result = results.next().await.ok_or_else(not_ready)?;
                let result = result.map_err(stopped)?;
                if result.is_ok() {
                    self.shared.contact.note(from);
                }
                Ok(Answer::Append(append_result_to_wire::<R>(&result)))
            }
            Call::Vote(vote) => {
                let request = vote_from_wire::<R>(&vote).map_err(invalid)?;
                let response = self.raft.vote(request).await.map_err(stopped)?;
                Ok(Answer::Vote(vote_answer_to_wire::<R>(&response)))
            }
            Call::PreVote(vote) => {
                let request = vote_from_wire::<R>(&vote).map_err(invalid)?;
                let response = self.raft.pre_vote(request).await.map_err(stopped)?;
                Ok(Answer::Vote(vote_answer_to_wire::<R>(&response)))
            }
            Call::TransferLeader(transfer) => self.transfer_leader(&transfer).await,
            Call::Forward(forward) => {
                let is_known =
                    |proposal: Option<&Proposal>| proposal.is_some_and(Proposal::is_known);
                // In an entry it would stop every replica.
                if !forward
                    .proposals
                    .iter()
                    .all(|forwarded| is_known(forwarded.proposal.as_ref()))
                {
                    return Err(invalid(
                        "a proposal of a kind that this replica does not know: upgrade it",
                    ));
                }
                let index = self
                    .proposer
                    .propose_forwarded(from, forward)
                    .await
                    .map_err(|error| error.refusal())?;
                Ok(Answer::Forward(ForwardAnswer { index }))
            }
            Call::ReadIndex(_) => {
                let index = self
                    .readers
                    .leader_index()
                    .await
                    .map_err(|error| error.refusal())?;
                Ok(Answer::ReadIndex(ReadIndexAnswer { index }))
            }
            Call::SnapshotOffset(snapshot) => Ok(Answer::SnapshotOffset(SnapshotOffsetAnswer {
                chunks: self.incoming.chunks(from, &snapshot),
            })),
            Call::LeaseTime(asked) => self.lease_time(asked).await.map(Answer::LeaseTime),
            Call::MemberChange(change) => {
                let (id, index) = self
                    .members
                    .change_here(change)
                    .await
                    .map_err(|error| error.refusal())?;
                Ok(Answer::MemberChange(MemberChangeAnswer { id, index }))
            }
            Call::Compare(asked) => self.compare(&asked).await.map(Answer::Compare),
            Call::Aside(aside) => {
                let listener = self.asides.lock().clone().ok_or_else(not_ready)?;
                listener(from, aside.message).map_err(invalid)?;
                Ok(Answer::Done(Done {}))
            }
            Call::Join(join) => {
                let used = self.shared.group.feature_level();
                if join.feature_level < used {
                    return Err(invalid(format_args!(
                        "the group uses feature level {used}, and the replica that joins knows {} only: upgrade it first",
                        join.feature_level
                    )));
                }
                let node = join
                    .node
                    .as_ref()
                    .map(wire::node_from_pb)
                    .ok_or_else(|| invalid("no description of the replica that joins"))?;
                let replica_id = self
                    .members
                    .join(node)
                    .await
                    .map_err(|error| error.refusal())?;
                Ok(Answer::Join(JoinAnswer {
                    replica_id,
                    cluster_id: self.identity.cluster_id(),
                }))
            }
        }
    }

    async fn compare(&self, asked: &Compare) -> Result<CompareAnswer, Refusal> {
        let applied = self.readers.wait_applied(asked.index).await;
        applied.map_err(|error| error.refusal())?;
        divergence::answer(&self.shared, asked)
            .await
            .map_err(|error| error.refusal())?
            .map_err(invalid)
    }

    async fn hello(&self) -> Result<HelloAnswer, Refusal> {
        let initialized = self.raft.is_initialized().await.map_err(stopped)?;
        let metrics = self.raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        Ok(HelloAnswer {
            replica_id: self.own,
            cluster_id: self.identity.cluster_id(),
            cluster_name: self.cluster_name.clone(),
            node: Some(wire::node_to_pb(&self.node)),
            initialized,
            feature_level: self.feature_level,
            membership: Some(wire::membership_to_pb(membership.membership())),
        })
    }

    fn append(
        self: Arc<Self>,
        from: ReplicaId,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxStream<'static, AppendResponse> {
        let checking = self.clone();
        // Ends at the first message that is not in order: the leader then begins a new stream.
        let requests = requests
            .map(move |request| {
                checking.check(request.header.as_ref()).ok()?;
                append_from_wire::<R>(request.append?).ok()
            })
            .take_while(|request| std::future::ready(request.is_some()))
            .filter_map(std::future::ready);
        let results = self.raft.stream_append(requests);
        results
            .map(move |result| {
                let answer = match result {
                    Ok(result) => {
                        if result.is_ok() {
                            self.shared.contact.note(from);
                        }
                        append_response::Answer::Append(append_result_to_wire::<R>(&result))
                    }
                    Err(error) => append_response::Answer::Refusal(stopped(error)),
                };
                AppendResponse {
                    answer: Some(answer),
                }
            })
            .boxed()
    }

    async fn transfer_leader(&self, transfer: &TransferLeader) -> Result<Answer, Refusal> {
        let from = transfer
            .from_leader
            .as_ref()
            .map(wire::vote_from_pb)
            .ok_or_else(|| invalid("no vote"))?;
        let last_log_id = transfer.last_log_id.as_ref().map(wire::log_id_from_pb);
        let request = TransferLeaderRequest::new(from, transfer.to, last_log_id);
        match self.raft.handle_transfer_leader(request).await {
            Ok(Ok(())) => Ok(Answer::Done(Done {})),
            Ok(Err(error)) => Err(refuse(Reason::Unspecified, error.to_string())),
            Err(error) => Err(stopped(error)),
        }
    }

    async fn lease_time(&self, asked: LeaseTime) -> Result<LeaseTimeAnswer, Refusal> {
        let confirmed = self.readers.leader_index().await;
        let index = confirmed.map_err(|error| error.refusal())?;
        self.readers
            .wait_applied(index)
            .await
            .map_err(|error| error.refusal())?;
        let left = if asked.keep_alive {
            self.shared.leases.renew(asked.id)
        } else {
            self.shared.leases.remaining(asked.id)
        };
        Ok(LeaseTimeAnswer {
            found: left.is_some(),
            remaining_ms: left.map_or(0, |left| {
                i64::try_from(left.as_millis()).unwrap_or(i64::MAX)
            }),
        })
    }

    async fn install_snapshot(
        &self,
        mut parts: BoxStream<'static, SnapshotPart>,
    ) -> Result<Answer, Refusal> {
        let first = parts.next().await.and_then(|part| part.start);
        let start = first.ok_or_else(|| invalid("a snapshot without beginning"))?;
        self.check(start.header.as_ref())?;
        let from = start.header.map_or(0, |header| header.from);
        let vote = start
            .vote
            .as_ref()
            .map(wire::vote_from_pb)
            .ok_or_else(|| invalid("no vote"))?;
        let snapshot = self.incoming.receive::<R>(from, start, parts).await?;
        let snapshot = openraft::Snapshot {
            meta: snapshot.meta().clone(),
            snapshot,
        };
        let response = self
            .raft
            .install_full_snapshot(vote, snapshot)
            .await
            .map_err(stopped)?;
        self.shared.contact.note(from);
        Ok(Answer::Snapshot(SnapshotAnswer {
            vote: Some(wire::vote_to_pb(&response.vote)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use openraft_rt_tokio::TokioInstant;

    use super::*;

    #[test]
    fn a_refusal_is_told_once_for_each_sender_and_reason_and_again_after_a_while() {
        let (refused, start) = (Refused::default(), TokioInstant::now());
        let (removed, wrong) = (Reason::Removed.into(), Reason::WrongReplica.into());
        assert!(refused.is_news(1, removed, start));
        assert!(!refused.is_news(1, removed, start));
        assert!(refused.is_news(1, wrong, start));
        assert!(refused.is_news(2, removed, start));
        let told = (3..10_000).filter(|from| refused.is_news(*from, wrong, start));
        assert_eq!(told.count(), MAX_REFUSALS_TOLD - 3);
        let later = start + REFUSALS_TOLD_INTERVAL;
        let shortly_before = later - Duration::from_secs(1);
        assert!(!refused.is_news(20_000, wrong, shortly_before));
        assert!(refused.is_news(20_000, wrong, later));
        assert!(refused.is_news(1, removed, later));
        assert!(!refused.is_news(1, removed, later));
    }
}
