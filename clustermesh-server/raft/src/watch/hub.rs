//! Hands what was applied to the watchers that want it: costs by those, and never waits for one.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use clustermesh_core::{CursorChange, EventGroup, KeyRange, WatchId, WatchIndex};
use openraft::async_runtime::{AsyncRuntime, Mpsc, MpscReceiver};
use parking_lot::Mutex;

use super::{
    Publication, WatchEvents, WatchItem,
    slot::{Offer, Offered, Slot},
};
use crate::{
    metrics::{Metrics, add, sub},
    task::Stop,
};

/// Id of a watcher in the hub.
type SlotId = u64;

#[derive(Default)]
struct Registry {
    /// Last publication that was handed out.
    sequence: u64,
    /// Last revision that was handed out.
    revision: i64,
    index: WatchIndex,
    /// Each range of a watcher has an id in the index.
    owners: HashMap<WatchId, SlotId>,
    slots: HashMap<SlotId, Attached>,
    /// Watchers that want cursors.
    cursor_slots: BTreeMap<SlotId, Arc<Slot>>,
    next_id: u64,
    closed: bool,
}

struct Attached {
    slot: Arc<Slot>,
    watch_ids: Vec<WatchId>,
}

/// All watchers.
pub(crate) struct Hub {
    registry: Mutex<Registry>,
    metrics: Arc<Metrics>,
    max_queue_items: usize,
}

impl Registry {
    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn detach(&mut self, id: SlotId) -> Option<Arc<Slot>> {
        let attached = self.slots.remove(&id)?;
        self.cursor_slots.remove(&id);
        for watch_id in attached.watch_ids {
            self.index.remove(watch_id);
            self.owners.remove(&watch_id);
        }
        Some(attached.slot)
    }

    /// Which watcher may want which event, by watcher and then in the order of events.
    fn matches(&self, group: &EventGroup) -> Vec<(SlotId, u32)> {
        let mut matches = Vec::new();
        for (place, event) in (0..).zip(&group.events) {
            self.index.for_each_matching(event.key(), |watch_id| {
                if let Some(owner) = self.owners.get(&watch_id) {
                    matches.push((*owner, place));
                }
            });
        }
        matches.sort_unstable();
        // Ranges of one watcher may overlap.
        matches.dedup();
        matches
    }

    fn hand_out_group(&mut self, sequence: u64, group: &Arc<EventGroup>, metrics: &Metrics) {
        let bytes = group.encoded_bytes();
        let mut slow = Vec::new();
        let matches = self.matches(group);
        for matched in matches.chunk_by(|(a, _), (b, _)| a == b) {
            let Some((id, attached)) = matched
                .first()
                .and_then(|(id, _)| Some((*id, self.slots.get(id)?)))
            else {
                continue;
            };
            let slot = &attached.slot;
            let offer = Offer {
                sequence,
                revision: Some(group.revision),
                bytes,
                complete_revision: group.revision - 1,
            };
            let taken = slot.offer(offer, || {
                let places = matched.iter().map(|(_, place)| *place);
                WatchEvents::choose(group, places, slot.filter.as_ref()).map(WatchItem::Events)
            });
            match taken {
                Offered::Queued => add(&metrics.watch_groups_total, 1),
                Offered::NotWanted => {}
                Offered::TooSlow => slow.push(id),
            }
        }
        self.drop_slow(slow, metrics);
        self.revision = group.revision;
    }

    fn hand_out_cursor(&mut self, sequence: u64, change: &CursorChange, metrics: &Metrics) {
        let mut slow = Vec::new();
        for (id, slot) in &self.cursor_slots {
            let bytes = change.cluster.len();
            let offer = Offer {
                sequence,
                revision: None,
                bytes,
                complete_revision: self.revision,
            };
            let item = || WatchItem::Cursor {
                cluster: change.cluster.clone(),
                cursor: change.cursor.clone(),
            };
            if slot.offer(offer, || Some(item())) == Offered::TooSlow {
                slow.push(*id);
            }
        }
        self.drop_slow(slow, metrics);
    }

