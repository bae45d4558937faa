//! The watches of one gRPC stream: requests in, acknowledgements, events and progress out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::Event;
use clustermesh_api::etcd::rpc::watch_create_request::FilterType;
use clustermesh_api::etcd::rpc::watch_request::RequestUnion;
use clustermesh_api::etcd::rpc::{WatchCreateRequest, WatchRequest, WatchResponse};
use clustermesh_api::limits::{
    MAX_VALUE_BYTES, MAX_WATCHES_PER_STREAM, STREAM_MESSAGE_TARGET_BYTES,
};
use clustermesh_core::auth::Access;
use clustermesh_core::{EventKind, KeyRange, KvError};
use clustermesh_process::Drain;
use clustermesh_raft::{WatchEnd, WatchEvents, WatchItem, WatchSpec};
use futures_util::FutureExt;
use prost::Message;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tonic::{Status, Streaming};

use crate::auth::{Caller, PERMISSION_DENIED};
use crate::etcd::lease::server_stopped;
use crate::metrics::WatchMetrics;
use crate::store::{AuthChanges, Store, TokioWatcher};

/// A quiet watch with `progress_notify` hears of the revision this often (etcd's `watch-progress-notify-interval`).
const PROGRESS_NOTIFY_INTERVAL: Duration = Duration::from_secs(600);
/// A stream that must not outlive the leader looks for it this often.
const LEADER_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Watches of all streams of this server.
const MAX_WATCHES: i64 = 262_144;
/// Below so many watches of a stream, ended ones are not looked for.
const LOOK_FOR_ENDED_WATCHES_MIN: usize = 64;
/// Id in responses that belong to no watch or to all.
const NO_WATCH_ID: i64 = -1;
/// A fragment has at most so many bytes of events (etcd's default request limit and 512 KiB).
const FRAGMENT_BYTES: usize = MAX_VALUE_BYTES + (512 << 10);

type Responses = mpsc::Sender<Result<WatchResponse, Status>>;

/// All watches of one stream.
#[derive(Debug)]
pub(super) struct WatchStream {
    store: Store,
    caller: Arc<Caller>,
    metrics: WatchMetrics,
    responses: Responses,
    watches: BTreeMap<i64, ActiveWatch>,
    /// Ids of watches that ended by themselves: taken, as in etcd, until the client cancels them.
    ended: BTreeSet<i64>,
    /// Number of watches at which ended ones are looked for: seldom enough to cost little per watch.
    look_for_ended_at: usize,
    next_id: i64,
    /// Rung by watches when they have passed a revision.
    passed: Arc<Notify>,
    /// Revision that a progress request waits for.
    progress_wanted: Option<i64>,
    /// The client wants to hear when there is no leader.
    needs_leader: bool,
}

#[derive(Debug)]
struct ActiveWatch {
    /// Everything up to this revision is queued for the client.
    passed: Arc<AtomicI64>,
    /// Rung to make the watch find out how far it is.
    asked: Arc<Notify>,
    task: JoinHandle<()>,
    metrics: WatchMetrics,
}

impl Drop for ActiveWatch {
    fn drop(&mut self) {
        self.task.abort();
        self.metrics.watches.dec();
    }
}

/// The client is gone.
struct Gone;

impl WatchStream {
    pub(super) fn new(
        store: Store,
        caller: Arc<Caller>,
        metrics: WatchMetrics,
        responses: Responses,
        needs_leader: bool,
    ) -> Self {
        Self {
            store,
            caller,
            metrics,
            responses,
            watches: BTreeMap::new(),
            ended: BTreeSet::new(),
            look_for_ended_at: LOOK_FOR_ENDED_WATCHES_MIN,
            next_id: 0,
            passed: Arc::new(Notify::new()),
            progress_wanted: None,
            needs_leader,
        }
    }

    /// Until the client is gone, or the drain begins. A client that only sends no more requests keeps its watches.
    pub(super) async fn run(
        mut self,
        mut requests: Streaming<WatchRequest>,
        drain: &Drain,
    ) -> Result<(), Status> {
        let passed = Arc::clone(&self.passed);
        let mut more_requests = true;
        let mut leader = tokio::time::interval(LEADER_CHECK_INTERVAL);
        loop {
            let handled = tokio::select! {
                request = requests.message(), if more_requests => match request? {
                    Some(request) => self.request(request).await,
                    None => {
                        more_requests = false;
                        Ok(())
                    }
                },
                _ = leader.tick(), if self.needs_leader => {
                    self.store.check_leader()?;
                    Ok(())
                }
                () = passed.notified(), if self.progress_wanted.is_some() => self.progress().await,
                () = self.responses.closed() => return Ok(()),
                () = drain.draining() => return Err(server_stopped()),
            };
            if handled.is_err() {
                return Ok(());
            }
        }
    }

