//! The ordered index of keys: leaves of bounded size that know how many of their keys live, so that counting a range costs by leaves and not
//! by keys, and that are filled more densely than a `BTreeMap`'s nodes. A key stands in its versions only.

use std::ops::{Bound, Range};

use bytes::Bytes;
use smallvec::SmallVec;

use crate::version::Version;

/// Versions of one key, by their places, at least one. Most keys have one.
pub(crate) type Versions = SmallVec<[Version; 2]>;

/// Keys of one leaf; a fuller one is split.
#[cfg(not(test))]
const MAX_LEAF_KEYS: usize = 128;
/// In tests few, so that leaves are split and go.
#[cfg(test)]
const MAX_LEAF_KEYS: usize = 4;

/// Where a key is or would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    leaf: usize,
    entry: usize,
}

/// All keys with their versions, in order.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// None of them is empty.
    leaves: Vec<Vec<Versions>>,
    /// For each leaf a key that none of its own is below. That of the first leaf counts as the lowest of all.
    lowest: Vec<Bytes>,
    /// For each leaf how many of its keys live.
    live: Vec<u32>,
    len: usize,
    /// Where the next key is expected: keys often come in order.
    next: Option<Place>,
}

/// Whether the newest version of a key is a value.
fn lives(versions: &Versions) -> bool {
    versions
        .last()
        .is_some_and(|version| !version.is_tombstone())
}

/// The key of which these are the versions.
pub(crate) fn key_of(versions: &[Version]) -> &[u8] {
    versions.first().map_or(&[], Version::key)
}

impl Index {
    /// Adds a key above all that are there.
    pub(crate) fn push_last(&mut self, versions: Versions) {
        let lives = u32::from(lives(&versions));
        self.len += 1;
        match (self.leaves.last_mut(), self.live.last_mut()) {
            (Some(leaf), Some(live)) if leaf.len() < MAX_LEAF_KEYS => {
                leaf.push(versions);
                *live += lives;
            }
            _ => {
                self.lowest.push(Bytes::copy_from_slice(key_of(&versions)));
                self.live.push(lives);
                let mut leaf = Vec::with_capacity(MAX_LEAF_KEYS);
                leaf.push(versions);
                self.leaves.push(leaf);
            }
        }
    }

    /// Number of keys, those that do not live among them.
    #[cfg(test)]
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<&Versions> {
        let place = self.find(key).ok()?;
        self.leaves.get(place.leaf)?.get(place.entry)
    }

    /// Changes the versions of a key; it goes when none are left. `None` where there is no such key.
    pub(crate) fn update<T>(
        &mut self,
        key: &[u8],
        change: impl FnOnce(&mut Versions) -> T,
    ) -> Option<T> {
        let place = self.find(key).ok()?;
        let leaf = self.leaves.get_mut(place.leaf)?;
        let live = self.live.get_mut(place.leaf)?;
        let versions = leaf.get_mut(place.entry)?;
        *live -= u32::from(lives(versions));
        let changed = change(versions);
        *live += u32::from(lives(versions));
        if versions.is_empty() {
            leaf.remove(place.entry);
            self.len -= 1;
            if leaf.is_empty() {
                self.leaves.remove(place.leaf);
                self.lowest.remove(place.leaf);
                self.live.remove(place.leaf);
            }
        }
        Some(changed)
    }

    /// Adds a key that is not there.
    pub(crate) fn insert(&mut self, versions: Versions) {
        let key = key_of(&versions);
        let (Ok(place) | Err(place)) = self.find(key);
        let place = self.make_room(place, key);
        let (Some(leaf), Some(live)) = (
            self.leaves.get_mut(place.leaf),
            self.live.get_mut(place.leaf),
        ) else {
            return;
        };
        *live += u32::from(lives(&versions));
        leaf.insert(place.entry, versions);
        self.len += 1;
        self.next = Some(Place {
            entry: place.entry + 1,
            ..place
        });
    }

    /// Where a key that is to be added belongs once its leaf, if that was full, is split.
    fn make_room(&mut self, place: Place, key: &[u8]) -> Place {
        let mut upper = Vec::new();
        let (number, at) = match self.leaves.get_mut(place.leaf) {
            Some(leaf) if leaf.len() < MAX_LEAF_KEYS => return place,
            Some(leaf) => {
                // A run of keys fills the lower half: split in the middle, all that it leaves behind would stay half empty.
                let goes_on = self.next == Some(place) || place.entry == leaf.len();
                let at = if goes_on { place.entry } else { leaf.len() / 2 };
                upper.reserve_exact(MAX_LEAF_KEYS);
                upper.extend(leaf.drain(at..));
                (place.leaf + 1, at)
            }
            None => (0, 0),
        };
        let lowest = upper.first().map_or(key, |versions| key_of(versions));
        self.lowest.insert(number, Bytes::copy_from_slice(lowest));
        let moved = upper.iter().map(|versions| u32::from(lives(versions)));
        let moved = moved.sum();
        if let Some(live) = self.live.get_mut(place.leaf) {
            *live -= moved;
        }
        self.live.insert(number, moved);
        let is_new = upper.is_empty();
        self.leaves.insert(number, upper);
        if is_new || place.entry > at {
            return Place {
                leaf: number,
                entry: place.entry - at,
            };
        }
        place
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Versions> {
        self.leaves.iter().flatten()
    }

    /// Keys within bounds, in order.
    pub(crate) fn range<'a>(
        &'a self,
        bounds: (Bound<&[u8]>, Bound<&[u8]>),
    ) -> impl Iterator<Item = &'a Versions> + use<'a> {
        let Range { start, end } = self.places(bounds);
        self.leaves_of(start, end).flat_map(|(_, entries)| entries)
    }