    /// Watchers that fell behind cost nothing until they have caught up.
    fn drop_slow(&mut self, slow: Vec<SlotId>, metrics: &Metrics) {
        add(&metrics.watch_fallbacks_total, slow.len());
        for id in slow {
            self.detach(id);
        }
    }
}

impl Hub {
    /// A hub for a state of this revision; a watcher may have `max_queue_items` waiting.
    pub(crate) fn new(metrics: Arc<Metrics>, revision: i64, max_queue_items: usize) -> Self {
        Self {
            registry: Mutex::new(Registry {
                revision,
                ..Registry::default()
            }),
            metrics,
            max_queue_items,
        }
    }

    pub(super) fn max_queue_items(&self) -> usize {
        self.max_queue_items
    }

    pub(super) fn hand_out(&self, publication: Publication) {
        let mut registry = self.registry.lock();
        match publication {
            Publication::Applied {
                sequence,
                groups,
                cursors,
            } => {
                let mut cursors = cursors.iter().peekable();
                for (before, group) in groups.iter().enumerate() {
                    while let Some(change) = cursors.next_if(|change| change.after_groups <= before)
                    {
                        registry.hand_out_cursor(sequence, change, &self.metrics);
                    }
                    registry.hand_out_group(sequence, group, &self.metrics);
                }
                for change in cursors {
                    registry.hand_out_cursor(sequence, change, &self.metrics);
                }
                registry.sequence = sequence;
            }
            Publication::Replaced { sequence } => {
                let revision = registry.revision;
                for id in registry.slots.keys().copied().collect::<Vec<_>>() {
                    if let Some(slot) = registry.detach(id) {
                        slot.fall_behind(revision);
                    }
                }
                registry.sequence = sequence;
            }
        }
    }

    /// Lets the hub fill `slot`, if history up to publication `known_sequence`, of `known_revision`, leaves no gap before what the hub hands
    /// out next. Returns the watcher's id for [`Hub::detach`].
    pub(super) fn attach(
        &self,
        slot: &Arc<Slot>,
        ranges: &[KeyRange],
        cursors: bool,
        known_sequence: u64,
        known_revision: i64,
    ) -> Option<SlotId> {
        let mut registry = self.registry.lock();
        if registry.closed {
            slot.close();
        } else if registry.sequence > known_sequence {
            return None;
        }
        slot.attach(known_sequence, known_revision);
        let id = registry.new_id();
        let mut watch_ids = Vec::with_capacity(ranges.len());
        for range in ranges {
            let watch_id = registry.new_id();
            registry.index.add(watch_id, range.clone());
            registry.owners.insert(watch_id, id);
            watch_ids.push(watch_id);
        }
        if cursors {
            registry.cursor_slots.insert(id, slot.clone());
        }
        registry.slots.insert(
            id,
            Attached {
                slot: slot.clone(),
                watch_ids,
            },
        );
        Some(id)
    }

    pub(super) fn detach(&self, id: SlotId) {
        self.registry.lock().detach(id);
    }

    /// Puts a progress item behind all that was handed out; false when `slot` is not filled by the hub any more.
    pub(super) fn push_progress(&self, slot: &Slot) -> bool {
        let registry = self.registry.lock();
        slot.push_progress(registry.revision)
    }

    pub(super) fn opened(&self) {
        add(&self.metrics.watchers, 1);
    }

    pub(super) fn dropped(&self) {
        sub(&self.metrics.watchers, 1);
    }

    /// Ends all watchers.
    pub(crate) fn close(&self) {
        let mut registry = self.registry.lock();
        registry.closed = true;
        registry
            .slots
            .values()
            .for_each(|attached| attached.slot.close());
    }
}

/// Hands out publications as they come.
pub(crate) async fn distribute<R: AsyncRuntime>(
    hub: Arc<Hub>,
    mut publications: <R::Mpsc as Mpsc>::Receiver<Publication>,
    stop: Stop<R>,
) {
    while let Some(Some(publication)) = stop.or(publications.recv()).await {
        hub.hand_out(publication);
    }
    hub.close();
}
