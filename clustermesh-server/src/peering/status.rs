//! What is known of each peer, for status, waits and metrics.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_api::v1::SourceRevision;
use clustermesh_api::v1::peer_status::State;
use clustermesh_client::{Client, ClientError};
use parking_lot::Mutex;
use tokio::time::timeout;

/// A peer must say its present revision by then.
const REVISION_TIMEOUT: Duration = Duration::from_secs(3);

/// All configured peers; clones share them.
#[derive(Debug, Clone, Default)]
pub struct PeerStatuses {
    peers: Arc<Mutex<BTreeMap<String, PeerState>>>,
}

/// One peer.
#[derive(Debug, Clone)]
pub struct PeerState {
    /// How the copy is.
    pub state: State,
    /// The peer's cluster id; 0 before its configuration was accepted.
    pub cluster_id: u32,
    /// Why the last attempt ended.
    pub last_error: String,
    /// When the peer was last heard of, ms since 1970; 0 never.
    pub last_contact_unix_ms: i64,
    /// Connections begun again.
    pub reconnects: u64,
    /// Refused records, by reason.
    pub refused_records: BTreeMap<String, u64>,
    /// Whether those are all: after a restart only once the peer was listed.
    pub refused_known: bool,
    client: Option<Client>,
}

impl Default for PeerState {
    fn default() -> Self {
        Self {
            state: State::Connecting,
            cluster_id: 0,
            last_error: String::new(),
            last_contact_unix_ms: 0,
            reconnects: 0,
            refused_records: BTreeMap::new(),
            refused_known: false,
            client: None,
        }
    }
}

impl PeerStatuses {
    /// A peer that is configured.
    pub fn add(&self, peer: &str) {
        self.peers.lock().entry(peer.to_owned()).or_default();
    }

    /// All peers by name.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, PeerState> {
        self.peers.lock().clone()
    }

    pub(super) fn update(&self, peer: &str, change: impl FnOnce(&mut PeerState)) {
        if let Some(state) = self.peers.lock().get_mut(peer) {
            change(state);
        }
    }

    pub(super) fn connected(&self, peer: &str, client: Client) {
        self.update(peer, |state| {
            state.client = Some(client);
            state.last_contact_unix_ms = clustermesh_raft::wall_clock();
        });
    }

    pub(super) fn heard(&self, peer: &str) {
        self.update(peer, |state| {
            state.last_contact_unix_ms = clustermesh_raft::wall_clock()
        });
    }

    pub(super) fn ended(&self, peer: &str, state: State, reason: String) {
        self.update(peer, |peer| {
            peer.state = state;
            peer.last_error = reason;
            peer.client = None;
            peer.reconnects += 1;
        });
    }

    /// Asks the peer itself for its present revision.
    ///
    /// # Errors
    /// A text that says why there is no answer.
    pub async fn present_revision(&self, peer: &str) -> Result<SourceRevision, String> {
        let (client, last_error) = match self.peers.lock().get(peer) {
            Some(state) => (state.client.clone(), state.last_error.clone()),
            None => return Err(format!("cluster {peer} is not a peer")),
        };
        let Some(client) = client else {
            return Err(format!("cluster {peer} is not connected: {last_error}"));
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
