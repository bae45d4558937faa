//! The agents' stream: records and watermarks into the model, resumed where it broke off.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clustermesh_api::etcd::mvcc::event::EventType;
use clustermesh_api::v1::AgentWatchResponse;
use clustermesh_api::v1::agent_watch_response::Message;
use clustermesh_client::Client;
use clustermesh_node_core::ABSENCE_GRACE_MS;
use clustermesh_node_core::change::ClusterName;
use clustermesh_node_core::decode::Decoder;
use clustermesh_node_core::progress::Position;
use clustermesh_process::{Drain, Heartbeat};
use futures_util::FutureExt as _;
use tracing::{info, warn};

use super::reconciler::{RETRY_AFTER, Reconciler};
use super::workloads::Workloads;
use crate::endpoints::Endpoints;
use crate::metrics::{Metrics, label};
use crate::state_files::StateFiles;

/// Messages that are handled before the maps are written.
const MESSAGES_PER_ROUND_MAX: usize = 256;
/// First wait before a new connection.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest wait before a new connection.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// The server's first message is waited for so long.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// A quiet stream shows this often that somebody follows it, and looks whether a round of another task has missed something.
const BEAT_EVERY: Duration = Duration::from_secs(5);
/// The known workloads are stored at most this often.
const WORKLOADS_STORED_EVERY: Duration = Duration::from_secs(1);

/// Where records and what follows from them go.
#[derive(Clone)]
pub struct Sinks {
    /// The model and the maps.
    pub reconciler: Arc<Reconciler>,
    /// Stored for the next start.
    pub workloads: Arc<Workloads>,
    /// Their identities follow the workloads'.
    pub endpoints: Arc<Endpoints>,
    /// Of which store the kernel's entries are.
    pub files: Arc<StateFiles>,
    /// Counters.
    pub metrics: Metrics,
}

/// Follows the server's records.
pub struct Follower {
    sinks: Sinks,
    client: Client,
    decoder: Decoder,
    cluster: ClusterName,
    store_id: u64,
    revision: i64,
    listing: bool,
    /// The store of which the kernel's entries are, as far as is known.
    held_store: Option<u64>,
    /// The kernel has entries, in maps of this layout or another.
    over_entries: bool,
    /// Clusters that the server copies, if it says.
    peers: Option<Vec<ClusterName>>,
    heartbeat: Heartbeat,
    started: Instant,
}

impl Follower {
    /// A follower that has read nothing yet; the kernel holds what was read from `held_store`, if `over_entries` at all.
    #[must_use]
    pub fn new(
        sinks: Sinks,
        client: Client,
        cluster: ClusterName,
        decoder: Decoder,
        held_store: Option<u64>,
        over_entries: bool,
        heartbeat: Heartbeat,
    ) -> Self {
        Self {
            sinks,
            client,
            decoder,
            cluster,
            store_id: 0,
            revision: 0,
            listing: true,
            held_store,
            over_entries,
            peers: None,
            heartbeat,
            started: Instant::now(),
        }
    }

