//! `clustermesh.v1.AgentStream`: one ordered view of everything that a machine of this cluster may read.

use std::time::Duration;

use clustermesh_api::limits::{MAX_SESSIONS, STREAM_MESSAGE_TARGET_BYTES};
use clustermesh_api::v1::agent_stream_server::AgentStream;
use clustermesh_api::v1::agent_watch_response::Message;
use clustermesh_api::v1::{
    AgentWatchRequest, AgentWatchResponse, Events, Progress, StreamStart, Watermark,
};
use clustermesh_process::Drain;
use clustermesh_raft::{WatchEnd, WatchItem, WatchSpec};
use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::agents::listing::{ListingPlace, can_resume, visible_ranges};
use crate::auth::Caller;
use crate::metrics::WatchMetrics;
use crate::places::{Full, Places};
use crate::status::kv_status;
use crate::store::{Store, TokioWatcher};

/// Messages made ahead of what the connection takes. Past it the watcher falls back to stored history.
const AGENT_QUEUE_MESSAGES: usize = 4;
/// Streams of one node: those of an agent that was cut off stay until that is noticed.
const MAX_STREAMS_OF_ONE_NODE: usize = 8;
/// When only invisible records change, the agent hears of the revision this soon.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// The service.
#[derive(Debug)]
pub struct AgentStreamService {
    store: Store,
    cluster: String,
    cluster_id: u32,
    peers: Vec<String>,
    metrics: WatchMetrics,
    drain: Drain,
    places: Places,
}

impl AgentStreamService {
    /// Serves the records of `store` as cluster `cluster` with number `cluster_id`, which copies `peers`.
    #[must_use]
    pub fn new(
        store: Store,
        cluster: String,
        cluster_id: u32,
        peers: Vec<String>,
        metrics: WatchMetrics,
        drain: Drain,
    ) -> Self {
        Self {
            store,
            cluster,
            cluster_id,
            peers,
            metrics,
            drain,
            places: Places::new(MAX_SESSIONS, MAX_STREAMS_OF_ONE_NODE),
        }
    }
}

#[tonic::async_trait]
impl AgentStream for AgentStreamService {
    type WatchStream = ReceiverStream<Result<AgentWatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<AgentWatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = Caller::of(&request)?;
        caller.check_agent_stream()?;
        let place = self.places.take(caller.holder()).map_err(|full| {
            Status::resource_exhausted(match full {
                Full::All(most) => {
                    format!("{most} agents' streams are open, which is the limit of one server")
                }
                Full::OfOne(most) => format!(
                    "{most} streams of this node are open, which is the limit of one; is its certificate in use on several machines?"
                ),
            })
        })?;
        let request = request.into_inner();
        // What the agent saw before must be here before it is told to go on.
        self.store.linearize().await?;
        let listing = self
            .store
            .read(|state| (!can_resume(state, &request)).then(|| ListingPlace::new(state)));
        let start = StreamStart {
            store_id: self.store.cluster_id(),
            replica_id: self.store.member_id(),
            cluster: self.cluster.clone(),
            cluster_id: self.cluster_id,
            full_listing: listing.is_some(),
            peers_known: true,
            peers: self.peers.clone(),
        };
        let (messages, stream) = mpsc::channel(AGENT_QUEUE_MESSAGES);
        let sent_revision = listing
            .as_ref()
            .map_or(request.resume_after_revision, ListingPlace::revision);
        let outgoing = Outgoing {
            messages: messages.clone(),
            metrics: self.metrics.clone(),
            sent_revision,
        };
        let (store, metrics, drain) =
            (self.store.clone(), self.metrics.clone(), self.drain.clone());
        tokio::spawn(async move {
            metrics.agent_streams.inc();
            let ended = tokio::select! {
                ended = outgoing.run(&store, start, listing) => ended,
                () = messages.closed() => Ok(()),
                () = drain.draining() => Err(Status::unavailable("etcdserver: server stopped")),
            };
            if let Err(status) = ended {
                // The agent may be gone already.
                let _ = messages.send(Err(status)).await;
            }
            metrics.agent_streams.dec();
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

struct Outgoing {
    messages: mpsc::Sender<Result<AgentWatchResponse, Status>>,
    metrics: WatchMetrics,
    /// The agent knows everything up to here.
    sent_revision: i64,
}

impl Outgoing {
    async fn run(
        mut self,
        store: &Store,
        start: StreamStart,
        listing: Option<ListingPlace>,
    ) -> Result<(), Status> {
        self.send(Message::Start(start)).await?;
        if let Some(mut place) = listing {
            while let Some(part) = store
                .read(|state| place.next(state))
                .map_err(|error| kv_status(&error))?
            {
                self.send(Message::Listing(part)).await?;
            }
        }
        let mut watcher = store.watch(WatchSpec {
            ranges: visible_ranges().into(),
            start_revision: self.sent_revision + 1,
            filter: None,
            cursors: true,
        });
        let mut progress = tokio::time::interval(PROGRESS_INTERVAL);
        progress.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let item = tokio::select! {
                biased;
                item = watcher.next() => item,
                _ = progress.tick() => {
                    if store.revision() > self.sent_revision {
                        watcher.request_progress();
                    }
                    continue;
                }
            };
            self.forward(item.map_err(|end| end_status(&end))?, &mut watcher)
                .await?;
        }
    }

    /// Sends an item; events that are ready join it.
    async fn forward(&mut self, item: WatchItem, watcher: &mut TokioWatcher) -> Result<(), Status> {
        let mut next = Some(item);
        while let Some(item) = next.take() {
            match item {
                WatchItem::Events(first) => {
                    let mut message = Events::default();
                    let mut bytes = 0;
                    let mut joined = Some(first);
                    while let Some(group) = joined.take() {
                        message.revision = group.revision();
                        for event in group.events() {
                            bytes += event.encoded().len();
                            message.events.push(event.to_event(false));
                        }
                        if bytes >= STREAM_MESSAGE_TARGET_BYTES {
                            break;
                        }
                        match watcher.next().now_or_never() {
                            Some(Ok(WatchItem::Events(group))) => joined = Some(group),
                            Some(Ok(other)) => next = Some(other),
                            Some(Err(end)) => return Err(end_status(&end)),
                            None => {}
                        }
                    }
                    self.sent_revision = message.revision;
                    self.metrics.events_sent.inc_by(message.events.len() as u64);
                    self.send(Message::Events(message)).await?;
                }
                WatchItem::Cursor {
                    cluster,
                    cursor: Some(cursor),
                } if cursor.synced => {
                    self.send(Message::Watermark(Watermark {
                        cluster,
                        store_id: cursor.store_id,
                        revision: cursor.revision,
                    }))
                    .await?;
                }
                // A copy under way, or a peer that is gone: there is nothing that an agent could rely on.
                WatchItem::Cursor { .. } => {}
                WatchItem::Progress { revision } => {
                    if revision > self.sent_revision {
                        self.sent_revision = revision;
                        self.send(Message::Progress(Progress { revision })).await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn send(&self, message: Message) -> Result<(), Status> {
        let response = AgentWatchResponse {
            message: Some(message),
        };
        self.messages
            .send(Ok(response))
            .await
            .map_err(|_| Status::cancelled("the agent is gone"))
    }
}

fn end_status(end: &WatchEnd) -> Status {
    match end {
        WatchEnd::Compacted { .. } => {
            Status::aborted(format!("{end}; begin again with a full listing"))
        }
        WatchEnd::Stopped => Status::unavailable("etcdserver: server stopped"),
    }
}
