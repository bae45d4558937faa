//! Linearizable reads by ReadIndex, one round shared by all who wait; the leader is asked where another replica leads.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use openraft::{
    Raft, ReadPolicy,
    async_runtime::{
        AsyncRuntime, Instant, Mpsc, MpscReceiver, MpscSender, Oneshot, OneshotSender, Watch,
        WatchReceiver,
    },
    errors::{LinearizableReadError, RaftError},
};

use crate::{
    Types,
    config::{MAX_WAITING_READERS, READ_INDEX_TIMEOUT, ROUTE_RETRY_PAUSE},
    entries::leader_of,
    error::ReadError,
    forward::Router,
    metrics::{Metrics, add},
    shared::Progress,
    state_machine::StateMachine,
    task::{Stop, spawn},
    wire::{ReadIndex, call_request::Call, call_response::Answer},
};

type Teller<R> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Sender<Result<(), ReadError>>;

/// The asking end.
pub(crate) struct Readers<R: AsyncRuntime> {
    queue: <R::Mpsc as Mpsc>::Sender<Teller<R>>,
    waiting: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
    raft: Raft<Types<R>, StateMachine<R>>,
    progress: <R::Watch as Watch>::Receiver<Progress>,
}

impl<R: AsyncRuntime> Clone for Readers<R> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            waiting: self.waiting.clone(),
            metrics: self.metrics.clone(),
            raft: self.raft.clone(),
            progress: self.progress.clone(),
        }
    }
}

struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<R: AsyncRuntime> Readers<R> {
    pub(crate) async fn linearize(&self) -> Result<(), ReadError> {
        #[cfg(feature = "mutants")]
        if crate::mutants::is(crate::mutants::Mutant::ReadWithoutIndex) {
            return Ok(());
        }
        add(&self.metrics.linearizable_reads_total, 1);
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _place = Place(self.waiting.clone());
        if before >= MAX_WAITING_READERS {
            return Err(ReadError::QueueFull {
                limit: MAX_WAITING_READERS,
            });
        }
        let (teller, answer) = R::Oneshot::channel();
        self.queue
            .send(teller)
            .await
            .map_err(|_| ReadError::Stopped)?;
        answer.await.unwrap_or(Err(ReadError::Stopped))
    }

    /// The index that a read must wait for, if this replica leads.
    pub(crate) async fn leader_index(&self) -> Result<u64, ReadError> {
        leader_index(&self.raft).await
    }

    /// Returns once this index is applied here.
    pub(crate) async fn wait_applied(&self, index: u64) -> Result<(), ReadError> {
        let mut progress = self.progress.clone();
        let applied = progress.wait_until(|progress| progress.next_index > index);
        applied.await.map(drop).map_err(|_| ReadError::Stopped)
    }
}

pub(crate) struct ReadIndexer<R: AsyncRuntime> {
    queue: <R::Mpsc as Mpsc>::Receiver<Teller<R>>,
    metrics: Arc<Metrics>,
}

impl<R: AsyncRuntime> ReadIndexer<R> {
    pub(crate) fn new(
        metrics: Arc<Metrics>,
        raft: Raft<Types<R>, StateMachine<R>>,
        progress: <R::Watch as Watch>::Receiver<Progress>,
    ) -> (Readers<R>, Self) {
        let (sender, queue) = R::Mpsc::channel(MAX_WAITING_READERS);
        (
            Readers {
                queue: sender,
                waiting: Arc::default(),
                metrics: metrics.clone(),
                raft,
                progress,
            },
            Self { queue, metrics },
        )
    }

    pub(crate) async fn run(mut self, router: Arc<Router<R>>, timeout: Duration, stop: Stop<R>) {
        while let Some(Some(first)) = stop.or(self.queue.recv()).await {
            let mut tellers = vec![first];
            while let Ok(next) = self.queue.try_recv() {
                tellers.push(next);
            }
            add(&self.metrics.read_index_rounds_total, 1);
            // Those who come while this round runs share the next one: this round's index may be older than they are.
            let Some(round) = stop.or(read_index(&router, timeout)).await else {
                return;
            };
            let index = match round {
                Ok(index) => index,
                Err(error) => {
                    tell_all(tellers, &Err(error));
                    continue;
                }
            };
            if router.progress.borrow_watched().next_index > index {
                tell_all(tellers, &Ok(()));
                continue;
            }
            let (mut progress, stop) = (router.progress.clone(), stop.clone());
            spawn::<R>(async move {
                let applied = progress.wait_until(|progress| progress.next_index > index);
                let told = match stop.or(applied).await {
                    Some(Ok(_)) => Ok(()),
                    Some(Err(_)) | None => Err(ReadError::Stopped),
                };
                tell_all(tellers, &told);
            });
        }
    }
}

/// The index that a read must wait for, from whoever leads; tried again while leadership changes.
async fn read_index<R: AsyncRuntime>(
    router: &Router<R>,
    timeout: Duration,
) -> Result<u64, ReadError> {
    let deadline = R::Instant::now() + timeout;
    loop {
        let question = Call::ReadIndex(ReadIndex {});
        let told = match router
            .ask_leader(&question, deadline, READ_INDEX_TIMEOUT)
            .await
        {
            Ok(Some(Answer::ReadIndex(answer))) => return Ok(answer.index),
            Ok(Some(_)) => Err(ReadError::NoQuorum),
            Ok(None) => leader_index(&router.raft).await,
            Err(error) => Err(error),
        };
        match told {
            Ok(index) => return Ok(index),
            Err(ReadError::Stopped) => return Err(ReadError::Stopped),
            Err(error) if R::Instant::now() >= deadline => return Err(error),
            Err(_) => {
                let own = Some(router.own);
                if !router.other_leader(own, ROUTE_RETRY_PAUSE).await {
                    return Err(ReadError::Stopped);
                }
            }
        }
    }
}

async fn leader_index<R: AsyncRuntime>(
    raft: &Raft<Types<R>, StateMachine<R>>,
) -> Result<u64, ReadError> {
    let round = raft.get_read_log_id(ReadPolicy::ReadIndex).await;
    round
        .map(|(read_log_id, _)| read_log_id.index())
        .map_err(read_error)
}

fn tell_all<S: OneshotSender<Result<(), ReadError>>>(
    tellers: Vec<S>,
    told: &Result<(), ReadError>,
) {
    for teller in tellers {
        // Whoever asked may be gone.
        let _gone = teller.send(told.clone());
    }
}

fn read_error<R: AsyncRuntime>(
    error: RaftError<Types<R>, LinearizableReadError<Types<R>>>,
) -> ReadError {
    match error {
        RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)) => {
            ReadError::NotLeader {
                leader: leader_of(forward),
            }
        }
        RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) => ReadError::NoQuorum,
        RaftError::Fatal(_) => ReadError::Stopped,
    }
}
