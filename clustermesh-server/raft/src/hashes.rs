//! etcd's HashKV over the applied state, taken in steps beside applies, and the hashes that compactions leave.

use std::sync::Arc;

use clustermesh_core::{CompactionHashes, HashCursor, KvError, KvHash, SnapshotError};
use openraft::async_runtime::{AsyncRuntime, Watch, WatchReceiver, WatchSender};
use parking_lot::Mutex;

use crate::{error::ReadError, state_machine::Shared, task::spawn};

/// Hashes of compactions being taken at once; those of further ones are left out.
const MAX_COMPACTION_HASHES_RUNNING: usize = 16;
/// Times that a hash begins anew because a snapshot replaced the state.
const MAX_HASH_ATTEMPTS: usize = 5;

/// Part of what apply and readers share.
pub(crate) struct Hashes<R: AsyncRuntime> {
    kept: CompactionHashes,
    running: Mutex<<R::Watch as Watch>::Sender<usize>>,
    running_seen: <R::Watch as Watch>::Receiver<usize>,
    /// In simulation there is no other thread.
    inline: bool,
}

impl<R: AsyncRuntime> Hashes<R> {
    /// Those that the newest compactions left.
    pub(crate) fn kept(&self) -> Vec<KvHash> {
        self.kept.all()
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

    fn begin(&self) -> bool {
        self.running.lock().send_if_modified(|running| {
            let has_room = *running < MAX_COMPACTION_HASHES_RUNNING;
            *running += usize::from(has_room);
            has_room
        })
    }

    fn end(&self) {
        self.running.lock().send_if_modified(|running| {
            *running = running.saturating_sub(1);
            true
        });
    }
}

/// Finishes the hash of a compaction and keeps it.
pub(crate) fn keep_compaction_hash<R: AsyncRuntime>(shared: &Arc<Shared<R>>, cursor: HashCursor) {
    if !shared.hashes.begin() {
        return;
    }
    let shared = Arc::clone(shared);
    spawn::<R>(async move {
        if let Ok(Ok(hash)) = finish(&shared, cursor).await {
            shared.hashes.kept.keep(hash);
        }
        shared.hashes.end();
    });
}

async fn finish<R: AsyncRuntime>(
    shared: &Arc<Shared<R>>,
    mut cursor: HashCursor,
) -> Result<Result<KvHash, SnapshotError>, ReadError> {
    let inline = shared.hashes.inline;
    let shared = Arc::clone(shared);
    let run = move || loop {
        // The lock is held for one step, so that apply is not kept waiting.
        match cursor.advance(&shared.applied.read().state) {
            Ok(false) => {}
            Ok(true) => return Ok(cursor.finish()),
            Err(error) => return Err(error),
        }
    };
    if inline {
        return Ok(run());
    }
    R::spawn_blocking(run).await.map_err(|_| ReadError::Stopped)
}

/// The hash of all changes up to `revision` (0: the newest), and the newest revision.
pub(crate) async fn hash_kv<R: AsyncRuntime>(
    shared: &Arc<Shared<R>>,
    revision: i64,
) -> Result<Result<(KvHash, i64), KvError>, ReadError> {
    // A compaction that was answered counts, even while its hash is being taken.
    let mut running = shared.hashes.running_seen.clone();
    let _gone = running.wait_until(|running| *running == 0).await;
    for _ in 0..MAX_HASH_ATTEMPTS {
        let (kept, cursor, newest) = {
            let state = &shared.applied.read().state;
            let kept = shared.hashes.kept.at(revision);
            (kept, state.hash_kv(revision), state.revision())
        };
        if let Some(hash) = kept {
            return Ok(Ok((hash, newest)));
        }
        let cursor = match cursor {
            Ok(cursor) => cursor,
            Err(error) => return Ok(Err(error)),
        };
        if let Ok(hash) = finish(shared, cursor).await? {
            return Ok(Ok((hash, newest)));
        }
    }
    Err(ReadError::Stopped)
}
