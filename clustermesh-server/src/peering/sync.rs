//! One connection to a peer: its configuration, its listings at one revision, then its events.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{RangeRequest, WatchCreateRequest, WatchResponse};
use clustermesh_api::keys::{HEARTBEAT_KEY, Kind, SYNCED_PREFIX};
use clustermesh_api::v1::peer_status::State;
use clustermesh_client::{Client, WatchStream};
use clustermesh_mesh::peering::{
    ConfigRefused, Ingested, Peer, PeerChange, PeerCopyState, accept_config, copied_config,
};
use clustermesh_mesh::prefix_end;
use futures_util::FutureExt;
use tokio::time::Instant;
use tonic::Code;
use tracing::{info, warn};

use super::batch::{Batch, WATCH_CANARIES, WATCH_CONFIG, WATCH_HEARTBEAT, WATCH_RECORDS};
use super::error::LinkError;
use super::listing::{self, range_of};
use super::refusals::{Named, RefusalLog};
use super::status::config_key;
use super::timing::Timing;
use super::writer::Writer;
use super::{Shared, drain_copy};
use crate::metrics::{ClusterLabels, ClusterReasonLabels};
use crate::view::StateView;

/// A listing again because a range became free: at most this often.
const RELIST_INTERVAL: Duration = Duration::from_secs(30);

/// A listing that the peer's compactions overtake is taken up again so often before the link is given up.
const MAX_LISTING_ATTEMPTS: usize = 8;

/// A connection in which the peer's configuration was accepted.
pub(super) struct Sync<'a> {
    shared: &'a Shared,
    name: &'a str,
    client: Client,
    copy: &'a mut PeerCopyState,
    refusals: &'a mut RefusalLog,
    writer: Writer<'a>,
    /// The peer's configuration as it said it.
    config: Bytes,
    store_id: u64,
    listed: Option<Instant>,
}

/// Why a watch ended without an error.
enum Next {
    /// List everything again.
    Relist,
}

impl<'a> Sync<'a> {
    /// Reads and judges the configuration, and takes up the copy that is there.
    pub(super) async fn begin(
        shared: &'a Shared,
        term: u64,
        name: &'a str,
        client: Client,
        copy: &'a mut Option<PeerCopyState>,
        refusals: &'a mut RefusalLog,
    ) -> Result<Self, LinkError> {
        let response = client
            .range(RangeRequest {
                key: config_key(name).into(),
                ..RangeRequest::default()
            })
            .await
            .map_err(|error| match error.code() {
                Some(Code::PermissionDenied) => ConfigRefused::Denied(name.to_owned()).into(),
                _ => LinkError::from(error),
            })?;
        let store_id = response
            .header
            .map(|header| header.cluster_id)
            .unwrap_or_default();
        if store_id == 0 {
            return Err(LinkError::Protocol(
                "the peer's answers carry no cluster id".to_owned(),
            ));
        }
        let config = response.kvs.into_iter().next().map(|kv| kv.value);
        let peer = accept(shared, name, config.as_deref())?;
        let config = config.unwrap_or_default();
        shared.statuses.update(name, |status| {
            status.set_state(State::Syncing);
            status.cluster_id = peer.cluster_id;
        });
        drain_if_renumbered(shared, &peer).await?;
        let mut writer = Writer::new(shared, name).await?;
        if shared.store.leading_term() != Some(term) {
            // Another replica may have copied on before the cursor was read.
            *copy = None;
        }
        let state = match copy.take() {
            Some(state) if *state.peer() == peer && !state.is_outdated(&shared.owners.lock()) => {
                state
            }
            _ => {
                let (state, changes) = {
                    let mut owners = shared.owners.lock();
                    shared
                        .store
                        .read(|state| PeerCopyState::restore(peer, &mut owners, &StateView(state)))
                };
                writer.write(changes).await?;
                state.with_quota(shared.quota)
            }
        };
        Ok(Self {
            shared,
            name,
            client,
            copy: copy.insert(state),
            refusals,
            writer,
            config,
            store_id,
            listed: None,
        })
    }

