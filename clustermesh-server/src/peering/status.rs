//! What is known of each peer, for status, waits and metrics: by this replica's own links while it leads, otherwise by the leader's word.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_api::v1::peer_status::State;
use clustermesh_api::v1::{PeerStatus, SourceRevision};
use clustermesh_client::{Client, ClientConfig, ClientError};
use parking_lot::Mutex;
use tokio::time::timeout;

use crate::store::Store;
use crate::wire::{Leading, SILENCE_MAX};

/// A peer must say its present revision by then.
const REVISION_TIMEOUT: Duration = Duration::from_secs(3);
/// Of an error's text, which the peer may have written, so much is kept.
const MAX_ERROR_BYTES: usize = 1024;
/// What a replica says that does not lead and was not told by the one that does.
const NOT_TOLD: &str = "the replica that leads, if one does, has not said how this peer is";

/// All configured peers; clones share them.
#[derive(Debug, Clone, Default)]
pub struct PeerStatuses {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    peers: BTreeMap<String, Peer>,
    told: Option<Told>,
}

#[derive(Debug)]
struct Peer {
    /// The link's, while this replica leads and is connected.
    linked: Option<Client>,
    /// For questions of a replica that does not lead; it connects when it is first asked.
    asked: Client,
    /// Without what stands in the store: revisions and counts.
    status: PeerStatus,
}

/// What the leader told last.
#[derive(Debug)]
struct Told {
    term: u64,
    heard: Instant,
    peers: BTreeMap<String, PeerStatus>,
}

impl Inner {
    /// The status of `peer`: this replica's own while it `leads`, else what the leader told of it.
    fn status(&self, name: &str, peer: &Peer, leads: bool) -> PeerStatus {
        if leads {
            return peer.status.clone();
        }
        let heard = self
            .told
            .as_ref()
            .filter(|told| told.heard.elapsed() < SILENCE_MAX)
            .and_then(|told| told.peers.get(name));
        heard.cloned().unwrap_or_else(|| PeerStatus {
            last_error: NOT_TOLD.to_owned(),
            ..begun(name)
        })
    }
}

fn begun(peer: &str) -> PeerStatus {
    PeerStatus {
        cluster: peer.to_owned(),
        state: State::Connecting.into(),
        refused_incomplete: true,
        ..PeerStatus::default()
    }
}

impl PeerStatuses {
    /// A peer that is configured, and how it is reached.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub(super) fn add(&self, name: &str, config: &ClientConfig) -> Result<(), ClientError> {
        let peer = Peer {
            linked: None,
            asked: Client::new(config)?,
            status: begun(name),
        };
        self.inner.lock().peers.insert(name.to_owned(), peer);
        Ok(())
    }

    /// All peers by name, without revisions and counts, as the replica of `store` knows them.
    #[must_use]
    pub fn all(&self, store: &Store) -> Vec<PeerStatus> {
        let leads = store.leading_term().is_some();
        let inner = self.inner.lock();
        let peers = inner.peers.iter();
        peers
            .map(|(name, peer)| inner.status(name, peer, leads))
            .collect()
    }

    /// What the leader in `term` tells the other replicas.
    pub(crate) fn to_tell(&self, term: u64) -> Leading {
        let inner = self.inner.lock();
        let peers = inner.peers.values();
        Leading {
            term,
            peers: peers.map(|peer| peer.status.clone()).collect(),
        }
    }

    /// Takes what a leader told. One of an older term is not heard while a newer one is.
    pub(crate) fn take_from_leader(&self, leading: Leading) {
        let mut inner = self.inner.lock();
        let newer = inner
            .told
            .as_ref()
            .is_some_and(|told| told.term > leading.term && told.heard.elapsed() < SILENCE_MAX);
        if newer {
            return;
        }
        // Peers that this replica is not configured with are not its own to tell of.
        let peers = leading
            .peers
            .into_iter()
            .filter(|peer| inner.peers.contains_key(&peer.cluster))
            .map(|peer| (peer.cluster.clone(), peer))
            .collect();
        inner.told = Some(Told {
            term: leading.term,
            heard: Instant::now(),
            peers,
        });
    }

    pub(super) fn update(&self, peer: &str, change: impl FnOnce(&mut PeerStatus)) {
        if let Some(peer) = self.inner.lock().peers.get_mut(peer) {
            change(&mut peer.status);
        }
    }

    pub(super) fn connected(&self, peer: &str, client: Client) {
        if let Some(peer) = self.inner.lock().peers.get_mut(peer) {
            peer.linked = Some(client);
            peer.status.last_contact_unix_ms = clustermesh_raft::wall_clock();
        }
    }

    pub(super) fn heard(&self, peer: &str) {
        self.update(peer, |status| {
            status.last_contact_unix_ms = clustermesh_raft::wall_clock();
        });
    }

    /// What is known is of an earlier term: it is the next leader that knows.
    pub(super) fn not_leading(&self, name: &str) {
        if let Some(peer) = self.inner.lock().peers.get_mut(name) {
            peer.linked = None;
            peer.status = PeerStatus {
                reconnects: peer.status.reconnects,
                ..begun(name)
            };
        }
    }

    pub(super) fn ended(&self, peer: &str, state: State, mut reason: String) {
        reason.truncate(reason.floor_char_boundary(MAX_ERROR_BYTES));
        if let Some(peer) = self.inner.lock().peers.get_mut(peer) {
            peer.linked = None;
            peer.status.set_state(state);
            peer.status.last_error = reason;
            peer.status.reconnects += 1;
        }
    }

    /// Asks the peer itself for its present revision, over the leader's link or a connection of its own.
    ///
    /// # Errors
    /// A text that says why there is no answer.
    pub async fn present_revision(
        &self,
        store: &Store,
        peer: &str,
    ) -> Result<SourceRevision, String> {
        let leads = store.leading_term().is_some();
        let client = {
            let inner = self.inner.lock();
            let Some(known) = inner.peers.get(peer) else {
                return Err(format!("cluster {peer} is not a peer"));
            };
            let status = inner.status(peer, known, leads);
            let copied = matches!(status.state(), State::Syncing | State::Synced);
            // Without a copy there is nothing to wait for but the reason.
            let client = if leads {
                known.linked.as_ref()
            } else {
                Some(&known.asked).filter(|_| copied)
            };
            client.cloned().ok_or_else(|| {
                let reason = match status.last_error.as_str() {
                    "" => "this has only begun",
                    error => error,
                };
                format!("cluster {peer} is not connected: {reason}")
            })?
        };
        match timeout(REVISION_TIMEOUT, ask(&client, peer)).await {
            Ok(Ok(source)) => Ok(source),
            Ok(Err(error)) => Err(format!("cluster {peer}: {error}")),
            Err(_) => Err(format!("cluster {peer} does not answer")),
        }
    }
}

/// A linearizable read of one key: its header has the revision.
async fn ask(client: &Client, peer: &str) -> Result<SourceRevision, ClientError> {
    let response = client
        .range(RangeRequest {
            key: config_key(peer).into(),
            count_only: true,
            ..RangeRequest::default()
        })
        .await?;
    let header = response.header.unwrap_or_default();
    Ok(SourceRevision {
        cluster: peer.to_owned(),
        store_id: header.cluster_id,
        revision: header.revision,
    })
}

/// The key of a cluster's configuration.
pub(super) fn config_key(cluster: &str) -> Vec<u8> {
    clustermesh_api::keys::RecordKey::ClusterConfig {
        cluster: cluster.to_owned(),
    }
    .to_bytes()
}
