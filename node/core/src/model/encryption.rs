//! Who is sent to encrypted: by settings, by the keys of the records, and by what this node's WireGuard devices know.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use clustermesh_ebpf_abi::{NODE_ENCRYPTED, NODE_INDEX_LOCAL};
use ipnetwork::IpNetwork;

use super::Model;
use super::sources::{OWN, SourceId};
use crate::change::{ClusterName, NodeKey, NodeRecord, WireguardKey};
use crate::refused::Reason;
use crate::tables;

/// What a WireGuard device of this node knows of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// The device.
    pub ifindex: u32,
    /// A handshake with the peer was finished at some time.
    pub has_answered: bool,
}

/// What this node's WireGuard devices are ready for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireguardState {
    /// This node's own public keys.
    pub own_keys: BTreeSet<WireguardKey>,
    /// Epoch of the present one.
    pub epoch: u32,
    /// Peers that a device has.
    pub peers: BTreeMap<WireguardKey, PeerState>,
}

/// How packets to a node travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// As they are.
    Clear,
    /// Not at all: they must be encrypted, and cannot be yet.
    Withheld,
    /// Encrypted.
    Encrypted {
        /// Device that encrypts them.
        ifindex: u32,
    },
}

/// A peer that one of this node's WireGuard devices should have: the one of the key's epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireguardPeer {
    /// Cluster of the node.
    pub cluster: Box<str>,
    /// The node.
    pub node: Box<str>,
    /// Its key.
    pub key: NodeKey,
    /// Address of its device.
    pub endpoint: IpAddr,
    /// Addresses that may come from it.
    pub allowed_ips: BTreeSet<IpNetwork>,
    /// How packets to the node travel now.
    pub protection: Protection,
}

/// Another node, as a proof of encryption needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvableNode {
    /// Cluster of the node.
    pub cluster: Box<str>,
    /// The node.
    pub node: Box<str>,
    /// Its own addresses in the mesh, which answer an echo: of its router, then those for health.
    pub addresses: Vec<IpAddr>,
    /// Whether packets to it are to be encrypted, by the settings.
    pub is_covered: bool,
    /// How packets to it travel.
    pub protection: Protection,
    /// The WireGuard device into which the kernel sends them; `None`: into none.
    pub kernel_ifindex: Option<u32>,
    /// Its keys, and where its devices are.
    pub keys: Vec<NodeKey>,
    /// Where its devices are.
    pub endpoint: Option<IpAddr>,
}

/// Who has which key.
#[derive(Debug, Default)]
pub(super) struct KeyHolders(HashMap<WireguardKey, BTreeSet<(SourceId, Box<str>)>>);

impl KeyHolders {
    fn of(&self, key: &WireguardKey) -> impl Iterator<Item = &(SourceId, Box<str>)> {
        self.0.get(key).into_iter().flatten()
    }
}

impl Model {
    /// Takes what the node's WireGuard devices know now; nodes that this concerns are written anew.
    pub fn set_wireguard(&mut self, state: WireguardState) {
        if self.wireguard == state {
            return;
        }
        let before = std::mem::replace(&mut self.wireguard, state);
        let after = &self.wireguard;
        if before.epoch != after.epoch {
            self.renew_nodes(|_| true);
            return;
        }
        let is_same = |key: &WireguardKey| {
            before.peers.get(key) == after.peers.get(key)
                && before.own_keys.contains(key) == after.own_keys.contains(key)
        };
        let touched: BTreeSet<(SourceId, Box<str>)> = before
            .peers
            .keys()
            .chain(after.peers.keys())
            .chain(&before.own_keys)
            .chain(&after.own_keys)
            .filter(|key| !is_same(key))
            .flat_map(|key| self.nodes.keys.of(key).cloned())
            .collect();
        if !touched.is_empty() {
            self.renew_nodes(|name| touched.contains(name));
        }
    }

    /// What the node's WireGuard devices know, as it was last taken.
    #[must_use]
    pub fn wireguard(&self) -> &WireguardState {
        &self.wireguard
    }

    /// True once after [`Model::wireguard_peers`] may have changed.
    pub fn take_peers_changed(&mut self) -> bool {
        std::mem::take(&mut self.peers_changed)
    }

