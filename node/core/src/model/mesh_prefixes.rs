//! Which prefixes the records name as the mesh's, and of which clusters they name all.

use std::collections::BTreeSet;

use clustermesh_ebpf_abi::NODE_INDEX_LOCAL;
use ipnetwork::IpNetwork;

use super::Model;
use super::nodes::routable;
use super::sources::OWN;
use crate::change::ClusterName;
use crate::mesh_prefixes::{MeshPrefix, PrefixKind};

impl Model {
    /// The clusters that the store's server is configured to copy; `None` if it does not say.
    pub fn set_configured_peers(&mut self, peers: Option<BTreeSet<ClusterName>>) {
        self.configured_peers = peers;
        self.mesh_changed = true;
    }

    /// True once after [`Model::mesh_prefixes`] or [`Model::is_complete`] may have changed.
    pub fn take_mesh_changed(&mut self) -> bool {
        std::mem::take(&mut self.mesh_changed)
    }

    /// As [`Model::take_mesh_changed`], for whoever only tells somebody else.
    #[must_use]
    pub fn has_mesh_changed(&self) -> bool {
        self.mesh_changed
    }

    /// Pod CIDRs and addresses of all other nodes of accepted clusters, those too that cannot be reached from here.
    #[must_use]
    pub fn mesh_prefixes(&self) -> BTreeSet<MeshPrefix> {
        let mut found = BTreeSet::new();
        for ((source, name), node) in &self.nodes.by_name {
            let is_self = *source == OWN && *name == self.settings.node;
            let is_accepted = self.sources.cluster_id(*source).is_some();
            if is_self || !is_accepted || node.index == Some(NODE_INDEX_LOCAL) {
                continue;
            }
            let cluster = self.sources.name(*source);
            let pods = node.record.pod_cidrs.iter().filter(|cidr| routable(cidr));
            let pods = pods.map(|cidr| (PrefixKind::Pods, *cidr));
            let addresses = node.record.underlay.iter();
            let addresses = addresses.map(|ip| (PrefixKind::Node, IpNetwork::from(*ip)));
            found.extend(pods.chain(addresses).map(|(kind, prefix)| MeshPrefix {
                cluster: cluster.into(),
                kind,
                prefix,
            }));
        }
        found
    }

    /// Whether what the records do not name of that cluster is gone: they have been listed in full, and the cluster's
    /// copy among them is complete, or the server copies no such cluster any more.
    #[must_use]
    pub fn is_complete(&self, cluster: &str) -> bool {
        if self.listing {
            return false;
        }
        self.sources.is_synced(cluster)
            || self
                .configured_peers
                .as_ref()
                .is_some_and(|peers| !peers.contains(cluster))
                && *cluster != *self.settings.cluster
    }
}
