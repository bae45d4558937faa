//! One watch: what it gets becomes messages, for as long as its user may read its range.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::Event;
use clustermesh_api::etcd::rpc::WatchResponse;
use clustermesh_api::limits::{MAX_VALUE_BYTES, STREAM_MESSAGE_TARGET_BYTES};
use clustermesh_core::auth::Access;
use clustermesh_raft::{WatchEnd, WatchEvents, WatchItem};
use futures_util::FutureExt;
use prost::Message;
use tokio::sync::Notify;
use tokio::time::Interval;
use tonic::Status;

use super::message::{Batch, Wanted, WatchMessage};
use super::{Gone, Responses};
use crate::etcd::lease::server_stopped;
use crate::metrics::WatchMetrics;
use crate::store::{AuthChanges, Store, TokioWatcher};

/// A fragment has at most so many bytes of events (etcd's default request limit and 512 KiB).
const FRAGMENT_BYTES: usize = MAX_VALUE_BYTES + (512 << 10);

/// Sees to it that a watch ends when its user may not read its range any more.
pub(super) struct AuthGuard {
    pub(super) changes: AuthChanges,
    /// Version of users and roles that was checked last.
    pub(super) version: u64,
    pub(super) key: Bytes,
    pub(super) range_end: Bytes,
}

impl AuthGuard {
    pub(super) fn check(&self, store: &Store) -> Result<(), Status> {
        store.permit(|state, actor| {
            state
                .auth()
                .check_range(actor, &self.key, &self.range_end, Access::Read)
        })
    }

    /// As [`AuthGuard::check`], only when something changed since.
    fn check_changed(&mut self, store: &Store) -> Result<(), Status> {
        let version = store.auth_version();
        if version == self.version {
            return Ok(());
        }
        self.version = version;
        self.check(store)
    }
}

/// How etcd puts an error into the reason of a cancelled watch.
pub(super) fn cancel_reason(status: &Status) -> String {
    format!(
        "rpc error: code = {:?} desc = {}",
        status.code(),
        status.message()
    )
}

/// Never without a timer.
async fn ticked(timer: &mut Option<Interval>) {
    match timer {
        Some(timer) => drop(timer.tick().await),
        None => std::future::pending().await,
    }
}

pub(super) struct WatchTask {
    pub(super) id: i64,
    pub(super) auth: AuthGuard,
    pub(super) store: Store,
    pub(super) watcher: TokioWatcher,
    pub(super) asked: Arc<Notify>,
    pub(super) wanted: Wanted,
    pub(super) fragment: bool,
    /// So often a quiet watch tells its revision, where the client wants that.
    pub(super) progress_notify: Option<Duration>,
    /// The next progress goes to the client as such.
    pub(super) quiet: bool,
    pub(super) responses: Responses,
    pub(super) metrics: WatchMetrics,
    pub(super) passed: Arc<AtomicI64>,
    pub(super) notify: Arc<Notify>,
}

impl WatchTask {
    pub(super) async fn run(mut self) {
        // A timer costs something with every message, and few clients want it.
        let mut quiet = self.progress_notify.map(|period| {
            let mut quiet = tokio::time::interval(period);
            quiet.reset();
            quiet
        });
        loop {
            let item = tokio::select! {
                biased;
                there = self.auth.changes.changed() => {
                    if !there || self.still_permitted().await.is_err() {
                        return;
                    }
                    continue;
                }
                item = self.watcher.next() => item,
                () = self.asked.notified() => {
                    self.watcher.request_progress();
                    continue;
                }
                () = ticked(&mut quiet), if quiet.is_some() => {
                    self.quiet = true;
                    self.watcher.request_progress();
                    continue;
                }
            };
            let handled = match item {
                Ok(WatchItem::Events(events)) => {
                    if let Some(quiet) = &mut quiet {
                        quiet.reset();
                    }
                    self.events(events).await
                }
                Ok(WatchItem::Progress { revision }) => self.progress(revision).await,
                // Not asked for.
                Ok(WatchItem::Cursor { .. }) => Ok(()),
                Err(end) => {
                    self.end(end).await;
                    return;
                }
            };
            if handled.is_err() {
                return;
            }
        }
    }

