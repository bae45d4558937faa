//! Who owns which pod CIDR in the mesh, as this cluster sees it: ours first, then whoever came first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::address::{Family, bounds, canonical, from_number, overlaps};
use crate::settings::ClusterSettings;

/// A CIDR that somebody else owns.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// The CIDR that was claimed.
    pub claimed: IpNetwork,
    /// The range that it overlaps.
    pub owned: IpNetwork,
    /// The cluster that has that range.
    pub owner: String,
}

type Block = (Family, u128, u8);
type Holder = (String, String);

/// Pod CIDRs of this cluster and of all peers' accepted nodes. Shared by the copies of all peers.
#[derive(Clone, Debug)]
pub struct CidrOwners {
    own: Vec<(IpNetwork, String)>,
    cluster: String,
    blocks: BTreeMap<Block, BTreeSet<Holder>>,
    nodes: BTreeMap<Holder, BTreeSet<Block>>,
    releases: u64,
    seizures: u64,
}

impl CidrOwners {
    /// This cluster's ranges, no peer's yet.
    #[must_use]
    pub fn new(settings: &ClusterSettings) -> Self {
        let own = settings
            .pod_cidrs
            .iter()
            .chain(&settings.service_cidrs)
            .map(|cidr| (*cidr, settings.name.clone()))
            .collect();
        Self {
            own,
            cluster: settings.name.clone(),
            blocks: BTreeMap::new(),
            nodes: BTreeMap::new(),
            releases: 0,
            seizures: 0,
        }
    }

    /// Sets the underlay addresses of one of our own nodes; none: the node is gone. Ours come first: a peer that was
    /// believed to have one of them loses it, see [`CidrOwners::seizures`].
    pub fn set_own_node(&mut self, node: &str, addresses: &[IpAddr]) {
        let networks = addresses.iter().map(|address| IpNetwork::from(*address));
        let taken = networks.clone().any(|network| {
            self.overlapping(network)
                .any(|(_, (holder, _))| *holder != self.cluster)
        });
        self.seizures += u64::from(taken);
        let cluster = self.cluster.clone();
        self.set(&cluster, node, networks.map(block).collect());
    }

    /// Sets all of our own nodes: those that are not named are gone.
    pub fn set_own_nodes(&mut self, nodes: &BTreeMap<String, Vec<IpAddr>>) {
        let gone: Vec<String> = self
            .nodes
            .keys()
            .filter(|(holder, node)| *holder == self.cluster && !nodes.contains_key(node))
            .map(|(_, node)| node.clone())
            .collect();
        for node in gone {
            self.set_own_node(&node, &[]);
        }
        for (node, addresses) in nodes {
            self.set_own_node(node, addresses);
        }
    }

    /// Counts up whenever we took an address that a peer had: what was accepted from it must be judged again.
    #[must_use]
    pub fn seizures(&self) -> u64 {
        self.seizures
    }

    /// Counts up whenever a range became free: a refused claim may then be accepted.
    #[must_use]
    pub fn releases(&self) -> u64 {
        self.releases
    }

    /// The owner of a range that overlaps `cidr`, other than `cluster` itself.
    #[must_use]
    pub fn conflict(&self, cluster: &str, cidr: IpNetwork) -> Option<Conflict> {
        if let Some((owned, owner)) = self.own.iter().find(|(own, _)| overlaps(*own, cidr)) {
            return Some(Conflict {
                claimed: cidr,
                owned: *owned,
                owner: owner.clone(),
            });
        }
        let (block, holder) = self
            .overlapping(cidr)
            .find(|(_, (holder, _))| holder != cluster)?;
        let owned = from_number(block.0, block.1)
            .and_then(|address| IpNetwork::new(address, block.2).ok())?;
        Some(Conflict {
            claimed: cidr,
            owned,
            owner: holder.0.clone(),
        })
    }

    /// Two CIDRs overlap only when one holds the other, so ancestors and descendants are all there is to look at.
    fn overlapping(&self, cidr: IpNetwork) -> impl Iterator<Item = (Block, &Holder)> {
        let family = Family::of(cidr.ip());
        let (first, last) = bounds(cidr);
        let ancestors = (0..cidr.prefix()).filter_map(move |prefix| {
            let network = from_number(family, first)
                .and_then(|address| IpNetwork::new(address, prefix).ok())?;
            self.blocks
                .get_key_value(&(family, bounds(network).0, prefix))
        });
        let descendants = self
            .blocks
            .range((family, first, 0)..=(family, last, u8::MAX))
            .filter(move |((_, _, prefix), _)| *prefix >= cidr.prefix());
        ancestors
            .chain(descendants)
            .flat_map(|(block, holders)| holders.iter().map(move |holder| (*block, holder)))
    }

    /// Takes all CIDRs for a node of a cluster in place of those that it had, or none of them.
    ///
    /// # Errors
    /// Another cluster owns an overlapping range.
    pub fn claim(
        &mut self,
        cluster: &str,
        node: &str,
        cidrs: &[IpNetwork],
    ) -> Result<(), Conflict> {
        if let Some(conflict) = cidrs.iter().find_map(|cidr| self.conflict(cluster, *cidr)) {
            return Err(conflict);
        }
        self.set(
            cluster,
            node,
            cidrs.iter().map(|cidr| block(*cidr)).collect(),
        );
        Ok(())
    }

    /// Frees what a node of a cluster had.
    pub fn release(&mut self, cluster: &str, node: &str) {
        self.set(cluster, node, BTreeSet::new());
    }

