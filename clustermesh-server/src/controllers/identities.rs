//! Identities that nothing uses any more go into quarantine, and later back into use.

use std::sync::Arc;
use std::time::Duration;

use clustermesh_mesh::allocate::plan_release;
use clustermesh_mesh::{ClusterSettings, View};
use clustermesh_process::Drain;
use tracing::{info, warn};

use crate::metrics::{ControllerLabels, ControllerMetrics};
use crate::planner::Planner;
use crate::store::Store;

/// Unused identities are looked for this often.
const RELEASE_INTERVAL: Duration = Duration::from_secs(60);

/// Runs on the leader until the drain begins.
pub async fn release(
    store: Store,
    planner: Planner,
    settings: Arc<ClusterSettings>,
    metrics: ControllerMetrics,
    drain: Drain,
) {
    let mut tick = tokio::time::interval(RELEASE_INTERVAL);
    tick.reset();
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = drain.draining() => return,
        }
        let mut more = store.is_leader();
        while more {
            let settings = Arc::clone(&settings);
            let released = planner
                .commit(move |view: &dyn View, now| plan_release(view, &settings, now))
                .await;
            more = match released {
                Ok(done) => {
                    if !done.result.identities.is_empty() {
                        info!(identities = ?done.result.identities, "unused identities released");
                    }
                    done.result.more
                }
                Err(error) => {
                    let labels = ControllerLabels {
                        controller: "identities".to_owned(),
                    };
                    metrics.failures.get_or_create(&labels).inc();
                    warn!(
                        error = tonic::Status::from(error).message(),
                        "unused identities not released"
                    );
                    false
                }
            };
        }
    }
}
