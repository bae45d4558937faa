//! Whose data this is, and of which group: kept durably, adopted once.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use clustermesh_store::{DataDir, Identity, StoreError};
use openraft::async_runtime::AsyncRuntime;
use parking_lot::Mutex;
use rand::Rng;

use crate::wire::refusal::Reason;

/// An id of a replica or a group that nobody else has.
pub(crate) fn random_id<R: AsyncRuntime>() -> u64 {
    loop {
        let id = R::thread_rng().next_u64();
        if id != 0 {
            return id;
        }
    }
}

/// Where the identity is kept.
pub(crate) enum Kept {
    Folder(DataDir),
    Memory(Arc<Mutex<Option<Identity>>>),
    Closed,
}

impl Kept {
    /// Makes it the data of another replica, durably.
    pub(crate) fn replace(&mut self, identity: Identity) -> Result<(), StoreError> {
        match self {
            Self::Folder(data_dir) => data_dir.set_identity(identity)?,
            Self::Memory(kept) => *kept.lock() = Some(identity),
            Self::Closed => {}
        }
        Ok(())
    }
}

/// The group's id as this replica knows it.
pub(crate) struct IdentityKeeper {
    kept: Mutex<Kept>,
    cluster_id: Arc<AtomicU64>,
}

impl IdentityKeeper {
    pub(crate) fn new(kept: Kept, cluster_id: u64) -> Self {
        Self {
            kept: Mutex::new(kept),
            cluster_id: Arc::new(AtomicU64::new(cluster_id)),
        }
    }

    /// 0 while it is not known.
    pub(crate) fn cluster_id(&self) -> u64 {
        self.cluster_id.load(Ordering::Relaxed)
    }

    pub(crate) fn shared_id(&self) -> Arc<AtomicU64> {
        self.cluster_id.clone()
    }

    /// Durable first: what was answered under an id must hold after a restart.
    pub(crate) fn set(&self, cluster_id: u64) -> Result<(), StoreError> {
        match &mut *self.kept.lock() {
            Kept::Folder(data_dir) => {
                let identity = Identity {
                    cluster_id,
                    ..data_dir.identity().clone()
                };
                data_dir.set_identity(identity)?;
            }
            Kept::Memory(identity) => {
                if let Some(identity) = &mut *identity.lock() {
                    identity.cluster_id = cluster_id;
                }
            }
            Kept::Closed => {}
        }
        self.cluster_id.store(cluster_id, Ordering::Relaxed);
        Ok(())
    }

    /// The sender must be of this group. A replica that has none yet belongs to the first that addresses it by its random id.
    pub(crate) fn check_or_adopt(&self, theirs: u64) -> Result<(), (Reason, String)> {
        let ours = self.cluster_id();
        if ours == theirs && ours != 0 {
            return Ok(());
        }
        if ours == 0 && theirs != 0 {
            return self
                .set(theirs)
                .map_err(|error| (Reason::Storage, error.to_string()));
        }
        Err((
            Reason::WrongCluster,
            format!(
                "this replica is of group {ours:016x}, the message of {theirs:016x}; check peer addresses and data folders"
            ),
        ))
    }

    /// Lets go of the folder.
    pub(crate) fn close(&self) {
        *self.kept.lock() = Kept::Closed;
    }
}
