//! What others follow of the applied group without waiting for apply: feature level, whether auth is enabled, changes of auth.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use clustermesh_core::{State, pb::AlarmKind};
use clustermesh_store::ReplicaId;
use openraft::async_runtime::{AsyncRuntime, Watch, WatchReceiver, WatchSender};
use parking_lot::Mutex;

/// Part of what apply and readers share.
pub(crate) struct GroupView<R: AsyncRuntime> {
    feature_level: AtomicU32,
    auth_enabled: AtomicBool,
    auth_version: AtomicU64,
    own: ReplicaId,
    accused: AtomicBool,
    auth_changes: Mutex<<R::Watch as Watch>::Sender<u64>>,
    auth_changes_seen: <R::Watch as Watch>::Receiver<u64>,
}

impl<R: AsyncRuntime> GroupView<R> {
    pub(crate) fn new(state: &State, own: ReplicaId) -> Self {
        let (auth_changes, auth_changes_seen) = R::Watch::channel(0);
        let view = Self {
            feature_level: AtomicU32::new(0),
            auth_enabled: AtomicBool::new(false),
            auth_version: AtomicU64::new(0),
            own,
            accused: AtomicBool::new(false),
            auth_changes: Mutex::new(auth_changes),
            auth_changes_seen,
        };
        view.follow(state, false);
        view
    }

    /// Grows with every change of auth.
    pub(crate) fn auth_version(&self) -> u64 {
        self.auth_version.load(Ordering::Acquire)
    }

    /// After each entry, under the lock that keeps readers out.
    pub(crate) fn follow(&self, state: &State, auth_changed: bool) {
        self.feature_level
            .store(state.feature_level(), Ordering::Release);
        self.auth_enabled
            .store(state.auth().is_enabled(), Ordering::Release);
        let accused = state
            .alarms()
            .any(|alarm| alarm.kind() == AlarmKind::Corrupt && alarm.member_id == self.own);
        self.accused.store(accused, Ordering::Release);
        if auth_changed {
            let version = self.auth_version.fetch_add(1, Ordering::AcqRel) + 1;
            self.auth_changes.lock().send_if_modified(|changes| {
                *changes = version;
                true
            });
        }
    }

    pub(crate) fn feature_level(&self) -> u32 {
        self.feature_level.load(Ordering::Acquire)
    }

    /// Whether the group holds that this replica's data is not its own.
    pub(crate) fn is_accused(&self) -> bool {
        self.accused.load(Ordering::Acquire)
    }

    pub(crate) fn is_auth_enabled(&self) -> bool {
        self.auth_enabled.load(Ordering::Acquire)
    }

    pub(crate) fn auth_changes(&self) -> AuthChanges<R> {
        AuthChanges(self.auth_changes_seen.clone())
    }
}

/// Wakes up when users, roles or whether permissions are checked change.
pub struct AuthChanges<R: AsyncRuntime>(<R::Watch as Watch>::Receiver<u64>);

impl<R: AsyncRuntime> AuthChanges<R> {
    /// Resolves with the next change; false when the replica is gone.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}