    /// Copies until something breaks.
    pub(super) async fn run(&mut self, synced: &mut bool) -> Result<Infallible, LinkError> {
        let mut resume = self.writer.is_synced() && self.writer.store_id() == self.store_id;
        loop {
            if resume {
                // Canaries are not part of the records' revision order: they are always read afresh.
                self.canaries(0).await?;
                let changes = vec![self.own_config()?];
                self.writer.write(changes).await?;
                info!(
                    peer = self.name,
                    revision = self.writer.revision(),
                    "peer copy resumes"
                );
            } else {
                self.list().await?;
            }
            let Next::Relist = self.watch(synced).await?;
            resume = false;
        }
    }

    fn own_config(&self) -> Result<PeerChange, LinkError> {
        Ok(PeerChange {
            key: config_key(self.name).into(),
            value: Some(copied_config(self.name, &self.config)?),
        })
    }

    /// Reads the canaries, at `revision` or (0) now; the revision at which they were read.
    async fn canaries(&mut self, revision: i64) -> Result<i64, LinkError> {
        let prefix = format!("{SYNCED_PREFIX}{}/", self.name);
        let listing = listing::collect(self.client.list(range_of(&prefix, revision))).await?;
        self.check_store(listing.store_id)?;
        let events: Vec<_> = listing
            .kvs
            .into_iter()
            .map(|kv| (kv.key, Some(kv.value)))
            .collect();
        self.copy.begin_canaries();
        let outcome = self.copy.ingest(&mut self.shared.owners.lock(), &events);
        self.log_refused(&outcome);
        Ok(listing.revision)
    }

    /// A complete listing at one revision; Raft writes what differs.
    async fn list(&mut self) -> Result<(), LinkError> {
        self.shared
            .statuses
            .update(self.name, |status| status.set_state(State::Syncing));
        self.listed = Some(Instant::now());
        // A copy that equals a revision of this store spares reading what did not change since.
        let mut equal: BTreeMap<Kind, i64> = BTreeMap::new();
        if self.writer.is_synced() && self.writer.store_id() == self.store_id {
            let revision = self.writer.revision();
            equal.extend(Kind::ALL.map(|kind| (kind, revision)));
        }
        for attempt in 1..=MAX_LISTING_ATTEMPTS {
            match self.list_at_one_revision(&mut equal).await {
                // What was read stays; the next attempt reads what is missing and what changed.
                Err(LinkError::Client(error)) if error.is_compacted() => {
                    info!(
                        peer = self.name,
                        attempt,
                        "the peer compacted the revision that is being listed, a newer one is"
                    );
                }
                outcome => return outcome,
            }
        }
        Err(LinkError::Protocol(format!(
            "the peer compacted the revision that was being listed {MAX_LISTING_ATTEMPTS} times in a row; \
             its history must be kept for longer than a listing takes"
        )))
    }

    /// One attempt; `equal` says, and learns, which revision of this store our copy of a kind equals.
    async fn list_at_one_revision(
        &mut self,
        equal: &mut BTreeMap<Kind, i64>,
    ) -> Result<(), LinkError> {
        let revision = self.canaries(0).await?;
        self.writer.begin(self.store_id, revision);
        // The configuration stands before the records, the canaries after them: readers rely on that order.
        let config = self.own_config()?;
        self.writer.write(vec![config]).await?;
        self.copy.begin_listing();
        for kind in Kind::ALL {
            if !self.copy.peer().exports(kind) {
                self.replace(kind, &[]).await?;
                continue;
            }
            let prefix = self.copy.peer().source_prefix(kind);
            let read = match equal.get(&kind).copied() {
                Some(since) => {
                    let store = &self.shared.store;
                    listing::since(
                        &self.client,
                        store,
                        self.copy.peer(),
                        &prefix,
                        revision,
                        since,
                    )
                    .await?
                }
                None => listing::full(&self.client, &prefix, revision).await?,
            };
            self.check_store(read.store_id)?;
            self.count_read(read.values_read);
            let records = read.records;
            self.replace(kind, &records).await?;
            equal.insert(kind, revision);
        }
        let complete = self.is_complete();
        self.writer.advance(Vec::new(), revision, complete).await?;
        info!(peer = self.name, revision, complete, "peer listed");
        Ok(())
    }

