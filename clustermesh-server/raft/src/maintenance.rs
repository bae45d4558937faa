//! Snapshots by bytes of log, the purge that follows them, and what changes with leadership.

use std::sync::Arc;

use clustermesh_store::SnapshotStore;
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Select2, Watch, WatchReceiver},
};

use crate::{
    Types,
    config::LEAVE_DELAY,
    peer::Links,
    shared::{Progress, Shared},
    state_machine::StateMachine,
    task::Stop,
};

/// Asks for a snapshot after every `snapshot_log_bytes` of log.
pub(crate) async fn take_snapshots<R: AsyncRuntime>(
    raft: Raft<Types<R>, StateMachine<R>>,
    mut progress: <R::Watch as Watch>::Receiver<Progress>,
    snapshots: SnapshotStore,
    snapshot_log_bytes: u64,
    stop: Stop<R>,
) {
    let mut metrics = raft.metrics();
    let mut newest = metrics.borrow_watched().snapshot;
    // Snapshots that had ended when one was asked for.
    let mut asked = None;
    loop {
        let now = *progress.borrow_and_update();
        // The same snapshot again would tell openraft nothing, so the end of building counts, not what openraft says of it.
        if asked.is_some_and(|before| now.snapshots > before) {
            asked = None;
        }
        if now.log_bytes >= snapshot_log_bytes && asked.is_none() {
            asked = Some(now.snapshots);
            if raft.trigger().snapshot().await.is_err() {
                return;
            }
        }
        let snapshot = metrics.borrow_and_update().snapshot;
        if snapshot > newest {
            newest = snapshot;
            purge(&raft, &snapshots).await;
        }
        let heard = stop.or(R::select2(progress.changed(), metrics.changed()));
        match heard.await {
            Some(Select2::First(Ok(())) | Select2::Second(Ok(()))) => {}
            _ => return,
        }
    }
}

/// Purges the log up to the snapshot before the newest, so that a damaged newest one can be done without.
async fn purge<R: AsyncRuntime>(raft: &Raft<Types<R>, StateMachine<R>>, snapshots: &SnapshotStore) {
    match snapshots.previous() {
        Ok(Some(previous)) => {
            if let Some(upto) = previous.meta().last_log_id
                && raft.trigger().purge_log(upto.index).await.is_err()
            {
                tracing::debug!("the replica stopped before its log was purged");
            }
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "the log is not purged"),
    }
}

/// Ends the replica once its group has removed it.
pub(crate) async fn leave<R: AsyncRuntime>(
    raft: Raft<Types<R>, StateMachine<R>>,
    shared: Arc<Shared<R>>,
    links: Arc<Links<R>>,
    stop: Stop<R>,
) {
    let mut told = links.removed();
    let mut metrics = raft.server_metrics();
    loop {
        if *told.borrow_watched() {
            break;
        }
        let applied = shared.applied.read().state.is_removed_member(links.own);
        if applied {
            links.set_removed();
            break;
        }
        let heard = stop.or(R::select2(told.changed(), metrics.changed())).await;
        match heard {
            Some(Select2::First(Ok(())) | Select2::Second(Ok(()))) => {}
            _ => return,
        }
    }
    // A leader that removed itself still has to hand over.
    if stop.or(R::sleep(LEAVE_DELAY)).await.is_none() {
        return;
    }
    tracing::error!(
        replica = %format_args!("{:016x}", links.own),
        "this replica was removed from its group and ends; empty its data folder before it joins again as a new one"
    );
    if let Err(error) = raft.shutdown().await {
        tracing::error!(%error, "raft did not stop in order");
    }
}

/// Tells the lease keeper when this replica leads.
pub(crate) async fn follow_leadership<R: AsyncRuntime>(
    raft: Raft<Types<R>, StateMachine<R>>,
    shared: Arc<Shared<R>>,
    stop: Stop<R>,
) {
    let mut metrics = raft.server_metrics();
    loop {
        let term = {
            let metrics = metrics.borrow_and_update();
            metrics
                .state
                .is_leader()
                .then_some(metrics.vote.leader_id.term)
        };
        {
            let applied = shared.applied.read();
            shared.leases.lead(term, &applied.state);
        }
        match stop.or(metrics.changed()).await {
            Some(Ok(())) => {}
            Some(Err(_)) | None => return,
        }
    }
}