    /// Number of keys within bounds that live.
    pub(crate) fn count_live(&self, bounds: (Bound<&[u8]>, Bound<&[u8]>)) -> usize {
        let Range { start, end } = self.places(bounds);
        self.leaves_of(start, end)
            .map(|(leaf, entries)| {
                let whole = self
                    .leaves
                    .get(leaf)
                    .is_some_and(|all| all.len() == entries.len());
                match self.live.get(leaf) {
                    Some(live) if whole => usize::try_from(*live).unwrap_or(usize::MAX),
                    _ => entries.iter().filter(|versions| lives(versions)).count(),
                }
            })
            .sum()
    }

    /// For each leaf between two places its number and the entries that lie between them.
    fn leaves_of(&self, start: Place, end: Place) -> impl Iterator<Item = (usize, &[Versions])> {
        let last = end.leaf.saturating_add(1).min(self.leaves.len());
        let numbers = start.leaf..last.max(start.leaf);
        numbers.filter_map(move |number| {
            let leaf = self.leaves.get(number)?;
            let from = if number == start.leaf { start.entry } else { 0 };
            let to = if number == end.leaf {
                end.entry
            } else {
                leaf.len()
            };
            Some((number, leaf.get(from..to).unwrap_or_default()))
        })
    }

    fn places(&self, (start, end): (Bound<&[u8]>, Bound<&[u8]>)) -> Range<Place> {
        let nowhere = Place {
            leaf: self.leaves.len(),
            entry: 0,
        };
        let after = |place: Place| Place {
            entry: place.entry + 1,
            ..place
        };
        let start = match start {
            Bound::Unbounded => Place { leaf: 0, entry: 0 },
            Bound::Included(key) => self.find(key).unwrap_or_else(|place| place),
            Bound::Excluded(key) => self.find(key).map_or_else(|place| place, after),
        };
        let end = match end {
            Bound::Unbounded => nowhere,
            Bound::Included(key) => self.find(key).map_or_else(|place| place, after),
            Bound::Excluded(key) => self.find(key).unwrap_or_else(|place| place),
        };
        start..end.max(start)
    }

    /// Where a key is, or where it would be.
    fn find(&self, key: &[u8]) -> Result<Place, Place> {
        let above = self.lowest.partition_point(|lowest| lowest <= key);
        let leaf = above.saturating_sub(1);
        let entries = self.leaves.get(leaf).map_or(&[][..], Vec::as_slice);
        entries
            .binary_search_by(|entry| key_of(entry).cmp(key))
            .map(|entry| Place { leaf, entry })
            .map_err(|entry| Place { leaf, entry })
    }

    /// Checks what holds between leaves; walks over everything.
    ///
    /// # Errors
    /// A text that names what is broken.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.leaves.len() != self.lowest.len() || self.leaves.len() != self.live.len() {
            return Err("leaves of the index are described wrong".to_owned());
        }
        let mut all = 0;
        for (leaf, lowest) in self.leaves.iter().zip(&self.lowest).skip(1) {
            if leaf
                .first()
                .is_none_or(|versions| key_of(versions) < lowest)
            {
                return Err(format!("a leaf of the index has keys below {lowest:?}"));
            }
        }
        for (leaf, live) in self.leaves.iter().zip(&self.live) {
            let counted = leaf.iter().filter(|versions| lives(versions)).count();
            if usize::try_from(*live) != Ok(counted) {
                return Err(format!(
                    "a leaf counts {live} keys that live, it has {counted}"
                ));
            }
        }
        for leaf in &self.leaves {
            if leaf.is_empty() || leaf.len() > MAX_LEAF_KEYS {
                return Err(format!("a leaf of the index has {} keys", leaf.len()));
            }
            all += leaf.len();
        }
        if all != self.len {
            return Err(format!("the index counts {} keys, it has {all}", self.len));
        }
        if !self.iter().is_sorted_by(|a, b| key_of(a) < key_of(b)) {
            return Err("keys of the index are out of order".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
