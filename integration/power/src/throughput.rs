//! How fast a log makes batches of entries durable.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clustermesh_store::{Command, Entry, LogId, SledLog, TypeConfig};
use openraft::{
    EntryPayload,
    async_runtime::{AsyncRuntime, Oneshot},
    entry::RaftEntry as _,
    storage::{IOFlushed, RaftLogStorage as _},
};
use openraft_rt_tokio::TokioRuntime;

const ENTRY_BYTES: usize = 600;
/// Entries that stay, as after snapshots.
const KEPT_ENTRIES: u64 = 50_000;

/// Appends batches of `batch` entries of 600 bytes one after the other for `time`, purging on the way; returns how many
/// entries became durable.
///
/// # Errors
/// When the log fails.
pub async fn measure(folder: &Path, batch: u64, time: Duration) -> anyhow::Result<u64> {
    type R = TokioRuntime;
    let mut log = SledLog::<R, ()>::open(folder)?;
    let payload = bytes::Bytes::from(vec![7; ENTRY_BYTES]);
    let started = Instant::now();
    let (mut next, mut purged) = (0, 0);
    while started.elapsed() < time {
        let entries: Vec<Entry> = (next..next + batch)
            .map(|index| {
                let command = Command::new(payload.clone());
                Entry::new(
                    LogId::new_term_index(1, index),
                    EntryPayload::Normal(command),
                )
            })
            .collect();
        let (done, durable) = <R as AsyncRuntime>::Oneshot::channel();
        log.append(entries, IOFlushed::<TypeConfig<R, ()>>::signal(done))
            .await?;
        durable.await.context("the log has stopped")??;
        next += batch;
        if next > purged + 2 * KEPT_ENTRIES {
            purged = next - KEPT_ENTRIES;
            log.purge(LogId::new_term_index(1, purged)).await?;
        }
    }
    Ok(next)
}
