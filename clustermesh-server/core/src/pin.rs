//! What a reader of one revision still needs while compaction goes on.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use bytes::Bytes;

use crate::version::Version;

/// The pins of one state; each lives as long as its reader holds it.
#[derive(Debug, Default)]
pub(crate) struct Pins(Mutex<Vec<Weak<Pin>>>);

impl Pins {
    /// Keeps what compaction drops from now on for whoever holds the pin.
    pub(crate) fn add(&self, revision: i64) -> Arc<Pin> {
        let pin = Arc::new(Pin::new(revision));
        let mut pins = self.lock();
        pins.retain(|pin| pin.strong_count() > 0);
        pins.push(Arc::downgrade(&pin));
        pin
    }

    /// Pins that are still held.
    pub(crate) fn live(&self) -> Vec<Arc<Pin>> {
        let mut pins = self.lock();
        pins.retain(|pin| pin.strong_count() > 0);
        pins.iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether the pin is one of these.
    pub(crate) fn hold(&self, pin: &Arc<Pin>) -> bool {
        let pins = self.lock();
        pins.iter()
            .any(|other| std::ptr::eq(other.as_ptr(), Arc::as_ptr(pin)))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Pin>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps for a running snapshot what compaction takes out of the index.
#[derive(Debug)]
pub(crate) struct Pin {
    revision: i64,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Keys below are in the snapshot already; `None` when all are.
    position: Option<Bytes>,
    pub(crate) versions: BTreeMap<Bytes, Vec<Version>>,
}

impl Kept {
    /// What was kept below is not needed any more; `None` for all of it.
    pub(crate) fn done_below(&mut self, position: Option<Bytes>) {
        self.versions = match &position {
            Some(position) => self.versions.split_off(position),
            None => BTreeMap::new(),
        };
        self.position = position;
    }
}

impl Pin {
    fn new(revision: i64) -> Self {
        let kept = Kept {
            position: Some(Bytes::new()),
            ..Kept::default()
        };
        Self {
            revision,
            kept: Mutex::new(kept),
        }
    }

    /// Takes a version that leaves the index, if the snapshot still needs it.
    pub(crate) fn keep(&self, version: Version) {
        if version.mod_revision() > self.revision {
            return;
        }
        let mut kept = self.lock();
        if kept
            .position
            .as_ref()
            .is_some_and(|position| version.key() >= position)
        {
            kept.versions
                .entry(Bytes::copy_from_slice(version.key()))
                .or_default()
                .push(version);
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Kept> {
        // A panic elsewhere leaves the map whole: each change is one call.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
