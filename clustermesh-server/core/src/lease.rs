//! Leases: granted TTL and attached keys. Deadlines are the leader's affair and no part of the state.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;

use crate::{
    error::KvError,
    limits::{MAX_LEASE_TTL_SECONDS, MIN_LEASE_TTL_SECONDS},
};

/// A lease as readers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseView {
    /// TTL as granted, seconds.
    pub granted_ttl_s: i64,
    /// Attached keys, sorted.
    pub keys: Vec<Bytes>,
}

#[derive(Debug)]
struct Lease {
    granted_ttl_s: i64,
    /// A hash set, so that a put costs the same however many keys the lease has. Nothing that apply yields follows its order.
    keys: HashSet<Bytes>,
}

/// All leases by id.
#[derive(Debug, Default)]
pub(crate) struct LeaseTable {
    leases: BTreeMap<i64, Lease>,
}

impl LeaseTable {
    /// Adds a lease and returns the TTL it got. Id 0 means "no lease" and is refused: the proposer chooses the id.
    pub(crate) fn grant(&mut self, id: i64, ttl_s: i64) -> Result<i64, KvError> {
        if id == 0 {
            return Err(KvError::LeaseNotFound);
        }
        if ttl_s > MAX_LEASE_TTL_SECONDS {
            return Err(KvError::LeaseTtlTooLarge);
        }
        if self.leases.contains_key(&id) {
            return Err(KvError::LeaseExists);
        }
        let granted_ttl_s = ttl_s.max(MIN_LEASE_TTL_SECONDS);
        self.restore(id, granted_ttl_s);
        Ok(granted_ttl_s)
    }

    pub(crate) fn restore(&mut self, id: i64, granted_ttl_s: i64) {
        self.leases.insert(
            id,
            Lease {
                granted_ttl_s,
                keys: HashSet::new(),
            },
        );
    }

    pub(crate) fn contains(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// Removes a lease and returns its keys in order, or `None` where there is none.
    pub(crate) fn remove(&mut self, id: i64) -> Option<Vec<Bytes>> {
        self.leases.remove(&id).map(|lease| sorted(&lease.keys))
    }

    /// Moves a key from one lease to another; 0 is no lease.
    pub(crate) fn move_key(&mut self, key: &[u8], from: i64, to: i64) {
        if from == to {
            return;
        }
        if let Some(lease) = self.leases.get_mut(&from) {
            lease.keys.remove(key);
        }
        if let Some(lease) = self.leases.get_mut(&to) {
            lease.keys.insert(Bytes::copy_from_slice(key));
        }
    }

    pub(crate) fn granted_ttl_s(&self, id: i64) -> Option<i64> {
        self.leases.get(&id).map(|lease| lease.granted_ttl_s)
    }

    pub(crate) fn view(&self, id: i64) -> Option<LeaseView> {
        self.leases.get(&id).map(|lease| LeaseView {
            granted_ttl_s: lease.granted_ttl_s,
            keys: sorted(&lease.keys),
        })
    }

    /// Ids with granted TTLs in seconds, by id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.leases
            .iter()
            .map(|(id, lease)| (*id, lease.granted_ttl_s))
    }

    /// Attached keys of a lease, in no order; none where there is no lease.
    pub(crate) fn keys(&self, id: i64) -> impl Iterator<Item = &Bytes> + '_ {
        self.leases
            .get(&id)
            .into_iter()
            .flat_map(|lease| lease.keys.iter())
    }

    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    /// Number of attached keys over all leases.
    pub(crate) fn attached(&self) -> usize {
        self.leases.values().map(|lease| lease.keys.len()).sum()
    }

    pub(crate) fn is_attached(&self, id: i64, key: &[u8]) -> bool {
        self.leases
            .get(&id)
            .is_some_and(|lease| lease.keys.contains(key))
    }
}

fn sorted(keys: &HashSet<Bytes>) -> Vec<Bytes> {
    let mut keys: Vec<Bytes> = keys.iter().cloned().collect();
    keys.sort_unstable();
    keys
}
