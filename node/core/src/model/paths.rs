//! How each node is reached: device, largest packet, encrypted or not.

use std::net::IpAddr;

use clustermesh_ebpf_abi::{
    NODE_CLEAR_REFUSED, NODE_DIRECT, NODE_ENCRYPTED, NODE_INDEX_LOCAL, NODE_NARROW, NODE_PRESENT,
    NODE_WITHHELD, NodeValue,
};

use super::Model;
use super::encryption::Protection;
use super::sources::SourceId;
use crate::change::{ClusterName, NodeRecord};
use crate::settings::UnderlayPath;
use crate::tables;

/// A slot that is not in use.
pub const EMPTY_NODE: NodeValue = NodeValue {
    endpoint: [0; 16],
    cluster_id: 0,
    flags: 0,
    path_mtu_bytes: 0,
    reserved: 0,
    egress_ifindex: 0,
    reserved2: 0,
    #[cfg(feature = "layout-next")]
    next_layout: 0,
};

/// A path that can be probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathTarget {
    /// Cluster of the other node.
    pub cluster: ClusterName,
    /// The other node.
    pub node: Box<str>,
    /// An address of it that packets of pods would be sent to in the same way.
    pub address: IpAddr,
    /// Largest packet that the devices take, bytes.
    pub most_bytes: u16,
    /// Largest packet that is sent now, bytes.
    pub usable_bytes: u16,
}

impl Model {
    /// The paths to all other nodes that packets may be sent to.
    #[must_use]
    pub fn path_targets(&self) -> Vec<PathTarget> {
        let mut targets = Vec::new();
        for ((source, name), node) in &self.nodes.by_name {
            let Some(index) = node.index.filter(|index| *index != NODE_INDEX_LOCAL) else {
                continue;
            };
            let (Some(value), Some((endpoint, _))) =
                (self.wanted.nodes.get(&index), self.path_to(&node.record))
            else {
                continue;
            };
            let most_bytes = self.device_mtu(*source, name, &node.record);
            // What is routed directly is so in the family of the underlay; a tunnel takes both alike.
            let fits =
                |ip: &&IpAddr| value.flags & NODE_DIRECT == 0 || ip.is_ipv4() == endpoint.is_ipv4();
            let mut addresses = node.record.health.iter().chain(&node.record.routers);
            if let Some(address) = addresses.find(fits)
                && let Some(most_bytes) = most_bytes.filter(|most| *most != 0)
            {
                targets.push(PathTarget {
                    cluster: self.sources.name(*source).into(),
                    node: name.clone(),
                    address: *address,
                    most_bytes,
                    usable_bytes: value.path_mtu_bytes,
                });
            }
        }
        targets
    }

    /// Probes have found what the path to a node takes.
    pub fn set_path_mtu(&mut self, cluster: &str, node: &str, bytes: u16) {
        let of_cluster = self.measured.entry(cluster.into()).or_default();
        if of_cluster.insert(node.into(), bytes) == Some(bytes) {
            return;
        }
        if let Some(source) = self.sources.find(cluster) {
            self.renew_nodes(|(of, name)| *of == source && **name == *node);
        }
    }

    /// Nobody probes: what an earlier run has found is not known to hold.
    pub fn forget_measured(&mut self) {
        self.measured.clear();
        self.keeps_measured = false;
    }

    /// The node is gone, and what was found of its path with it.
    pub fn forget_path_mtu(&mut self, cluster: &str, node: &str) {
        if let Some(of_cluster) = self.measured.get_mut(cluster) {
            of_cluster.remove(node);
            if of_cluster.is_empty() {
                self.measured.remove(cluster);
            }
        }
    }

    /// What probes have found, or those of an earlier run as the kernel has it.
    fn measured(&self, source: SourceId, name: &str, endpoint: IpAddr) -> Option<u16> {
        let of_cluster = self.measured.get(self.sources.name(source));
        if let Some(bytes) = of_cluster.and_then(|nodes| nodes.get(name)) {
            return Some(*bytes);
        }
        if !self.keeps_measured {
            return None;
        }
        let endpoint = tables::address(endpoint);
        let place = self.actual.node_addresses.get(&endpoint)?;
        let held = self.actual.nodes.get(&place.node_index)?;
        (held.endpoint == endpoint && held.flags & NODE_NARROW != 0).then_some(held.path_mtu_bytes)
    }

