//! When a leader was last heard.

use clustermesh_store::ReplicaId;
use openraft::async_runtime::{AsyncRuntime, Instant};
use parking_lot::Mutex;

/// When a leader was last heard.
pub(crate) struct Contact<R: AsyncRuntime> {
    last: Mutex<Option<(ReplicaId, R::Instant)>>,
}

impl<R: AsyncRuntime> Contact<R> {
    pub(crate) fn new() -> Self {
        Self {
            last: Mutex::new(None),
        }
    }

    pub(crate) fn note(&self, leader: ReplicaId) {
        *self.last.lock() = Some((leader, R::Instant::now()));
    }

    /// How long ago this leader was heard.
    pub(crate) fn age(&self, leader: ReplicaId) -> Option<std::time::Duration> {
        self.last
            .lock()
            .as_ref()
            .filter(|(from, _)| *from == leader)
            .map(|(_, at)| at.elapsed())
    }
}
