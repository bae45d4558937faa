//! The durable log: reads, and requests to the thread that writes (see `writer`).

use std::{
    fmt::Debug,
    io,
    ops::{Range, RangeBounds},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use openraft::{
    LogState, OptionalSend,
    async_runtime::{AsyncRuntime, Oneshot},
    storage::{IOFlushed, RaftLogReader, RaftLogStorage},
};
use parking_lot::Mutex;

use super::{
    LogStats, MAX_ENTRY_BYTES, MAX_READ_BYTES,
    tail::{Tail, index_range},
    writer::{Disk, Op, Queue, Saved, Writer},
};
use crate::{
    codec::entry_size_bytes,
    error::StoreError,
    types::{Entry, LogId, Reply, TypeConfig, Vote},
};

/// The log and vote on sled, made durable by group commit. Clones share it.
pub struct SledLog<R: AsyncRuntime, A: Reply> {
    shared: Arc<Shared<R, A>>,
}

struct Shared<R: AsyncRuntime, A: Reply> {
    path: PathBuf,
    disk: Arc<Disk>,
    tail: Arc<Mutex<Tail>>,
    queue: Arc<Queue<R, A>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Last, so that everything else is closed when it says so.
    closing: Closing,
}

/// Tells when a log is closed and its folder may be opened again.
#[derive(Debug, Clone, Default)]
pub struct Closed(Arc<AtomicBool>);

impl Closed {
    /// Whether the log is closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

#[derive(Default)]
struct Closing(Closed);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Release);
    }
}

impl<R: AsyncRuntime, A: Reply> Drop for Shared<R, A> {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(writer) = self.writer.lock().take()
            && writer.join().is_err()
        {
            tracing::error!(path = %self.path.display(), "log writer has panicked");
        }
    }
}

