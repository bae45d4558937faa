//! How much of our store one peer's copy takes, and how much it may.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use clustermesh_api::limits::{MAX_PEER_COPY_BYTES, MAX_PEER_COPY_RECORDS};

/// Below this share of the quota, records that were refused for it and not kept are worth a new listing, percent.
const WORTH_RELIST_PERCENT: usize = 90;

/// Bounds of one peer's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyQuota {
    /// Records of all kinds.
    pub records_max: usize,
    /// Their keys and values, bytes.
    pub bytes_max: usize,
}

impl Default for CopyQuota {
    fn default() -> Self {
        Self {
            records_max: MAX_PEER_COPY_RECORDS,
            bytes_max: MAX_PEER_COPY_BYTES,
        }
    }
}

/// What the copy takes. Keys are kept as hashes: a peer may have a million records.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage {
    quota: CopyQuota,
    sizes: HashMap<u64, u32>,
    bytes: usize,
    /// Something became free since the last [`Usage::take_freed`].
    freed: bool,
}

/// `SipHash` with fixed keys: a peer cannot make many of its keys count as one.
fn place(key: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

impl Usage {
    pub(super) fn set_quota(&mut self, quota: CopyQuota) {
        self.quota = quota;
    }

    pub(super) const fn quota(&self) -> CopyQuota {
        self.quota
    }

    /// Whether there is room for this record in place of the one under its key.
    pub(super) fn fits(&self, key: &[u8], value_bytes: usize) -> bool {
        let old = self.sizes.get(&place(key));
        let records = self.sizes.len() + usize::from(old.is_none());
        let bytes = self.bytes - old.map_or(0, |old| *old as usize) + key.len() + value_bytes;
        records <= self.quota.records_max && bytes <= self.quota.bytes_max
    }

    pub(super) fn set(&mut self, key: &[u8], value_bytes: usize) {
        self.remove(key);
        let size = u32::try_from(key.len() + value_bytes).unwrap_or(u32::MAX);
        self.bytes += size as usize;
        self.sizes.insert(place(key), size);
    }

    pub(super) fn remove(&mut self, key: &[u8]) {
        if let Some(size) = self.sizes.remove(&place(key)) {
            self.bytes -= size as usize;
            self.freed = true;
        }
    }

    /// Whether something became free since the last call.
    pub(super) fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.freed)
    }

    /// Whether there is room for more than the odd record.
    pub(super) fn has_much_room(&self) -> bool {
        let below = |used: usize, max: usize| used < max / 100 * WORTH_RELIST_PERCENT;
        below(self.sizes.len(), self.quota.records_max) && below(self.bytes, self.quota.bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_in_place_of_another_needs_only_the_difference() {
        let mut usage = Usage::default();
        usage.set_quota(CopyQuota {
            records_max: 2,
            bytes_max: 100,
        });
        usage.set(b"a", 59);
        assert!(usage.fits(b"b", 39) && !usage.fits(b"b", 40));
        assert!(usage.fits(b"a", 99) && !usage.fits(b"a", 100));
        usage.set(b"b", 1);
        assert!(!usage.fits(b"c", 0) && usage.fits(b"b", 2));
        usage.remove(b"a");
        assert!(usage.take_freed() && !usage.take_freed());
        assert!(usage.fits(b"c", 90));
    }
}
