//! Nodes: a stable index for each, its place in the node map, and its addresses.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use clustermesh_ebpf_abi::{
    Address, IDENTITY_HEALTH, IDENTITY_REMOTE_NODE, IDENTITY_WORLD, NODE_INDEX_LOCAL, NODES_MAX,
    NodeAddressValue, NodeValue,
};
use ipnetwork::IpNetwork;

use super::Model;
use super::addresses::Origin;
use super::claims::{Claim, Claims};
use super::encryption::KeyHolders;
use super::places::Places;
use super::sources::{OWN, SourceId};
use crate::change::{ClusterConfig, ClusterName, NodeRecord};
use crate::refused::Reason;
use crate::tables;

/// Shortest prefix of an IPv4 pod CIDR that is taken.
const POD_CIDR_V4_BITS_MIN: u8 = 8;
/// Shortest prefix of an IPv6 pod CIDR that is taken.
const POD_CIDR_V6_BITS_MIN: u8 = 16;
/// Addresses of nodes that are wanted at most: the rest of the map is room for those not removed yet.
pub const NODE_ADDRESSES_WANTED_MAX: usize = NODES_MAX as usize / 8 * 7;
/// Reserved identity of a node's ingress address.
const IDENTITY_INGRESS: u32 = 8;

pub(super) struct Nodes {
    pub(super) by_name: HashMap<(SourceId, Box<str>), Node>,
    /// Names of the nodes that have an index of their own.
    names: HashMap<u32, Box<str>>,
    /// Who has which WireGuard key: more than one, and nobody can tell them apart.
    pub(super) keys: KeyHolders,
    /// Underlay address, as the cluster's address records name it, to index.
    hosts: HashMap<(SourceId, IpAddr), u32>,
    address_claims: Claims<Address, AddressClaim>,
    /// Who is in the map if it cannot take all: the same addresses on every machine, whatever came first.
    address_places: Places<(AddressRank, Address)>,
    /// Nodes for which no index was free.
    waiting: BTreeSet<(SourceId, Box<str>)>,
    next_index: u32,
}

/// Tunnel ends go first, without which a node is not heard at all; of those, and of the rest, our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum AddressRank {
    OwnTunnelEnd,
    PeersTunnelEnd,
    Own,
    Peers,
}

impl AddressRank {
    const ALL: [Self; 4] = [
        Self::OwnTunnelEnd,
        Self::PeersTunnelEnd,
        Self::Own,
        Self::Peers,
    ];
}

impl Default for Nodes {
    fn default() -> Self {
        Self {
            by_name: HashMap::new(),
            names: HashMap::new(),
            keys: KeyHolders::default(),
            hosts: HashMap::new(),
            address_claims: Claims::default(),
            address_places: Places::new(NODE_ADDRESSES_WANTED_MAX),
            waiting: BTreeSet::new(),
            next_index: 0,
        }
    }
}

pub(super) struct Node {
    pub(super) record: Box<NodeRecord>,
    /// `None` while the node cannot be used.
    pub(super) index: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct AddressClaim {
    source: SourceId,
    index: u32,
    tunnel_end: bool,
}

impl AddressClaim {
    fn rank(&self) -> AddressRank {
        match (self.tunnel_end, self.source == OWN) {
            (true, true) => AddressRank::OwnTunnelEnd,
            (true, false) => AddressRank::PeersTunnelEnd,
            (false, true) => AddressRank::Own,
            (false, false) => AddressRank::Peers,
        }
    }
}

impl Claim for AddressClaim {
    fn source(&self) -> SourceId {
        self.source
    }
    fn same_claimant(&self, other: &Self) -> bool {
        self.index == other.index
    }
    fn rank(&self) -> u8 {
        0
    }
}

impl Nodes {
    pub(super) fn index_of_host(&self, source: SourceId, host: IpAddr) -> Option<u32> {
        self.hosts.get(&(source, host)).copied()
    }
}

impl Model {
    /// Pod CIDRs of other nodes with the node's cluster, sorted: what the host must route into the mesh.
    #[must_use]
    pub fn remote_pod_cidrs(&self) -> Vec<(IpNetwork, u16)> {
        let mut cidrs: Vec<(IpNetwork, u16)> = Vec::new();
        for node in self.nodes.by_name.values() {
            let Some(index) = node.index.filter(|index| *index != NODE_INDEX_LOCAL) else {
                continue;
            };
            let value = self.wanted.nodes.get(&index);
            let mtu_bytes = value.map_or(0, |value| value.path_mtu_bytes);
            let ranges = node.record.pod_cidrs.iter().filter(|cidr| routable(cidr));
            cidrs.extend(ranges.map(|cidr| (*cidr, mtu_bytes)));
        }
        // Of one that two nodes claim, the smaller size.
        cidrs.sort_unstable();
        cidrs.dedup_by_key(|(cidr, _)| *cidr);
        cidrs
    }