impl<R: AsyncRuntime, A: Reply> Clone for SledLog<R, A> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<R: AsyncRuntime, A: Reply> SledLog<R, A> {
    /// Opens or creates the log in folder `path` and checks every record in it.
    ///
    /// # Errors
    /// [`StoreError`]: the folder cannot be used, or holds a damaged or newer log.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::start(path, Disk::open(path)?)
    }

    /// The same without any sync of ours, to show that sled's own flush is not enough.
    ///
    /// # Errors
    /// As [`Self::open`].
    #[cfg(feature = "flush-only")]
    #[doc(hidden)]
    pub fn open_flush_only(path: &Path) -> Result<Self, StoreError> {
        Self::start(path, Disk::open_flush_only(path)?)
    }

    fn start(path: &Path, (disk, tail): (Disk, Tail)) -> Result<Self, StoreError> {
        let disk = Arc::new(disk);
        let saved = Saved::new(&tail);
        let tail = Arc::new(Mutex::new(tail));
        let queue = Arc::new(Queue::default());
        let writer = Writer {
            disk: disk.clone(),
            tail: tail.clone(),
            queue: queue.clone(),
        };
        let writer = std::thread::Builder::new()
            .name("raft-log".into())
            .spawn(move || writer.run(saved))
            .map_err(StoreError::io("start the writer thread of", path))?;
        let shared = Shared {
            path: path.to_owned(),
            disk,
            tail,
            queue,
            writer: Mutex::new(Some(writer)),
            closing: Closing::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Bounds and size of the log.
    pub fn stats(&self) -> LogStats {
        let (first_index, last_index) = {
            let tail = self.shared.tail.lock();
            (tail.begin, tail.last.map_or(0, |last| last.index))
        };
        LogStats {
            first_index,
            last_index,
            bytes: self.shared.disk.size_bytes(),
        }
    }

    /// Whether the oldest entries are on disk only.
    #[cfg(test)]
    pub(super) fn read_back_is_on_disk(&self) -> bool {
        let tail = self.shared.tail.lock();
        tail.first_index() > tail.begin
    }

    /// Tells when the last clone is gone and the folder may be opened again.
    #[must_use]
    pub fn closed(&self) -> Closed {
        self.shared.closing.0.clone()
    }

    /// First index of a record that was being written when the process before this one ended; opening dropped it.
    #[must_use]
    pub fn torn(&self) -> Option<u64> {
        self.shared.tail.lock().torn
    }

    /// What was last written down as committed, even if the log does not reach so far.
    #[must_use]
    pub fn recorded_committed(&self) -> Option<LogId> {
        self.shared.tail.lock().committed
    }

    /// Everything up to here is gone.
    pub fn purged(&self) -> Option<LogId> {
        self.shared.tail.lock().purged
    }

    /// Hands `op` to the writer and waits until its effect is durable.
    async fn durably(
        &self,
        op: impl FnOnce(super::writer::Done<R>) -> Op<R, A>,
    ) -> Result<(), io::Error> {
        let (done, durable) = R::Oneshot::channel();
        self.shared.queue.push(op(done), 0).await?;
        match durable.await {
            Ok(result) => result,
            Err(_) => Err(io::Error::other("the log has stopped")),
        }
    }

    fn read(
        &self,
        range: impl FnOnce(u64, u64) -> Range<u64>,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, io::Error> {
        let (range, held_from, mut held) = {
            let tail = self.shared.tail.lock();
            let first = tail.begin;
            let range = range(first, tail.next_index());
            (
                range.clone(),
                tail.first_index(),
                tail.read(range, max_bytes),
            )
        };
        if range.start >= range.end || range.start >= held_from {
            return Ok(held);
        }
        // The older part was trimmed from memory, so it is on disk.
        let older_end = range.end.min(held_from);
        let mut entries = self.shared.disk.read(range.start..older_end, max_bytes)?;
        let bytes: usize = entries.iter().map(entry_size_bytes).sum();
        let complete = entries
            .last()
            .is_some_and(|entry| entry.log_id.index + 1 == older_end);
        if complete && bytes < max_bytes {
            entries.append(&mut held);
        }
        Ok(entries)
    }
}

impl<R: AsyncRuntime, A: Reply> RaftLogReader<TypeConfig<R, A>> for SledLog<R, A> {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.read(|first, next| index_range(&range, first, next), usize::MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.tail.lock().vote)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(
            |first, next| index_range(&(start..end), first, next),
            MAX_READ_BYTES,
        )
    }
}

impl<R: AsyncRuntime, A: Reply> RaftLogStorage<TypeConfig<R, A>> for SledLog<R, A> {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig<R, A>>, io::Error> {
        let tail = self.shared.tail.lock();
        Ok(LogState {
            last_purged_log_id: tail.purged,
            last_log_id: tail.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.durably(|done| Op::Vote { vote, done }).await?;
        self.shared.tail.lock().vote = Some(vote);
        Ok(())
    }

    // Written with the next sync: losing it only delays re-apply until the next leader has committed.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.shared.tail.lock().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let tail = self.shared.tail.lock();
        Ok(tail.committed.min(tail.last))
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig<R, A>>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let mut bytes = 0;
        for entry in &entries {
            let size = entry_size_bytes(entry);
            if size > MAX_ENTRY_BYTES {
                return Err(StoreError::TooLarge {
                    what: "log entry",
                    size,
                    limit: MAX_ENTRY_BYTES,
                }
                .into());
            }
            bytes += size;
        }
        {
            let mut tail = self.shared.tail.lock();
            entries.iter().for_each(|entry| tail.push(entry.clone()));
        }
        self.shared
            .queue
            .push(Op::Append { entries, callback }, bytes)
            .await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.shared.tail.lock().truncate_after(last_log_id);
        self.durably(|done| Op::Truncate {
            keep: last_log_id,
            done,
        })
        .await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.shared.tail.lock().purge(log_id);
        self.durably(|done| Op::Purge { upto: log_id, done }).await
    }
}
