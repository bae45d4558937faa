//! Collects proposals into log entries: no delay when idle, larger entries under load. What another replica leads goes there.

use std::{sync::Arc, time::Duration};

use openraft::async_runtime::{AsyncRuntime, Instant, Mpsc, MpscReceiver, MpscSender, Select2};

use crate::{
    config::{
        MAX_BATCH_BYTES, MAX_BATCH_PROPOSALS, MAX_ENTRIES_IN_FLIGHT, MAX_FORWARDS_IN_FLIGHT,
        MAX_WAITING_PROPOSALS, PIPELINED_BATCH_PROPOSALS, PIPELINED_BATCH_WAIT,
    },
    error::ProposeError,
    forward::Router,
    metrics::Metrics,
    proposal::{Proposer, Waiting},
    task::{Stop, spawn},
};

type Queue<R, T> = <<R as AsyncRuntime>::Mpsc as Mpsc>::Receiver<T>;

/// Proposals for the next entry, within its limits.
struct Gathered<R: AsyncRuntime> {
    batch: Vec<Waiting<R>>,
    bytes: usize,
    /// Would have made the batch too large.
    left_over: Option<Waiting<R>>,
}

impl<R: AsyncRuntime> Gathered<R> {
    const fn new() -> Self {
        Self {
            batch: Vec::new(),
            bytes: 0,
            left_over: None,
        }
    }

    fn is_full(&self) -> bool {
        self.left_over.is_some()
            || self.batch.len() >= MAX_BATCH_PROPOSALS
            || self.bytes >= MAX_BATCH_BYTES
    }

    /// Whether an entry of its own, while another is on its way, costs less than waiting brings.
    fn is_worth_an_entry(&self) -> bool {
        self.is_full() || self.batch.len() >= PIPELINED_BATCH_PROPOSALS
    }

    fn push(&mut self, waiting: Waiting<R>) {
        if !self.batch.is_empty() && self.bytes + waiting.bytes > MAX_BATCH_BYTES {
            self.left_over = Some(waiting);
        } else {
            self.bytes += waiting.bytes;
            self.batch.push(waiting);
        }
    }

    /// The batch; what was too much for it begins the next one.
    fn take(&mut self) -> Vec<Waiting<R>> {
        self.bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        if let Some(left_over) = self.left_over.take() {
            self.push(left_over);
        }
        batch
    }
}

pub(crate) struct Batcher<R: AsyncRuntime> {
    queue: Queue<R, Waiting<R>>,
}

impl<R: AsyncRuntime> Batcher<R> {
    pub(crate) fn new(metrics: Arc<Metrics>, timeout: Duration) -> (Proposer<R>, Self) {
        let (sender, queue) = R::Mpsc::channel(MAX_WAITING_PROPOSALS);
        (Proposer::new(sender, metrics, timeout), Self { queue })
    }

