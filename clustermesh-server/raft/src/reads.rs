//! Linearizable reads by ReadIndex, one round shared by all who wait.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use openraft::{
    Raft, ReadPolicy,
    async_runtime::{
        AsyncRuntime, Mpsc, MpscReceiver, MpscSender, Oneshot, OneshotSender, Watch, WatchReceiver,
    },
    errors::{LinearizableReadError, RaftError},
};

use crate::{
    Types,
    batcher::leader_of,
    config::MAX_WAITING_READERS,
    error::ReadError,
    metrics::{Metrics, add},
    state_machine::{Progress, StateMachine},
    task::{Stop, spawn},
};

type Teller<R> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Sender<Result<(), ReadError>>;

/// The asking end.
pub(crate) struct Readers<R: AsyncRuntime> {
    queue: <R::Mpsc as Mpsc>::Sender<Teller<R>>,
    waiting: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

impl<R: AsyncRuntime> Clone for Readers<R> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            waiting: self.waiting.clone(),
            metrics: self.metrics.clone(),
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
}

pub(crate) struct ReadIndexer<R: AsyncRuntime> {
    queue: <R::Mpsc as Mpsc>::Receiver<Teller<R>>,
    metrics: Arc<Metrics>,
}

impl<R: AsyncRuntime> ReadIndexer<R> {
    pub(crate) fn new(metrics: Arc<Metrics>) -> (Readers<R>, Self) {
        let (sender, queue) = R::Mpsc::channel(MAX_WAITING_READERS);
        (
            Readers {
                queue: sender,
                waiting: Arc::default(),
                metrics: metrics.clone(),
            },
            Self { queue, metrics },
        )
    }

    pub(crate) async fn run(
        mut self,
        raft: Raft<Types<R>, StateMachine<R>>,
        progress: <R::Watch as Watch>::Receiver<Progress>,
        stop: Stop<R>,
    ) {
        while let Some(Some(first)) = stop.or(self.queue.recv()).await {
            let mut tellers = vec![first];
            while let Ok(next) = self.queue.try_recv() {
                tellers.push(next);
            }
            add(&self.metrics.read_index_rounds_total, 1);
            // Those who come while this round runs share the next one: this round's index may be older than they are.
            let Some(round) = stop.or(raft.get_read_log_id(ReadPolicy::ReadIndex)).await else {
                return;
            };
            let needed = match round {
                Ok((read_log_id, _)) => read_log_id.index() + 1,
                Err(error) => {
                    let error = read_error(error);
                    tell_all(tellers, &Err(error));
                    continue;
                }
            };
            if progress.borrow_watched().next_index >= needed {
                tell_all(tellers, &Ok(()));
                continue;
            }
            let (mut progress, stop) = (progress.clone(), stop.clone());
            spawn::<R>(async move {
                let applied = progress.wait_until(|progress| progress.next_index >= needed);
                let told = match stop.or(applied).await {
                    Some(Ok(_)) => Ok(()),
                    Some(Err(_)) | None => Err(ReadError::Stopped),
                };
                tell_all(tellers, &told);
            });
        }
    }
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
