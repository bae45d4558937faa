//! Collects proposals into log entries: no delay when idle, larger entries under load. What another replica leads goes there.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clustermesh_core::{pb, pb::proposal::Command as CoreCommand};
use clustermesh_store::{Command, Node, Origin, ReplicaId};
use openraft::{
    Raft,
    async_runtime::{
        AsyncRuntime, Instant, Mpsc, MpscReceiver, MpscSender, Oneshot, OneshotSender, Select2,
        WatchReceiver,
    },
    errors::{ClientWriteError, ForwardToLeader},
    impls::ProgressResponder,
    raft::ClientWriteResult,
};
use parking_lot::Mutex;
use prost::Message;
use rand::Rng;

use crate::{
    Types,
    answer::{Answer, Committed},
    config::{
        MAX_BATCH_BYTES, MAX_BATCH_PROPOSALS, MAX_ENTRIES_IN_FLIGHT, MAX_FORWARDS_IN_FLIGHT,
        MAX_PROPOSAL_BYTES, MAX_WAITING_PROPOSALS,
    },
    error::ProposeError,
    forward::Router,
    metrics::{Metrics, add, sub},
    state_machine::StateMachine,
    task::{Stop, spawn},
    wire::Forward,
};

pub(crate) type Told = Result<Committed, ProposeError>;
type Queue<R, T> = <<R as AsyncRuntime>::Mpsc as Mpsc>::Receiver<T>;
type OneshotOf<R, T> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Sender<T>;

/// Who is told what came of a proposal.
pub(crate) enum Teller<R: AsyncRuntime> {
    /// A caller here.
    Caller(OneshotOf<R, Told>),
    /// Another replica, which hears of all that it forwarded at once.
    Forwarded(Arc<Forwarded<R>>),
}

impl<R: AsyncRuntime> Teller<R> {
    pub(crate) fn tell(self, told: Told) {
        match self {
            Self::Caller(teller) => {
                // Whoever asked may be gone.
                let _gone = teller.send(told);
            }
            Self::Forwarded(group) => group.note(&told),
        }
    }
}

/// What came of proposals that were forwarded together.
struct Sum {
    index: u64,
    refused: Option<ProposeError>,
    committed: bool,
    unknown: bool,
}

/// Proposals that were forwarded together; the last one to be told sends the sum.
pub(crate) struct Forwarded<R: AsyncRuntime> {
    sum: Mutex<Sum>,
    done: Mutex<Option<OneshotOf<R, Result<u64, ProposeError>>>>,
}

impl<R: AsyncRuntime> Forwarded<R> {
    fn note(&self, told: &Told) {
        let mut sum = self.sum.lock();
        match told {
            Ok(committed) => {
                sum.committed = true;
                sum.index = sum.index.max(committed.index);
            }
            Err(ProposeError::Unknown | ProposeError::Timeout) => sum.unknown = true,
            Err(error) => sum.refused = Some(error.clone()),
        }
    }
}

impl<R: AsyncRuntime> Drop for Forwarded<R> {
    fn drop(&mut self) {
        let sum = self.sum.get_mut();
        let told = match &sum.refused {
            None if sum.committed && !sum.unknown => Ok(sum.index),
            // Only when nothing at all was proposed may all of it be proposed again.
            Some(error) if !sum.committed && !sum.unknown => Err(error.clone()),
            _ => Err(ProposeError::Unknown),
        };
        if let Some(done) = self.done.get_mut().take() {
            let _gone = done.send(told);
        }
    }
}

/// Who may propose something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stays {
    /// Whoever leads.
    Anywhere,
    /// This replica, while it leads.
    Here,
}

/// A proposal that waits for its answer.
pub(crate) struct Waiting<R: AsyncRuntime> {
    pub(crate) proposal: pb::Proposal,
    pub(crate) origin: Option<(ReplicaId, u64)>,
    pub(crate) stays: Stays,
    bytes: usize,
    teller: Teller<R>,
    /// Given back when it is told.
    _place: Place,
    pub(crate) deadline: R::Instant,
}

impl<R: AsyncRuntime> Waiting<R> {
    pub(crate) fn tell(self, told: Told) {
        self.teller.tell(told);
    }
}

