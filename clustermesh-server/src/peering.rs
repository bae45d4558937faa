//! Copies of peers: one task per configured peer, and the end of those that are not configured any more.

mod batch;
mod error;
mod link;
mod listing;
mod own_nodes;
mod refusals;
mod status;
mod sync;
mod timing;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::keys::RecordKey;
use clustermesh_client::ClientConfig;
use clustermesh_mesh::peering::{CidrOwners, CopyQuota, PeerCopyState, accept_config, forget};
use clustermesh_mesh::{ClusterSettings, View};
use clustermesh_process::Drain;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::config::{Config, PeerConfig};
use crate::metrics::PeeringMetrics;
use crate::peering::writer::Writer;
use crate::store::Store;
use crate::view::StateView;

pub use status::PeerStatuses;

/// Pause before the copy of a peer that is not configured any more is removed again after a failure.
const FORGET_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// All peers of this server.
#[derive(Debug)]
pub struct Peering {
    shared: Arc<Shared>,
    links: Vec<link::Link>,
    configured: BTreeSet<String>,
}

/// What the peers' tasks share.
#[derive(Debug)]
struct Shared {
    store: Store,
    settings: Arc<ClusterSettings>,
    /// Who has which pod CIDR: one peer's release may admit another's claim.
    owners: Mutex<CidrOwners>,
    /// Cluster ids in use by peers, with their names.
    ids: Mutex<BTreeMap<u32, String>>,
    /// How much of each peer is copied.
    quota: CopyQuota,
    statuses: PeerStatuses,
    metrics: PeeringMetrics,
}

impl Peering {
    /// Checks addresses and certificates of all configured peers.
    ///
    /// # Errors
    /// When one cannot be used.
    pub fn new(
        config: &Config,
        settings: &Arc<ClusterSettings>,
        store: &Store,
        statuses: &PeerStatuses,
        metrics: &PeeringMetrics,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            store: store.clone(),
            settings: Arc::clone(settings),
            owners: Mutex::new(CidrOwners::new(settings)),
            ids: Mutex::new(BTreeMap::new()),
            quota: CopyQuota {
                records_max: config.limits.max_records_per_peer,
                bytes_max: config.limits.max_bytes_per_peer,
            },
            statuses: statuses.clone(),
            metrics: metrics.clone(),
        });
        let mut links = Vec::new();
        for peer in &config.peers {
            let client = client_config(config, peer);
            statuses.add(&peer.name, &client)?;
            links.push(link::Link::new(Arc::clone(&shared), &peer.name, client)?);
        }
        Ok(Self {
            shared,
            links,
            configured: config.peers.iter().map(|peer| peer.name.clone()).collect(),
        })
    }

    /// Copies until the drain begins.
    pub async fn run(self, drain: Drain) {
        // Ours come first; what changes while the stored copies are taken up is seen by the follower.
        drop(own_nodes::take_up(&self.shared));
        self.take_up_stored();
        let mut tasks = JoinSet::new();
        tasks.spawn(own_nodes::follow(Arc::clone(&self.shared)));
        tasks.spawn(forget_others(Arc::clone(&self.shared), self.configured));
        for link in self.links {
            tasks.spawn(link.run());
        }
        drain.draining().await;
        tasks.shutdown().await;
    }

    /// Peers whose copies stand in the store keep their ids and pod CIDRs against newcomers, whoever connects first.
    fn take_up_stored(&self) {
        let mut owners = self.shared.owners.lock();
        let mut ids = self.shared.ids.lock();
        for name in &self.configured {
            let key = RecordKey::ClusterConfig {
                cluster: name.clone(),
            }
            .to_bytes();
            self.shared.store.read(|state| {
                let view = StateView(state);
                let Some(stored) = view.get(&key) else {
                    return;
                };
                match accept_config(&self.shared.settings, name, Some(&stored.value), &ids) {
                    Ok(peer) => {
                        ids.insert(peer.cluster_id, name.clone());
                        // Only its claims matter here; what has to change is found again when the peer is connected.
                        drop(PeerCopyState::restore(peer, &mut owners, &view));
                    }
                    Err(error) => {
                        warn!(peer = name, %error, "the stored copy is not acceptable any more")
                    }
                }
            });
        }
    }
}

fn client_config(config: &Config, peer: &PeerConfig) -> ClientConfig {
    let url = |endpoint: &String| match endpoint.strip_prefix("https://") {
        Some(_) => endpoint.clone(),
        None => format!("https://{endpoint}"),
    };
    ClientConfig {
        endpoints: peer.endpoints.iter().map(url).collect(),
        tls: Some(config.peer_tls_paths(peer)),
        server_name: peer.server_name.clone(),
    }
}

/// Removes the copies of clusters that are no peers any more.
async fn forget_others(shared: Arc<Shared>, configured: BTreeSet<String>) {
    loop {
        let gone: Vec<String> = shared.store.read(|state| {
            let cursors = state.peer_cursors().map(|cursor| cursor.cluster.clone());
            cursors
                .filter(|cluster| !configured.contains(cluster))
                .collect()
        });
        if gone.is_empty() {
            return;
        }
        if shared.store.leading_term().is_none() {
            tokio::time::sleep(FORGET_RETRY_PAUSE).await;
            continue;
        }
        let mut failed = false;
        for cluster in gone {
            match drain_copy(&shared, &cluster).await {
                Ok(records) => info!(cluster, records, "not a peer any more, its copy is removed"),
                Err(status) => {
                    failed = true;
                    warn!(
                        cluster,
                        error = status.message(),
                        "the copy of a former peer could not be removed"
                    );
                }
            }
        }
        if !failed {
            return;
        }
        tokio::time::sleep(FORGET_RETRY_PAUSE).await;
    }
}

/// Deletes all that is copied of `cluster`, then its cursor; the number of records.
async fn drain_copy(shared: &Shared, cluster: &str) -> Result<usize, tonic::Status> {
    let mut writer = Writer::new(shared, cluster).await?;
    let changes = {
        let mut owners = shared.owners.lock();
        shared
            .store
            .read(|state| forget(cluster, &mut owners, &StateView(state)))
    };
    let records = changes.len();
    writer.unsync();
    writer.write(changes).await?;
    writer.forget().await?;
    shared.ids.lock().retain(|_, name| name != cluster);
    Ok(records)
}