    async fn replace(&mut self, kind: Kind, records: &[(Bytes, Bytes)]) -> Result<(), LinkError> {
        let outcome = {
            let mut owners = self.shared.owners.lock();
            let now = clustermesh_raft::wall_clock();
            self.shared.store.read(|state| {
                self.copy
                    .replace(&mut owners, kind, records, &StateView(state), now)
            })
        };
        self.log_refused(&outcome);
        self.writer.write(outcome.changes).await?;
        Ok(())
    }

    fn count_read(&self, values: usize) {
        let labels = ClusterLabels {
            cluster: self.name.to_owned(),
        };
        self.shared
            .metrics
            .values_read
            .get_or_create(&labels)
            .inc_by(values as u64);
    }

    fn is_complete(&self) -> bool {
        self.copy.completed().count() == Kind::ALL.len()
    }

    fn check_store(&self, store_id: u64) -> Result<(), LinkError> {
        if store_id == self.store_id {
            return Ok(());
        }
        Err(LinkError::Protocol(format!(
            "the peer's store changed from {:x} to {store_id:x}; its revisions begin anew",
            self.store_id
        )))
    }

    /// Follows the events after the cursor.
    async fn watch(&mut self, synced: &mut bool) -> Result<Next, LinkError> {
        let tree = self.copy.peer().source_tree().prefix();
        let from = self.writer.revision() + 1;
        let watch = |watch_id, prefix: &str, start_revision| WatchCreateRequest {
            key: prefix.to_owned().into(),
            range_end: prefix_end(prefix.as_bytes()),
            start_revision,
            watch_id,
            ..WatchCreateRequest::default()
        };
        let config = WatchCreateRequest {
            key: config_key(self.name).into(),
            start_revision: from,
            watch_id: WATCH_CONFIG,
            ..WatchCreateRequest::default()
        };
        let mut stream = self
            .client
            .watch([
                // One watch for all kinds, so that their events come in the order of their revisions.
                watch(WATCH_RECORDS, tree, from),
                watch(
                    WATCH_CANARIES,
                    &format!("{SYNCED_PREFIX}{}/", self.name),
                    from,
                ),
                config,
                watch(WATCH_HEARTBEAT, HEARTBEAT_KEY, 0),
            ])
            .await?;
        // Its answer comes behind everything that happened before.
        stream.request_progress().await?;
        let mut caught_up = false;
        let mut timing = Timing::new(Instant::now());
        loop {
            let response = tokio::select! {
                response = stream.next() => response?,
                () = tokio::time::sleep_until(timing.next_ask()) => {
                    timing.check_silence(Instant::now())?;
                    stream.request_progress().await?;
                    timing.asked(Instant::now());
                    if let Some(next) = self.reconsider().await? {
                        return Ok(next);
                    }
                    continue;
                }
            };
            timing.heard(Instant::now());
            self.shared.statuses.heard(self.name);
            let batch = self.gather(&mut stream, response)?;
            if batch.changed {
                timing.changed(Instant::now());
            }
            caught_up |= batch.progressed;
            if let Some(next) = self.take(batch).await? {
                return Ok(next);
            }
            self.report_state(caught_up, synced);
        }
    }

    /// Takes a response and those that are ready behind it.
    fn gather(
        &mut self,
        stream: &mut WatchStream,
        first: Option<WatchResponse>,
    ) -> Result<Batch, LinkError> {
        let mut batch = Batch::after(self.writer.revision());
        let mut next = Some(first);
        while let Some(response) = next.take() {
            let response = response
                .ok_or_else(|| LinkError::Protocol("the peer ended the watch stream".to_owned()))?;
            let store_id = response
                .header
                .map(|header| header.cluster_id)
                .unwrap_or_default();
            self.check_store(store_id)?;
            batch.add(response)?;
            if batch.is_full() {
                break;
            }
            next = stream.next().now_or_never().transpose()?;
        }
        Ok(batch)
    }

