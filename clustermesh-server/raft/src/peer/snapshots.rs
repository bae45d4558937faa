//! A snapshot on its way in: what was received stays when the stream breaks, so that the next one goes on from there.

use clustermesh_store::{ReplicaId, SnapshotFile, SnapshotMeta, SnapshotStore, SnapshotWriter};
use futures_util::{StreamExt, stream::BoxStream};
use openraft::async_runtime::AsyncRuntime;
use parking_lot::Mutex;

use super::snapshot_from_wire;
use crate::{
    error::refuse,
    wire::{Refusal, Snapshot, SnapshotPart, SnapshotStart, refusal::Reason},
};

/// What was received of one snapshot.
struct Partial {
    from: ReplicaId,
    snapshot: Snapshot,
    writer: SnapshotWriter,
    chunks: u64,
}

/// Receives one snapshot at a time.
pub(crate) struct Incoming {
    store: SnapshotStore,
    partial: Mutex<Option<Partial>>,
}

impl Incoming {
    pub(crate) fn new(store: SnapshotStore) -> Self {
        Self {
            store,
            partial: Mutex::default(),
        }
    }

    /// Chunks of this snapshot that are there.
    pub(crate) fn chunks(&self, from: ReplicaId, snapshot: &Snapshot) -> u64 {
        self.partial
            .lock()
            .as_ref()
            .filter(|partial| partial.from == from && partial.snapshot == *snapshot)
            .map_or(0, |partial| partial.chunks)
    }

    fn begin(
        &self,
        from: ReplicaId,
        snapshot: Snapshot,
        meta: SnapshotMeta,
    ) -> Result<Partial, Refusal> {
        if let Some(partial) = self
            .partial
            .lock()
            .take_if(|partial| partial.from == from && partial.snapshot == snapshot)
        {
            return Ok(partial);
        }
        // The file of another one goes first: two may have the same name.
        drop(self.partial.lock().take());
        let writer = self.store.create(meta).map_err(storage)?;
        Ok(Partial {
            from,
            snapshot,
            writer,
            chunks: 0,
        })
    }

    /// Takes the parts after the first one; the snapshot, once it is complete.
    pub(crate) async fn receive<R: AsyncRuntime>(
        &self,
        from: ReplicaId,
        start: SnapshotStart,
        mut parts: BoxStream<'static, SnapshotPart>,
    ) -> Result<SnapshotFile, Refusal> {
        let invalid = |reason: &str| refuse(Reason::Invalid, reason);
        let snapshot = start
            .snapshot
            .ok_or_else(|| invalid("a snapshot without description"))?;
        let meta = snapshot_from_wire(&snapshot).map_err(|error| invalid(&error.to_string()))?;
        let mut partial = self.begin(from, snapshot, meta)?;
        while let Some(part) = parts.next().await {
            if let Some(end) = part.end {
                if end.chunks != partial.chunks {
                    return Err(invalid("the snapshot's end names another number of chunks"));
                }
                return self.finish::<R>(partial.writer).await;
            }
            if part.number < partial.chunks {
                continue;
            }
            if part.number > partial.chunks {
                *self.partial.lock() = Some(partial);
                return Err(invalid("a chunk of the snapshot is missing"));
            }
            partial = self.write::<R>(partial, part.chunk).await?;
        }
        let chunks = partial.chunks;
        *self.partial.lock() = Some(partial);
        Err(refuse(
            Reason::Storage,
            format!("the snapshot's stream ended after {chunks} chunks"),
        ))
    }

    async fn write<R: AsyncRuntime>(
        &self,
        mut partial: Partial,
        chunk: bytes::Bytes,
    ) -> Result<Partial, Refusal> {
        let write = move || {
            partial.writer.chunk(chunk).map_err(storage)?;
            partial.chunks += 1;
            Ok(partial)
        };
        self.blocking::<R, _>(write).await
    }

    async fn finish<R: AsyncRuntime>(
        &self,
        writer: SnapshotWriter,
    ) -> Result<SnapshotFile, Refusal> {
        self.blocking::<R, _>(move || writer.finish().map_err(storage))
            .await
    }

    async fn blocking<R: AsyncRuntime, T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        if self.store.is_memory() {
            work()
        } else {
            R::spawn_blocking(work).await.map_err(storage)?
        }
    }
}

fn storage(error: impl std::fmt::Display) -> Refusal {
    refuse(Reason::Storage, error.to_string())
}
