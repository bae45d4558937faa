//! The applied state, and all that apply and those who read share.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use clustermesh_core::State;
use clustermesh_store::{LogId, SnapshotMeta, StoredMembership};
use openraft::async_runtime::{AsyncRuntime, Watch, WatchSender};
use parking_lot::{Mutex, RwLock};

use crate::{
    contact::Contact, group::GroupView, hashes::Hashes, lease::LeaseKeeper, metrics::Metrics,
    pending::Pending,
};

/// The state with its place in the log.
pub(crate) struct Applied {
    pub(crate) state: State,
    pub(crate) last: Option<LogId>,
    pub(crate) membership: StoredMembership,
    /// Number of publications made of this state: orders readers of it against the watch hub.
    pub(crate) sequence: u64,
    /// Bytes of entries applied since the last snapshot.
    pub(crate) log_bytes: u64,
    /// Index of the last entry that may have changed what the state holds beside keys.
    pub(crate) beside_keys_since: u64,
    /// Times that members or alarms changed, or all of the state.
    pub(crate) group_changes: u64,
}

impl Applied {
    /// What a snapshot holds.
    pub(crate) fn new(state: State, meta: SnapshotMeta) -> Self {
        Self {
            state,
            last: meta.last_log_id,
            membership: meta.last_membership,
            sequence: 0,
            log_bytes: 0,
            beside_keys_since: meta.last_log_id.map_or(0, |last| last.index),
            group_changes: 0,
        }
    }
}

/// What apply and everyone who reads share.
pub(crate) struct Shared<R: AsyncRuntime> {
    pub(crate) applied: RwLock<Applied>,
    pub(crate) leases: LeaseKeeper<R>,
    pub(crate) pending: Arc<Pending<R>>,
    pub(crate) contact: Contact<R>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) group: GroupView<R>,
    pub(crate) hashes: Hashes<R>,
    /// The group found other data here than elsewhere: nothing is read from it any more.
    pub(crate) diverged: AtomicBool,
    pub(crate) reports: Reports<R>,
}

impl<R: AsyncRuntime> Shared<R> {
    pub(crate) fn report(&self) {
        let metrics = &self.metrics;
        let snapshots = [&metrics.snapshots_total, &metrics.snapshot_failures_total];
        let snapshots = snapshots.map(|count| count.load(Ordering::Relaxed));
        // One after the other: apply and a snapshot's end may come at once, and the newer word must be the last.
        let told = self.reports.told.lock();
        let (progress, milestones) = {
            let applied = self.applied.read();
            (
                Progress {
                    next_index: applied.last.map_or(0, |last| last.index + 1),
                },
                Milestones {
                    log_is_long: applied.log_bytes >= self.reports.snapshot_log_bytes,
                    snapshots: snapshots.into_iter().sum(),
                    group_changes: applied.group_changes,
                },
            )
        };
        // Nobody listens once the replica is stopping.
        told.progress.send_if_different(progress);
        told.milestones.send_if_different(milestones);
    }
}

/// Where observers of apply are told.
pub(crate) struct Reports<R: AsyncRuntime> {
    told: Mutex<Told<R>>,
    /// A log of so many bytes is long.
    snapshot_log_bytes: u64,
}

struct Told<R: AsyncRuntime> {
    progress: <R::Watch as Watch>::Sender<Progress>,
    milestones: <R::Watch as Watch>::Sender<Milestones>,
}

impl<R: AsyncRuntime> Reports<R> {
    /// With those who hear them.
    pub(crate) fn new(snapshot_log_bytes: u64) -> (Self, Observers<R>) {
        let (progress, seen_progress) = R::Watch::channel(Progress::default());
        let (milestones, seen_milestones) = R::Watch::channel(Milestones::default());
        let told = Mutex::new(Told {
            progress,
            milestones,
        });
        let reports = Self {
            told,
            snapshot_log_bytes,
        };
        let observers = Observers {
            progress: seen_progress,
            milestones: seen_milestones,
        };
        (reports, observers)
    }
}

/// What observers of apply hear.
pub(crate) struct Observers<R: AsyncRuntime> {
    pub(crate) progress: <R::Watch as Watch>::Receiver<Progress>,
    pub(crate) milestones: <R::Watch as Watch>::Receiver<Milestones>,
}

/// What changes with every entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// One past the last applied index.
    pub(crate) next_index: u64,
}

/// What seldom changes: who waits for it is not woken by every entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Milestones {
    /// It is time for a snapshot.
    pub(crate) log_is_long: bool,
    /// Snapshots taken or failed since the start.
    pub(crate) snapshots: u64,
    /// Times that members or alarms changed, or all of the state.
    pub(crate) group_changes: u64,
}