    async fn take(&mut self, batch: Batch) -> Result<Option<Next>, LinkError> {
        if batch.relist {
            return Ok(Some(Next::Relist));
        }
        if batch.config.is_some_and(|config| config != self.config) {
            return Err(LinkError::Reconfigured);
        }
        let outcome = self
            .copy
            .ingest(&mut self.shared.owners.lock(), &batch.events);
        self.log_refused(&outcome);
        self.writer
            .advance(outcome.changes, batch.revision, self.writer.is_synced())
            .await?;
        // The peer's own list became complete after ours was taken: only a listing from now on says what is absent.
        if !outcome.completed.is_empty() && !self.writer.is_synced() {
            return Ok(Some(Next::Relist));
        }
        Ok(None)
    }

    /// Refused records may be acceptable since another peer gave something up.
    async fn reconsider(&mut self) -> Result<Option<Next>, LinkError> {
        let (changes, relist) = {
            let mut owners = self.shared.owners.lock();
            if self.copy.is_outdated(&owners) {
                return Err(LinkError::Outdated);
            }
            let changes = self.copy.reconsider(&mut owners);
            (changes, self.copy.needs_relist(&owners))
        };
        self.writer.write(changes).await?;
        let rested = self
            .listed
            .is_none_or(|listed| listed.elapsed() >= RELIST_INTERVAL);
        Ok((relist && rested).then_some(Next::Relist))
    }

    fn report_state(&mut self, caught_up: bool, synced: &mut bool) {
        let now = if caught_up && self.writer.is_synced() {
            State::Synced
        } else {
            State::Syncing
        };
        *synced |= now == State::Synced;
        let labels = ClusterLabels {
            cluster: self.name.to_owned(),
        };
        self.shared
            .metrics
            .synced
            .get_or_create(&labels)
            .set(i64::from(now == State::Synced));
        let refused_known = self.copy.refused_known();
        let refused = self
            .copy
            .refused_counts()
            .into_iter()
            .map(|(reason, count)| (reason.to_owned(), count))
            .collect();
        self.shared.statuses.update(self.name, |status| {
            if status.state() != now {
                status.set_state(now);
                if now == State::Synced {
                    status.last_error.clear();
                }
            }
            status.refused_records = refused;
            status.refused_incomplete = !refused_known;
        });
    }

    fn log_refused(&mut self, outcome: &Ingested) {
        for refusal in &outcome.refused {
            let labels = ClusterReasonLabels {
                cluster: self.name.to_owned(),
                reason: refusal.reason().to_owned(),
            };
            self.shared.metrics.refused.get_or_create(&labels).inc();
            let (peer, reason) = (self.name, refusal.reason());
            let Some(Named { unnamed, is_last }) = self.refusals.admit(Instant::now()) else {
                continue;
            };
            if unnamed == 0 {
                warn!(peer, reason, %refusal, "record refused");
            } else {
                warn!(peer, reason, %refusal, unnamed, "record refused, as were others that were not named");
            }
            if is_last {
                warn!(
                    peer,
                    "further refused records are only counted for a while, by reason in `clustermesh status`"
                );
            }
        }
    }
}

/// Judges the configuration and reserves the peer's id.
fn accept(shared: &Shared, name: &str, config: Option<&[u8]>) -> Result<Peer, LinkError> {
    let mut ids = shared.ids.lock();
    let peer = accept_config(&shared.settings, name, config, &ids)?;
    ids.retain(|id, holder| holder != name || *id == peer.cluster_id);
    ids.insert(peer.cluster_id, name.to_owned());
    Ok(peer)
}

/// A peer under another number is another peer: nothing of the old copy is valid.
async fn drain_if_renumbered(shared: &Shared, peer: &Peer) -> Result<(), LinkError> {
    use clustermesh_api::records::ClusterConfig;
    use clustermesh_mesh::View;
    let stored = shared
        .store
        .read(|state| StateView(state).get(&config_key(&peer.cluster)))
        .and_then(|kv| ClusterConfig::decode(&kv.value).ok());
    if let Some(stored) = stored.filter(|stored| stored.id != peer.cluster_id) {
        warn!(
            peer = peer.cluster,
            from = stored.id,
            to = peer.cluster_id,
            "the peer's cluster id changed, its copy begins anew"
        );
        drain_copy(shared, &peer.cluster).await?;
        shared
            .ids
            .lock()
            .insert(peer.cluster_id, peer.cluster.clone());
    }
    Ok(())
}
