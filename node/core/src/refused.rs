//! Records that could not be taken: counted by reason, the newest ones named.

use std::collections::{BTreeMap, VecDeque};

/// Newest refusals that are kept by name.
pub const REFUSALS_NAMED_MAX: usize = 64;

/// Why a record was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Key or value does not follow the schema.
    Malformed,
    /// Larger than the limit of its kind.
    TooLarge,
    /// The record contradicts its key, or speaks for another cluster.
    NotOwnName,
    /// An identity outside of the cluster's range.
    ForeignIdentity,
    /// An address that another cluster has already.
    AddressConflict,
    /// A cluster id that is 0, ours, or another peer's.
    ClusterIdConflict,
    /// A virtual address and port that another service has already.
    FrontendConflict,
    /// A backend whose address was not accepted from that cluster.
    ForeignBackend,
    /// A node without an address of a family that we have on the underlay.
    NoUnderlayFamily,
    /// A map has no room for more.
    MapFull,
    /// A list longer than the data path takes.
    TooManyBackends,
    /// A WireGuard key that another node has, too.
    DuplicateKey,
}

impl Reason {
    /// Label of the metric.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TooLarge => "too-large",
            Self::NotOwnName => "not-own-name",
            Self::ForeignIdentity => "foreign-identity",
            Self::AddressConflict => "address-conflict",
            Self::ClusterIdConflict => "cluster-id-conflict",
            Self::FrontendConflict => "frontend-conflict",
            Self::ForeignBackend => "foreign-backend",
            Self::NoUnderlayFamily => "no-underlay-family",
            Self::MapFull => "map-full",
            Self::TooManyBackends => "too-many-backends",
            Self::DuplicateKey => "duplicate-key",
        }
    }
}

/// One refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// Key of the record, or the object that it speaks of.
    pub object: String,
    /// What is wrong with it.
    pub detail: String,
}

/// Refusals since the start.
#[derive(Clone, Debug, Default)]
pub struct Refused {
    counts: BTreeMap<Reason, u64>,
    newest: VecDeque<Refusal>,
}

impl Refused {
    /// Counts one refusal.
    pub fn record(&mut self, refusal: Refusal) {
        let count = self.counts.entry(refusal.reason).or_default();
        *count = count.saturating_add(1);
        if self.newest.len() == REFUSALS_NAMED_MAX {
            self.newest.pop_front();
        }
        self.newest.push_back(refusal);
    }

    /// Refusals by reason.
    pub fn counts(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        self.counts.iter().map(|(reason, count)| (*reason, *count))
    }

    /// How many there were in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Takes the newest ones out, oldest first, at most [`REFUSALS_NAMED_MAX`].
    pub fn take_newest(&mut self) -> Vec<Refusal> {
        self.newest.drain(..).collect()
    }
}