/// One of the places in the queue.
pub(crate) struct Place {
    taken: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

impl Place {
    fn take(taken: &Arc<AtomicUsize>, metrics: &Arc<Metrics>) -> Result<Self, ProposeError> {
        if taken.fetch_add(1, Ordering::Relaxed) >= MAX_WAITING_PROPOSALS {
            taken.fetch_sub(1, Ordering::Relaxed);
            add(&metrics.proposals_queue_full_total, 1);
            return Err(ProposeError::QueueFull {
                limit: MAX_WAITING_PROPOSALS,
            });
        }
        add(&metrics.proposals_total, 1);
        add(&metrics.proposals_waiting, 1);
        Ok(Self {
            taken: taken.clone(),
            metrics: metrics.clone(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
        sub(&self.metrics.proposals_waiting, 1);
    }
}

/// The sending end of the batcher.
pub(crate) struct Proposer<R: AsyncRuntime> {
    queue: <R::Mpsc as Mpsc>::Sender<Waiting<R>>,
    taken: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
    /// A proposal without outcome after this long is given up.
    timeout: Duration,
}

impl<R: AsyncRuntime> Clone for Proposer<R> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            taken: self.taken.clone(),
            metrics: self.metrics.clone(),
            timeout: self.timeout,
        }
    }
}

impl<R: AsyncRuntime> Proposer<R> {
    /// Proposes wherever the leader is.
    pub(crate) async fn propose(&self, mut proposal: pb::Proposal) -> Told {
        choose_lease_id::<R>(&mut proposal);
        self.propose_with(proposal, Stays::Anywhere).await
    }

    /// Proposes only while this replica leads.
    pub(crate) async fn propose_as_leader(&self, proposal: pb::Proposal) -> Told {
        self.propose_with(proposal, Stays::Here).await
    }

    async fn propose_with(&self, proposal: pb::Proposal, stays: Stays) -> Told {
        let (teller, answer) = R::Oneshot::channel();
        let teller = Teller::Caller(teller);
        self.enqueue(proposal, None, stays, teller).await?;
        // The teller goes away unheard only when the replica stops, perhaps with the entry on its way.
        answer.await.unwrap_or(Err(ProposeError::Unknown))
    }

    async fn enqueue(
        &self,
        proposal: pb::Proposal,
        origin: Option<(ReplicaId, u64)>,
        stays: Stays,
        teller: Teller<R>,
    ) -> Result<(), ProposeError> {
        let bytes = proposal.encoded_len();
        if bytes > MAX_PROPOSAL_BYTES {
            return Err(ProposeError::TooLarge {
                size_bytes: bytes,
                limit_bytes: MAX_PROPOSAL_BYTES,
            });
        }
        let waiting = Waiting {
            proposal,
            origin,
            stays,
            bytes,
            teller,
            _place: Place::take(&self.taken, &self.metrics)?,
            deadline: R::Instant::now() + self.timeout,
        };
        self.queue
            .send(waiting)
            .await
            .map_err(|_| ProposeError::Stopped)
    }

    /// Proposes for another replica's clients; the index at which all are committed.
    pub(crate) async fn propose_forwarded(
        &self,
        from: ReplicaId,
        forward: Forward,
    ) -> Result<u64, ProposeError> {
        if forward.proposals.is_empty() {
            return Ok(0);
        }
        let (done, told) = R::Oneshot::channel();
        let group = Arc::new(Forwarded {
            sum: Mutex::new(Sum {
                index: 0,
                refused: None,
                committed: false,
                unknown: false,
            }),
            done: Mutex::new(Some(done)),
        });
        for forwarded in forward.proposals {
            let origin = Some((from, forwarded.request_id));
            let proposal = forwarded.proposal.unwrap_or_default();
            let teller = Teller::Forwarded(group.clone());
            if let Err(error) = self.enqueue(proposal, origin, Stays::Here, teller).await {
                group.note(&Err(error));
            }
        }
        drop(group);
        told.await.unwrap_or(Err(ProposeError::Unknown))
    }
}

/// The client leaves the choice to us by id 0; apply has no randomness.
fn choose_lease_id<R: AsyncRuntime>(proposal: &mut pb::Proposal) {
    if let Some(CoreCommand::LeaseGrant(grant)) = &mut proposal.command {
        while grant.id == 0 {
            grant.id = (R::thread_rng().next_u64() & i64::MAX.unsigned_abs()).cast_signed();
        }
    }
}

pub(crate) struct Batcher<R: AsyncRuntime> {
    queue: Queue<R, Waiting<R>>,
}

impl<R: AsyncRuntime> Batcher<R> {
    pub(crate) fn new(metrics: Arc<Metrics>, timeout: Duration) -> (Proposer<R>, Self) {
        let (sender, queue) = R::Mpsc::channel(MAX_WAITING_PROPOSALS);
        (
            Proposer {
                queue: sender,
                taken: Arc::default(),
                metrics,
                timeout,
            },
            Self { queue },
        )
    }

