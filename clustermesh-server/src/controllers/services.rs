//! The service join: follows the store, writes endpoint slices at once and service records at most once a second each.

use std::time::{Duration, Instant};

use clustermesh_api::etcd::rpc::{
    DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, request_op,
};
use clustermesh_api::keys::{OWN_PREFIX, STATE_PREFIX};
use clustermesh_core::{EventKind, KeyRange};
use clustermesh_mesh::services::{Change, ServiceJoin};
use clustermesh_mesh::{ClusterSettings, prefix_end};
use clustermesh_process::Drain;
use clustermesh_raft::{WatchItem, WatchSpec};
use futures_util::FutureExt;
use std::sync::Arc;
use tracing::warn;

use crate::metrics::{ControllerLabels, ControllerMetrics};
use crate::store::{Store, TokioWatcher};
use crate::view::StateView;

/// Events taken before what they caused is written: bounds the delay of the first one.
const MAX_EVENT_GROUPS_PER_ROUND: usize = 1_024;
/// Records of one transaction.
const MAX_CHANGES_PER_TXN: usize = 512;
/// Bytes of values of one transaction.
const MAX_BYTES_PER_TXN: usize = 1 << 20;
/// What another leader left undone is written so long after this replica leads, at most.
const LEADER_POLL: Duration = Duration::from_millis(500);
/// Pause before failed writes are made again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Runs until the drain begins; begins anew when the watch was compacted away.
pub async fn run(
    store: Store,
    settings: Arc<ClusterSettings>,
    metrics: ControllerMetrics,
    drain: Drain,
) {
    loop {
        let round = Round::new(&store, &settings, &metrics);
        tokio::select! {
            () = round.run() => {}
            () = drain.draining() => return,
        }
        failed(&metrics);
        tokio::select! {
            () = tokio::time::sleep(RETRY_PAUSE) => {}
            () = drain.draining() => return,
        }
    }
}

struct Round<'a> {
    store: &'a Store,
    metrics: &'a ControllerMetrics,
    join: ServiceJoin,
    watcher: TokioWatcher,
    epoch: Instant,
    /// Failed writes wait until then.
    not_before: Option<Instant>,
}

impl<'a> Round<'a> {
    fn new(store: &'a Store, settings: &ClusterSettings, metrics: &'a ControllerMetrics) -> Self {
        let (join, revision) = store.read(|state| {
            let join = ServiceJoin::from_view(settings.clone(), &StateView(state));
            (join, state.revision())
        });
        let prefix =
            |prefix: &'static str| KeyRange::Between(prefix.into(), prefix_end(prefix.as_bytes()));
        Self {
            watcher: store.watch(WatchSpec {
                ranges: vec![prefix(STATE_PREFIX), prefix(OWN_PREFIX)],
                start_revision: revision + 1,
                filter: None,
                cursors: false,
            }),
            store,
            metrics,
            join,
            epoch: Instant::now(),
            not_before: None,
        }
    }

    /// Until the watch ends.
    async fn run(mut self) {
        loop {
            self.write().await;
            let wait = self.next_due();
            let item = tokio::select! {
                item = self.watcher.next() => item,
                () = tokio::time::sleep(wait) => continue,
            };
            let mut next = Some(item);
            let mut groups = 0;
            while let Some(item) = next.take() {
                match item {
                    Ok(WatchItem::Events(events)) => {
                        for event in events.events() {
                            let is_put = event.kind() == EventKind::Put;
                            let value = is_put.then(|| event.kv().value_bytes());
                            self.join.handle(event.key(), value);
                        }
                    }
                    Ok(WatchItem::Cursor { .. } | WatchItem::Progress { .. }) => {}
                    Err(end) => {
                        warn!(%end, "service join begins anew");
                        return;
                    }
                }
                groups += 1;
                if groups < MAX_EVENT_GROUPS_PER_ROUND {
                    next = self.watcher.next().now_or_never();
                }
            }
        }
    }

    fn now_ms(&self) -> i64 {
        i64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    /// Time until something waits to be written.
    fn next_due(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(3_600);
        if !self.store.is_leader() {
            return LEADER_POLL;
        }
        if let Some(not_before) = self.not_before {
            return not_before.saturating_duration_since(Instant::now());
        }
        match self.join.services_due_ms() {
            Some(due) => {
                Duration::from_millis(u64::try_from(due.saturating_sub(self.now_ms())).unwrap_or(0))
            }
            None => IDLE,
        }
    }

    async fn write(&mut self) {
        if self
            .not_before
            .is_some_and(|not_before| Instant::now() < not_before)
            || !self.store.is_leader()
        {
            return;
        }
        self.not_before = None;
        let mut changes = self.join.take_slices();
        changes.extend(self.join.take_services(self.now_ms()));
        let mut rest = changes.as_slice();
        while !rest.is_empty() {
            let (part, after) = rest.split_at(first_part(rest));
            if let Err(status) = self.store.txn_as_leader(request(part)).await {
                failed(self.metrics);
                warn!(
                    error = status.message(),
                    records = rest.len(),
                    "service records not written, will be tried again"
                );
                self.join.failed(rest);
                self.not_before = Some(Instant::now() + RETRY_PAUSE);
                return;
            }
            self.metrics.service_writes.inc_by(part.len() as u64);
            rest = after;
        }
    }
}

fn failed(metrics: &ControllerMetrics) {
    metrics
        .failures
        .get_or_create(&ControllerLabels {
            controller: "services".to_owned(),
        })
        .inc();
}

/// How many of the changes fit into one transaction, at least one.
fn first_part(changes: &[Change]) -> usize {
    let mut bytes = 0;
    let fitting = changes
        .iter()
        .take(MAX_CHANGES_PER_TXN)
        .take_while(|change| {
            bytes += change.key.len() + change.value.as_ref().map_or(0, bytes::Bytes::len);
            bytes <= MAX_BYTES_PER_TXN
        })
        .count();
    fitting.max(1)
}

fn request(changes: &[Change]) -> TxnRequest {
    let success = changes
        .iter()
        .map(|change| RequestOp {
            request: Some(match &change.value {
                Some(value) => request_op::Request::RequestPut(PutRequest {
                    key: change.key.clone(),
                    value: value.clone(),
                    ..PutRequest::default()
                }),
                None => request_op::Request::RequestDeleteRange(DeleteRangeRequest {
                    key: change.key.clone(),
                    ..DeleteRangeRequest::default()
                }),
            }),
        })
        .collect();
    TxnRequest {
        success,
        ..TxnRequest::default()
    }
}
