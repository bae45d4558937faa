//! Which watchers want a key: a hash for single keys, an interval tree for ranges, so that a change costs by the watchers that it concerns.

mod tree;

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;

use crate::{key_range::KeyRange, watch::tree::IntervalTree};

/// Id of a watcher, chosen by the caller.
pub type WatchId = u64;

/// Watchers by the range that they watch. Watchers of equal ranges share one place.
#[derive(Debug, Default)]
pub struct WatchIndex {
    ranges: HashMap<WatchId, KeyRange>,
    singles: HashMap<Bytes, BTreeSet<WatchId>>,
    intervals: IntervalTree,
}

impl WatchIndex {
    /// An index without watchers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a watcher; one of the same id is replaced and its range returned.
    pub fn add(&mut self, id: WatchId, range: KeyRange) -> Option<KeyRange> {
        let replaced = self.remove(id);
        match &range {
            KeyRange::Single(key) => {
                self.singles.entry(key.clone()).or_default().insert(id);
            }
            // Holds nothing, so it matches nothing.
            KeyRange::Between(start, end) if start >= end => {}
            KeyRange::Between(start, end) => self.intervals.insert(start, Some(end), id),
            KeyRange::From(start) => self.intervals.insert(start, None, id),
        }
        self.ranges.insert(id, range);
        replaced
    }

    /// Removes a watcher and returns its range.
    pub fn remove(&mut self, id: WatchId) -> Option<KeyRange> {
        let range = self.ranges.remove(&id)?;
        match &range {
            KeyRange::Single(key) => {
                if let Some(ids) = self.singles.get_mut(key) {
                    ids.remove(&id);
                    if ids.is_empty() {
                        self.singles.remove(key);
                    }
                }
            }
            KeyRange::Between(start, end) if start >= end => {}
            KeyRange::Between(start, end) => self.intervals.remove(start, Some(end), id),
            KeyRange::From(start) => self.intervals.remove(start, None, id),
        }
        Some(range)
    }

    /// Range of a watcher.
    #[must_use]
    pub fn range(&self, id: WatchId) -> Option<&KeyRange> {
        self.ranges.get(&id)
    }

    /// Number of watchers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there is no watcher.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Calls `visit` once for each watcher whose range holds `key`, in no particular order.
    pub fn for_each_matching(&self, key: &[u8], mut visit: impl FnMut(WatchId)) {
        if let Some(ids) = self.singles.get(key) {
            ids.iter().copied().for_each(&mut visit);
        }
        self.intervals.stab(key, &mut visit);
    }

    /// Watchers whose range holds `key`, in no particular order.
    #[must_use]
    pub fn matching(&self, key: &[u8]) -> Vec<WatchId> {
        let mut ids = Vec::new();
        self.for_each_matching(key, |id| ids.push(id));
        ids
    }
}

#[cfg(test)]
mod tests;