    /// What the devices towards a node take; `None` if nothing is sent there.
    fn device_mtu(&self, source: SourceId, name: &str, record: &NodeRecord) -> Option<u16> {
        let (_, path) = self.path_to(record)?;
        match self.protection(source, name, record) {
            Protection::Clear => Some(path.mtu_bytes),
            Protection::Withheld => None,
            Protection::Encrypted { .. } => Some(path.encrypted_mtu_bytes),
        }
    }

    /// The node's own place on the underlay is another one now: paths to all other nodes follow.
    pub fn change_underlay(
        &mut self,
        underlay: Vec<IpAddr>,
        path_v4: Option<UnderlayPath>,
        path_v6: Option<UnderlayPath>,
    ) {
        self.settings.underlay = underlay;
        self.settings.path_v4 = path_v4;
        self.settings.path_v6 = path_v6;
        self.renew_nodes(|_| true);
    }

    /// Looks anew at how each of these nodes is reached.
    pub(super) fn renew_nodes(&mut self, which: impl Fn(&(SourceId, Box<str>)) -> bool) {
        let names: Vec<(SourceId, Box<str>)> = self
            .nodes
            .by_name
            .keys()
            .filter(|name| which(name))
            .cloned()
            .collect();
        for (source, name) in names {
            let Some(node) = self.nodes.by_name.get(&(source, name.clone())) else {
                continue;
            };
            let record = node.record.clone();
            match node.index {
                // The index is kept: one write for each node, none for what lives there.
                Some(index)
                    if index != NODE_INDEX_LOCAL
                        && self.node_value(source, &name, &record).is_some() =>
                {
                    self.install_node(source, name, record, index);
                }
                _ => {
                    self.withdraw_node(source, &name);
                    self.place_node(source, name, record);
                }
            }
        }
    }

    /// The node map's value; `None` if the node cannot be reached or its cluster is not accepted.
    pub(super) fn node_value(
        &self,
        source: SourceId,
        name: &str,
        record: &NodeRecord,
    ) -> Option<NodeValue> {
        let cluster_id = self.sources.cluster_id(source)?;
        let (endpoint, path) = self.path_to(record)?;
        let mut flags = NODE_PRESENT;
        if self.settings.direct_routing {
            flags |= NODE_DIRECT;
        }
        let (mut path_mtu_bytes, mut egress_ifindex) = (path.mtu_bytes, path.egress_ifindex);
        match self.protection(source, name, record) {
            Protection::Clear => {}
            Protection::Withheld => flags |= NODE_WITHHELD | NODE_CLEAR_REFUSED,
            Protection::Encrypted { ifindex } => {
                flags |= NODE_ENCRYPTED;
                if self.settings.encryption.strict {
                    flags |= NODE_CLEAR_REFUSED;
                }
                (path_mtu_bytes, egress_ifindex) = (path.encrypted_mtu_bytes, ifindex);
            }
        }
        let measured = self.measured(source, name, endpoint);
        if let Some(measured) = measured.filter(|bytes| *bytes < path_mtu_bytes) {
            path_mtu_bytes = measured;
            flags |= NODE_NARROW;
        }
        Some(NodeValue {
            endpoint: tables::address(endpoint),
            cluster_id,
            flags,
            path_mtu_bytes,
            egress_ifindex,
            ..EMPTY_NODE
        })
    }

    /// The address by which a node is reached, and how.
    pub(super) fn path_to(&self, record: &NodeRecord) -> Option<(IpAddr, UnderlayPath)> {
        let v4 = record.underlay.iter().find(|ip| ip.is_ipv4());
        let v6 = record.underlay.iter().find(|ip| ip.is_ipv6());
        match (v4, self.settings.path_v4, v6, self.settings.path_v6) {
            (Some(ip), Some(path), _, _) | (_, _, Some(ip), Some(path)) => Some((*ip, path)),
            _ => None,
        }
    }
}