    async fn request(&mut self, request: WatchRequest) -> Result<(), Gone> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => self.create(create).await,
            Some(RequestUnion::CancelRequest(cancel)) => self.cancel(cancel.watch_id).await,
            Some(RequestUnion::ProgressRequest(_)) => {
                self.progress_wanted = Some(self.store.revision());
                self.progress().await
            }
            // A newer client's request: etcd ignores it too.
            None => Ok(()),
        }
    }

    async fn create(&mut self, request: WatchCreateRequest) -> Result<(), Gone> {
        let (key, range_end) = range_of(&request);
        if request.start_revision < 0 {
            return self.refuse(KvError::Compacted.to_string()).await;
        }
        if !self.caller.may_read(&key, &range_end) {
            // etcd puts its error as Go prints it, and its clients compare that.
            let reason = format!("rpc error: code = PermissionDenied desc = {PERMISSION_DENIED}");
            return self.refuse(reason).await;
        }
        let store = self.store.for_user_now();
        let auth = AuthGuard {
            changes: store.auth_changes(),
            version: store.auth_version(),
            key: key.clone(),
            range_end: range_end.clone(),
        };
        if let Err(status) = auth.check(&store) {
            return self.refuse(cancel_reason(&status)).await;
        }
        // An end of one zero byte means: all keys from here.
        if !matches!(range_end.as_ref(), [] | [0]) && key >= range_end {
            return self.refuse("mvcc: watcher range is empty".to_owned()).await;
        }
        if self.watches.len() >= self.look_for_ended_at {
            self.put_ended_aside();
            self.look_for_ended_at =
                (2 * self.watches.len()).clamp(LOOK_FOR_ENDED_WATCHES_MIN, MAX_WATCHES_PER_STREAM);
        }
        if self.watches.len() >= MAX_WATCHES_PER_STREAM {
            let reason = format!(
                "clustermesh: {MAX_WATCHES_PER_STREAM} watches on one stream; open another stream"
            );
            return self.refuse(reason).await;
        }
        if self.metrics.watches.get() >= MAX_WATCHES {
            let reason =
                format!("clustermesh: {MAX_WATCHES} watches on this server; watch ranges instead");
            return self.refuse(reason).await;
        }
        let id = match request.watch_id {
            0 => {
                while self.is_taken(self.next_id) {
                    self.next_id += 1;
                }
                self.next_id += 1;
                self.next_id - 1
            }
            wanted if self.is_taken(wanted) => {
                return self
                    .refuse("mvcc: duplicate watch ID provided on the WatchStream".to_owned())
                    .await;
            }
            wanted => wanted,
        };
        let revision = self.store.revision();
        self.send(WatchResponse {
            watch_id: id,
            created: true,
            ..self.blank(revision)
        })
        .await?;
        let after = if request.start_revision > 0 {
            request.start_revision - 1
        } else {
            revision
        };
        let passed = Arc::new(AtomicI64::new(after.min(revision)));
        let asked = Arc::new(Notify::new());
        let task = WatchTask {
            id,
            auth,
            store,
            watcher: self.store.watch(WatchSpec {
                ranges: vec![KeyRange::new(&key, &range_end)],
                start_revision: after + 1,
                filter: None,
                cursors: false,
            }),
            asked: Arc::clone(&asked),
            filters: request.filters().collect(),
            prev_kv: request.prev_kv,
            fragment: request.fragment,
            progress_notify: request.progress_notify,
            quiet: false,
            responses: self.responses.clone(),
            metrics: self.metrics.clone(),
            passed: Arc::clone(&passed),
            notify: Arc::clone(&self.passed),
        };
        self.metrics.watches.inc();
        let task = tokio::spawn(task.run());
        let metrics = self.metrics.clone();
        self.watches.insert(
            id,
            ActiveWatch {
                passed,
                asked,
                task,
                metrics,
            },
        );
        Ok(())
    }

    /// A watch whose history was compacted, or that is not permitted any more, has ended by itself.
    fn put_ended_aside(&mut self) {
        let ended = self
            .watches
            .extract_if(.., |_, watch| watch.task.is_finished());
        self.ended.extend(ended.map(|(id, _)| id));
        while self.ended.len() > MAX_WATCHES_PER_STREAM {
            self.ended.pop_first();
        }
    }

    fn is_taken(&self, id: i64) -> bool {
        self.watches.contains_key(&id) || self.ended.contains(&id)
    }

    async fn cancel(&mut self, id: i64) -> Result<(), Gone> {
        if let Some(mut watch) = self.watches.remove(&id) {
            watch.task.abort();
            // After the answer no event of this watch may follow.
            let _ = (&mut watch.task).await;
        } else if !self.ended.remove(&id) {
            return Ok(());
        }
        self.send(WatchResponse {
            watch_id: id,
            canceled: true,
            ..self.blank(self.store.revision())
        })
        .await?;
        // It may have been the one that progress waited for.
        self.progress().await
    }

    /// Answers a progress request once every watch has handed out what it asks for.
    async fn progress(&mut self) -> Result<(), Gone> {
        let Some(wanted) = self.progress_wanted else {
            return Ok(());
        };
        self.put_ended_aside();
        let reached = self
            .watches
            .values()
            .map(|watch| watch.passed.load(Ordering::Acquire))
            .min();
        match reached {
            Some(reached) if reached < wanted => {
                // What was applied may not have been handed out when they were asked: nothing else may ever reach them.
                for watch in self.watches.values() {
                    if watch.passed.load(Ordering::Acquire) < wanted {
                        watch.asked.notify_one();
                    }
                }
                Ok(())
            }
            // As in etcd, a stream without a watch gets no answer.
            None => {
                self.progress_wanted = None;
                Ok(())
            }
            Some(reached) => {
                self.progress_wanted = None;
                self.send(WatchResponse {
                    watch_id: NO_WATCH_ID,
                    ..self.blank(reached.min(self.store.revision()))
                })
                .await
            }
        }
    }

    async fn refuse(&self, cancel_reason: String) -> Result<(), Gone> {
        self.send(WatchResponse {
            watch_id: NO_WATCH_ID,
            created: true,
            canceled: true,
            cancel_reason,
            ..self.blank(self.store.revision())
        })
        .await
    }

    fn blank(&self, revision: i64) -> WatchResponse {
        WatchResponse {
            header: Some(self.store.header(revision)),
            ..WatchResponse::default()
        }
    }

    async fn send(&self, response: WatchResponse) -> Result<(), Gone> {
        self.responses.send(Ok(response)).await.map_err(|_| Gone)
    }
}