    /// Sends a revision's events; those of later revisions that are ready join them.
    async fn events(&mut self, first: WatchEvents) -> Result<(), Gone> {
        let mut batch = Batch::new(self.wanted);
        let mut next = Some(WatchItem::Events(first));
        let mut revision = 0;
        let mut last = Ok(());
        while let Some(WatchItem::Events(group)) = next.take() {
            revision = group.revision();
            batch.push(group);
            if batch.bytes() >= STREAM_MESSAGE_TARGET_BYTES {
                break;
            }
            match self.watcher.next().now_or_never() {
                Some(Ok(item)) => next = Some(item),
                Some(Err(end)) => last = Err(end),
                None => {}
            }
            if matches!(
                next,
                Some(WatchItem::Progress { .. } | WatchItem::Cursor { .. })
            ) {
                break;
            }
        }
        // What changed the permission was applied before whatever came after it.
        self.still_permitted().await?;
        if batch.len() > 0 {
            self.metrics.events_sent.inc_by(batch.len() as u64);
            self.send_events(revision, batch).await?;
        }
        self.pass(revision);
        if let Err(end) = last {
            self.end(end).await;
            return Err(Gone);
        }
        if let Some(WatchItem::Progress { revision }) = next {
            return self.progress(revision).await;
        }
        Ok(())
    }

    /// Ends the watch when its user may not read its range any more.
    async fn still_permitted(&mut self) -> Result<(), Gone> {
        let Err(status) = self.auth.check_changed(&self.store) else {
            return Ok(());
        };
        let mut response = self.blank(self.store.revision());
        response.canceled = true;
        response.cancel_reason = cancel_reason(&status);
        // The client may be gone already.
        let _ = self.send(response.into()).await;
        self.pass(i64::MAX);
        Err(Gone)
    }

    async fn progress(&mut self, revision: i64) -> Result<(), Gone> {
        if std::mem::take(&mut self.quiet) {
            let response = self.blank(revision);
            self.send(response.into()).await?;
        }
        self.pass(revision);
        Ok(())
    }

    fn pass(&self, revision: i64) {
        self.passed.fetch_max(revision, Ordering::AcqRel);
        self.notify.notify_one();
    }

    async fn end(&self, end: WatchEnd) {
        let message = match end {
            WatchEnd::Compacted { compact_revision } => {
                // etcd's header names no revision here.
                let mut response = self.blank(0);
                response.canceled = true;
                response.compact_revision = compact_revision;
                Ok(response.into())
            }
            WatchEnd::Stopped => Err(server_stopped()),
        };
        // The client may be gone already.
        let _ = self.responses.send(message).await;
        // Progress waits no longer for this one.
        self.pass(i64::MAX);
    }

    async fn send_events(&self, revision: i64, batch: Batch) -> Result<(), Gone> {
        if !self.fragment || batch.bytes() <= FRAGMENT_BYTES {
            return self
                .send(WatchMessage::new(self.blank(revision), batch))
                .await;
        }
        let parts = fragments(batch.to_events());
        let last = parts.len().saturating_sub(1);
        for (index, events) in parts.into_iter().enumerate() {
            let mut response = self.blank(revision);
            response.events = events;
            response.fragment = index < last;
            self.send(response.into()).await?;
        }
        Ok(())
    }

    async fn send(&self, message: WatchMessage) -> Result<(), Gone> {
        self.responses.send(Ok(message)).await.map_err(|_| Gone)
    }

    fn blank(&self, revision: i64) -> WatchResponse {
        WatchResponse {
            header: Some(self.store.header(revision)),
            watch_id: self.id,
            ..WatchResponse::default()
        }
    }
}

/// Cuts a batch into parts of at most [`FRAGMENT_BYTES`], at least one event each.
fn fragments(events: Vec<Event>) -> Vec<Vec<Event>> {
    let mut parts: Vec<Vec<Event>> = Vec::new();
    let mut bytes = 0;
    for event in events {
        let size = event.encoded_len();
        match parts.last_mut() {
            Some(part) if bytes + size <= FRAGMENT_BYTES => {
                bytes += size;
                part.push(event);
            }
            _ => {
                bytes = size;
                parts.push(vec![event]);
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use clustermesh_api::etcd::mvcc::KeyValue;

    use super::*;

    #[test]
    fn fragments_keep_order_and_bound_their_size() {
        let event = |index: u8| Event {
            kv: Some(KeyValue {
                key: Bytes::from(vec![index]),
                value: vec![0; FRAGMENT_BYTES / 3].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let parts = fragments((0..7).map(event).collect());
        assert!(parts.len() > 2);
        for part in &parts {
            assert!(part.iter().map(Message::encoded_len).sum::<usize>() <= FRAGMENT_BYTES);
        }
        let keys: Vec<u8> = parts
            .iter()
            .flatten()
            .map(|event| event.kv.as_ref().unwrap().key[0])
            .collect();
        assert_eq!(keys, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(fragments(vec![event(0)]).len(), 1);
    }
}
