//! Key ranges as etcd's requests write them.

use std::ops::Bound;

use bytes::Bytes;

type MapBounds<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// Keys that a request names by `key` and `range_end` (etcd API: `RangeRequest`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyRange {
    /// One key (`range_end` empty).
    Single(Bytes),
    /// From the first key up to, without, the second; empty where the second is not greater.
    Between(Bytes, Bytes),
    /// The key and all greater ones (`range_end` is `\0`).
    From(Bytes),
}

impl KeyRange {
    /// Reads the fields of a request.
    #[must_use]
    pub fn new(key: &Bytes, range_end: &Bytes) -> Self {
        match range_end.as_ref() {
            [] => Self::Single(key.clone()),
            [0] => Self::From(key.clone()),
            _ => Self::Between(key.clone(), range_end.clone()),
        }
    }

    /// Whether `key` lies in the range.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            Self::Single(only) => only == key,
            Self::Between(start, end) => start.as_ref() <= key && key < end.as_ref(),
            Self::From(start) => start.as_ref() <= key,
        }
    }

    /// First key that the range may hold.
    #[must_use]
    pub const fn start(&self) -> &Bytes {
        match self {
            Self::Single(start) | Self::Between(start, _) | Self::From(start) => start,
        }
    }

    /// Bounds for an ordered map; `None` for a range that holds nothing (a map would panic on inverted bounds).
    pub(crate) fn bounds(&self) -> Option<MapBounds<'_>> {
        match self {
            Self::Single(key) => Some((Bound::Included(key), Bound::Included(key))),
            Self::Between(start, end) => {
                (start < end).then_some((Bound::Included(start), Bound::Excluded(end)))
            }
            Self::From(start) => Some((Bound::Included(start), Bound::Unbounded)),
        }
    }
}
