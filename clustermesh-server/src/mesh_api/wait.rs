//! `Wait`: until every node of this cluster holds, of each source cluster, the revision that it had at the start.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::limits::WAIT_MAX_MS;
use clustermesh_api::records::SessionState;
use clustermesh_api::v1::{Laggard, SourceRevision, WaitProgress};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::Shared;
use super::report::{RecordedNode, recorded_nodes};

/// Reports are looked at no more often than this.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// And no more often than every so many times what a look takes: in a large cluster it reads thousands of nodes.
const LOOK_PAUSE_FACTOR: u32 = 10;
/// Without a report, the waiter hears of the state this often.
const SILENT_INTERVAL: Duration = Duration::from_secs(1);
/// A peer that did not say its revision is asked again after this.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// Laggards named in one message.
const MAX_NAMED_LAGGARDS: usize = 1_000;

type Progress = mpsc::Sender<Result<WaitProgress, Status>>;

/// Runs one wait; `timeout_ms` 0 asks for the longest one.
pub(super) async fn run(shared: Arc<Shared>, timeout_ms: u32, progress: Progress) {
    let limit = if timeout_ms == 0 {
        WAIT_MAX_MS
    } else {
        timeout_ms.min(WAIT_MAX_MS)
    };
    let deadline = Instant::now() + Duration::from_millis(limit.into());
    let waited = tokio::select! {
        waited = timeout_at(deadline, wait(&shared, &progress)) => waited,
        () = shared.drain.draining() => Ok(Err(Status::unavailable("etcdserver: server stopped"))),
        () = progress.closed() => return,
    };
    if let Ok(Err(status)) = waited {
        // The waiter may have given up.
        let _ = progress.send(Err(status)).await;
    }
}

async fn wait(shared: &Shared, progress: &Progress) -> Result<(), Status> {
    shared.store.linearize().await?;
    let own = SourceRevision {
        cluster: shared.settings.name.clone(),
        store_id: shared.store.cluster_id(),
        revision: shared.store.revision(),
    };
    let mut targets = vec![own];
    // A peer that cannot be asked stays in the way until it answers or the wait runs out: it is never dropped silently.
    let mut silent: BTreeMap<String, String> = shared
        .peers
        .all(&shared.store)
        .into_iter()
        .map(|peer| (peer.cluster, String::new()))
        .collect();
    let mut changes = shared.registry.changes();
    let mut next_ask = Instant::now();
    loop {
        if !silent.is_empty() && Instant::now() >= next_ask {
            ask(shared, &mut silent, &mut targets).await;
            next_ask = Instant::now() + ASK_INTERVAL;
        }
        changes.mark_unchanged();
        let begun = Instant::now();
        let now = look(shared, &targets, &silent);
        let rest = LOOK_INTERVAL.max(begun.elapsed() * LOOK_PAUSE_FACTOR);
        let done = now.done;
        if progress.send(Ok(now)).await.is_err() || done {
            return Ok(());
        }
        let pause = if silent.is_empty() {
            SILENT_INTERVAL
        } else {
            ASK_INTERVAL
        };
        // The registry outlives this call.
        let _ = tokio::time::timeout(pause, changes.changed()).await;
        tokio::time::sleep(rest).await;
    }
}

async fn ask(
    shared: &Shared,
    silent: &mut BTreeMap<String, String>,
    targets: &mut Vec<SourceRevision>,
) {
    let asked: Vec<String> = silent.keys().cloned().collect();
    let answers = futures_util::future::join_all(
        asked
            .iter()
            .map(|peer| shared.peers.present_revision(&shared.store, peer)),
    )
    .await;
    for (peer, answer) in asked.into_iter().zip(answers) {
        match answer {
            Ok(target) => {
                silent.remove(&peer);
                targets.push(target);
            }
            Err(reason) => {
                silent.insert(peer, reason);
            }
        }
    }
}

fn look(
    shared: &Shared,
    targets: &[SourceRevision],
    silent: &BTreeMap<String, String>,
) -> WaitProgress {
    let nodes = recorded_nodes(shared);
    let nodes_total = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
    let mut lagging = 0;
    let mut laggards: Vec<Laggard> = silent
        .values()
        .map(|reason| Laggard {
            node: String::new(),
            reason: reason.clone(),
        })
        .collect();
    for node in nodes {
        if let Some(reason) = lag(shared, targets, &node) {
            lagging += 1;
            if laggards.len() < MAX_NAMED_LAGGARDS {
                laggards.push(Laggard {
                    node: node.record.name,
                    reason,
                });
            }
        }
    }
    WaitProgress {
        targets: targets.to_vec(),
        nodes_total,
        nodes_applied: nodes_total.saturating_sub(lagging),
        done: lagging == 0 && silent.is_empty(),
        laggards,
    }
}

/// Why a node does not count as having applied; `None`: it has.
fn lag(shared: &Shared, targets: &[SourceRevision], node: &RecordedNode) -> Option<String> {
    let Some(report) = shared.registry.report(&node.record.name) else {
        let stale = node
            .session
            .as_ref()
            .filter(|session| session.state == SessionState::Stale);
        return Some(match stale {
            Some(session) => format!(
                "stale since {} ms (Unix time): its agent is not connected",
                session.since_unix_ms
            ),
            None => "its agent is not connected".to_owned(),
        });
    };
    let missing: Vec<String> = targets
        .iter()
        .filter(|target| !report.has_applied(target))
        .map(|target| {
            let held = report
                .applied
                .iter()
                .find(|source| source.cluster == target.cluster);
            match held {
                Some(held) if held.store_id == target.store_id => {
                    format!(
                        "holds {} at revision {}, wanted {}",
                        target.cluster, held.revision, target.revision
                    )
                }
                _ => format!(
                    "holds nothing of {} yet, wanted revision {}",
                    target.cluster, target.revision
                ),
            }
        })
        .collect();
    (!missing.is_empty()).then(|| missing.join("; "))
}
