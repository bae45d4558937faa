//! A bounded number of places that the smallest keys have, whatever the order in which they came.

use std::collections::BTreeSet;

/// Keys with a place, and those that wait for one: every key that waits is greater than all that have a place.
pub(super) struct Places<K> {
    places_max: usize,
    placed: BTreeSet<K>,
    waiting: BTreeSet<K>,
}

impl<K: Ord + Copy> Places<K> {
    pub(super) fn new(places_max: usize) -> Self {
        Self {
            places_max,
            placed: BTreeSet::new(),
            waiting: BTreeSet::new(),
        }
    }

    /// Adds a key; gives the one that is left without a place by it, which may be the key itself.
    pub(super) fn insert(&mut self, key: K) -> Option<K> {
        if self.placed.contains(&key) || self.waiting.contains(&key) {
            return None;
        }
        self.placed.insert(key);
        if self.placed.len() <= self.places_max {
            return None;
        }
        let last = self.placed.pop_last()?;
        self.waiting.insert(last);
        Some(last)
    }

    /// Removes a key; gives the one that has its place now.
    pub(super) fn remove(&mut self, key: &K) -> Option<K> {
        if !self.placed.remove(key) {
            self.waiting.remove(key);
            return None;
        }
        let next = self.waiting.pop_first()?;
        self.placed.insert(next);
        Some(next)
    }

    /// True if the key has a place.
    pub(super) fn has_place(&self, key: &K) -> bool {
        self.placed.contains(key)
    }

    /// Keys without a place, the first in line first.
    pub(super) fn waiting(&self) -> impl Iterator<Item = K> + '_ {
        self.waiting.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_smallest_keys_have_the_places(ops in prop::collection::vec((any::<bool>(), 0_u8..20), 0..80)) {
            let mut places = Places::new(5);
            let mut all = BTreeSet::new();
            let mut shown = BTreeSet::new();
            for (add, key) in ops {
                if add {
                    all.insert(key);
                    let left_out = places.insert(key);
                    shown.insert(key);
                    left_out.iter().for_each(|key| { shown.remove(key); });
                } else {
                    all.remove(&key);
                    shown.remove(&key);
                    shown.extend(places.remove(&key));
                }
                let smallest: BTreeSet<u8> = all.iter().take(5).copied().collect();
                prop_assert_eq!(&places.placed, &smallest);
                // What the calls said is what is the case, but for repeated insertions of a waiting key.
                shown.retain(|key| places.has_place(key));
                prop_assert_eq!(&shown, &smallest);
                prop_assert_eq!(places.waiting().collect::<BTreeSet<_>>(), &all - &smallest);
            }
        }
    }
}
