//! The log in memory: the twin of the durable one for simulation and tests.

use std::{fmt::Debug, io, ops::RangeBounds, sync::Arc};

use openraft::{
    LogState, OptionalSend,
    async_runtime::AsyncRuntime,
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
}

impl MemoryLog {
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
        self.tail.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.tail.lock().committed = committed;
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
        {
            let mut tail = self.tail.lock();
            entries.into_iter().for_each(|entry| tail.push(entry));
        }
        callback.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.tail.lock().truncate_after(last_log_id);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.tail.lock().purge(log_id);
        Ok(())
    }
}
