//! The watches of one gRPC stream: requests in, acknowledgements, events and progress out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::watch_request::RequestUnion;
use clustermesh_api::etcd::rpc::{WatchCreateRequest, WatchRequest, WatchResponse};
use clustermesh_api::limits::MAX_WATCHES_PER_STREAM;
use clustermesh_core::{KeyRange, KvError};
use clustermesh_process::Drain;
use clustermesh_raft::WatchSpec;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tonic::{Status, Streaming};

use super::message::Wanted;
use super::task::{AuthGuard, WatchTask, cancel_reason};
use super::{Gone, Responses};
use crate::auth::{Caller, PERMISSION_DENIED};
use crate::etcd::lease::server_stopped;
use crate::metrics::WatchMetrics;
use crate::places::{Full, Place, Places};
use crate::store::Store;

/// A stream that must not outlive the leader looks for it this often.
const LEADER_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Watches of all streams of this server.
const MAX_WATCHES: usize = 262_144;
/// Those of one node or of one other cluster: they leave room for operators.
const MAX_WATCHES_OF_ONE: usize = 4_096;
/// Below so many watches of a stream, ended ones are not looked for.
const LOOK_FOR_ENDED_WATCHES_MIN: usize = 64;
/// Id in responses that belong to no watch or to all.
const NO_WATCH_ID: i64 = -1;

/// The places of all watches of a server.
pub(super) fn places() -> Places {
    Places::new(MAX_WATCHES, MAX_WATCHES_OF_ONE)
}

/// What holds for all watches of a stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// The client wants to hear when there is no leader.
    pub(super) needs_leader: bool,
    /// A quiet watch tells its revision this often, if it was asked to (etcd's `watch-progress-notify-interval`).
    pub(super) progress_notify_interval: Duration,
}

/// All watches of one stream.
#[derive(Debug)]
pub(super) struct WatchStream {
    store: Store,
    caller: Arc<Caller>,
    metrics: WatchMetrics,
    places: Places,
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
    manner: Manner,
}

#[derive(Debug)]
struct ActiveWatch {
    /// Everything up to this revision is queued for the client.
    passed: Arc<AtomicI64>,
    /// Rung to make the watch find out how far it is.
    asked: Arc<Notify>,
    task: JoinHandle<()>,
    metrics: WatchMetrics,
    _place: Place,
}

impl Drop for ActiveWatch {
    fn drop(&mut self) {
        self.task.abort();
        self.metrics.watches.dec();
    }
}

impl WatchStream {
    pub(super) fn new(
        store: Store,
        caller: Arc<Caller>,
        metrics: WatchMetrics,
        places: Places,
        responses: Responses,
        manner: Manner,
    ) -> Self {
        Self {
            store,
            caller,
            metrics,
            places,
            responses,
            watches: BTreeMap::new(),
            ended: BTreeSet::new(),
            look_for_ended_at: LOOK_FOR_ENDED_WATCHES_MIN,
            next_id: 0,
            passed: Arc::new(Notify::new()),
            progress_wanted: None,
            manner,
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
                _ = leader.tick(), if self.manner.needs_leader => {
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
        let place = match self.places.take(self.caller.holder()) {
            Ok(place) => place,
            Err(full) => {
                let (most, whose) = match full {
                    Full::All(most) => (most, "on this server"),
                    Full::OfOne(most) => (most, "of this certificate's holder"),
                };
                let reason = format!("clustermesh: {most} watches {whose}; watch ranges instead");
                return self.refuse(reason).await;
            }
        };
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
            wanted: Wanted::of(&request),
            fragment: request.fragment,
            progress_notify: request
                .progress_notify
                .then_some(self.manner.progress_notify_interval),
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
                _place: place,
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
        let sent = self.responses.send(Ok(response.into())).await;
        sent.map_err(|_| Gone)
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
