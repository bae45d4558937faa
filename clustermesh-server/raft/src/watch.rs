//! Watching changes in revision order: what a watcher asks for and gets.

mod hub;
mod slot;
mod watcher;

use std::{fmt, sync::Arc};

use clustermesh_core::{CursorChange, EventGroup, KeyRange, PeerCursor, StoredEvent};

pub(crate) use self::hub::{Hub, distribute};
pub use self::watcher::Watcher;

/// Decides whether a watcher gets an event.
pub type EventFilter = Arc<dyn Fn(&StoredEvent) -> bool + Send + Sync>;

/// What a watcher asks for.
#[derive(Clone, Default)]
pub struct WatchSpec {
    /// Keys whose changes are wanted; ranges may overlap, an event comes once.
    pub ranges: Vec<KeyRange>,
    /// First wanted revision; 0 or less for what comes after now.
    pub start_revision: i64,
    /// Lets events through; without one all of them.
    pub filter: Option<EventFilter>,
    /// Whether peer cursors are wanted, in their place among the events; all that exist come first.
    pub cursors: bool,
}

impl fmt::Debug for WatchSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchSpec")
            .field("ranges", &self.ranges)
            .field("start_revision", &self.start_revision)
            .field("filter", &self.filter.is_some())
            .field("cursors", &self.cursors)
            .finish()
    }
}

/// One thing that a watcher gets.
#[derive(Debug, Clone)]
pub enum WatchItem {
    /// Changes of one revision.
    Events(WatchEvents),
    /// A peer's cursor, after everything that it covers; `None` when the peer was forgotten.
    Cursor {
        /// Name of the peer.
        cluster: String,
        /// Its cursor.
        cursor: Option<PeerCursor>,
    },
    /// Everything up to this revision was delivered; sent when asked for.
    Progress {
        /// The revision.
        revision: i64,
    },
}

/// The wanted changes of one revision, shared among watchers.
#[derive(Debug, Clone)]
pub struct WatchEvents {
    group: Arc<EventGroup>,
    /// Places of the wanted events, ascending; `None` for all.
    chosen: Option<Vec<u32>>,
}

impl WatchEvents {
    /// The revision.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.group.revision
    }

    /// The wanted events in their order, at least one.
    pub fn events(&self) -> impl Iterator<Item = &StoredEvent> + '_ {
        let all = if self.chosen.is_none() {
            self.group.events.as_slice()
        } else {
            &[]
        };
        let some = self
            .chosen
            .iter()
            .flatten()
            .filter_map(|place| self.group.events.get(usize::try_from(*place).ok()?));
        all.iter().chain(some)
    }

    /// The events at `places` of `group` that `filter` lets through; `None` for none.
    fn choose(
        group: &Arc<EventGroup>,
        places: impl ExactSizeIterator<Item = u32>,
        filter: Option<&EventFilter>,
    ) -> Option<Self> {
        let all = places.len() == group.events.len();
        if all && filter.is_none() {
            return Some(Self {
                group: group.clone(),
                chosen: None,
            });
        }
        let event = |place: u32| {
            usize::try_from(place)
                .ok()
                .and_then(|place| group.events.get(place))
        };
        let chosen: Vec<u32> = places
            .filter(|place| {
                filter.is_none_or(|filter| event(*place).is_some_and(|event| filter(event)))
            })
            .collect();
        (!chosen.is_empty()).then(|| Self {
            group: group.clone(),
            chosen: Some(chosen),
        })
    }
}

/// What apply tells the hub, in order.
#[derive(Debug)]
pub(crate) enum Publication {
    /// One entry that changed something.
    Applied {
        sequence: u64,
        groups: Vec<Arc<EventGroup>>,
        cursors: Vec<CursorChange>,
    },
    /// The state was replaced by a snapshot's: watchers must read its history.
    Replaced { sequence: u64 },
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