    /// True once after [`Model::remote_pod_cidrs`] may have changed.
    pub fn take_pod_cidrs_changed(&mut self) -> bool {
        std::mem::take(&mut self.pod_cidrs_changed)
    }

    pub(super) fn apply_cluster(&mut self, name: &ClusterName, config: Option<ClusterConfig>) {
        let Some(source) = self.source(name) else {
            return;
        };
        let slices_before = self.sources.has_slices(source);
        let id_before = self.sources.cluster_id(source);
        let changed = self.sources.set_config(source, config);
        if let Some(config) = config
            && source != OWN
            && self.sources.cluster_id(source).is_none()
        {
            self.refuse(
                Reason::ClusterIdConflict,
                format!("cluster {name}"),
                format!("cluster id {} is 0, ours, or another peer's", config.id),
            );
        }
        if config.is_none() {
            self.handled.forget(name);
        }
        if let Some(id) = id_before
            && self.sources.cluster_id(source) != Some(id)
        {
            self.give_up(id);
            self.release_protected();
        }
        let switched = slices_before != self.sources.has_slices(source);
        for source in &changed {
            let names: Vec<Box<str>> = self
                .nodes
                .by_name
                .keys()
                .filter(|(of, _)| of == source)
                .map(|(_, name)| name.clone())
                .collect();
            for name in names {
                if let Some(node) = self.withdraw_node(*source, &name) {
                    self.place_node(*source, name, node);
                }
            }
            for key in self.addresses.keys_of(*source) {
                self.resolve_address(key);
            }
            self.services.mark_source(*source);
        }
        if !changed.is_empty() {
            self.renew_disputed();
        }
        if switched {
            self.services.mark_source(source);
        }
    }

    pub(super) fn apply_node(
        &mut self,
        source: SourceId,
        name: Box<str>,
        node: Option<Box<NodeRecord>>,
    ) {
        let Some(record) = node else {
            self.note_keys(source, &name, &[]);
            self.withdraw_node(source, &name);
            return;
        };
        self.note_keys(source, &name, &record.keys);
        let held = self.nodes.by_name.get(&(source, name.clone()));
        if held.is_some_and(|held| *held.record == *record && held.index.is_some()) {
            return;
        }
        // The index is kept: only what differs reaches the dirty keys.
        let index = held.and_then(|held| held.index);
        if let Some(index) = index
            && index != NODE_INDEX_LOCAL
            && self.node_value(source, &name, &record).is_some()
        {
            self.replace_node(source, name, record, index);
        } else {
            self.withdraw_node(source, &name);
            self.place_node(source, name, record);
        }
    }

    /// A known node with changed addresses: claims of the old record that the new one lacks go last.
    fn replace_node(
        &mut self,
        source: SourceId,
        name: Box<str>,
        record: Box<NodeRecord>,
        index: u32,
    ) {
        let old = self.nodes.by_name.remove(&(source, name.clone()));
        self.install_node(source, name, record.clone(), index);
        if let Some(old) = old {
            for ip in old
                .record
                .underlay
                .iter()
                .filter(|ip| !record.underlay.contains(ip))
            {
                self.drop_underlay(source, *ip, index);
            }
            let kept: Vec<IpNetwork> = claimed(&record).map(|(ip, _)| ip).collect();
            for (ip, _) in claimed(&old.record).filter(|(ip, _)| !kept.contains(ip)) {
                self.drop_claim(ip, source, Origin::Node(index));
            }
        }
    }