    /// Frees all that a cluster had.
    pub fn release_cluster(&mut self, cluster: &str) {
        let nodes: Vec<_> = self
            .nodes
            .keys()
            .filter(|(holder, _)| holder == cluster)
            .cloned()
            .collect();
        for (_, node) in nodes {
            self.release(cluster, &node);
        }
    }

    /// Whether an address lies in a pod CIDR that was accepted from this cluster.
    #[must_use]
    pub fn holds(&self, cluster: &str, network: IpNetwork) -> bool {
        let family = Family::of(network.ip());
        let (first, _) = bounds(network);
        (0..=network.prefix()).any(|prefix| {
            from_number(family, first)
                .and_then(|address| IpNetwork::new(address, prefix).ok())
                .and_then(|outer| self.blocks.get(&(family, bounds(outer).0, prefix)))
                .is_some_and(|holders| holders.iter().any(|(holder, _)| holder == cluster))
        })
    }

    fn set(&mut self, cluster: &str, node: &str, wanted: BTreeSet<Block>) {
        let holder = (cluster.to_owned(), node.to_owned());
        let had = self.nodes.remove(&holder).unwrap_or_default();
        for block in had.difference(&wanted) {
            if let Some(holders) = self.blocks.get_mut(block) {
                holders.remove(&holder);
                if holders.is_empty() {
                    self.blocks.remove(block);
                }
            }
            self.releases += 1;
        }
        for block in &wanted {
            self.blocks
                .entry(*block)
                .or_default()
                .insert(holder.clone());
        }
        if !wanted.is_empty() {
            self.nodes.insert(holder, wanted);
        }
    }
}

fn block(cidr: IpNetwork) -> Block {
    let cidr = canonical(cidr);
    (Family::of(cidr.ip()), bounds(cidr).0, cidr.prefix())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::settings::example;

    fn cidr(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    #[test]
    fn ours_come_first() {
        let mut owners = CidrOwners::new(&example());
        let conflict = owners
            .claim("c2", "n1", &[cidr("10.1.7.0/24")])
            .unwrap_err();
        assert_eq!(conflict.owner, "c1");
        assert_eq!(conflict.owned, cidr("10.1.0.0/16"));
        assert!(owners.claim("c2", "n1", &[cidr("10.0.0.0/8")]).is_err());
    }

    #[test]
    fn the_incumbent_keeps_its_range_until_it_lets_go() {
        let mut owners = CidrOwners::new(&example());
        owners.claim("c2", "n1", &[cidr("10.2.0.0/24")]).unwrap();
        assert_eq!(
            owners
                .claim("c3", "n1", &[cidr("10.2.0.0/16")])
                .unwrap_err()
                .owner,
            "c2"
        );
        let before = owners.releases();
        owners.release("c2", "n1");
        assert!(owners.releases() > before);
        owners.claim("c3", "n1", &[cidr("10.2.0.0/16")]).unwrap();
        assert!(owners.holds("c3", cidr("10.2.9.9/32")));
        assert!(!owners.holds("c2", cidr("10.2.9.9/32")));
    }

    #[test]
    fn an_address_of_our_own_node_is_nobody_elses_even_if_somebody_had_it() {
        let mut owners = CidrOwners::new(&example());
        owners.claim("c2", "n1", &[cidr("192.0.2.21/32")]).unwrap();
        owners.set_own_node("w1", &["192.0.2.1".parse().unwrap()]);
        assert_eq!(owners.seizures(), 0);
        let conflict = owners
            .claim("c2", "n2", &[cidr("192.0.2.1/32")])
            .unwrap_err();
        assert_eq!(conflict.owner, "c1");

        owners.set_own_node("w2", &["192.0.2.21".parse().unwrap()]);
        assert_eq!(owners.seizures(), 1);
        assert!(owners.claim("c2", "n1", &[cidr("192.0.2.21/32")]).is_err());

        let before = owners.releases();
        owners.set_own_nodes(&BTreeMap::new());
        assert!(owners.releases() > before);
        owners.claim("c2", "n2", &[cidr("192.0.2.1/32")]).unwrap();
    }

    #[test]
    fn a_refused_claim_changes_nothing() {
        let mut owners = CidrOwners::new(&example());
        owners.claim("c2", "n1", &[cidr("10.2.0.0/24")]).unwrap();
        owners
            .claim("c2", "n1", &[cidr("10.3.0.0/24"), cidr("10.1.0.0/24")])
            .unwrap_err();
        assert!(owners.holds("c2", cidr("10.2.0.1/32")));
        assert!(!owners.holds("c2", cidr("10.3.0.1/32")));
    }

    proptest! {
        #[test]
        fn conflicts_equal_a_scan_of_all_claims(
            claims in prop::collection::vec((0_u8..3, 0_u8..6, any::<u16>(), 20_u8..=32), 1..40),
        ) {
            let mut owners = CidrOwners::new(&ClusterSettings { pod_cidrs: vec![], service_cidrs: vec![], ..example() });
            let mut model: BTreeMap<(u8, u8), IpNetwork> = BTreeMap::new();
            for (cluster, node, low, prefix) in claims {
                let cidr = canonical(IpNetwork::new(Ipv4Addr::from_bits(0x0a00_0000 | u32::from(low)).into(), prefix).unwrap());
                let expected = !model.iter().any(|((holder, _), held)| *holder != cluster && overlaps(*held, cidr));
                let got = owners.claim(&cluster.to_string(), &node.to_string(), &[cidr]).is_ok();
                prop_assert_eq!(got, expected);
                if got {
                    model.insert((cluster, node), cidr);
                }
            }
        }
    }
}
