//! Collects proposals into log entries: no delay when idle, larger entries under load.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use clustermesh_core::{limits::BATCH_FORMAT, pb, pb::proposal::Command as CoreCommand};
use clustermesh_store::{Command, Node, ReplicaId};
use openraft::{
    Raft,
    async_runtime::{
        AsyncRuntime, Mpsc, MpscReceiver, MpscSender, Oneshot, OneshotSender, Select2,
    },
    errors::{ClientWriteError, ForwardToLeader},
    impls::ProgressResponder,
};
use prost::Message;
use rand::Rng;

use crate::{
    Types,
    config::{
        MAX_BATCH_BYTES, MAX_BATCH_PROPOSALS, MAX_ENTRIES_IN_FLIGHT, MAX_PROPOSAL_BYTES,
        MAX_WAITING_PROPOSALS,
    },
    error::ProposeError,
    metrics::{Metrics, add, sub},
    replica::Committed,
    state_machine::{Answer, StateMachine},
    task::{Stop, spawn},
};

type Told = Result<Committed, ProposeError>;
type Teller<R> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Sender<Told>;
type Queue<R, T> = <<R as AsyncRuntime>::Mpsc as Mpsc>::Receiver<T>;

/// A proposal that waits for its answer.
struct Waiting<R: AsyncRuntime> {
    proposal: pb::Proposal,
    bytes: usize,
    teller: Teller<R>,
    place: Place,
}

/// One of the places in the queue.
struct Place {
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
}

impl<R: AsyncRuntime> Clone for Proposer<R> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            taken: self.taken.clone(),
            metrics: self.metrics.clone(),
        }
    }
}

impl<R: AsyncRuntime> Proposer<R> {
    pub(crate) async fn propose(&self, mut proposal: pb::Proposal) -> Told {
        choose_lease_id::<R>(&mut proposal);
        let bytes = proposal.encoded_len();
        if bytes > MAX_PROPOSAL_BYTES {
            return Err(ProposeError::TooLarge {
                size_bytes: bytes,
                limit_bytes: MAX_PROPOSAL_BYTES,
            });
        }
        let place = Place::take(&self.taken, &self.metrics)?;
        let (teller, answer) = R::Oneshot::channel();
        let waiting = Waiting {
            proposal,
            bytes,
            teller,
            place,
        };
        self.queue
            .send(waiting)
            .await
            .map_err(|_| ProposeError::Stopped)?;
        // The teller goes away unheard only when the replica stops, perhaps with the entry on its way.
        answer.await.unwrap_or(Err(ProposeError::Unknown))
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
    metrics: Arc<Metrics>,
}

impl<R: AsyncRuntime> Batcher<R> {
    pub(crate) fn new(metrics: Arc<Metrics>) -> (Proposer<R>, Self) {
        let (sender, queue) = R::Mpsc::channel(MAX_WAITING_PROPOSALS);
        (
            Proposer {
                queue: sender,
                taken: Arc::default(),
                metrics: metrics.clone(),
            },
            Self { queue, metrics },
        )
    }

    pub(crate) async fn run(
        mut self,
        raft: Raft<Types<R>, StateMachine<R>>,
        wall_clock_unix_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
        stop: Stop<R>,
    ) {
        let (done, mut answered) = R::Mpsc::channel::<()>(MAX_ENTRIES_IN_FLIGHT);
        let mut in_flight = 0;
        let mut left_over = None;
        loop {
            let turn = self.next(&mut left_over, &mut answered, &mut in_flight);
            let Some(Some(first)) = stop.or(turn).await else {
                break;
            };
            let (proposals, tellers) = self.collect(first, &mut left_over);
            let batch = pb::Batch {
                format: BATCH_FORMAT,
                leader_time_unix_ms: wall_clock_unix_ms(),
                proposals,
                ..pb::Batch::default()
            };
            let command = Command::new(batch.encode_to_vec());
            add(&self.metrics.entries_proposed_total, 1);
            let (responder, answer) = ProgressResponder::complete_only();
            let sent = raft.client_write_ff(command, Some(responder)).await;
            if sent.is_err() {
                tell_all(tellers, || Err(ProposeError::Stopped));
                break;
            }
            in_flight += 1;
            let (done, metrics) = (done.clone(), self.metrics.clone());
            spawn::<R>(async move {
                let answer = answer.await;
                // The next entry need not wait until everyone is told.
                let _stopped = done.send(()).await;
                match answer {
                    Ok(Ok(response)) => {
                        tell_results(tellers, response.log_id.leader_id.term, response.data)
                    }
                    Ok(Err(ClientWriteError::ForwardToLeader(forward))) => {
                        let leader = leader_of(forward);
                        tell_all(tellers, || {
                            Err(ProposeError::NotLeader {
                                leader: leader.clone(),
                            })
                        });
                    }
                    // Discarded, or the replica stops: it may be committed yet.
                    Ok(Err(_)) | Err(_) => {
                        add(&metrics.proposals_unknown_total, tellers.len());
                        tell_all(tellers, || Err(ProposeError::Unknown));
                    }
                }
            });
        }
        // Those still queued were never proposed.
        while let Ok(waiting) = self.queue.try_recv() {
            let _gone = waiting.teller.send(Err(ProposeError::Stopped));
        }
    }

    /// The first proposal of the next entry, once there is room for that entry.
    async fn next(
        &mut self,
        left_over: &mut Option<Waiting<R>>,
        answered: &mut Queue<R, ()>,
        in_flight: &mut usize,
    ) -> Option<Waiting<R>> {
        loop {
            while *in_flight >= MAX_ENTRIES_IN_FLIGHT {
                answered.recv().await?;
                *in_flight -= 1;
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
    ) -> (Vec<pb::Proposal>, Vec<(Teller<R>, Place)>) {
        let mut bytes = first.bytes;
        let mut proposals = vec![first.proposal];
        let mut tellers = vec![(first.teller, first.place)];
        while proposals.len() < MAX_BATCH_PROPOSALS {
            let Ok(next) = self.queue.try_recv() else {
                break;
            };
            if bytes + next.bytes > MAX_BATCH_BYTES {
                *left_over = Some(next);
                break;
            }
            bytes += next.bytes;
            proposals.push(next.proposal);
            tellers.push((next.teller, next.place));
        }
        (proposals, tellers)
    }
}

pub(crate) fn leader_of<R: AsyncRuntime>(
    forward: ForwardToLeader<Types<R>>,
) -> Option<(ReplicaId, Node)> {
    forward.leader_id.zip(forward.leader_node)
}

fn tell_all<S: OneshotSender<Told>>(tellers: Vec<(S, Place)>, told: impl Fn() -> Told) {
    for (teller, _place) in tellers {
        // Whoever asked may be gone.
        let _gone = teller.send(told());
    }
}

fn tell_results<S: OneshotSender<Told>>(tellers: Vec<(S, Place)>, term: u64, answer: Answer) {
    let compact_revision = answer.compact_revision;
    let mut results = answer.results.into_iter();
    for (teller, _place) in tellers {
        let told = results.next().map_or(Err(ProposeError::Unknown), |result| {
            Ok(Committed {
                outcome: result.result,
                revision: result.revision,
                compact_revision,
                term,
            })
        });
        let _gone = teller.send(told);
    }
}