    pub(super) fn place_node(&mut self, source: SourceId, name: Box<str>, record: Box<NodeRecord>) {
        if source == OWN && name == self.settings.node {
            let own = self.settings.underlay.clone();
            for ip in record.underlay.iter().chain(&own) {
                self.nodes.hosts.insert((OWN, *ip), NODE_INDEX_LOCAL);
                self.host_changed(OWN, *ip);
            }
            // Claimed so that no other cluster can have them; local claims give no entry.
            for (ip, identity) in claimed(&record) {
                self.claim_node_address(OWN, ip, identity, NODE_INDEX_LOCAL);
            }
            self.nodes.by_name.insert(
                (source, name),
                Node {
                    record,
                    index: Some(NODE_INDEX_LOCAL),
                },
            );
            return;
        }
        let Some(value) = self.node_value(source, &name, &record) else {
            if self.sources.cluster_id(source).is_some() {
                self.refuse(
                    Reason::NoUnderlayFamily,
                    format!("node {}/{name}", self.sources.name(source)),
                    "no address of a family that this node has on the underlay".to_owned(),
                );
            }
            self.nodes.by_name.insert(
                (source, name),
                Node {
                    record,
                    index: None,
                },
            );
            return;
        };
        match self.allocate_index(&value) {
            Some(index) => self.install_node(source, name, record, index),
            None => {
                self.refuse(
                    Reason::MapFull,
                    format!("node {}/{name}", self.sources.name(source)),
                    format!("the node map holds {NODES_MAX} nodes: its pods are not reached until others go"),
                );
                self.nodes.waiting.insert((source, name.clone()));
                self.nodes.by_name.insert(
                    (source, name),
                    Node {
                        record,
                        index: None,
                    },
                );
            }
        }
    }

    pub(super) fn install_node(
        &mut self,
        source: SourceId,
        name: Box<str>,
        record: Box<NodeRecord>,
        index: u32,
    ) {
        let Some(value) = self.node_value(source, &name, &record) else {
            return;
        };
        if self.wanted.nodes.insert(index, value) != Some(value) {
            self.dirty.nodes.insert(index);
        }
        self.nodes.names.insert(index, name.clone());
        for (place, ip) in record.underlay.iter().enumerate() {
            let first_of_family = |held: &&IpAddr| held.is_ipv4() == ip.is_ipv4();
            let claim = AddressClaim {
                source,
                index,
                tunnel_end: record
                    .underlay
                    .iter()
                    .position(|held| first_of_family(&held))
                    == Some(place),
            };
            self.nodes
                .address_claims
                .insert(tables::address(*ip), claim);
            self.resolve_node_address(*ip);
            if self.nodes.hosts.insert((source, *ip), index) != Some(index) {
                self.host_changed(source, *ip);
            }
        }
        for (ip, identity) in claimed(&record) {
            self.claim_node_address(source, ip, identity, index);
        }
        self.pod_cidrs_changed = true;
        self.peers_changed = true;
        self.nodes.by_name.insert(
            (source, name),
            Node {
                record,
                index: Some(index),
            },
        );
    }

    /// Takes a node out of everything and gives its record back.
    pub(super) fn withdraw_node(
        &mut self,
        source: SourceId,
        name: &str,
    ) -> Option<Box<NodeRecord>> {
        let named = (source, name.into());
        let node = self.nodes.by_name.remove(&named)?;
        let Some(index) = node.index else {
            self.nodes.waiting.remove(&named);
            return Some(node.record);
        };
        for ip in &node.record.underlay {
            self.drop_underlay(source, *ip, index);
        }
        for (ip, _) in claimed(&node.record) {
            self.drop_claim(ip, source, Origin::Node(index));
        }
        if index != NODE_INDEX_LOCAL {
            self.wanted.nodes.remove(&index);
            self.nodes.names.remove(&index);
            self.dirty.nodes.insert(index);
            self.pod_cidrs_changed = true;
            self.peers_changed = true;
        }
        Some(node.record)
    }

    fn drop_underlay(&mut self, source: SourceId, ip: IpAddr, index: u32) {
        let claim = AddressClaim {
            source,
            index,
            tunnel_end: false,
        };
        self.nodes
            .address_claims
            .remove(&tables::address(ip), &claim);
        self.resolve_node_address(ip);
        if self.nodes.hosts.get(&(source, ip)) == Some(&index) {
            self.nodes.hosts.remove(&(source, ip));
            self.host_changed(source, ip);
        }
    }

    /// Gives the address the place that its claims are worth, and others what follows from that.
    fn resolve_node_address(&mut self, ip: IpAddr) {
        let key = tables::address(ip);
        let winner = self.nodes.address_claims.of(&key).first();
        let rank = winner.map(AddressClaim::rank);
        let stale = AddressRank::ALL
            .into_iter()
            .filter(|held| rank != Some(*held));
        for rank in stale {
            if let Some((_, promoted)) = self.nodes.address_places.remove(&(rank, key)) {
                self.write_node_address(promoted);
            }
        }
        if let Some(rank) = rank
            && let Some((_, left_out)) = self.nodes.address_places.insert((rank, key))
        {
            self.write_node_address(left_out);
            if !self.listing {
                self.refuse_node_address(left_out);
            }
        }
        self.write_node_address(key);
    }

