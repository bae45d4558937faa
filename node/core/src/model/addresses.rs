//! The ipcache: claims of addresses, checked against the claiming cluster's range.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use clustermesh_ebpf_abi::{
    IPCACHE_ENTRIES_MAX, IpcacheKey, IpcacheValue, NODE_INDEX_LOCAL, RESERVED_IDENTITY_MAX,
};
use ipnetwork::IpNetwork;

use super::Model;
use super::claims::{Claim, Claims};
use super::sources::SourceId;
use crate::change::AddressOwner;
use crate::refused::Reason;
use crate::tables::{host_key, ip, ipcache_key};

/// Entries that are wanted at most: the rest of the map is room for entries that are not removed yet.
pub const IPCACHE_WANTED_MAX: usize = IPCACHE_ENTRIES_MAX as usize / 8 * 7;

#[derive(Default)]
pub(super) struct Addresses {
    claims: Claims<IpcacheKey, AddressClaim>,
    /// Keys that found no room; who came first has it, so that no newcomer takes it from others.
    waiting: BTreeSet<IpcacheKey>,
    by_host: HashMap<(SourceId, IpAddr), Vec<IpcacheKey>>,
}

/// Where a claim comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The node itself, by index: its own address.
    Node(u32),
    /// An address record that names this host.
    Record(Option<IpAddr>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AddressClaim {
    source: SourceId,
    identity: u32,
    origin: Origin,
}

impl Claim for AddressClaim {
    fn source(&self) -> SourceId {
        self.source
    }
    fn same_claimant(&self, other: &Self) -> bool {
        self.source == other.source
            && match (self.origin, other.origin) {
                (Origin::Node(a), Origin::Node(b)) => a == b,
                (Origin::Record(_), Origin::Record(_)) => true,
                _ => false,
            }
    }
    fn rank(&self) -> u8 {
        match self.origin {
            Origin::Node(_) => 0,
            Origin::Record(_) => 1,
        }
    }
}

impl Addresses {
    pub(super) fn keys_of(&self, source: SourceId) -> Vec<IpcacheKey> {
        self.claims.keys_of(source)
    }

    fn unlink(&mut self, source: SourceId, host: Option<IpAddr>, key: &IpcacheKey) {
        let Some(host) = host else { return };
        if let Some(keys) = self.by_host.get_mut(&(source, host)) {
            if let Some(place) = keys.iter().position(|held| held == key) {
                keys.swap_remove(place);
            }
            if keys.is_empty() {
                self.by_host.remove(&(source, host));
            }
        }
    }
}

impl Model {
    pub(super) fn apply_address(
        &mut self,
        source: SourceId,
        prefix: IpNetwork,
        owner: Option<AddressOwner>,
    ) {
        let key = ipcache_key(prefix);
        let Some(owner) = owner else {
            self.drop_key(key, source, Origin::Record(None));
            return;
        };
        let claim = AddressClaim {
            source,
            identity: owner.identity,
            origin: Origin::Record(owner.host),
        };
        let replaced = self.addresses.claims.insert(key, claim);
        if replaced == Some(claim) {
            return;
        }
        if let Some(old) = replaced
            && let Origin::Record(host) = old.origin
        {
            self.addresses.unlink(source, host, &key);
        }
        if let Some(host) = owner.host {
            self.addresses
                .by_host
                .entry((source, host))
                .or_default()
                .push(key);
        }
        if let [first, .., _] = self.addresses.claims.of(&key)
            && first.source != source
        {
            let other = self.sources.name(first.source).to_owned();
            self.refuse(
                Reason::AddressConflict,
                format!("address {prefix} of cluster {}", self.sources.name(source)),
                format!("cluster {other} has it"),
            );
        }
        self.resolve_address(key);
    }

    pub(super) fn claim_node_address(
        &mut self,
        source: SourceId,
        prefix: IpNetwork,
        identity: u32,
        index: u32,
    ) {
        let key = ipcache_key(prefix);
        let claim = AddressClaim {
            source,
            identity,
            origin: Origin::Node(index),
        };
        if self.addresses.claims.insert(key, claim) != Some(claim) {
            self.resolve_address(key);
        }
    }

    pub(super) fn drop_claim(&mut self, prefix: IpNetwork, source: SourceId, origin: Origin) {
        self.drop_key(ipcache_key(prefix), source, origin);
    }

    fn drop_key(&mut self, key: IpcacheKey, source: SourceId, origin: Origin) {
        let claimant = AddressClaim {
            source,
            identity: 0,
            origin,
        };
        if let Some(removed) = self.addresses.claims.remove(&key, &claimant) {
            if let Origin::Record(host) = removed.origin {
                self.addresses.unlink(source, host, &key);
            }
            self.resolve_address(key);
        }
    }

    /// The node behind a host address came, moved or went.
    pub(super) fn host_changed(&mut self, source: SourceId, host: IpAddr) {
        let keys = self.addresses.by_host.get(&(source, host)).cloned();
        for key in keys.into_iter().flatten() {
            self.resolve_address(key);
        }
    }

    /// Sets the ipcache entry of a key from its claims; where it frees one, a key that waits has it.
    pub(super) fn resolve_address(&mut self, key: IpcacheKey) {
        self.set_address(key);
        while self.has_room_for_addresses()
            && let Some(next) = self.addresses.waiting.pop_first()
        {
            self.set_address(next);
        }
    }

    fn has_room_for_addresses(&self) -> bool {
        self.wanted.ipcache.len() < self.settings.ipcache_wanted_max
    }

    fn set_address(&mut self, key: IpcacheKey) {
        let value = self.winner(&key);
        if value.is_none() {
            self.addresses.waiting.remove(&key);
        }
        let changed = match value {
            Some(value) => {
                if !self.has_room_for_addresses() && !self.wanted.ipcache.contains_key(&key) {
                    if self.addresses.waiting.insert(key) {
                        let most = self.settings.ipcache_wanted_max;
                        self.refuse(
                            Reason::MapFull,
                            format!("address {}", ip(&key.address)),
                            format!("the ipcache takes {most} entries: packets to it are not forwarded until others go"),
                        );
                    }
                    return;
                }
                self.wanted.ipcache.insert(key, value) != Some(value)
            }
            None => self.wanted.ipcache.remove(&key).is_some(),
        };
        if changed {
            self.dirty.ipcache.insert(key);
            self.services.mark_address(ip(&key.address));
        }
    }

    /// The claim that counts: valid, and its node known. Addresses of this node's pods are
    /// not in the ipcache: the endpoint map has them, and a stale entry cannot contradict it.
    fn winner(&mut self, key: &IpcacheKey) -> Option<IpcacheValue> {
        let mut foreign = None;
        let mut found = None;
        for claim in self.addresses.claims.of(key) {
            let Some(cluster_id) = self.sources.cluster_id(claim.source) else {
                continue;
            };
            let node_index = match claim.origin {
                Origin::Node(index) => Some(index),
                Origin::Record(host) => {
                    // Reserved identities belong to the nodes' own addresses, which the nodes claim.
                    if claim.identity <= RESERVED_IDENTITY_MAX {
                        continue;
                    }
                    if self.settings.split.cluster_of(claim.identity) != u32::from(cluster_id) {
                        foreign = Some((claim.source, claim.identity));
                        continue;
                    }
                    host.and_then(|host| self.nodes.index_of_host(claim.source, host))
                }
            };
            match node_index {
                Some(NODE_INDEX_LOCAL) => return None,
                Some(node_index) => {
                    found = Some(IpcacheValue {
                        identity: claim.identity,
                        node_index,
                    });
                    break;
                }
                None => {}
            }
        }
        if let Some((source, identity)) = foreign {
            self.refuse(
                Reason::ForeignIdentity,
                format!(
                    "address {} of cluster {}",
                    ip(&key.address),
                    self.sources.name(source)
                ),
                format!("identity {identity} is not in the cluster's range"),
            );
        }
        found
    }

    /// True if the address is in the ipcache by a claim of that cluster.
    pub(super) fn accepted_from(&self, source: SourceId, address: IpAddr) -> bool {
        let key = host_key(address);
        let Some(entry) = self.wanted.ipcache.get(&key) else {
            return false;
        };
        self.addresses
            .claims
            .of(&key)
            .iter()
            .any(|claim| claim.source == source && claim.identity == entry.identity)
            && self
                .wanted
                .nodes
                .get(&entry.node_index)
                .is_some_and(|node| Some(node.cluster_id) == self.sources.cluster_id(source))
    }
}
