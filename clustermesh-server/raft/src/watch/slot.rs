//! What waits for one watcher: bounded, filled by the hub, emptied by the watcher.

use std::{
    collections::VecDeque,
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;

use super::{EventFilter, WatchItem};
use crate::config::MAX_WATCHER_QUEUE_BYTES;

pub(super) struct Slot {
    pub(super) filter: Option<EventFilter>,
    max_items: usize,
    queue: Mutex<Queue>,
}

struct Queue {
    items: VecDeque<(WatchItem, usize)>,
    bytes: usize,
    /// Publications up to this one are known from history.
    known_sequence: u64,
    /// Everything up to this revision is known from history.
    known_revision: i64,
    /// Events below are not wanted.
    first_revision: i64,
    /// Set once the watcher was too slow: everything up to this revision is queued, the rest it must read itself.
    behind_after: Option<i64>,
    closed: bool,
    waker: Option<Waker>,
}

/// Something that the hub hands out.
pub(super) struct Offer {
    /// Revision of the events; `None` for a cursor.
    pub(super) revision: Option<i64>,
    /// Encoded size.
    pub(super) bytes: usize,
    /// Everything up to this revision was handed out before.
    pub(super) complete_revision: i64,
    pub(super) item: WatchItem,
}

/// What became of what was offered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Offered {
    /// Items taken.
    pub(super) queued: usize,
    /// The watcher must read history from now on.
    pub(super) too_slow: bool,
}

/// What a watcher finds in its slot.
pub(super) enum Taken {
    Item(WatchItem),
    /// The rest must be read from history, after this revision.
    Behind(i64),
    Closed,
}

impl Slot {
    pub(super) fn new(filter: Option<EventFilter>, first_revision: i64, max_items: usize) -> Self {
        let queue = Queue {
            items: VecDeque::new(),
            bytes: 0,
            known_sequence: 0,
            known_revision: 0,
            first_revision,
            behind_after: None,
            closed: false,
            waker: None,
        };
        Self {
            filter,
            max_items,
            queue: Mutex::new(queue),
        }
    }

    /// From now on the hub fills this slot, except with what `known_sequence`, at `known_revision`, covers.
    pub(super) fn attach(&self, known_sequence: u64, known_revision: i64) {
        let mut queue = self.queue.lock();
        queue.known_sequence = known_sequence;
        queue.known_revision = known_revision;
        queue.behind_after = None;
    }

    /// Adds what is wanted here of publication `sequence`, as far as there is room, and wakes the watcher once.
    pub(super) fn offer(&self, sequence: u64, offers: impl IntoIterator<Item = Offer>) -> Offered {
        let mut offered = Offered::default();
        let waker = {
            let mut queue = self.queue.lock();
            if sequence <= queue.known_sequence {
                return offered;
            }
            let first_revision = queue.first_revision;
            let wanted = |offer: &Offer| {
                offer
                    .revision
                    .is_none_or(|revision| revision >= first_revision)
            };
            for offer in offers.into_iter().filter(wanted) {
                let fits = queue.items.len() < self.max_items
                    && (queue.items.is_empty()
                        || queue.bytes + offer.bytes <= MAX_WATCHER_QUEUE_BYTES);
                if !fits {
                    queue.behind_after = Some(offer.complete_revision);
                    offered.too_slow = true;
                    break;
                }
                queue.bytes += offer.bytes;
                queue.items.push_back((offer.item, offer.bytes));
                offered.queued += 1;
            }
            if offered.queued == 0 {
                // Nothing is new, or it has items to take: nobody waits.
                return offered;
            }
            queue.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
        offered
    }

    /// The watcher must read history after `complete_revision`.
    pub(super) fn fall_behind(&self, complete_revision: i64) {
        let waker = {
            let mut queue = self.queue.lock();
            queue.behind_after = Some(complete_revision);
            queue.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    pub(super) fn close(&self) {
        let waker = {
            let mut queue = self.queue.lock();
            queue.closed = true;
            queue.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    pub(super) fn poll_take(&self, context: &mut Context<'_>) -> Poll<Taken> {
        let mut queue = self.queue.lock();
        if let Some((item, bytes)) = queue.items.pop_front() {
            queue.bytes -= bytes;
            return Poll::Ready(Taken::Item(item));
        }
        if queue.closed {
            return Poll::Ready(Taken::Closed);
        }
        if let Some(revision) = queue.behind_after {
            return Poll::Ready(Taken::Behind(revision));
        }
        queue.waker = Some(context.waker().clone());
        Poll::Pending
    }

    /// Adds a progress item: all up to `handed_out` is queued. False when the watcher reads history and answers itself, or finds the end next.
    pub(super) fn push_progress(&self, handed_out: i64) -> bool {
        let mut queue = self.queue.lock();
        // One item after another would keep the end from a watcher that asks again and again.
        if queue.closed || queue.behind_after.is_some() {
            return false;
        }
        // The hub may not have handed out yet what the watcher knows.
        let revision = handed_out.max(queue.known_revision);
        // One past the limit is fine, but never two in a row.
        if !matches!(queue.items.back(), Some((WatchItem::Progress { .. }, _))) {
            queue.items.push_back((WatchItem::Progress { revision }, 0));
        }
        let waker = queue.waker.take();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
        true
    }
}