    fn write_node_address(&mut self, key: Address) {
        let winner = self.nodes.address_claims.of(&key).first();
        let placed =
            winner.filter(|claim| self.nodes.address_places.has_place(&(claim.rank(), key)));
        let changed = match placed {
            Some(claim) => {
                let value = NodeAddressValue {
                    node_index: claim.index,
                };
                self.wanted.node_addresses.insert(key, value) != Some(value)
            }
            None => self.wanted.node_addresses.remove(&key).is_some(),
        };
        if changed {
            self.dirty.node_addresses.insert(key);
            self.peers_changed = true;
        }
    }

    /// Names the addresses that found no place: to be called when a listing is complete, because its order says
    /// nothing about who stays.
    pub(super) fn refuse_unplaced_node_addresses(&mut self) {
        let waiting: Vec<Address> = self
            .nodes
            .address_places
            .waiting()
            .map(|(_, key)| key)
            .collect();
        // The newest refusals are the ones that are named: those first in line come last.
        for key in waiting.into_iter().rev() {
            self.refuse_node_address(key);
        }
    }

    fn refuse_node_address(&mut self, key: Address) {
        let claim = self.nodes.address_claims.of(&key).first().copied();
        let owner = claim.and_then(|claim| {
            let name = self.nodes.names.get(&claim.index)?;
            Some(format!(
                " of node {}/{name}",
                self.sources.name(claim.source)
            ))
        });
        self.refuse(
            Reason::MapFull,
            format!(
                "node address {}{}",
                tables::ip(&key),
                owner.unwrap_or_default()
            ),
            format!(
                "{NODE_ADDRESSES_WANTED_MAX} addresses of nodes are taken, tunnel ends first: \
                 packets that the node sends from this one are dropped"
            ),
        );
    }

    /// The index that the kernel has for this endpoint already, else the next one that nothing in the kernel names.
    /// Gives indexes that have become free to nodes that wait for one.
    pub(super) fn place_waiting_nodes(&mut self) {
        // Not before the kernel has let go of an index: until then it is looked for in vain.
        while self.wanted.nodes.len() < NODES_MAX as usize - 1
            && let Some((source, name)) = self.nodes.waiting.first().cloned()
        {
            let node = self.nodes.by_name.get(&(source, name.clone()));
            let record = node.map(|node| node.record.clone());
            if let Some(record) = record
                && let Some(value) = self.node_value(source, &name, &record)
            {
                let Some(index) = self.allocate_index(&value) else {
                    return;
                };
                self.install_node(source, name.clone(), record, index);
            }
            self.nodes.waiting.remove(&(source, name));
        }
    }

    fn allocate_index(&mut self, value: &NodeValue) -> Option<u32> {
        let held = self
            .actual
            .node_addresses
            .get(&value.endpoint)
            .map(|held| held.node_index)
            .filter(|index| {
                self.actual.nodes.get(index).is_some_and(|node| {
                    node.endpoint == value.endpoint && node.cluster_id == value.cluster_id
                }) && !self.wanted.nodes.contains_key(index)
            });
        if held.is_some() {
            return held;
        }
        for _ in 1..NODES_MAX {
            self.nodes.next_index = self.nodes.next_index % (NODES_MAX - 1) + 1;
            let index = self.nodes.next_index;
            if !self.wanted.nodes.contains_key(&index) && !self.actual.nodes.contains_key(&index) {
                return Some(index);
            }
        }
        None
    }
}

/// A pod CIDR larger than any cluster needs would draw traffic that is not the mesh's.
pub(super) fn routable(cidr: &IpNetwork) -> bool {
    match cidr {
        IpNetwork::V4(v4) => v4.prefix() >= POD_CIDR_V4_BITS_MIN,
        IpNetwork::V6(v6) => v6.prefix() >= POD_CIDR_V6_BITS_MIN,
    }
}

/// The node's own addresses with the identity that they have for others, and its pod CIDRs: a packet for a
/// pod that is new or gone finds the node, which delivers or refuses it.
fn claimed(record: &NodeRecord) -> impl Iterator<Item = (IpNetwork, u32)> + '_ {
    let with = |identity| move |ip: &IpAddr| (IpNetwork::from(*ip), identity);
    record
        .underlay
        .iter()
        .map(with(IDENTITY_REMOTE_NODE))
        .chain(record.routers.iter().map(with(IDENTITY_REMOTE_NODE)))
        .chain(record.health.iter().map(with(IDENTITY_HEALTH)))
        .chain(record.ingress.iter().map(with(IDENTITY_INGRESS)))
        .chain(
            record
                .pod_cidrs
                .iter()
                .filter(|cidr| routable(cidr))
                .map(|cidr| (*cidr, IDENTITY_WORLD)),
        )
}
