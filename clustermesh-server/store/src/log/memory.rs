//! The log in memory: the twin of the durable one for simulation and tests.

use std::{
    collections::VecDeque,
    fmt::{self, Debug},
    io,
    ops::RangeBounds,
    sync::Arc,
    time::Duration,
};

use openraft::{
    LogState, OptionalSend,
    async_runtime::{AsyncRuntime, Oneshot, OneshotSender},
    storage::{IOFlushed, RaftLogReader, RaftLogStorage},
};
use parking_lot::Mutex;

use super::{
    LogStats, MAX_READ_BYTES,
    tail::{Tail, index_range},
};
use crate::types::{Entry, LogId, Reply, TypeConfig, Vote};

/// A log that lives as long as one of its clones: a "restart" hands a clone to the next replica.
#[derive(Debug, Clone, Default)]
pub struct MemoryLog {
    tail: Arc<Mutex<Tail>>,
    /// Without one, what is written is durable at once.
    disk: Option<Arc<Disk>>,
}

/// A disk whose writes are durable only after a sync, in their order.
struct Disk {
    sync_time: Box<dyn Fn() -> Duration + Send + Sync>,
    state: Mutex<DiskState>,
}

#[derive(Default)]
struct DiskState {
    durable: Tail,
    volatile: VecDeque<Write>,
    syncing: bool,
}

struct Write {
    change: Change,
    done: Option<Box<dyn FnOnce() + Send>>,
}

enum Change {
    Vote(Vote),
    Committed(Option<LogId>),
    Append(Vec<Entry>),
    Truncate(Option<LogId>),
    Purge(LogId),
}

impl Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disk")
    }
}

impl Change {
    fn make(&self, tail: &mut Tail) {
        match self {
            Self::Vote(vote) => tail.vote = Some(*vote),
            Self::Committed(committed) => tail.committed = *committed,
            Self::Append(entries) => entries.iter().for_each(|entry| tail.push(entry.clone())),
            Self::Truncate(keep) => tail.truncate_after(*keep),
            Self::Purge(upto) => tail.purge(*upto),
        }
    }
}

impl DiskState {
    fn settle(&mut self, writes: usize) -> Vec<Write> {
        let settled: Vec<Write> = self
            .volatile
            .drain(..writes.min(self.volatile.len()))
            .collect();
        for write in &settled {
            write.change.make(&mut self.durable);
        }
        settled
    }
}

/// Syncs while there is something to sync: what came before a sync begins is durable when it ends.
async fn sync<R: AsyncRuntime>(disk: Arc<Disk>) {
    loop {
        let writes = {
            let mut state = disk.state.lock();
            state.syncing = !state.volatile.is_empty();
            state.volatile.len()
        };
        if writes == 0 {
            return;
        }
        R::sleep((disk.sync_time)()).await;
        let settled = disk.state.lock().settle(writes);
        for done in settled.into_iter().filter_map(|write| write.done) {
            done();
        }
    }
}

impl MemoryLog {
    /// A log on a simulated disk, whose syncs take what `sync_time` says. [`MemoryLog::crash`] loses what was not synced.
    pub fn on_disk(sync_time: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self {
            tail: Arc::default(),
            disk: Some(Arc::new(Disk {
                sync_time: Box::new(sync_time),
                state: Mutex::default(),
            })),
        }
    }

    /// The log as it is after a crash: of the writes that were not synced, as many of the oldest are kept as `keep` says, given their number.
    /// All tasks that use the log must have ended.
    pub fn crash(&self, keep: impl FnOnce(usize) -> usize) {
        let Some(disk) = &self.disk else {
            return;
        };
        let mut state = disk.state.lock();
        let kept = keep(state.volatile.len());
        drop(state.settle(kept));
        state.volatile.clear();
        state.syncing = false;
        *self.tail.lock() = state.durable.clone();
    }

    fn write<R: AsyncRuntime>(&self, change: Change, done: Option<Box<dyn FnOnce() + Send>>) {
        change.make(&mut self.tail.lock());
        let Some(disk) = &self.disk else {
            if let Some(done) = done {
                done();
            }
            return;
        };
        let idle = {
            let mut state = disk.state.lock();
            state.volatile.push_back(Write { change, done });
            !std::mem::replace(&mut state.syncing, true)
        };
        if idle {
            drop(R::spawn(sync::<R>(disk.clone())));
        }
    }

    /// Bounds and size of the log.
    pub fn stats(&self) -> LogStats {
        let tail = self.tail.lock();
        LogStats {
            first_index: tail.first_index(),
            last_index: tail.last.map_or(0, |last| last.index),
            bytes: tail.bytes as u64,
        }
    }

    /// Everything up to here is gone.
    pub fn purged(&self) -> Option<LogId> {
        self.tail.lock().purged
    }
}

impl<R: AsyncRuntime, A: Reply> RaftLogReader<TypeConfig<R, A>> for MemoryLog {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let tail = self.tail.lock();
        Ok(tail.read(
            index_range(&range, tail.first_index(), tail.next_index()),
            usize::MAX,
        ))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.tail.lock().vote)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        let tail = self.tail.lock();
        Ok(tail.read(
            index_range(&(start..end), tail.first_index(), tail.next_index()),
            MAX_READ_BYTES,
        ))
    }
}

impl<R: AsyncRuntime, A: Reply> RaftLogStorage<TypeConfig<R, A>> for MemoryLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig<R, A>>, io::Error> {
        let tail = self.tail.lock();
        Ok(LogState {
            last_purged_log_id: tail.purged,
            last_log_id: tail.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (done, synced) = R::Oneshot::channel();
        let done = move || {
            // openraft waits for it.
            let _gone = done.send(());
        };
        self.write::<R>(Change::Vote(*vote), Some(Box::new(done)));
        synced
            .await
            .map_err(|gone| io::Error::other(gone.to_string()))
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.write::<R>(Change::Committed(committed), None);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.tail.lock().committed)
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
        let entries = entries.into_iter().collect();
        let done = move || callback.io_completed(Ok(()));
        self.write::<R>(Change::Append(entries), Some(Box::new(done)));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.write::<R>(Change::Truncate(last_log_id), None);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.write::<R>(Change::Purge(log_id), None);
        Ok(())
    }
}
