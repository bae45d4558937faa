//! Indexes over the records that many plans look for by something else than their key, kept up by the store's changes.
//!
//! Without them each session that begins would read every node and every address of the cluster.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::ControlFlow;

use clustermesh_api::keys::Kind;
use clustermesh_api::records::{AddressType, IpIdentityPair, Node};

use crate::keys::{OWN_ADDRESSES_PREFIX, own_address};
use crate::view::View;

/// Nodes by underlay address, and addresses by the node that holds them, as of one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterIndex {
    nodes_prefix: String,
    revision: i64,
    underlay: HashMap<IpAddr, BTreeSet<String>>,
    node_addresses: HashMap<String, Vec<IpAddr>>,
    held: HashMap<String, BTreeSet<IpAddr>>,
    holders: HashMap<IpAddr, String>,
}

impl ClusterIndex {
    /// An index of cluster `cluster` before its first change.
    #[must_use]
    pub fn new(cluster: &str) -> Self {
        Self {
            nodes_prefix: Kind::Nodes.state_prefix(cluster),
            ..Self::default()
        }
    }

    /// The index of all that a view shows.
    #[must_use]
    pub fn of(cluster: &str, view: &dyn View) -> Self {
        let mut index = Self::new(cluster);
        for prefix in [index.nodes_prefix.clone(), OWN_ADDRESSES_PREFIX.to_owned()] {
            view.scan(prefix.as_bytes(), &mut |kv| {
                index.apply(&kv.key, Some(&kv.value));
                ControlFlow::Continue(())
            });
        }
        index.revision = view.revision();
        index
    }

    /// Everything up to this revision was applied; 0 before the first time.
    #[must_use]
    pub const fn revision(&self) -> i64 {
        self.revision
    }

    /// All changes up to `revision` were given to [`ClusterIndex::apply`].
    pub const fn advance(&mut self, revision: i64) {
        self.revision = revision;
    }

    /// Takes one change of the store; `None` means deleted. Other keys are ignored, and a record that cannot be read
    /// counts as absent.
    pub fn apply(&mut self, key: &[u8], value: Option<&[u8]>) {
        if let Some(address) = own_address(key) {
            let node = value
                .and_then(|value| IpIdentityPair::decode(value).ok())
                .and_then(|pair| pair.node().map(str::to_owned));
            self.set_holder(address, node);
        } else if let Some(name) = key.strip_prefix(self.nodes_prefix.as_bytes())
            && let Ok(name) = std::str::from_utf8(name)
        {
            let addresses = value
                .and_then(|value| Node::decode(value).ok())
                .map(|node| node.addresses_of(&AddressType::InternalIP).collect())
                .unwrap_or_default();
            self.set_node(name, addresses);
        }
    }

    fn set_holder(&mut self, address: IpAddr, node: Option<String>) {
        if let Some(old) = self.holders.remove(&address)
            && let Some(held) = self.held.get_mut(&old)
        {
            held.remove(&address);
            if held.is_empty() {
                self.held.remove(&old);
            }
        }
        if let Some(node) = node {
            self.held.entry(node.clone()).or_default().insert(address);
            self.holders.insert(address, node);
        }
    }

    fn set_node(&mut self, name: &str, addresses: Vec<IpAddr>) {
        for address in self.node_addresses.remove(name).unwrap_or_default() {
            if let Some(nodes) = self.underlay.get_mut(&address) {
                nodes.remove(name);
                if nodes.is_empty() {
                    self.underlay.remove(&address);
                }
            }
        }
        if addresses.is_empty() {
            return;
        }
        for address in &addresses {
            self.underlay
                .entry(*address)
                .or_default()
                .insert(name.to_owned());
        }
        self.node_addresses.insert(name.to_owned(), addresses);
    }

    /// Addresses whose records name `node` as their machine, in order.
    #[must_use]
    pub fn addresses_of(&self, node: &str) -> BTreeSet<IpAddr> {
        self.held.get(node).cloned().unwrap_or_default()
    }

    /// Names of the nodes with this underlay address, in order.
    #[must_use]
    pub fn nodes_at(&self, address: IpAddr) -> BTreeSet<String> {
        self.underlay.get(&address).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_support::Lab;
    use crate::view::MapView;

    /// A step of the cluster: a node says hello, or an endpoint comes or goes.
    #[derive(Clone, Debug)]
    enum Step {
        Hello(u8, u8),
        Address(u8, Option<u8>),
        Gone(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u8..4, 0_u8..4).prop_map(|(node, ip)| Step::Hello(node, ip)),
            (0_u8..6, prop::option::of(0_u8..4)).prop_map(|(ip, node)| Step::Address(ip, node)),
            (0_u8..4).prop_map(Step::Gone),
        ]
    }

    proptest! {
        #[test]
        fn the_index_says_what_reading_all_records_says(steps in prop::collection::vec(step(), 1..40)) {
            let mut view = MapView::new();
            let mut index = ClusterIndex::new("c1");
            for step in steps {
                let (key, value) = match step {
                    Step::Hello(node, ip) => {
                        let mut lab = Lab::new();
                        lab.node(&format!("n{node}"), &format!("192.0.2.{ip}"));
                        let key = format!("cilium/state/nodes/v1/c1/n{node}");
                        let value = lab.view.get(key.as_bytes()).unwrap().value;
                        (key, Some(value))
                    }
                    Step::Address(ip, node) => {
                        let address: IpAddr = format!("10.1.0.{ip}").parse().unwrap();
                        let pair = |node: u8| IpIdentityPair {
                            extension: Some(clustermesh_api::records::IpExtension { node: format!("n{node}") }),
                            ..IpIdentityPair::new(address, 70_000, None)
                        };
                        (format!("{OWN_ADDRESSES_PREFIX}{address}"), node.map(|node| pair(node).encode()))
                    }
                    Step::Gone(node) => (format!("cilium/state/nodes/v1/c1/n{node}"), None),
                };
                index.apply(key.as_bytes(), value.as_deref());
                match value {
                    Some(value) => view.put(key, value),
                    None => view.delete(key.as_bytes()),
                }
            }
            for number in 0_u8..6 {
                let (node, address) = (format!("n{number}"), format!("192.0.2.{number}").parse().unwrap());
                prop_assert_eq!(index.addresses_of(&node), view.addresses_of(&node));
                prop_assert_eq!(index.nodes_at(address), view.nodes_at("c1", address));
            }
            index.advance(view.revision());
            prop_assert_eq!(index, ClusterIndex::of("c1", &view));
        }
    }
}
