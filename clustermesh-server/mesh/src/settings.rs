//! What the operator fixed for this cluster: name, number, address ranges.

use clustermesh_api::IdentitySplit;
use clustermesh_api::validate::{ClusterError, check_cluster};
use ipnetwork::IpNetwork;

use crate::address::{Family, bounds, canonical, family_bits, overlaps};

/// Node blocks smaller than this have no room for the network, router and health addresses and pods, bits of host part.
const MIN_NODE_HOST_BITS: u8 = 3;
/// Address ranges of each use and family that a cluster may have.
pub const MAX_CIDRS_PER_CLUSTER: usize = 64;

/// This cluster's settings, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterSettings {
    /// Cluster name.
    pub name: String,
    /// Cluster id within `split`.
    pub id: u32,
    /// How identities are divided among clusters.
    pub split: IdentitySplit,
    /// Ranges from which nodes get their pod CIDRs.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Prefix length of a node's IPv4 pod CIDR, bits.
    pub node_mask_v4: u8,
    /// Prefix length of a node's IPv6 pod CIDR, bits.
    pub node_mask_v6: u8,
    /// Ranges from which Services get their virtual addresses.
    pub service_cidrs: Vec<IpNetwork>,
}

/// Settings that contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// Name or id cannot take part in a mesh.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Two ranges share addresses.
    #[error("{0} and {1} overlap: pod and service CIDRs of a cluster must be apart")]
    Overlap(IpNetwork, IpNetwork),
    /// A pod CIDR cannot hold one node block.
    #[error(
        "pod CIDR {cidr} cannot hold node blocks of /{mask}: choose a mask of {shortest} to {longest}"
    )]
    NodeMask {
        /// The range.
        cidr: IpNetwork,
        /// The mask set for its family, bits.
        mask: u8,
        /// Shortest mask that fits, bits.
        shortest: u8,
        /// Longest mask that leaves room for pods, bits.
        longest: u8,
    },
    /// Too many ranges.
    #[error("{0} CIDRs are set, at most {MAX_CIDRS_PER_CLUSTER} are taken")]
    TooMany(usize),
}

impl ClusterSettings {
    /// Checks that the parts fit together, and spells each CIDR without host bits.
    ///
    /// # Errors
    /// A bad name or id, overlapping ranges, or a node mask that does not fit its pod CIDR.
    pub fn checked(mut self) -> Result<Self, SettingsError> {
        check_cluster(&self.name, self.id, self.split)?;
        let total = self.pod_cidrs.len() + self.service_cidrs.len();
        if total > MAX_CIDRS_PER_CLUSTER {
            return Err(SettingsError::TooMany(total));
        }
        for cidr in self.pod_cidrs.iter_mut().chain(&mut self.service_cidrs) {
            *cidr = canonical(*cidr);
        }
        let all: Vec<_> = self
            .pod_cidrs
            .iter()
            .chain(&self.service_cidrs)
            .copied()
            .collect();
        for (index, a) in all.iter().enumerate() {
            if let Some(b) = all.iter().skip(index + 1).find(|b| overlaps(*a, **b)) {
                return Err(SettingsError::Overlap(*a, *b));
            }
        }
        for &cidr in &self.pod_cidrs {
            let family = Family::of(cidr.ip());
            let (mask, longest) = (
                self.node_mask(family),
                family_bits(family) - MIN_NODE_HOST_BITS,
            );
            if mask < cidr.prefix() || mask > longest {
                return Err(SettingsError::NodeMask {
                    cidr,
                    mask,
                    shortest: cidr.prefix(),
                    longest,
                });
            }
        }
        Ok(self)
    }

    /// Prefix length of a node's pod CIDR, bits.
    #[must_use]
    pub fn node_mask(&self, family: Family) -> u8 {
        match family {
            Family::IPv4 => self.node_mask_v4,
            Family::IPv6 => self.node_mask_v6,
        }
    }

    /// Pod CIDRs of one family, in the order of the settings.
    pub fn pod_cidrs(&self, family: Family) -> impl Iterator<Item = IpNetwork> + '_ {
        self.pod_cidrs
            .iter()
            .copied()
            .filter(move |cidr| Family::of(cidr.ip()) == family)
    }

    /// Service CIDRs of one family, in the order of the settings.
    pub fn service_cidrs(&self, family: Family) -> impl Iterator<Item = IpNetwork> + '_ {
        self.service_cidrs
            .iter()
            .copied()
            .filter(move |cidr| Family::of(cidr.ip()) == family)
    }

    /// Addresses of a range that may be given out: without the network address and IPv4's broadcast address.
    #[must_use]
    pub(crate) fn usable(cidr: IpNetwork) -> Option<(u128, u128)> {
        let (first, last) = bounds(cidr);
        if first == last {
            return Some((first, last));
        }
        let last = if cidr.is_ipv4() { last - 1 } else { last };
        (first < last).then_some((first + 1, last))
    }
}

#[cfg(test)]
pub(crate) fn example() -> ClusterSettings {
    ClusterSettings {
        name: "c1".into(),
        id: 1,
        split: IdentitySplit::Clusters255,
        pod_cidrs: vec!["10.1.0.0/16".parse().unwrap(), "fd01::/48".parse().unwrap()],
        node_mask_v4: 24,
        node_mask_v6: 64,
        service_cidrs: vec![
            "10.96.1.0/24".parse().unwrap(),
            "fd00:96:1::/112".parse().unwrap(),
        ],
    }
    .checked()
    .unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_are_refused_with_both_named() {
        let mut settings = example();
        settings.service_cidrs = vec!["10.1.5.0/24".parse().unwrap()];
        assert_eq!(
            settings.checked().unwrap_err().to_string(),
            "10.1.0.0/16 and 10.1.5.0/24 overlap: pod and service CIDRs of a cluster must be apart"
        );
    }

    #[test]
    fn node_mask_must_fit_the_pod_cidr() {
        for mask in [15, 30, 33] {
            let settings = ClusterSettings {
                node_mask_v4: mask,
                ..example()
            };
            assert!(
                matches!(settings.checked(), Err(SettingsError::NodeMask { .. })),
                "{mask}"
            );
        }
    }

    #[test]
    fn cluster_id_must_fit_the_split() {
        for id in [0, 256] {
            assert!(matches!(
                ClusterSettings { id, ..example() }.checked(),
                Err(SettingsError::Cluster(_))
            ));
        }
    }

    #[test]
    fn host_bits_are_dropped() {
        let settings = ClusterSettings {
            pod_cidrs: vec!["10.1.2.3/16".parse().unwrap()],
            ..example()
        };
        assert_eq!(
            settings.checked().unwrap().pod_cidrs,
            vec!["10.1.0.0/16".parse().unwrap()]
        );
    }
}
