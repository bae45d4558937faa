//! This cluster's own description, in the order in which readers rely on it: configuration, canaries, heartbeat.

use std::convert::Infallible;
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

/// Writes configuration and canaries where they are missing or differ, then the first heartbeat.
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
    let cluster = settings.name.clone();
    let key = RecordKey::ClusterConfig {
        cluster: cluster.clone(),
    };
    put(planner, move |draft, _| {
        draft.put(key.to_bytes(), config.encode());
    })
    .await?;
    // The store outlives its server, so its records are complete as soon as the configuration stands: a canary means no more.
    put(planner, move |draft, now| {
        for kind in Kind::ALL {
            let key = RecordKey::Synced {
                cluster: cluster.clone(),
                tree: Tree::State,
                kind,
            }
            .to_bytes();
            if draft.get(&key).is_none() {
                draft.put(key, Timestamp::from_unix_ms(now).encode());
            }
        }
    })
    .await?;
    heartbeat(planner).await
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
            metrics
                .failures
                .get_or_create(&ControllerLabels {
                    controller: "heartbeat".to_owned(),
                })
                .inc();
            warn!(error = status.message(), "heartbeat not written");
        }
    }
}
