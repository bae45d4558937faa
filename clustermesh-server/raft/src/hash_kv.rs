//! etcd's HashKV over the applied state, taken in steps beside applies.

use std::sync::Arc;

use clustermesh_core::{HashCursor, KvError, KvHash, SnapshotError};
use openraft::async_runtime::AsyncRuntime;

use crate::{error::ReadError, shared::Shared, task::spawn};

/// Times that a hash begins anew because a snapshot replaced the state.
const MAX_HASH_ATTEMPTS: usize = 5;

/// Finishes the hash of a compaction and keeps it.
pub(crate) fn keep_compaction_hash<R: AsyncRuntime>(shared: &Arc<Shared<R>>, cursor: HashCursor) {
    if !shared.hashes.begin() {
        return;
    }
    let shared = Arc::clone(shared);
    spawn::<R>(async move {
        if let Ok(Ok(hash)) = finish(&shared, cursor).await {
            shared.hashes.keep(hash);
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
    shared.hashes.settled().await;
    for _ in 0..MAX_HASH_ATTEMPTS {
        let (kept, cursor, newest) = {
            let state = &shared.applied.read().state;
            let kept = shared.hashes.at(revision);
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
