//! The thread that makes the log durable, and the layout of the log in sled.
//!
//! sled's own flush calls `sync_file_range`, which leaves data in the disk's cache, so each group of writes ends with
//! `fdatasync` on a descriptor of ours. Values must stay well below a quarter of a segment: sled spills larger leaf
//! pages (up to 17 values) into files that nothing syncs.

mod database;
mod disk;

use std::{collections::VecDeque, io, sync::Arc};

use openraft::{
    async_runtime::{AsyncRuntime, Oneshot, OneshotSender},
    storage::IOFlushed,
};
use parking_lot::{Condvar, Mutex};

pub(super) use self::disk::Disk;
use super::tail::{TAIL_BYTES, Tail};
use crate::{
    error::StoreError,
    types::{Entry, LogId, Reply, TypeConfig, Vote},
};

/// Entries waiting for the disk, bytes: past it an append waits.
const MAX_QUEUE_BYTES: usize = 32 << 20;

/// Records say what is known to be committed; so often it is also written down apart from them, where it outlives what may
/// become of the records and a loss shows.
const MAX_APPENDS_BETWEEN_MARKS: u32 = 64;

/// Told once the write is durable or has failed.
pub(super) type Done<R> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Sender<Result<(), io::Error>>;
type Room<R> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Sender<()>;

/// One request to the writer.
pub(super) enum Op<R: AsyncRuntime, A: Reply> {
    Append {
        entries: Vec<Entry>,
        callback: IOFlushed<TypeConfig<R, A>>,
    },
    Vote {
        vote: Vote,
        done: Done<R>,
    },
    Truncate {
        keep: Option<LogId>,
        done: Done<R>,
    },
    Purge {
        upto: LogId,
        done: Done<R>,
    },
}

/// What was last written down as committed apart from the records, and how many groups of entries ago.
pub(super) struct Saved {
    committed: Option<LogId>,
    appends: u32,
    /// What the files said when they were opened: it stays, so that a loss shows again.
    recovered: Option<LogId>,
    /// Last entry that was written. Those only handed over may be committed, but a crash loses them here.
    written: Option<LogId>,
}

impl Saved {
    /// Of a log that was just opened.
    pub(super) fn new(tail: &Tail) -> Self {
        Self {
            committed: None,
            appends: 0,
            recovered: tail.committed,
            written: tail.last,
        }
    }
}

enum Ack<R: AsyncRuntime, A: Reply> {
    Append(IOFlushed<TypeConfig<R, A>>),
    Done(Done<R>),
}

impl<R: AsyncRuntime, A: Reply> Ack<R, A> {
    fn send(self, result: Result<(), io::Error>) {
        match self {
            Self::Append(callback) => callback.io_completed(result),
            // The asker may be gone; the write stands.
            Self::Done(done) => drop(done.send(result)),
        }
    }
}

struct QueueState<R: AsyncRuntime, A: Reply> {
    ops: VecDeque<Op<R, A>>,
    bytes: usize,
    waiting: Vec<Room<R>>,
    closed: bool,
    failed: Option<String>,
}

/// Requests in their order, bounded by bytes.
pub(super) struct Queue<R: AsyncRuntime, A: Reply> {
    state: Mutex<QueueState<R, A>>,
    filled: Condvar,
}

impl<R: AsyncRuntime, A: Reply> Default for Queue<R, A> {
    fn default() -> Self {
        let state = QueueState {
            ops: VecDeque::new(),
            bytes: 0,
            waiting: Vec::new(),
            closed: false,
            failed: None,
        };
        Self {
            state: Mutex::new(state),
            filled: Condvar::new(),
        }
    }
}

impl<R: AsyncRuntime, A: Reply> Queue<R, A> {
    /// Adds a request of `bytes`, waiting while the queue is full.
    pub(super) async fn push(&self, op: Op<R, A>, bytes: usize) -> Result<(), io::Error> {
        loop {
            let room = {
                let mut state = self.state.lock();
                if let Some(reason) = &state.failed {
                    return Err(StoreError::Failed {
                        reason: reason.clone(),
                    }
                    .into());
                }
                if state.bytes < MAX_QUEUE_BYTES {
                    state.bytes += bytes;
                    state.ops.push_back(op);
                    self.filled.notify_one();
                    return Ok(());
                }
                let (told, room) = R::Oneshot::channel();
                state.waiting.push(told);
                room
            };
            // An error means that the writer is gone, which the next turn finds out.
            drop(room.await);
        }
    }

    /// No more requests will come; what is queued is still written.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.filled.notify_one();
    }

    /// All that is queued; `None` once closed and empty.
    fn take(&self) -> Option<VecDeque<Op<R, A>>> {
        let mut state = self.state.lock();
        while state.ops.is_empty() {
            if state.closed {
                return None;
            }
            self.filled.wait(&mut state);
        }
        state.bytes = 0;
        let waiting = std::mem::take(&mut state.waiting);
        let ops = std::mem::take(&mut state.ops);
        drop(state);
        for told in waiting {
            // A waiter that is gone needs no room.
            let _gone = told.send(());
        }
        Some(ops)
    }

    fn fail(&self, reason: String) -> VecDeque<Op<R, A>> {
        let mut state = self.state.lock();
        state.failed = Some(reason);
        state.waiting.clear();
        std::mem::take(&mut state.ops)
    }
}

