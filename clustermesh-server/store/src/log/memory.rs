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
use crate::{
    faults::DiskFaults,
    types::{Entry, LogId, Reply, TypeConfig, Vote},
};

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
    faults: DiskFaults,
    state: Mutex<DiskState>,
}

#[derive(Default)]
struct DiskState {
    durable: Tail,
    volatile: VecDeque<Write>,
    syncing: bool,
}

type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

struct Write {
    change: Change,
    done: Option<Done>,
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
    /// Into how many parts a crash may tear it.
    fn parts(&self) -> usize {
        match self {
            Self::Append(entries) => entries.len(),
            Self::Vote(_) | Self::Committed(_) | Self::Truncate(_) | Self::Purge(_) => 1,
        }
    }

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
    /// The oldest writes are durable; those who wait for them.
    fn settle(&mut self, writes: usize) -> Vec<Done> {
        let settled = self.volatile.drain(..writes.min(self.volatile.len()));
        let mut done = Vec::new();
        for write in settled {
            write.change.make(&mut self.durable);
            done.extend(write.done);
        }
        done
    }

    /// What a crash leaves: the oldest entries and other changes, `kept` of them; one write of several entries may be torn.
    fn tear(&mut self, mut kept: usize) {
        while let Some(write) = self.volatile.pop_front() {
            let parts = write.change.parts();
            if parts > kept {
                if let Change::Append(mut entries) = write.change {
                    entries.truncate(kept);
                    Change::Append(entries).make(&mut self.durable);
                }
                break;
            }
            kept -= parts;
            write.change.make(&mut self.durable);
        }
        self.volatile.clear();
        self.syncing = false;
    }

    /// Those who wait for writes that will never be durable for sure.
    fn waiting(&mut self) -> Vec<Done> {
        let waiting = self.volatile.iter_mut();
        waiting.filter_map(|write| write.done.take()).collect()
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
        if let Err(error) = disk.faults.check_log() {
            let waiting = disk.state.lock().waiting();
            for done in waiting {
                done(Err(io::Error::new(error.kind(), error.to_string())));
            }
            // As with a real disk: what failed once may be there or not, and nothing more is written.
            return;
        }
        let settled = disk.state.lock().settle(writes);
        for done in settled {
            done(Ok(()));
        }
    }
}

impl MemoryLog {
    /// A log on a simulated disk, whose syncs take what `sync_time` says. [`MemoryLog::crash`] loses what was not synced.
    pub fn on_disk(
        sync_time: impl Fn() -> Duration + Send + Sync + 'static,
        faults: DiskFaults,
    ) -> Self {
        Self {
            tail: Arc::default(),
            disk: Some(Arc::new(Disk {
                sync_time: Box::new(sync_time),
                faults,
                state: Mutex::default(),
            })),
        }
    }

    /// The log as it is after a crash: of the entries and other changes that were not synced, as many of the oldest are kept as `keep` says,
    /// given their number. All tasks that use the log must have ended.
    pub fn crash(&self, keep: impl FnOnce(usize) -> usize) {
        let Some(disk) = &self.disk else {
            return;
        };
        let mut state = disk.state.lock();
        let parts = state.volatile.iter().map(|write| write.change.parts());
        let kept = keep(parts.sum());
        state.tear(kept);
        *self.tail.lock() = state.durable.clone();
    }

    fn write<R: AsyncRuntime>(&self, change: Change, done: Option<Done>) -> io::Result<()> {
        if let Some(disk) = &self.disk {
            disk.faults.check_log()?;
        }
        change.make(&mut self.tail.lock());
        let Some(disk) = &self.disk else {
            if let Some(done) = done {
                done(Ok(()));
            }
            return Ok(());
        };
        let idle = {
            let mut state = disk.state.lock();
            state.volatile.push_back(Write { change, done });
            !std::mem::replace(&mut state.syncing, true)
        };
        if idle {
            drop(R::spawn(sync::<R>(disk.clone())));
        }
        Ok(())
    }

    /// Returns once the change is durable; openraft waits for it.
    async fn durably<R: AsyncRuntime>(&self, change: Change) -> io::Result<()> {
        let (done, synced) = R::Oneshot::channel();
        let done = move |written| {
            let _gone = done.send(written);
        };
        self.write::<R>(change, Some(Box::new(done)))?;
        synced
            .await
            .map_err(|gone| io::Error::other(gone.to_string()))?
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
        self.durably::<R>(Change::Vote(*vote)).await
    }

    // As with the durable log: it goes with the next sync, and nobody hears when that fails.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.tail.lock().committed = committed;
        if let Some(disk) = &self.disk {
            let change = Change::Committed(committed);
            let mut state = disk.state.lock();
            state.volatile.push_back(Write { change, done: None });
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let tail = self.tail.lock();
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
        let entries = entries.into_iter().collect();
        let done = move |written| callback.io_completed(written);
        self.write::<R>(Change::Append(entries), Some(Box::new(done)))
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.durably::<R>(Change::Truncate(last_log_id)).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.durably::<R>(Change::Purge(log_id)).await
    }
}
