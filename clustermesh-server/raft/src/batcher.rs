//! Collects proposals into log entries: no delay when idle, larger entries under load. What another replica leads goes there.

use std::{sync::Arc, time::Duration};

use openraft::async_runtime::{AsyncRuntime, Mpsc, MpscReceiver, MpscSender, Select2};

use crate::{
    config::{
        MAX_BATCH_BYTES, MAX_BATCH_PROPOSALS, MAX_ENTRIES_IN_FLIGHT, MAX_FORWARDS_IN_FLIGHT,
        MAX_WAITING_PROPOSALS,
    },
    error::ProposeError,
    forward::Router,
    metrics::Metrics,
    proposal::{Proposer, Waiting},
    task::{Stop, spawn},
};

type Queue<R, T> = <<R as AsyncRuntime>::Mpsc as Mpsc>::Receiver<T>;
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
