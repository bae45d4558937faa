//! Nodes whose agents do not come back after this server was away.

use std::convert::Infallible;
use std::time::Duration;

use clustermesh_api::keys::{RecordKey, SESSIONS_PREFIX};
use clustermesh_api::limits::{
    SESSION_TTL_DEFAULT_SECONDS, SESSION_TTL_MAX_SECONDS, SESSION_TTL_MIN_SECONDS,
};
use clustermesh_api::records::{Session, SessionState};
use clustermesh_mesh::allocate::Plan;
use clustermesh_mesh::claims::plan_session;
use clustermesh_mesh::{Kv, View};
use clustermesh_process::Drain;
use tokio::time::Instant;
use tracing::warn;

use crate::agents::registry::Registry;
use crate::metrics::SessionMetrics;
use crate::planner::Planner;
use crate::store::Store;
use crate::view::StateView;

/// Nodes on record as connected that have no session become stale: each when its own time to live has passed since the
/// server's start without a word of it.
pub async fn mark_unheard_stale(
    store: Store,
    planner: Planner,
    registry: Registry,
    metrics: SessionMetrics,
    drain: Drain,
) {
    if store.replica().status().members.len() > 1 {
        // Sessions live at every replica, and this one cannot tell which of them are open elsewhere.
        return;
    }
    let start = Instant::now();
    let recorded = store.read(|state| StateView(state).list(SESSIONS_PREFIX.as_bytes()));
    for (grace, node, session) in unheard(recorded) {
        tokio::select! {
            () = tokio::time::sleep_until(start + grace) => {}
            () = drain.draining() => return,
        }
        if registry.is_open(&node) {
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
                    session.ttl_seconds,
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

/// Connected nodes with the time that each has to come back, shortest first.
fn unheard(recorded: Vec<Kv>) -> Vec<(Duration, String, Session)> {
    let mut unheard: Vec<_> = recorded
        .into_iter()
        .filter_map(|kv| {
            let (Ok(RecordKey::Session { node }), Ok(session)) =
                (RecordKey::parse(&kv.key), Session::decode(&kv.value))
            else {
                return None;
            };
            let seconds = match session.ttl_seconds {
                0 => SESSION_TTL_DEFAULT_SECONDS,
                own => own.clamp(SESSION_TTL_MIN_SECONDS, SESSION_TTL_MAX_SECONDS),
            };
            let connected = session.state == SessionState::Connected;
            connected.then(|| (Duration::from_secs(seconds.into()), node, session))
        })
        .collect();
    unheard.sort_by_key(|(grace, ..)| *grace);
    unheard
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_its_own_time_to_live_to_come_back() {
        let record = |node: &str, state, ttl_seconds| Kv {
            key: RecordKey::Session {
                node: node.to_owned(),
            }
            .to_bytes()
            .into(),
            value: Session {
                state,
                since_unix_ms: 1,
                instance_id: "i".to_owned(),
                ttl_seconds,
            }
            .encode(),
            mod_revision: 2,
        };
        let recorded = vec![
            record("slow", SessionState::Connected, 120),
            record("old", SessionState::Connected, 0),
            record("quick", SessionState::Connected, 5),
            record("stale", SessionState::Stale, 5),
        ];
        let waits: Vec<_> = unheard(recorded)
            .into_iter()
            .map(|(grace, node, _)| (grace.as_secs(), node))
            .collect();
        let default = u64::from(SESSION_TTL_DEFAULT_SECONDS);
        let expected = [(5, "quick"), (default, "old"), (120, "slow")];
        assert_eq!(
            waits,
            expected.map(|(seconds, node)| (seconds, node.to_owned()))
        );
    }
}
