//! The end of the log that is kept in memory, and the log's bounds.

use std::{collections::VecDeque, ops::Range};

use openraft::entry::RaftEntry;

use crate::{
    codec::entry_size_bytes,
    types::{Entry, LogId, Vote},
};

/// Newest entries kept in memory, bytes: followers and apply read these.
pub(super) const TAIL_BYTES: usize = 16 << 20;

/// Newest entries of a log, in order and without holes.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail {
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    /// The last entry's id, or `purged` when there is none.
    pub(super) last: Option<LogId>,
    /// First index of the log, here or on disk.
    pub(super) begin: u64,
    entries: VecDeque<Entry>,
    pub(super) bytes: usize,
    /// First index of a record that was cut off when the process before this one ended.
    pub(super) torn: Option<u64>,
}

impl Tail {
    /// First index held here; one past the last when nothing is held.
    pub(super) fn first_index(&self) -> u64 {
        self.entries
            .front()
            .map_or_else(|| self.next_index(), |entry| entry.log_id.index)
    }

    /// The index that the next entry gets.
    pub(super) fn next_index(&self) -> u64 {
        self.last.map_or(0, |last| last.index + 1)
    }

    pub(super) fn push(&mut self, entry: Entry) {
        if self.last.is_none() {
            self.begin = entry.log_id.index;
        }
        self.last = Some(entry.log_id());
        self.bytes += entry_size_bytes(&entry);
        self.entries.push_back(entry);
    }

    /// Drops entries after `keep`.
    pub(super) fn truncate_after(&mut self, keep: Option<LogId>) {
        while let Some(entry) = self
            .entries
            .pop_back_if(|entry| Some(entry.log_id.index) > keep.map(|k| k.index))
        {
            self.bytes = self.bytes.saturating_sub(entry_size_bytes(&entry));
        }
        self.last = keep.min(self.last).max(self.purged);
    }

    /// Drops entries up to `upto`, inclusive.
    pub(super) fn purge(&mut self, upto: LogId) {
        self.purged = self.purged.max(Some(upto));
        self.last = self.last.max(Some(upto));
        self.begin = self.begin.max(upto.index + 1);
        while let Some(entry) = self
            .entries
            .pop_front_if(|entry| entry.log_id.index <= upto.index)
        {
            self.bytes = self.bytes.saturating_sub(entry_size_bytes(&entry));
        }
    }

    /// Forgets the oldest entries below `durable_next` until `max_bytes` are left.
    pub(super) fn trim(&mut self, durable_next: u64, max_bytes: usize) {
        while self.bytes > max_bytes {
            let Some(entry) = self
                .entries
                .pop_front_if(|entry| entry.log_id.index < durable_next)
            else {
                break;
            };
            self.bytes = self.bytes.saturating_sub(entry_size_bytes(&entry));
        }
    }

    /// Held entries of `range`, at most about `max_bytes` but at least one.
    pub(super) fn read(&self, range: Range<u64>, max_bytes: usize) -> Vec<Entry> {
        let first = self.first_index();
        let start = range.start.max(first) - first;
        let end = range.end.max(first) - first;
        let mut bytes = 0;
        self.entries
            .iter()
            .skip(usize::try_from(start).unwrap_or(usize::MAX))
            .take(usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX))
            .take_while(|entry| {
                let fits = bytes == 0 || bytes < max_bytes;
                bytes += entry_size_bytes(entry);
                fits
            })
            .cloned()
            .collect()
    }
}

/// The indexes that a range of openraft's means, cut to what exists.
pub(super) fn index_range(
    range: &impl std::ops::RangeBounds<u64>,
    first: u64,
    next: u64,
) -> Range<u64> {
    use std::ops::Bound;
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start.max(first)..end.min(next)
}
