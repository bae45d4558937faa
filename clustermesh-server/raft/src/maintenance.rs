//! Snapshots by bytes of log, the purge that follows them, and what changes with leadership.

use std::sync::Arc;

use clustermesh_store::SnapshotStore;
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Select2, Watch, WatchReceiver},
};

use crate::{
    Types,
    state_machine::{Progress, Shared, StateMachine},
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
    let mut taken = metrics.borrow_watched().snapshot;
    let mut asked = false;
    loop {
        // Bytes of log fall when a snapshot is done.
        if progress.borrow_watched().log_bytes >= snapshot_log_bytes && !asked {
            if raft.trigger().snapshot().await.is_err() {
                return;
            }
            asked = true;
        }
        let heard = if asked {
            stop.or(async { metrics.changed().await.is_ok() }).await
        } else {
            stop.or(async {
                match R::select2(progress.changed(), metrics.changed()).await {
                    Select2::First(heard) => heard.is_ok(),
                    Select2::Second(heard) => heard.is_ok(),
                }
            })
            .await
        };
        if heard != Some(true) {
            return;
        }
        let newest = metrics.borrow_watched().snapshot;
        if newest > taken {
            taken = newest;
            asked = false;
            purge(&raft, &snapshots).await;
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
