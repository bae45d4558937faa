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
    slot::{Offer, Slot},
};
use crate::{
    metrics::{Metrics, add, sub},
    task::Stop,
};

/// Id of a watcher in the hub.
type SlotId = u64;

/// Bits of an id in the index that number a watcher's ranges; those above are the watcher's own id.
const RANGE_BITS: u32 = 24;

/// Groups that are matched together: bounds what the matches take in memory.
const MAX_GROUPS_AT_ONCE: usize = 64;

/// Each range of a watcher has an id in the index.
const fn watch_id(slot: SlotId, range: u64) -> WatchId {
    slot << RANGE_BITS | range
}

const fn slot_of(watch_id: WatchId) -> SlotId {
    watch_id >> RANGE_BITS
}

/// A watcher may want the event at `place` of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Match {
    slot: SlotId,
    group: u32,
    place: u32,
}

#[derive(Default)]
struct Registry {
    /// Last publication that was handed out.
    sequence: u64,
    /// Last revision that was handed out.
    revision: i64,
    index: WatchIndex,
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

    /// In the order of their ids: what is woken in a row must be woken in the same one by the same seed of a simulation.
    fn ids(&self) -> Vec<SlotId> {
        let mut ids: Vec<SlotId> = self.slots.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    fn detach(&mut self, id: SlotId) -> Option<Arc<Slot>> {
        let attached = self.slots.remove(&id)?;
        self.cursor_slots.remove(&id);
        for watch_id in attached.watch_ids {
            self.index.remove(watch_id);
        }
        Some(attached.slot)
    }

    /// Which watcher may want which event of which group, by watcher and then in the order of events.
    fn matches(&self, groups: &[Arc<EventGroup>]) -> Vec<Match> {
        let mut matches = Vec::new();
        for (group, events) in (0..).zip(groups) {
            for (place, event) in (0..).zip(&events.events) {
                self.index.for_each_matching(event.key(), |watch_id| {
                    let slot = slot_of(watch_id);
                    matches.push(Match { slot, group, place });
                });
            }
        }
        matches.sort_unstable();
        // Ranges of one watcher may overlap.
        matches.dedup();
        matches
    }

    fn hand_out_groups(&mut self, sequence: u64, groups: &[Arc<EventGroup>], metrics: &Metrics) {
        for groups in groups.chunks(MAX_GROUPS_AT_ONCE) {
            self.hand_out_together(sequence, groups, metrics);
        }
    }

    /// Hands each watcher all that it wants of these groups at once.
    fn hand_out_together(&mut self, sequence: u64, groups: &[Arc<EventGroup>], metrics: &Metrics) {
        let Some(newest) = groups.last() else {
            return;
        };
        let mut queued = 0;
        let mut slow = Vec::new();
        for matched in self.matches(groups).chunk_by(|a, b| a.slot == b.slot) {
            let Some((id, attached)) = matched
                .first()
                .and_then(|first| Some((first.slot, self.slots.get(&first.slot)?)))
            else {
                continue;
            };
            let slot = &attached.slot;
            let offers = matched
                .chunk_by(|a, b| a.group == b.group)
                .filter_map(|of| {
                    let first = of.first()?;
                    let group = groups.get(usize::try_from(first.group).ok()?)?;
                    let places = of.iter().map(|matched| matched.place);
                    let events = WatchEvents::choose(group, places, slot.filter.as_ref())?;
                    Some(Offer {
                        revision: Some(group.revision),
                        bytes: group.encoded_bytes(),
                        complete_revision: group.revision - 1,
                        item: WatchItem::Events(events),
                    })
                });
            let offered = slot.offer(sequence, offers);
            queued += offered.queued;
            if offered.too_slow {
                slow.push(id);
            }
        }
        add(&metrics.watch_groups_total, queued);
        self.drop_slow(slow, metrics);
        self.revision = newest.revision;
    }

    fn hand_out_cursor(&mut self, sequence: u64, change: &CursorChange, metrics: &Metrics) {
        let mut slow = Vec::new();
        for (id, slot) in &self.cursor_slots {
            let offer = Offer {
                revision: None,
                bytes: change.cluster.len(),
                complete_revision: self.revision,
                item: WatchItem::Cursor {
                    cluster: change.cluster.clone(),
                    cursor: change.cursor.clone(),
                },
            };
            if slot.offer(sequence, [offer]).too_slow {
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
                let mut rest = groups.as_slice();
                let mut handed_out = 0;
                for change in &cursors {
                    let before = change.after_groups.saturating_sub(handed_out);
                    let (covered, later) = rest.split_at(before.min(rest.len()));
                    registry.hand_out_groups(sequence, covered, &self.metrics);
                    registry.hand_out_cursor(sequence, change, &self.metrics);
                    handed_out += covered.len();
                    rest = later;
                }
                registry.hand_out_groups(sequence, rest, &self.metrics);
                registry.sequence = sequence;
            }
            Publication::Replaced { sequence } => {
                let revision = registry.revision;
                for id in registry.ids() {
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
        for (number, range) in (0..).zip(ranges) {
            let watch_id = watch_id(id, number);
            registry.index.add(watch_id, range.clone());
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
        for id in registry.ids() {
            if let Some(attached) = registry.slots.get(&id) {
                attached.slot.close();
            }
        }
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