    /// The peers that the node's WireGuard devices should have, by cluster and node. Whatever the mode: a node that is
    /// sent to in clear may send encrypted. No key is there twice, and no prefix twice among keys of one epoch.
    #[must_use]
    pub fn wireguard_peers(&self) -> Vec<WireguardPeer> {
        let mut peers = Vec::new();
        for ((source, name), node) in &self.nodes.by_name {
            let (record, Some(index)) = (&node.record, node.index) else {
                continue;
            };
            let Some((endpoint, _)) = self.path_to(record) else {
                continue;
            };
            if index == NODE_INDEX_LOCAL || record.keys.is_empty() {
                continue;
            }
            let allowed_ips = self.allowed_ips(record, index);
            let protection = self.protection(*source, name, record);
            let usable = record
                .keys
                .iter()
                .filter(|key| self.is_holder(*source, name, &key.key));
            peers.extend(usable.map(|key| WireguardPeer {
                cluster: self.sources.name(*source).into(),
                node: name.clone(),
                key: *key,
                endpoint,
                allowed_ips: allowed_ips.clone(),
                protection,
            }));
        }
        peers.sort_unstable_by(|a, b| {
            (&a.cluster, &a.node, a.key.epoch).cmp(&(&b.cluster, &b.node, b.key.epoch))
        });
        peers
    }

    /// Nodes that have no key, with the way in which packets to them travel.
    pub fn nodes_without_key(&self) -> Vec<(ClusterName, Box<str>, Protection)> {
        let mut found: Vec<_> = self
            .nodes
            .by_name
            .iter()
            .filter(|(_, node)| {
                node.record.keys.is_empty()
                    && node.index.is_some_and(|index| index != NODE_INDEX_LOCAL)
            })
            .map(|((source, name), node)| {
                let protection = self.protection(*source, name, &node.record);
                (self.sources.name(*source).into(), name.clone(), protection)
            })
            .collect();
        found.sort_unstable_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        found
    }

    /// Every other node that can be sent to, by cluster and name.
    #[must_use]
    pub fn provable_nodes(&self) -> Vec<ProvableNode> {
        let mut found = Vec::new();
        for ((source, name), node) in &self.nodes.by_name {
            let (record, Some(index)) = (&node.record, node.index) else {
                continue;
            };
            if index == NODE_INDEX_LOCAL {
                continue;
            }
            let cluster = self.sources.name(*source);
            let held = self.actual.nodes.get(&index);
            let encrypted = held.filter(|value| value.flags & NODE_ENCRYPTED != 0);
            found.push(ProvableNode {
                cluster: cluster.into(),
                node: name.clone(),
                addresses: [&record.routers[..], &record.health].concat(),
                is_covered: self.settings.encryption.covers(cluster, *source == OWN),
                protection: self.protection(*source, name, record),
                kernel_ifindex: encrypted.map(|value| value.egress_ifindex),
                keys: record.keys.clone(),
                endpoint: self.path_to(record).map(|(endpoint, _)| endpoint),
            });
        }
        found.sort_unstable_by(|a, b| (&a.cluster, &a.node).cmp(&(&b.cluster, &b.node)));
        found
    }

    /// Tunnel packets come from the node's own addresses; with direct routing its pods send themselves. Only what the
    /// kernel's maps give to this node too: a disputed address has one owner.
    fn allowed_ips(&self, record: &NodeRecord, index: u32) -> BTreeSet<IpNetwork> {
        let is_own = |ip: &IpAddr| {
            let place = self.wanted.node_addresses.get(&tables::address(*ip));
            place.is_some_and(|place| place.node_index == index)
                && !self.settings.underlay.contains(ip)
        };
        let has_range = |cidr: &IpNetwork| {
            let entry = self.wanted.ipcache.get(&tables::ipcache_key(*cidr));
            self.settings.direct_routing && entry.is_some_and(|entry| entry.node_index == index)
        };
        let addresses = record.underlay.iter().copied().filter(|ip| is_own(ip));
        let ranges = record.pod_cidrs.iter().copied().filter(|c| has_range(c));
        addresses.map(IpNetwork::from).chain(ranges).collect()
    }

