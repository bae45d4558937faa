//! Whose turn it is while a device takes over from another, and how much may wait for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that are held of one peer in one direction: what TCP may have on the way by Linux's defaults.
pub const HELD_BYTES_MAX: usize = 8 << 20;
/// Bytes that a device holds of all peers.
pub const HELD_BYTES_TOTAL_MAX: usize = 64 << 20;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the peer.
    Outward,
    /// From it.
    Inward,
}

/// Whether it is this device's turn to carry a peer's packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// It carries them.
    #[default]
    Open,
    /// None has come yet.
    Fresh,
    /// They are held.
    Held,
}

/// Counts what one holder holds, and lets go of it when dropped.
#[derive(Debug)]
pub struct HeldBytes {
    total: Arc<AtomicUsize>,
    own: usize,
}

impl HeldBytes {
    /// Nothing yet, of this total.
    #[must_use]
    pub fn new(total: &Arc<AtomicUsize>) -> Self {
        Self {
            total: Arc::clone(total),
            own: 0,
        }
    }

    /// Counts more; false: it is more than may be held.
    #[must_use]
    pub fn add(&mut self, bytes: usize) -> bool {
        let total = self.total.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.own += bytes;
        self.own <= HELD_BYTES_MAX && total <= HELD_BYTES_TOTAL_MAX
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.total.fetch_sub(self.own, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_counted_for_each_and_for_all_and_let_go_with_its_holder() {
        let total = Arc::default();
        let mut all: Vec<HeldBytes> = (0..=HELD_BYTES_TOTAL_MAX / HELD_BYTES_MAX)
            .map(|_| HeldBytes::new(&total))
            .collect();
        let taken: Vec<bool> = all.iter_mut().map(|one| one.add(HELD_BYTES_MAX)).collect();
        let (last, before) = taken.split_last().unwrap();
        assert!(before.iter().all(|taken| *taken) && !last);
        drop(all);
        let mut one = HeldBytes::new(&total);
        assert!(one.add(HELD_BYTES_MAX) && !one.add(1));
        drop(one);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }
}
