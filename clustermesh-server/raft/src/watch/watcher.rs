//! A watcher: reads history until it meets the hub, then what the hub hands out.

use std::{
    collections::{BTreeMap, VecDeque},
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::Poll,
};

use clustermesh_core::{KeyRange, PeerCursor};
use openraft::async_runtime::AsyncRuntime;

use super::{
    WatchEvents, WatchItem, WatchSpec,
    hub::Hub,
    slot::{Slot, Taken},
};
use crate::{config::MAX_CATCH_UP_BYTES, error::WatchEnd, shared::Shared};

/// Yields the changes of a [`WatchSpec`] in order, none twice and none missing, until it is dropped.
pub struct Watcher<R: AsyncRuntime> {
    shared: Arc<Shared<R>>,
    hub: Arc<Hub>,
    ranges: Vec<KeyRange>,
    cursors: bool,
    slot: Arc<Slot>,
    /// The id in the hub while the hub fills the slot.
    attached: Option<u64>,
    /// Everything up to this revision was delivered, or was not wanted.
    revision: i64,
    start_revision: i64,
    ready: VecDeque<WatchItem>,
    sent_cursors: BTreeMap<String, PeerCursor>,
    progress_asked: bool,
}

impl<R: AsyncRuntime> Drop for Watcher<R> {
    fn drop(&mut self) {
        if let Some(id) = self.attached {
            self.hub.detach(id);
        }
        self.hub.dropped();
    }
}

impl<R: AsyncRuntime> Watcher<R> {
    pub(crate) fn new(shared: Arc<Shared<R>>, hub: Arc<Hub>, spec: WatchSpec) -> Self {
        let current = shared.applied.read().state.revision();
        let start_revision = if spec.start_revision > 0 {
            spec.start_revision
        } else {
            current + 1
        };
        hub.opened();
        Self {
            slot: Arc::new(Slot::new(
                spec.filter,
                start_revision,
                hub.max_queue_items(),
            )),
            shared,
            hub,
            ranges: spec.ranges,
            cursors: spec.cursors,
            attached: None,
            revision: start_revision - 1,
            start_revision,
            ready: VecDeque::new(),
            sent_cursors: BTreeMap::new(),
            progress_asked: false,
        }
    }

    /// First revision that it yields.
    #[must_use]
    pub const fn start_revision(&self) -> i64 {
        self.start_revision
    }

    /// The next item. May be dropped and called again without losing one.
    ///
    /// # Errors
    /// [`WatchEnd`]: nothing more will come.
    pub async fn next(&mut self) -> Result<WatchItem, WatchEnd> {
        loop {
            if self.shared.diverged.load(Ordering::Acquire) {
                return Err(WatchEnd::Stopped);
            }
            if let Some(item) = self.ready.pop_front() {
                self.note(&item);
                return Ok(item);
            }
            if self.attached.is_none() {
                self.catch_up()?;
                if self.ready.is_empty() {
                    // Nothing here was wanted: others may run before the next piece of history.
                    yield_once().await;
                }
                continue;
            }
            let slot = &self.slot;
            match poll_fn(|context| slot.poll_take(context)).await {
                Taken::Item(item) => {
                    self.note(&item);
                    return Ok(item);
                }
                Taken::Behind(revision) => {
                    self.revision = self.revision.max(revision);
                    self.attached = None;
                }
                Taken::Closed => return Err(WatchEnd::Stopped),
            }
        }
    }

    #[cfg(test)]
    pub(super) fn shared_history(&self) -> Vec<Arc<clustermesh_core::EventGroup>> {
        self.shared
            .applied
            .read()
            .state
            .history(0, usize::MAX)
            .unwrap_or_default()
    }

    /// Asks for a [`WatchItem::Progress`] once all before it is delivered.
    pub fn request_progress(&mut self) {
        if self.attached.is_none() || !self.hub.push_progress(&self.slot) {
            self.progress_asked = true;
        }
    }

    fn note(&mut self, item: &WatchItem) {
        match item {
            WatchItem::Events(events) => self.revision = self.revision.max(events.revision()),
            WatchItem::Cursor {
                cluster,
                cursor: Some(cursor),
            } => {
                self.sent_cursors.insert(cluster.clone(), cursor.clone());
            }
            WatchItem::Cursor {
                cluster,
                cursor: None,
            } => {
                self.sent_cursors.remove(cluster);
            }
            WatchItem::Progress { .. } => {}
        }
    }

    /// Reads the next piece of history, and joins the hub at its end.
    fn catch_up(&mut self) -> Result<(), WatchEnd> {
        let (groups, sequence, newest, cursors) = {
            let applied = self.shared.applied.read();
            let groups = applied
                .state
                .history(self.revision, MAX_CATCH_UP_BYTES)
                .map_err(|compacted| WatchEnd::Compacted {
                    compact_revision: compacted.compact_revision,
                })?;
            let newest = applied.state.revision();
            let complete = groups.last().is_none_or(|group| group.revision == newest);
            let cursors: Option<BTreeMap<String, PeerCursor>> =
                (complete && self.cursors).then(|| {
                    applied
                        .state
                        .peer_cursors()
                        .map(|cursor| (cursor.cluster.clone(), cursor.clone()))
                        .collect()
                });
            (groups, applied.sequence, newest, cursors)
        };
        let complete = groups.last().is_none_or(|group| group.revision == newest);
        for group in &groups {
            let wanted = |key: &[u8]| self.ranges.iter().any(|range| range.contains(key));
            let places: Vec<u32> = (0..)
                .zip(&group.events)
                .filter(|(_, event)| wanted(event.key()))
                .map(|(place, _)| place)
                .collect();
            let events = WatchEvents::choose(group, places.into_iter(), self.slot.filter.as_ref());
            self.ready.extend(events.map(WatchItem::Events));
            self.revision = self.revision.max(group.revision);
        }
        if !complete {
            return Ok(());
        }
        self.ready
            .extend(self.changed_cursors(cursors.unwrap_or_default()));
        if std::mem::take(&mut self.progress_asked) {
            self.ready
                .push_back(WatchItem::Progress { revision: newest });
        }
        self.attached = self
            .hub
            .attach(&self.slot, &self.ranges, self.cursors, sequence, newest);
        Ok(())
    }

    /// What must be told so that the reader knows exactly `now`.
    fn changed_cursors(&self, now: BTreeMap<String, PeerCursor>) -> Vec<WatchItem> {
        if !self.cursors {
            return Vec::new();
        }
        let gone = self
            .sent_cursors
            .keys()
            .filter(|cluster| !now.contains_key(*cluster));
        let mut items: Vec<WatchItem> = gone
            .map(|cluster| WatchItem::Cursor {
                cluster: cluster.clone(),
                cursor: None,
            })
            .collect();
        let changed = now
            .into_iter()
            .filter(|(cluster, cursor)| self.sent_cursors.get(cluster) != Some(cursor));
        items.extend(changed.map(|(cluster, cursor)| WatchItem::Cursor {
            cluster,
            cursor: Some(cursor),
        }));
        items
    }
}

async fn yield_once() {
    let mut yielded = false;
    poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
