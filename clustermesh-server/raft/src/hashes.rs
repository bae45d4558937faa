//! The hashes that compactions leave.

use clustermesh_core::{CompactionHashes, KvHash};
use openraft::async_runtime::{AsyncRuntime, Watch, WatchReceiver, WatchSender};
use parking_lot::Mutex;

/// Hashes of compactions being taken at once; those of further ones are left out, or a log full of compactions would take
/// the processors for itself at a start.
const MAX_COMPACTION_HASHES_RUNNING: usize = 2;

/// Part of what apply and readers share.
pub(crate) struct Hashes<R: AsyncRuntime> {
    kept: CompactionHashes,
    running: Mutex<<R::Watch as Watch>::Sender<usize>>,
    running_seen: <R::Watch as Watch>::Receiver<usize>,
    /// In simulation there is no other thread.
    pub(crate) inline: bool,
}

impl<R: AsyncRuntime> Hashes<R> {
    /// Those that the newest compactions left.
    pub(crate) fn kept(&self) -> Vec<KvHash> {
        self.kept.all()
    }

    /// The one at `revision`.
    pub(crate) fn at(&self, revision: i64) -> Option<KvHash> {
        self.kept.at(revision)
    }

    pub(crate) fn keep(&self, hash: KvHash) {
        self.kept.keep(hash);
    }

    /// Waits until none is being taken.
    pub(crate) async fn settled(&self) {
        let mut running = self.running_seen.clone();
        let _gone = running.wait_until(|running| *running == 0).await;
    }

    pub(crate) fn new(inline: bool) -> Self {
        let (running, running_seen) = R::Watch::channel(0);
        Self {
            kept: CompactionHashes::default(),
            running: Mutex::new(running),
            running_seen,
            inline,
        }
    }

    /// The state is another one.
    pub(crate) fn forget(&self) {
        self.kept.clear();
    }

    /// One more is being taken; false where there are too many.
    pub(crate) fn begin(&self) -> bool {
        self.running.lock().send_if_modified(|running| {
            let has_room = *running < MAX_COMPACTION_HASHES_RUNNING;
            *running += usize::from(has_room);
            has_room
        })
    }

    pub(crate) fn end(&self) {
        self.running.lock().send_if_modified(|running| {
            *running = running.saturating_sub(1);
            true
        });
    }
}
