//! Snapshots by bytes of log, the purge that follows them, and what changes with leadership.

use std::sync::Arc;

use clustermesh_store::SnapshotStore;
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Select2, Watch, WatchReceiver},
};

use crate::{
    Types,
    config::{LEAVE_DELAY, MEMBERS_POLL, READ_INDEX_TIMEOUT},
    peer::{Links, target},
    shared::{Milestones, Shared},
    state_machine::StateMachine,
    task::Stop,
    wire::{Hello, call_request::Call},
};

/// Asks for a snapshot whenever the log is long.
pub(crate) async fn take_snapshots<R: AsyncRuntime>(
    raft: Raft<Types<R>, StateMachine<R>>,
    mut milestones: <R::Watch as Watch>::Receiver<Milestones>,
    snapshots: SnapshotStore,
    stop: Stop<R>,
) {
    // Snapshots that had ended when one was asked for.
    let mut asked = None;
    let mut ended = 0;
    loop {
        let now = *milestones.borrow_and_update();
        // The same snapshot again would tell openraft nothing, so the end of building counts, not what openraft says of it.
        if asked.is_some_and(|before| now.snapshots > before) {
            asked = None;
        }
        if now.log_is_long && asked.is_none() {
            asked = Some(now.snapshots);
            if raft.trigger().snapshot().await.is_err() {
                return;
            }
        }
        if now.snapshots > ended {
            ended = now.snapshots;
            purge(&raft, &snapshots).await;
        }
        if !matches!(stop.or(milestones.changed()).await, Some(Ok(()))) {
            return;
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

/// Asks the others whether this replica was removed, where its log says so and it was not told that this is committed: no leader
/// speaks to it any more, and without a vote it asks for none, which would be refused. Does not end where the log says nothing.
async fn ask_without_vote<R: AsyncRuntime>(
    raft: &Raft<Types<R>, StateMachine<R>>,
    links: &Links<R>,
) {
    let mut metrics = raft.server_metrics();
    loop {
        let membership = metrics.borrow_and_update().membership_config.clone();
        let membership = membership.membership();
        let others: Vec<_> = membership
            .nodes()
            .map(|(id, node)| target(*id, node))
            .collect();
        if membership.get_node(&links.own).is_none() && !others.is_empty() {
            for other in others {
                // A refusal is heeded; nothing else counts here.
                let _heeded = links
                    .call(&other, Call::Hello(Hello {}), READ_INDEX_TIMEOUT)
                    .await;
            }
            return R::sleep(MEMBERS_POLL).await;
        }
        if metrics.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Ends the replica once its group has removed it.
pub(crate) async fn leave<R: AsyncRuntime>(
    raft: Raft<Types<R>, StateMachine<R>>,
    shared: Arc<Shared<R>>,
    links: Arc<Links<R>>,
    mut milestones: <R::Watch as Watch>::Receiver<Milestones>,
    stop: Stop<R>,
) {
    let mut told = links.removed();
    loop {
        drop(milestones.borrow_and_update());
        if *told.borrow_and_update() {
            break;
        }
        let applied = shared.applied.read().state.is_removed_member(links.own);
        if applied {
            links.set_removed();
            break;
        }
        let heard = R::select2(told.changed(), milestones.changed());
        let asked = R::select2(heard, ask_without_vote(&raft, &links));
        match stop.or(asked).await {
            Some(
                Select2::First(Select2::First(Ok(())) | Select2::Second(Ok(())))
                | Select2::Second(()),
            ) => {}
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

/// Tells those who keep something of a leadership when this replica leads.
pub(crate) async fn follow_leadership<R: AsyncRuntime>(
    raft: Raft<Types<R>, StateMachine<R>>,
    shared: Arc<Shared<R>>,
    links: Arc<Links<R>>,
    stop: Stop<R>,
) {
    let mut metrics = raft.server_metrics();
    let mut led = None;
    loop {
        let term = {
            let metrics = metrics.borrow_and_update();
            metrics
                .state
                .is_leader()
                .then_some(metrics.vote.leader_id.term)
        };
        if term.is_some() && term != led {
            led = term;
            links.forget_outages();
        }
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