    pub(crate) async fn run(mut self, router: Arc<Router<R>>, stop: Stop<R>) {
        let (done, mut answered) = R::Mpsc::channel::<()>(MAX_FORWARDS_IN_FLIGHT);
        let mut in_flight = 0;
        let mut gathered = Gathered::new();
        loop {
            let turn = self.gather(&mut gathered, &mut answered, &mut in_flight, &router);
            if stop.or(turn).await != Some(true) {
                break;
            }
            let batch = gathered.take();
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
        let left_over = gathered.left_over.into_iter();
        for waiting in gathered.batch.into_iter().chain(left_over) {
            waiting.tell(Err(ProposeError::Stopped));
        }
        while let Ok(waiting) = self.queue.try_recv() {
            waiting.tell(Err(ProposeError::Stopped));
        }
    }

    /// Gathers the next entry until it may begin; false once nobody can propose any more.
    ///
    /// An entry costs three replicas messages, wake-ups and a sync each, whatever is in it: the next one begins when none
    /// is on its way, when enough for one waits, or when some have waited for long.
    async fn gather(
        &mut self,
        gathered: &mut Gathered<R>,
        answered: &mut Queue<R, ()>,
        in_flight: &mut usize,
        router: &Router<R>,
    ) -> bool {
        let waits = |gathered: &Gathered<R>| !gathered.batch.is_empty();
        let soon = || R::Instant::now() + PIPELINED_BATCH_WAIT;
        let mut late = waits(gathered).then(soon);
        let mut overdue = false;
        loop {
            while !gathered.is_full()
                && let Ok(next) = self.queue.try_recv()
            {
                gathered.push(next);
            }
            let leads = router.leads();
            let limit = if leads {
                MAX_ENTRIES_IN_FLIGHT
            } else {
                MAX_FORWARDS_IN_FLIGHT
            };
            if waits(gathered) {
                late.get_or_insert_with(soon);
            }
            let may_begin = if *in_flight == 0 || !leads || overdue {
                waits(gathered)
            } else {
                gathered.is_worth_an_entry()
            };
            if may_begin && *in_flight < limit {
                return true;
            }
            if may_begin {
                if answered.recv().await.is_none() {
                    return false;
                }
                *in_flight = in_flight.saturating_sub(1);
                continue;
            }
            let told = R::select2(answered.recv(), self.queue.recv());
            let told = match late {
                Some(late) => R::timeout_at(late, told).await,
                None => Ok(told.await),
            };
            match told {
                Ok(Select2::First(_)) => *in_flight = in_flight.saturating_sub(1),
                Ok(Select2::Second(Some(waiting))) => gathered.push(waiting),
                Ok(Select2::Second(None)) => return false,
                // The entry on its way may wait for a quorum that is gone.
                Err(_) => overdue = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::task::{JoinSet, yield_now};

    use super::*;
    use crate::{
        Data, MemoryData, Replica,
        test_support::{R, config, put},
    };

    /// Longer than everything else here takes.
    const SYNC_MS: u64 = 4000;

    fn entries(replica: &Replica<R>) -> u64 {
        let metrics = replica.metrics();
        metrics.entries_proposed_total.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn few_are_not_worth_an_entry_beside_another_and_many_are() {
        let (proposer, mut batcher) = Batcher::<R>::new(Arc::default(), Duration::from_secs(60));
        let mut running = JoinSet::new();
        let mut gathered = Gathered::new();
        for number in 1..=PIPELINED_BATCH_PROPOSALS {
            let proposer = proposer.clone();
            running.spawn(async move { proposer.propose(put("k", "v", 0)).await });
            gathered.push(batcher.queue.recv().await.unwrap());
            assert_eq!(
                gathered.is_worth_an_entry(),
                number == PIPELINED_BATCH_PROPOSALS
            );
        }
        assert_eq!(gathered.take().len(), PIPELINED_BATCH_PROPOSALS);
        // Two that are too large together: the second begins the next entry.
        for _ in 0..2 {
            let proposer = proposer.clone();
            let large = put("k", vec![0; MAX_BATCH_BYTES * 2 / 3], 0);
            running.spawn(async move { proposer.propose(large).await });
            assert!(!gathered.is_worth_an_entry());
            gathered.push(batcher.queue.recv().await.unwrap());
        }
        assert!(gathered.is_worth_an_entry());
        assert_eq!(gathered.take().len(), 1);
        assert_eq!(gathered.batch.len(), 1);
    }

    #[tokio::test]
    async fn a_few_do_not_wait_for_ever_for_an_entry_on_its_way() {
        let sync_ms = Arc::new(AtomicU64::new(0));
        let slow = sync_ms.clone();
        let data = MemoryData::on_disk(move || Duration::from_millis(slow.load(Ordering::Relaxed)));
        let replica = Replica::<R>::start(config(Data::Memory(data)))
            .await
            .unwrap();
        sync_ms.store(SYNC_MS, Ordering::Relaxed);
        let mut running = JoinSet::new();
        let before = entries(&replica);
        for number in 1..=2 {
            let proposing = replica.clone();
            running.spawn(async move { proposing.propose(put("k", "v", 0)).await });
            while entries(&replica) < before + number {
                yield_now().await;
            }
        }
        sync_ms.store(0, Ordering::Relaxed);
        assert!(
            running.try_join_next().is_none(),
            "the first was on its way"
        );
        while let Some(done) = running.join_next().await {
            done.unwrap().unwrap();
        }
        replica.shutdown().await;
    }
}
