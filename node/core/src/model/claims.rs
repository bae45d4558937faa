//! Who claims a key: own cluster first, then whoever came first.

use std::collections::HashMap;
use std::hash::Hash;

use smallvec::SmallVec;

use super::sources::{OWN, SourceId};

/// One claim of a key.
pub(super) trait Claim: Copy + PartialEq {
    /// Cluster that makes it.
    fn source(&self) -> SourceId;
    /// Same claimant, whatever the value.
    fn same_claimant(&self, other: &Self) -> bool;
    /// Smaller goes first among the claims of one cluster.
    fn rank(&self) -> u8;
}

pub(super) struct Claims<K, C>(HashMap<K, SmallVec<[C; 1]>>);

impl<K, C> Default for Claims<K, C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Copy + Eq + Hash, C: Claim> Claims<K, C> {
    /// Adds a claim or renews the claimant's; gives the claim that was replaced.
    pub(super) fn insert(&mut self, key: K, claim: C) -> Option<C> {
        let claims = self.0.entry(key).or_default();
        match claims.iter_mut().find(|held| held.same_claimant(&claim)) {
            Some(held) => Some(std::mem::replace(held, claim)),
            None => {
                let place = claims
                    .iter()
                    .position(|held| {
                        let own_first = claim.source() == OWN && held.source() != OWN;
                        let ranked = claim.source() == held.source() && claim.rank() < held.rank();
                        own_first || ranked
                    })
                    .unwrap_or(claims.len());
                claims.insert(place, claim);
                None
            }
        }
    }

    /// Removes the claimant's claim and gives it.
    pub(super) fn remove(&mut self, key: &K, claimant: &C) -> Option<C> {
        let claims = self.0.get_mut(key)?;
        let place = claims.iter().position(|c| c.same_claimant(claimant))?;
        let removed = claims.remove(place);
        if claims.is_empty() {
            self.0.remove(key);
        }
        Some(removed)
    }

    /// All claims of a key, the one with precedence first.
    pub(super) fn of(&self, key: &K) -> &[C] {
        self.0.get(key).map_or(&[], |claims| claims)
    }

    /// All keys that a source claims.
    pub(super) fn keys_of(&self, source: SourceId) -> Vec<K> {
        self.0
            .iter()
            .filter(|(_, claims)| claims.iter().any(|c| c.source() == source))
            .map(|(key, _)| *key)
            .collect()
    }
}
