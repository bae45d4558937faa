//! How each node is reached: device, largest packet, encrypted or not.

use std::net::IpAddr;

use clustermesh_ebpf_abi::{
    NODE_CLEAR_REFUSED, NODE_DIRECT, NODE_ENCRYPTED, NODE_INDEX_LOCAL, NODE_PRESENT, NODE_WITHHELD,
    NodeValue,
};

use super::encryption::Protection;
use super::sources::SourceId;
use super::{Model, UnderlayPath};
use crate::change::NodeRecord;
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

impl Model {
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