    pub(crate) async fn run(mut self, router: Arc<Router<R>>, stop: Stop<R>) {
        let (done, mut answered) = R::Mpsc::channel::<()>(MAX_FORWARDS_IN_FLIGHT);
        let mut in_flight = 0;
        let mut left_over = None;
        loop {
            let turn = self.next(&mut left_over, &mut answered, &mut in_flight, &router);
            let Some(Some(first)) = stop.or(turn).await else {
                break;
            };
            let batch = self.collect(first, &mut left_over);
            in_flight += 1;
            let (done, router, stop) = (done.clone(), router.clone(), stop.clone());
            // Submitted here, so that entries keep the order of the queue.
            let submitted = if router.leads() {
                Ok(router.entries.submit(batch).await)
            } else {
                Err(batch)
            };
            spawn::<R>(async move {
                let left = match submitted {
                    Ok(submitted) => submitted.settle(&done).await,
                    Err(batch) => Some(batch),
                };
                if let Some(batch) = left {
                    router.route(batch, &stop).await;
                    let _stopped = done.send(()).await;
                }
            });
        }
        // Those still queued were never proposed.
        while let Ok(waiting) = self.queue.try_recv() {
            waiting.tell(Err(ProposeError::Stopped));
        }
    }

    /// The first proposal of the next entry, once there is room for that entry.
    async fn next(
        &mut self,
        left_over: &mut Option<Waiting<R>>,
        answered: &mut Queue<R, ()>,
        in_flight: &mut usize,
        router: &Router<R>,
    ) -> Option<Waiting<R>> {
        loop {
            let limit = if router.leads() {
                MAX_ENTRIES_IN_FLIGHT
            } else {
                MAX_FORWARDS_IN_FLIGHT
            };
            if *in_flight >= limit {
                answered.recv().await?;
                *in_flight -= 1;
                continue;
            }
            if let Some(waiting) = left_over.take() {
                return Some(waiting);
            }
            match R::select2(answered.recv(), self.queue.recv()).await {
                Select2::First(_) => *in_flight = in_flight.saturating_sub(1),
                Select2::Second(waiting) => return waiting,
            }
        }
    }

    /// Adds what waits already, within an entry's limits.
    fn collect(
        &mut self,
        first: Waiting<R>,
        left_over: &mut Option<Waiting<R>>,
    ) -> Vec<Waiting<R>> {
        let mut bytes = first.bytes;
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH_PROPOSALS {
            let Ok(next) = self.queue.try_recv() else {
                break;
            };
            if bytes + next.bytes > MAX_BATCH_BYTES {
                *left_over = Some(next);
                break;
            }
            bytes += next.bytes;
            batch.push(next);
        }
        batch
    }
}

/// Makes log entries of batches, on the leader.
pub(crate) struct Entries<R: AsyncRuntime> {
    pub(crate) raft: Raft<Types<R>, StateMachine<R>>,
    /// What the leader says of itself in its entries.
    pub(crate) leader: Box<dyn Fn() -> pb::Leader + Send + Sync>,
    pub(crate) metrics: Arc<Metrics>,
}

/// An entry on its way.
pub(crate) struct Submitted<R: AsyncRuntime> {
    batch: Vec<Waiting<R>>,
    command: Command,
    answer: Option<OneshotReceiverOf<R, ClientWriteResult<Types<R>>>>,
    metrics: Arc<Metrics>,
}

type OneshotReceiverOf<R, T> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Receiver<T>;

impl<R: AsyncRuntime> Entries<R> {
    /// The term in which this replica leads, as far as it knows.
    pub(crate) fn leading_term(&self) -> Option<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leads = metrics.state.is_leader();
        leads.then_some(metrics.vote.leader_id.term)
    }

