//! A proposal on its way: who waits for it, and the sending end of the queue that it goes into.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clustermesh_core::{pb, pb::proposal::Command as CoreCommand};
use clustermesh_store::ReplicaId;
use openraft::async_runtime::{AsyncRuntime, Instant, Mpsc, MpscSender, Oneshot, OneshotSender};
use parking_lot::Mutex;
use prost::Message;
use rand::Rng;

use crate::{
    answer::Committed,
    config::{MAX_PROPOSAL_BYTES, MAX_WAITING_PROPOSALS},
    error::ProposeError,
    metrics::{Metrics, add, sub},
    wire::Forward,
};

pub(crate) type Told = Result<Committed, ProposeError>;
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
    pub(crate) bytes: usize,
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
    /// Puts proposals into `queue`; one without outcome after `timeout` is given up.
    pub(crate) fn new(
        queue: <R::Mpsc as Mpsc>::Sender<Waiting<R>>,
        metrics: Arc<Metrics>,
        timeout: Duration,
    ) -> Self {
        Self {
            queue,
            taken: Arc::default(),
            metrics,
            timeout,
        }
    }

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