    /// Follows until the drain; a broken stream is made again.
    pub async fn run(mut self, drain: Drain) {
        let mut backoff = BACKOFF_MIN;
        let mut last = String::new();
        loop {
            self.heartbeat.beat();
            let before = self.revision;
            let ended = tokio::select! {
                ended = self.follow() => ended,
                () = drain.draining() => return,
            };
            if let Err(error) = ended {
                let text = format!("{error:#}");
                // The same failure every second says nothing new.
                if text != last || self.revision > before {
                    warn!(error = text, "record stream broken, connecting again");
                }
                last = text;
            }
            if self.listing {
                // A listing that broke off says nothing of what was not sent.
                self.store_id = 0;
            }
            self.sinks
                .metrics
                .reconnects
                .get_or_create(&label("stream", "records"))
                .inc();
            if self.revision > before {
                backoff = BACKOFF_MIN;
            }
            if self.has_missed() {
                tokio::task::block_in_place(|| self.sinks.reconciler.round());
            }
            // Jitter: the agents of a cluster whose server comes back do not all knock at once.
            let pause = backoff.mul_f64(rand::random_range(0.5..1.0));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = drain.draining() => return,
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn follow(&mut self) -> anyhow::Result<()> {
        let resume = if self.store_id == 0 { 0 } else { self.revision };
        let watch = self.client.agent_watch(self.store_id, resume);
        let mut stream = tokio::time::timeout(ANSWER_WAIT, watch)
            .await
            .context("the server does not answer the request for records")??;
        let mut beats = tokio::time::interval(BEAT_EVERY);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut retry = false;
        let mut store_due: Option<tokio::time::Instant> = None;
        let mut workloads = self.sinks.reconciler.workload_changes.subscribe();
        loop {
            let first = tokio::select! {
                message = stream.next() => Some(message?.context("the server ended the stream")?),
                () = tokio::time::sleep(RETRY_AFTER), if retry => None,
                _ = beats.tick(), if !retry => {
                    self.heartbeat.beat();
                    if !self.has_missed() {
                        continue;
                    }
                    None
                }
                Ok(()) = workloads.changed() => {
                    store_due.get_or_insert_with(|| tokio::time::Instant::now() + WORKLOADS_STORED_EVERY);
                    self.refresh_identities().await;
                    continue;
                }
                () = until(store_due), if store_due.is_some() => {
                    store_due = None;
                    if let Err(error) = tokio::task::block_in_place(|| self.sinks.workloads.store()) {
                        warn!(%error, "workloads not stored for the next start");
                    }
                    continue;
                }
            };
            self.heartbeat.beat();
            if let Some(first) = first {
                self.handle(first)?;
                for _ in 1..MESSAGES_PER_ROUND_MAX {
                    match stream.next().now_or_never() {
                        Some(Ok(Some(message))) => self.handle(message)?,
                        Some(Ok(None)) => bail!("the server ended the stream"),
                        Some(Err(error)) => return Err(error.into()),
                        None => break,
                    }
                }
            }
            if !self.listing {
                retry = !tokio::task::block_in_place(|| self.round());
            }
        }
    }

    /// One round of map calls. False if there is something to do again without a new message.
    fn round(&mut self) -> bool {
        let now_ms = self.now_ms();
        if let Some(model) = self.sinks.reconciler.model().as_mut() {
            model.pass_time(now_ms);
            if model.kept_entries() > 0
                && let Some(peers) = &self.peers
            {
                model.peers_configured(peers);
            }
        }
        let complete = self.sinks.reconciler.round();
        let (kept, trusted) = match self.sinks.reconciler.model().as_ref() {
            Some(model) => (model.kept_entries(), model.is_trusted()),
            None => (0, false),
        };
        let kept_before = self
            .sinks
            .metrics
            .kept_entries
            .set(i64::try_from(kept).unwrap_or(i64::MAX));
        if kept > 0 && kept_before == 0 {
            warn!(
                entries = kept,
                store_id = format!("{:x}", self.store_id),
                "this store does not name entries that the kernel has from another one: \
                 peers' stay until they are synced or removed from the server's configuration, own ones for {} s",
                ABSENCE_GRACE_MS / 1000
            );
        }
        if complete && trusted && self.held_store != Some(self.store_id) {
            match self.sinks.files.store_store_id(self.store_id) {
                Ok(()) => {
                    self.held_store = Some(self.store_id);
                    self.over_entries = true;
                }
                Err(error) => warn!(%error, "the store's id is not stored for the next start"),
            }
        }
        complete && (trusted || !self.distrusts())
    }

    /// A round of this or another task has left something undone.
    fn has_missed(&self) -> bool {
        self.sinks.reconciler.has_missed()
    }

    /// True if the store is not the one of which the kernel's entries are.
    fn distrusts(&self) -> bool {
        self.over_entries && self.held_store != Some(self.store_id)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn refresh_identities(&self) {
        let Sinks {
            endpoints,
            workloads,
            ..
        } = &self.sinks;
        let refreshed = endpoints
            .refresh_identities(|name| workloads.identity_of(name))
            .await;
        if let Err(error) = refreshed {
            warn!(%error, "identities of local endpoints not brought up to date");
        }
    }

    fn handle(&mut self, message: AgentWatchResponse) -> anyhow::Result<()> {
        let now_ms = self.now_ms();
        let mut guard = self.sinks.reconciler.model();
        let Some(model) = guard.as_mut() else {
            bail!("there is no model yet");
        };
        let mut take = |key: &[u8], value: Option<&[u8]>| match self.decoder.decode(key, value) {
            Ok(change) => model.apply(change),
            Err(refusal) => model.refused().record(refusal),
        };
        match message.message {
            Some(Message::Start(start)) => {
                if start.cluster != *self.cluster {
                    bail!(
                        "the server is of cluster {:?}, this node of {:?}: check server.endpoints",
                        start.cluster,
                        self.cluster
                    );
                }
                info!(
                    store_id = format!("{:x}", start.store_id),
                    full = start.full_listing,
                    "following records"
                );
                self.store_id = start.store_id;
                self.peers = start.peers_known.then(|| {
                    start
                        .peers
                        .iter()
                        .map(|peer| peer.as_str().into())
                        .collect()
                });
                let peers = self.peers.as_ref();
                model.set_configured_peers(peers.map(|peers| peers.iter().cloned().collect()));
                if start.full_listing {
                    model.begin_listing();
                    if self.over_entries && self.held_store != Some(start.store_id) {
                        model.distrust_absence(now_ms);
                    }
                    self.listing = true;
                    self.revision = 0;
                }
            }
            Some(Message::Listing(listing)) => {
                for kv in &listing.kvs {
                    take(&kv.key, Some(&kv.value));
                }
                if listing.last {
                    model.end_listing();
                    self.listing = false;
                    self.revision = listing.revision;
                }
            }
            Some(Message::Events(events)) => {
                for event in &events.events {
                    let Some(kv) = &event.kv else { continue };
                    let put = event.r#type() == EventType::Put;
                    take(&kv.key, put.then_some(kv.value.as_ref()));
                }
                self.revision = events.revision;
            }
            Some(Message::Progress(progress)) => self.revision = progress.revision,
            Some(Message::Watermark(watermark)) => {
                let position = Position {
                    store_id: watermark.store_id,
                    revision: watermark.revision,
                };
                model.progress(&watermark.cluster.into(), position);
            }
            None => {}
        }
        if !self.listing {
            let position = Position {
                store_id: self.store_id,
                revision: self.revision,
            };
            model.progress(&self.cluster, position);
        }
        Ok(())
    }
}

async fn until(instant: Option<tokio::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