    pub(crate) async fn submit(&self, mut batch: Vec<Waiting<R>>) -> Submitted<R> {
        let origins = (0_u32..)
            .zip(&batch)
            .filter_map(|(place, waiting)| {
                let (replica_id, request_id) = waiting.origin?;
                Some(Origin {
                    place,
                    replica_id,
                    request_id,
                })
            })
            .collect();
        let proposals = batch
            .iter_mut()
            .map(|waiting| std::mem::take(&mut waiting.proposal))
            .collect();
        let encoded = pb::Batch::new((self.leader)(), proposals).encode_to_vec();
        let command = Command {
            batch: encoded.into(),
            origins,
        };
        add(&self.metrics.entries_proposed_total, 1);
        let (responder, answer) = ProgressResponder::complete_only();
        let write = self.raft.write(command.clone()).responder(responder);
        let sent = write.await;
        Submitted {
            batch,
            command,
            answer: sent.is_ok().then_some(answer),
            metrics: self.metrics.clone(),
        }
    }
}

impl<R: AsyncRuntime> Submitted<R> {
    /// Tells everyone what came of it; hands the batch back when it was refused before anything was proposed.
    pub(crate) async fn settle(
        self,
        done: &<R::Mpsc as Mpsc>::Sender<()>,
    ) -> Option<Vec<Waiting<R>>> {
        let Some(answer) = self.answer else {
            for waiting in self.batch {
                waiting.tell(Err(ProposeError::Stopped));
            }
            let _stopped = done.send(()).await;
            return None;
        };
        let deadline = self.batch.first().map(|waiting| waiting.deadline);
        let answer = match deadline {
            Some(deadline) => R::timeout_at(deadline, answer).await,
            None => Ok(answer.await),
        };
        match answer {
            Ok(Ok(Ok(response))) => {
                // The next entry need not wait until everyone is told.
                let _stopped = done.send(()).await;
                tell_results(self.batch, response.log_id, response.data);
                return None;
            }
            #[cfg(feature = "mutants")]
            Ok(Ok(Err(ClientWriteError::LogEntryDiscarded(_))))
                if crate::mutants::is(crate::mutants::Mutant::RetryDiscarded) =>
            {
                return Some(restore(self.batch, &self.command));
            }
            // Only this error says that nothing was proposed. A discarded entry may be committed yet.
            Ok(Ok(Err(ClientWriteError::ForwardToLeader(_)))) => {
                return Some(restore(self.batch, &self.command));
            }
            Ok(Ok(Err(_)) | Err(_)) => {
                add(&self.metrics.proposals_unknown_total, self.batch.len());
                for waiting in self.batch {
                    waiting.tell(Err(ProposeError::Unknown));
                }
            }
            Err(_) => {
                add(&self.metrics.proposals_unknown_total, self.batch.len());
                for waiting in self.batch {
                    waiting.tell(Err(ProposeError::Timeout));
                }
            }
        }
        let _stopped = done.send(()).await;
        None
    }
}

/// Gives the proposals back to those who wait for them.
fn restore<R: AsyncRuntime>(mut batch: Vec<Waiting<R>>, command: &Command) -> Vec<Waiting<R>> {
    let proposals = pb::Batch::decode(command.batch.clone())
        .map(|batch| batch.proposals)
        .unwrap_or_default();
    for (waiting, proposal) in batch.iter_mut().zip(proposals) {
        waiting.proposal = proposal;
    }
    batch
}

pub(crate) fn leader_of<R: AsyncRuntime>(
    forward: ForwardToLeader<Types<R>>,
) -> Option<(ReplicaId, Node)> {
    forward.leader_id.zip(forward.leader_node)
}

fn tell_results<R: AsyncRuntime>(
    batch: Vec<Waiting<R>>,
    log_id: clustermesh_store::LogId,
    answer: Answer,
) {
    let compact_revision = answer.compact_revision;
    let mut results = answer.results.into_iter();
    for waiting in batch {
        let told = results.next().map_or(Err(ProposeError::Unknown), |result| {
            Ok(Committed {
                outcome: result.result,
                revision: result.revision,
                compact_revision,
                term: log_id.leader_id.term,
                index: log_id.index,
            })
        });
        waiting.tell(told);
    }
}