/// etcd: an empty key means the first one.
fn range_of(request: &WatchCreateRequest) -> (Bytes, Bytes) {
    let key = if request.key.is_empty() {
        Bytes::from_static(&[0])
    } else {
        request.key.clone()
    };
    (key, request.range_end.clone())
}

/// Sees to it that a watch ends when its user may not read its range any more.
struct AuthGuard {
    changes: AuthChanges,
    /// Version of users and roles that was checked last.
    version: u64,
    key: Bytes,
    range_end: Bytes,
}

impl AuthGuard {
    fn check(&self, store: &Store) -> Result<(), Status> {
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
fn cancel_reason(status: &Status) -> String {
    format!(
        "rpc error: code = {:?} desc = {}",
        status.code(),
        status.message()
    )
}

struct WatchTask {
    id: i64,
    auth: AuthGuard,
    store: Store,
    watcher: TokioWatcher,
    asked: Arc<Notify>,
    filters: Vec<FilterType>,
    prev_kv: bool,
    fragment: bool,
    progress_notify: bool,
    /// The next progress goes to the client as such.
    quiet: bool,
    responses: Responses,
    metrics: WatchMetrics,
    passed: Arc<AtomicI64>,
    notify: Arc<Notify>,
}

impl WatchTask {
    async fn run(mut self) {
        let mut quiet = tokio::time::interval(PROGRESS_NOTIFY_INTERVAL);
        quiet.reset();
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
                _ = quiet.tick(), if self.progress_notify => {
                    self.quiet = true;
                    self.watcher.request_progress();
                    continue;
                }
            };
            let handled = match item {
                Ok(WatchItem::Events(events)) => {
                    quiet.reset();
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
        let mut events: Vec<Event> = Vec::new();
        let mut bytes = 0;
        let mut next = Some(WatchItem::Events(first));
        let mut revision = 0;
        let mut last = Ok(());
        while let Some(WatchItem::Events(group)) = next.take() {
            revision = group.revision();
            for event in group
                .events()
                .filter(|event| !self.is_filtered(event.kind()))
            {
                bytes += event.encoded().len();
                events.push(event.to_event(self.prev_kv));
            }
            if bytes >= STREAM_MESSAGE_TARGET_BYTES {
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
        if !events.is_empty() {
            self.metrics.events_sent.inc_by(events.len() as u64);
            self.send_events(revision, events).await?;
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
        let _ = self.responses.send(Ok(response)).await;
        self.pass(i64::MAX);
        Err(Gone)
    }

    async fn progress(&mut self, revision: i64) -> Result<(), Gone> {
        if std::mem::take(&mut self.quiet) {
            let response = self.blank(revision);
            self.responses.send(Ok(response)).await.map_err(|_| Gone)?;
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
                Ok(response)
            }
            WatchEnd::Stopped => Err(server_stopped()),
        };
        // The client may be gone already.
        let _ = self.responses.send(message).await;
        // Progress waits no longer for this one.
        self.pass(i64::MAX);
    }

    fn is_filtered(&self, kind: EventKind) -> bool {
        let filter = match kind {
            EventKind::Put => FilterType::Noput,
            EventKind::Delete => FilterType::Nodelete,
        };
        self.filters.contains(&filter)
    }

    async fn send_events(&self, revision: i64, events: Vec<Event>) -> Result<(), Gone> {
        let parts = if self.fragment {
            fragments(events)
        } else {
            vec![events]
        };
        let last = parts.len().saturating_sub(1);
        for (index, events) in parts.into_iter().enumerate() {
            let mut response = self.blank(revision);
            response.events = events;
            response.fragment = index < last;
            self.responses.send(Ok(response)).await.map_err(|_| Gone)?;
        }
        Ok(())
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