    /// How packets to the node are to travel.
    pub(super) fn protection(
        &self,
        source: SourceId,
        name: &str,
        record: &NodeRecord,
    ) -> Protection {
        let settings = &self.settings.encryption;
        if !settings.covers(self.sources.name(source), source == OWN) {
            return Protection::Clear;
        }
        let mut ready: Vec<(u32, PeerState)> = record
            .keys
            .iter()
            .filter(|key| self.is_holder(source, name, &key.key))
            .filter_map(|key| Some((key.epoch, *self.wireguard.peers.get(&key.key)?)))
            .collect();
        ready.sort_unstable_by_key(|(epoch, _)| *epoch);
        // A new key is used once its owner has answered under it; until then the old one is as good as before.
        let answered = ready.iter().rfind(|(_, state)| state.has_answered);
        match answered.or(ready.first()) {
            Some((_, state)) => Protection::Encrypted {
                ifindex: state.ifindex,
            },
            // It encrypts, only with a key that is over: it is no node that takes clear text.
            None if settings.strict || self.has_old_key(source, name, record) => {
                Protection::Withheld
            }
            None => Protection::Clear,
        }
    }

    /// Whether the node has a key of an epoch before that of our present one.
    fn has_old_key(&self, source: SourceId, name: &str, record: &NodeRecord) -> bool {
        let mut old = record
            .keys
            .iter()
            .filter(|key| key.epoch < self.wireguard.epoch);
        old.any(|key| self.is_holder(source, name, &key.key))
    }

    /// Whether the key is that node's and nobody else's. Our own nodes' word goes before that of other clusters; two of
    /// equal rank lose it both.
    fn is_holder(&self, source: SourceId, name: &str, key: &WireguardKey) -> bool {
        if self.wireguard.own_keys.contains(key) {
            return false;
        }
        let accepted = || {
            self.nodes
                .keys
                .of(key)
                .filter(|(source, _)| self.sources.cluster_id(*source).is_some())
        };
        let has_own = accepted().any(|(source, _)| *source == OWN);
        let mut best = accepted().filter(|(source, _)| !has_own || *source == OWN);
        let first = best.next();
        best.next().is_none()
            && first.is_some_and(|(holder, held)| *holder == source && **held == *name)
    }

    /// Looks anew at the nodes that share a key with another: who may speak for a cluster has changed.
    pub(super) fn renew_disputed(&mut self) {
        let disputed: BTreeSet<(SourceId, Box<str>)> = self
            .nodes
            .keys
            .0
            .values()
            .filter(|holders| holders.len() > 1)
            .flatten()
            .cloned()
            .collect();
        if !disputed.is_empty() {
            self.peers_changed = true;
            self.renew_nodes(|name| disputed.contains(name));
        }
    }

    /// Notes which keys a node has now, and what that means for others that have one of them.
    pub(super) fn note_keys(&mut self, source: SourceId, name: &str, keys: &[NodeKey]) {
        let node = (source, Box::<str>::from(name));
        let held = self.nodes.by_name.get(&node);
        let before: Vec<WireguardKey> = held
            .map(|node| node.record.keys.iter().map(|key| key.key).collect())
            .unwrap_or_default();
        let after: BTreeSet<WireguardKey> = keys.iter().map(|key| key.key).collect();
        let mut disputed = BTreeSet::new();
        for key in before.iter().filter(|key| !after.contains(*key)) {
            if let Some(holders) = self.nodes.keys.0.get_mut(key) {
                holders.remove(&node);
                disputed.extend(holders.iter().cloned());
                if holders.is_empty() {
                    self.nodes.keys.0.remove(key);
                }
            }
        }
        for key in after.iter().filter(|key| !before.contains(key)) {
            let holders = self.nodes.keys.0.entry(*key).or_default();
            holders.insert(node.clone());
            if holders.len() > 1 {
                disputed.extend(holders.iter().cloned());
                let names: Vec<String> = holders
                    .iter()
                    .map(|(source, name)| format!("{}/{name}", self.sources.name(*source)))
                    .collect();
                self.refuse(
                    Reason::DuplicateKey,
                    format!("WireGuard keys of the nodes {}", names.join(" and ")),
                    "they have one key, so that nothing can be sent to one of them encrypted: remove the file \
                     wireguard.key from the state folder of one and restart its agent"
                        .to_owned(),
                );
            }
        }
        disputed.remove(&node);
        if !disputed.is_empty() {
            self.peers_changed = true;
            self.renew_nodes(|name| disputed.contains(name));
        }
    }
}