/// The writer thread's belongings.
pub(super) struct Writer<R: AsyncRuntime, A: Reply> {
    pub(super) disk: Arc<Disk>,
    pub(super) tail: Arc<Mutex<Tail>>,
    pub(super) queue: Arc<Queue<R, A>>,
}

impl<R: AsyncRuntime, A: Reply> Writer<R, A> {
    pub(super) fn run(self, mut saved: Saved) {
        while let Some(ops) = self.queue.take() {
            let mut acks = Vec::with_capacity(ops.len());
            let result = self.write(ops, &mut acks, &mut saved);
            match result {
                Ok(durable_next) => {
                    if let Some(durable_next) = durable_next {
                        self.tail.lock().trim(durable_next, TAIL_BYTES);
                    }
                    acks.into_iter().for_each(|ack| ack.send(Ok(())));
                }
                Err(error) => {
                    tracing::error!(
                        %error,
                        "the log takes no more writes, this replica ends: make room on its disk or replace it, then start the server again"
                    );
                    let reason = error.to_string();
                    let unwritten = self.queue.fail(reason.clone());
                    acks.extend(unwritten.into_iter().map(Op::into_ack));
                    for ack in acks {
                        ack.send(Err(StoreError::Failed {
                            reason: reason.clone(),
                        }
                        .into()));
                    }
                    return;
                }
            }
        }
        // Spares the next start some waiting for a leader; not needed for safety.
        if let Err(error) = self.mark(&mut saved).and_then(|()| self.disk.sync()) {
            tracing::warn!(%error, "committed index not saved");
        }
    }

    /// Writes down which of the written entries are known to be committed apart from the records, where that is news.
    fn mark(&self, saved: &mut Saved) -> Result<(), StoreError> {
        let known = self.tail.lock().committed.min(saved.written);
        if let Some(committed) = known.max(saved.recovered)
            && saved.committed < Some(committed)
        {
            self.disk.put_committed(committed)?;
            saved.committed = Some(committed);
        }
        saved.appends = 0;
        Ok(())
    }

    /// Writes entries that follow one another.
    fn append(
        &self,
        entries: &[Entry],
        committed: Option<LogId>,
        saved: &mut Saved,
    ) -> Result<(), StoreError> {
        self.disk.append(entries, committed)?;
        saved.written = entries.last().map(|entry| entry.log_id).or(saved.written);
        Ok(())
    }

    /// Writes `ops` and syncs once. Every request's `Ack` is in `acks` afterwards, also on an error.
    fn write(
        &self,
        ops: VecDeque<Op<R, A>>,
        acks: &mut Vec<Ack<R, A>>,
        saved: &mut Saved,
    ) -> Result<Option<u64>, StoreError> {
        let mut failed = None;
        let mut durable_next = None;
        let mut pending: Vec<Entry> = Vec::new();
        for op in ops {
            let step = match &op {
                _ if failed.is_some() => Ok(()),
                Op::Append { .. } => Ok(()),
                // A record that says what is committed may go: before it does, this is durable apart from it.
                _ => self
                    .append(&std::mem::take(&mut pending), None, saved)
                    .and_then(|()| self.mark(saved)),
            };
            let step = step.and_then(|()| match &op {
                _ if failed.is_some() => Ok(()),
                Op::Append { .. } => Ok(()),
                Op::Vote { vote, .. } => self.disk.put_vote(vote),
                Op::Truncate { keep, .. } => {
                    let keep_index = keep.map(|keep| keep.index);
                    durable_next = durable_next.min(Some(keep_index.map_or(0, |keep| keep + 1)));
                    self.disk.sync()?;
                    saved.written = saved.written.min(*keep);
                    self.disk.truncate_after(keep_index)
                }
                Op::Purge { upto, .. } => {
                    saved.written = saved.written.max(Some(*upto));
                    self.disk.purge(*upto)
                }
            });
            if let Err(error) = step {
                failed.get_or_insert(error);
            }
            acks.push(match op {
                Op::Append {
                    mut entries,
                    callback,
                } => {
                    durable_next = entries
                        .last()
                        .map(|entry| entry.log_id.index + 1)
                        .or(durable_next);
                    pending.append(&mut entries);
                    Ack::Append(callback)
                }
                other => other.into_ack(),
            });
        }
        if let Some(error) = failed {
            return Err(error);
        }
        let committed = self.tail.lock().committed;
        saved.appends += 1;
        self.append(&pending, committed, saved)?;
        if pending.is_empty() || saved.appends >= MAX_APPENDS_BETWEEN_MARKS {
            self.mark(saved)?;
        }
        self.disk.sync()?;
        Ok(durable_next)
    }
}

impl<R: AsyncRuntime, A: Reply> Op<R, A> {
    fn into_ack(self) -> Ack<R, A> {
        match self {
            Self::Append { callback, .. } => Ack::Append(callback),
            Self::Vote { done, .. } | Self::Truncate { done, .. } | Self::Purge { done, .. } => {
                Ack::Done(done)
            }
        }
    }
}
