//! The record of who is connected, held against what the replicas say of their sessions.

use std::collections::BTreeMap;
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
use tracing::{info, warn};

use crate::agents::registry::Registry;
use crate::metrics::SessionMetrics;
use crate::planner::Planner;
use crate::store::Store;
use crate::view::StateView;

/// How often records and sessions are compared.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A session that is open so long while its node is on record as stale was wrongly recorded.
const RESTORE_GRACE: Duration = Duration::from_secs(5);

/// While this replica leads: nodes on record as connected become stale once no replica has had a session of theirs for their own time to live,
/// which begins anew with a leader. A node recorded as stale whose session is open (its replica was cut off and is back) is connected again.
pub async fn keep_true(
    store: Store,
    planner: Planner,
    registry: Registry,
    metrics: SessionMetrics,
    drain: Drain,
) {
    let mut wrong: BTreeMap<String, Instant> = BTreeMap::new();
    let mut recorded = (0, Vec::new());
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
            () = drain.draining() => return,
        }
        if !store.is_leader() {
            wrong.clear();
            continue;
        }
        let revision = store.revision();
        if recorded.0 != revision {
            let records = store.read(|state| StateView(state).list(SESSIONS_PREFIX.as_bytes()));
            recorded = (revision, records.iter().filter_map(parse).collect());
        }
        let due = due(&recorded.1, &mut wrong, Instant::now(), |node| {
            registry.is_open(node)
        });
        for (node, session) in due {
            correct(&planner, &registry, &metrics, node, session).await;
        }
    }
}

fn parse(kv: &Kv) -> Option<(String, Session)> {
    match (RecordKey::parse(&kv.key), Session::decode(&kv.value)) {
        (Ok(RecordKey::Session { node }), Ok(session)) => Some((node, session)),
        _ => None,
    }
}

/// How long a record may differ from what the replicas say of the session.
fn grace(session: &Session) -> Duration {
    match (session.state, session.ttl_seconds) {
        (SessionState::Stale, _) => RESTORE_GRACE,
        (SessionState::Connected, 0) => Duration::from_secs(SESSION_TTL_DEFAULT_SECONDS.into()),
        (SessionState::Connected, own) => Duration::from_secs(
            own.clamp(SESSION_TTL_MIN_SECONDS, SESSION_TTL_MAX_SECONDS)
                .into(),
        ),
    }
}

/// Records that have been wrong for too long. `wrong` says since when each one is.
fn due(
    recorded: &[(String, Session)],
    wrong: &mut BTreeMap<String, Instant>,
    now: Instant,
    is_open: impl Fn(&str) -> bool,
) -> Vec<(String, Session)> {
    let before = std::mem::take(wrong);
    let mut due = Vec::new();
    for (node, session) in recorded {
        if is_open(node) == (session.state == SessionState::Connected) {
            continue;
        }
        let since = before.get(node).copied().unwrap_or(now);
        if now.saturating_duration_since(since) >= grace(session) {
            due.push((node.clone(), session.clone()));
        }
        wrong.insert(node.clone(), since);
    }
    due
}

/// Writes what is true when it is planned.
async fn correct(
    planner: &Planner,
    registry: &Registry,
    metrics: &SessionMetrics,
    node: String,
    session: Session,
) {
    let state = match session.state {
        SessionState::Connected => SessionState::Stale,
        SessionState::Stale => SessionState::Connected,
    };
    if state == SessionState::Stale {
        metrics.lost.inc();
        warn!(
            node,
            "no replica has a session of the node, it is stale; its records stay"
        );
    } else {
        info!(
            node,
            "the node's session is open after all, it is connected again"
        );
    }
    let registry = registry.clone();
    let written = planner
        .commit(move |view: &dyn View, now| {
            let key = RecordKey::Session { node: node.clone() }.to_bytes();
            let same = view
                .get(&key)
                .and_then(|kv| Session::decode(&kv.value).ok())
                .is_some_and(|recorded| recorded == session);
            if !same || registry.is_open(&node) != (state == SessionState::Connected) {
                return Ok(Plan {
                    txn: clustermesh_mesh::Txn::new(),
                    result: (),
                });
            }
            Ok::<_, Infallible>(plan_session(
                view,
                &node,
                state,
                &session.instance_id,
                session.ttl_seconds,
                now,
            ))
        })
        .await;
    if let Err(error) = written {
        let error = tonic::Status::from(error);
        warn!(
            error = error.message(),
            "the state of a session could not be recorded"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(state: SessionState, ttl_seconds: u32) -> Session {
        Session {
            state,
            since_unix_ms: 1,
            instance_id: "i".to_owned(),
            ttl_seconds,
        }
    }

    fn names(due: Vec<(String, Session)>) -> Vec<String> {
        due.into_iter().map(|(node, _)| node).collect()
    }

    #[test]
    fn a_node_has_its_own_time_to_live_to_come_back() {
        let recorded: Vec<_> = [("slow", 120), ("old", 0), ("quick", 5)]
            .map(|(node, ttl)| (node.to_owned(), session(SessionState::Connected, ttl)))
            .into();
        let mut wrong = BTreeMap::new();
        let start = Instant::now();
        let mut at = |seconds| {
            let now = start + Duration::from_secs(seconds);
            names(due(&recorded, &mut wrong, now, |node| {
                node == "slow" && seconds == 100
            }))
        };
        assert!(at(0).is_empty() && at(4).is_empty());
        assert_eq!(at(5), ["quick"]);
        let default = u64::from(SESSION_TTL_DEFAULT_SECONDS);
        assert_eq!(at(default), ["old", "quick"]);
        // It was back in between: its time begins anew.
        assert_eq!(at(100), ["old", "quick"]);
        assert_eq!(at(120), ["old", "quick"]);
        assert_eq!(at(240), ["slow", "old", "quick"]);
    }

    #[test]
    fn a_stale_node_with_an_open_session_is_connected_again() {
        let recorded = [
            ("back".to_owned(), session(SessionState::Stale, 5)),
            ("gone".to_owned(), session(SessionState::Stale, 5)),
        ];
        let mut wrong = BTreeMap::new();
        let start = Instant::now();
        let mut at = |now| names(due(&recorded, &mut wrong, now, |node| node == "back"));
        assert!(at(start).is_empty());
        assert_eq!(at(start + RESTORE_GRACE), ["back"]);
    }
}
