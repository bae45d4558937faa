//! The ordered index of keys: leaves of bounded size that know how many of their keys live, so that counting a range costs by leaves and not
//! by keys, and that are filled more densely than a `BTreeMap`'s nodes.

use std::{
    ops::{Bound, Range},
    sync::Arc,
};

use bytes::Bytes;
use smallvec::SmallVec;

use crate::version::Version;

/// Versions of one key, by (mod revision, sub), at least one. Most keys have one.
pub(crate) type Versions = SmallVec<[Arc<Version>; 2]>;

/// Keys of one leaf; a fuller one is split.
#[cfg(not(test))]
const MAX_LEAF_KEYS: usize = 128;
/// In tests few, so that leaves are split and go.
#[cfg(test)]
const MAX_LEAF_KEYS: usize = 4;

type Entry = (Bytes, Versions);

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
    leaves: Vec<Vec<Entry>>,
    /// For each leaf a key that none of its own is below. That of the first leaf counts as the lowest of all.
    lowest: Vec<Bytes>,
    /// For each leaf how many of its keys live.
    live: Vec<u32>,
    len: usize,
}

/// Whether the newest version of a key is a value.
fn lives(versions: &Versions) -> bool {
    versions
        .last()
        .is_some_and(|version| !version.is_tombstone())
}

fn key_of((key, _): &Entry) -> &[u8] {
    key
}

impl Index {
    /// Of keys in ascending order.
    pub(crate) fn from_sorted(sorted: impl IntoIterator<Item = Entry>) -> Self {
        let mut index = Self::default();
        for (key, versions) in sorted {
            index.push_last(key, versions);
        }
        for leaf in &mut index.leaves {
            leaf.shrink_to_fit();
        }
        index
    }

    fn push_last(&mut self, key: Bytes, versions: Versions) {
        let lives = u32::from(lives(&versions));
        self.len += 1;
        match (self.leaves.last_mut(), self.live.last_mut()) {
            (Some(leaf), Some(live)) if leaf.len() < MAX_LEAF_KEYS => {
                leaf.push((key, versions));
                *live += lives;
            }
            _ => {
                self.lowest.push(key.clone());
                self.live.push(lives);
                self.leaves.push(vec![(key, versions)]);
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
        let (_, versions) = self.leaves.get(place.leaf)?.get(place.entry)?;
        Some(versions)
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
        let (_, versions) = leaf.get_mut(place.entry)?;
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
    pub(crate) fn insert(&mut self, key: Bytes, versions: Versions) {
        let (Ok(place) | Err(place)) = self.find(&key);
        // Keys often come in order: the leaf before then stays full.
        if place.leaf + 1 >= self.leaves.len()
            && self
                .leaves
                .last()
                .is_none_or(|leaf| place.entry == leaf.len())
        {
            self.push_last(key, versions);
            return;
        }
        let (Some(leaf), Some(live)) = (
            self.leaves.get_mut(place.leaf),
            self.live.get_mut(place.leaf),
        ) else {
            return;
        };
        *live += u32::from(lives(&versions));
        leaf.insert(place.entry, (key, versions));
        self.len += 1;
        if leaf.len() > MAX_LEAF_KEYS {
            let upper = leaf.split_off(leaf.len() / 2);
            let upper_live = upper
                .iter()
                .map(|(_, versions)| u32::from(lives(versions)))
                .sum();
            *live -= upper_live;
            let lowest = upper.first().map(|(key, _)| key.clone());
            self.lowest
                .insert(place.leaf + 1, lowest.unwrap_or_default());
            self.live.insert(place.leaf + 1, upper_live);
            self.leaves.insert(place.leaf + 1, upper);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Bytes, &Versions)> {
        self.leaves
            .iter()
            .flatten()
            .map(|(key, versions)| (key, versions))
    }

    /// Keys within bounds, in order.
    pub(crate) fn range<'a>(
        &'a self,
        bounds: (Bound<&[u8]>, Bound<&[u8]>),
    ) -> impl Iterator<Item = (&'a Bytes, &'a Versions)> + use<'a> {
        let Range { start, end } = self.places(bounds);
        self.leaves_of(start, end)
            .flat_map(|(_, entries)| entries)
            .map(|(key, versions)| (key, versions))
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
                    _ => entries
                        .iter()
                        .filter(|(_, versions)| lives(versions))
                        .count(),
                }
            })
            .sum()
    }

    /// For each leaf between two places its number and the entries that lie between them.
    fn leaves_of(&self, start: Place, end: Place) -> impl Iterator<Item = (usize, &[Entry])> {
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
            if leaf.first().is_none_or(|(key, _)| key < lowest) {
                return Err(format!("a leaf of the index has keys below {lowest:?}"));
            }
        }
        for (leaf, live) in self.leaves.iter().zip(&self.live) {
            let counted = leaf.iter().filter(|(_, versions)| lives(versions)).count();
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
        if !self.iter().is_sorted_by(|(a, _), (b, _)| a < b) {
            return Err("keys of the index are out of order".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
