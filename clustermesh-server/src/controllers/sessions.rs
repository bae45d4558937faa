//! Nodes whose agents do not come back after this server was away.

use std::convert::Infallible;
use std::time::Duration;

use clustermesh_api::keys::{RecordKey, SESSIONS_PREFIX};
use clustermesh_api::limits::SESSION_TTL_DEFAULT_SECONDS;
use clustermesh_api::records::{Session, SessionState};
use clustermesh_mesh::View;
use clustermesh_mesh::allocate::Plan;
use clustermesh_mesh::claims::plan_session;
use clustermesh_process::Drain;
use tracing::warn;

use crate::agents::registry::Registry;
use crate::metrics::SessionMetrics;
use crate::planner::Planner;
use crate::store::Store;
use crate::view::StateView;

/// Agents have so long to come back after the server's start.
const GRACE: Duration = Duration::from_secs(SESSION_TTL_DEFAULT_SECONDS as u64);

/// Once, after the grace time: nodes on record as connected that have no session become stale.
pub async fn mark_unheard_stale(
    store: Store,
    planner: Planner,
    registry: Registry,
    metrics: SessionMetrics,
    drain: Drain,
) {
    tokio::select! {
        () = tokio::time::sleep(GRACE) => {}
        () = drain.draining() => return,
    }
    let recorded = store.read(|state| StateView(state).list(SESSIONS_PREFIX.as_bytes()));
    for kv in recorded {
        let (Ok(RecordKey::Session { node }), Ok(session)) =
            (RecordKey::parse(&kv.key), Session::decode(&kv.value))
        else {
            continue;
        };
        if session.state == SessionState::Stale || registry.is_open(&node) {
            continue;
        }
        metrics.lost.inc();
        warn!(
            node,
            "the node did not come back after the server's start, it is stale; its records stay"
        );
        let registry = registry.clone();
        let marked = planner
            .commit(move |view: &dyn View, now| {
                if registry.is_open(&node) {
                    return Ok(Plan {
                        txn: clustermesh_mesh::Txn::new(),
                        result: (),
                    });
                }
                Ok::<_, Infallible>(plan_session(
                    view,
                    &node,
                    SessionState::Stale,
                    &session.instance_id,
                    now,
                ))
            })
            .await;
        if let Err(error) = marked {
            warn!(
                error = tonic::Status::from(error).message(),
                "a stale node could not be recorded"
            );
        }
    }
}
