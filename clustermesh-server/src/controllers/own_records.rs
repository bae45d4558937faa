//! This cluster's own description, in the order in which readers rely on it: configuration, canaries, heartbeat.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::keys::{Kind, RecordKey, Tree};
use clustermesh_api::limits::HEARTBEAT_INTERVAL_SECONDS;
use clustermesh_api::records::{
    ClusterConfig, ClusterConfigCapabilities, EndpointSlicesExportMode, Timestamp,
};
use clustermesh_mesh::ClusterSettings;
use clustermesh_mesh::allocate::Plan;
use clustermesh_mesh::{Draft, View};
use clustermesh_process::Drain;
use tonic::Status;
use tracing::warn;

use crate::metrics::{ControllerLabels, ControllerMetrics};
use crate::planner::Planner;
use crate::store::Store;

/// Pause before canaries that could not be written are tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Writes the configuration where it is missing or differs, then the first heartbeat.
///
/// # Errors
/// When the store refuses.
pub async fn write(planner: &Planner, settings: &ClusterSettings) -> Result<(), Status> {
    let config = ClusterConfig {
        id: settings.id,
        capabilities: ClusterConfigCapabilities {
            synced_canaries: true,
            cached: false,
            max_connected_clusters: settings.split.max_cluster_id(),
            service_exports_enabled: Some(false),
            endpoint_slices_export_mode: EndpointSlicesExportMode::ServicesAndEndpointSlices,
        },
    };
    let key = RecordKey::ClusterConfig {
        cluster: settings.name.clone(),
    };
    put(planner, move |draft, _| {
        draft.put(key.to_bytes(), config.encode());
    })
    .await?;
    heartbeat(planner).await
}

/// Tells peers, once, that this store's records are complete: after that, what it does not name is gone for them.
///
/// A store outlives its server, so one that has its canaries needs nothing more. A store made anew does not know what
/// its predecessor held: its agents come back within their sessions' time to live and tell. Until `settle` has passed
/// since the server's start, peers keep what they copied from the predecessor.
pub async fn announce(
    store: Store,
    planner: Planner,
    settings: Arc<ClusterSettings>,
    settle: Duration,
    metrics: ControllerMetrics,
    drain: Drain,
) {
    let keys: Vec<Vec<u8>> = Kind::ALL
        .into_iter()
        .map(|kind| canary(&settings.name, kind).to_bytes())
        .collect();
    let mut pause = settle;
    loop {
        let complete = store.read(|state| keys.iter().all(|key| state.get(key).is_some()));
        if complete {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = drain.draining() => return,
        }
        pause = RETRY_PAUSE;
        if !store.is_leader() {
            continue;
        }
        let missing = keys.clone();
        let written = put(&planner, move |draft, now| {
            for key in &missing {
                if draft.get(key).is_none() {
                    draft.put(key.clone(), Timestamp::from_unix_ms(now).encode());
                }
            }
        })
        .await;
        if let Err(status) = written {
            failed(&metrics, "canaries");
            warn!(error = status.message(), "canaries not written");
        }
    }
}

fn canary(cluster: &str, kind: Kind) -> RecordKey {
    RecordKey::Synced {
        cluster: cluster.to_owned(),
        tree: Tree::State,
        kind,
    }
}

fn failed(metrics: &ControllerMetrics, controller: &str) {
    metrics
        .failures
        .get_or_create(&ControllerLabels {
            controller: controller.to_owned(),
        })
        .inc();
}

async fn heartbeat(planner: &Planner) -> Result<(), Status> {
    put(planner, |draft, now| {
        draft.put(
            RecordKey::Heartbeat.to_bytes(),
            Timestamp::from_unix_ms(now).encode(),
        );
    })
    .await
}

async fn put(
    planner: &Planner,
    decide: impl Fn(&mut Draft<'_>, i64) + Send + 'static,
) -> Result<(), Status> {
    planner
        .commit(move |view: &dyn View, now| {
            let mut draft = Draft::new(view);
            decide(&mut draft, now);
            Ok::<_, Infallible>(Plan {
                txn: draft.into_txn(),
                result: (),
            })
        })
        .await?;
    Ok(())
}

/// Beats until the drain begins, on the leader.
pub async fn beat(store: Store, planner: Planner, metrics: ControllerMetrics, drain: Drain) {
    let mut tick = tokio::time::interval(Duration::from_secs(HEARTBEAT_INTERVAL_SECONDS));
    // The first one was written at start.
    tick.reset();
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = drain.draining() => return,
        }
        if !store.is_leader() {
            continue;
        }
        if let Err(status) = heartbeat(&planner).await {
            failed(&metrics, "heartbeat");
            warn!(error = status.message(), "heartbeat not written");
        }
    }
}
