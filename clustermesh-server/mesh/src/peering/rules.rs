//! What a peer may claim: each of its records, judged against what was accepted from it and from others.

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_api::address::parse_address;
use clustermesh_api::identity_split::{
    IDENTITY_HEALTH, IDENTITY_HOST, IDENTITY_INGRESS, IDENTITY_REMOTE_NODE, is_reserved,
};
use clustermesh_api::keys::RecordKey;
use clustermesh_api::record::Record;
use clustermesh_api::records::{AddressType, IpIdentityPair, Node};
use clustermesh_api::validate::{Claimant, ValidationError};
use ipnetwork::IpNetwork;

use super::config::Peer;
use super::owners::{CidrOwners, Conflict};
use crate::address::{Family, bounds, overlaps};

/// Reserved identity of the API server, which runs on a node.
const IDENTITY_KUBE_APISERVER: u32 = 7;
/// A pod CIDR holds at most so many address bits: nobody owns half the internet.
const MAX_CIDR_HOST_BITS: [(Family, u8); 2] = [(Family::IPv4, 24), (Family::IPv6, 112)];

/// Why a peer's record is not copied. The text names the record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a record of the schema, or unreadable.
    #[error("{0}")]
    Malformed(String),
    /// A record that its cluster must not publish.
    #[error(transparent)]
    Invalid(#[from] ValidationError),
    /// A range that somebody else owns.
    #[error("{object}: {} overlaps {} of cluster {}", conflict.claimed, conflict.owned, conflict.owner)]
    Conflict {
        /// The record's key.
        object: String,
        /// Who has it.
        conflict: Conflict,
    },
    /// A range or address that no node can have.
    #[error("{object}: {range} cannot belong to a node")]
    UnusableRange {
        /// The record's key.
        object: String,
        /// The range.
        range: IpNetwork,
    },
    /// An address outside what was accepted from the peer.
    #[error(
        "{object}: {address} is in no pod CIDR and of no node that was accepted from cluster {cluster}"
    )]
    NotOwned {
        /// The record's key.
        object: String,
        /// The address or prefix.
        address: String,
        /// The peer.
        cluster: String,
    },
    /// A tunnel end that is none of the peer's nodes.
    #[error("{object}: host {host} is no node that was accepted from cluster {cluster}")]
    UnknownHost {
        /// The record's key.
        object: String,
        /// The address of the machine.
        host: IpAddr,
        /// The peer.
        cluster: String,
    },
    /// The copy of the peer has no room.
    #[error(
        "{object}: no more than {records_max} records or {bytes_max} bytes are copied of cluster {cluster}"
    )]
    Quota {
        /// The record's key.
        object: String,
        /// The peer.
        cluster: String,
        /// Records that are taken.
        records_max: usize,
        /// Bytes that are taken.
        bytes_max: usize,
    },
    /// A reserved identity on an address that does not have it.
    #[error(
        "{object}: reserved identity {identity} is only taken on the addresses of nodes that have that role"
    )]
    ReservedIdentity {
        /// The record's key.
        object: String,
        /// The identity.
        identity: u32,
    },
}

impl Refusal {
    /// A short stable name, for metrics and counters.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::Invalid(error) => error.violation.reason(),
            Self::Conflict { .. } => "overlap",
            Self::UnusableRange { .. } => "unusable-range",
            Self::NotOwned { .. } => "not-owned",
            Self::UnknownHost { .. } => "unknown-host",
            Self::Quota { .. } => "quota",
            Self::ReservedIdentity { .. } => "reserved-identity",
        }
    }
}

/// What an address of a node is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Node,
    Health,
    Ingress,
}

/// Addresses of the nodes that were accepted from one peer.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeAddresses {
    by_node: BTreeMap<String, Vec<(IpAddr, Role)>>,
    /// How many nodes name the address in this role.
    counts: BTreeMap<(IpAddr, Role), usize>,
}

impl NodeAddresses {
    fn set(&mut self, node: &str, addresses: Vec<(IpAddr, Role)>) {
        for entry in self.by_node.remove(node).unwrap_or_default() {
            if let Some(count) = self.counts.get_mut(&entry) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&entry);
                }
            }
        }
        if addresses.is_empty() {
            return;
        }
        for entry in &addresses {
            *self.counts.entry(*entry).or_default() += 1;
        }
        self.by_node.insert(node.to_owned(), addresses);
    }

    fn has(&self, address: IpAddr, role: Role) -> bool {
        self.counts.contains_key(&(address, role))
    }
}

/// The judge of one peer's records.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) peer: Peer,
    nodes: NodeAddresses,
}

impl Rules {
    pub(super) fn new(peer: Peer) -> Self {
        Self {
            peer,
            nodes: NodeAddresses::default(),
        }
    }

    /// Judges one record. A node that is accepted owns its ranges from then on.
    pub(super) fn accept(
        &mut self,
        owners: &mut CidrOwners,
        key: &RecordKey,
        value: &[u8],
    ) -> Result<(), Refusal> {
        let record =
            Record::decode(key, value).map_err(|error| Refusal::Malformed(error.to_string()))?;
        let claimant = Claimant {
            cluster: &self.peer.cluster,
            cluster_id: self.peer.cluster_id,
            split: self.peer.split,
        };
        claimant.check(key, &record)?;
        match record {
            Record::Node(node) => self.accept_node(owners, key, &node),
            Record::Ip(pair) => self.check_ip(owners, key, &pair),
            Record::Service(service) => self.check_backends(owners, key, service.backends.keys()),
            Record::EndpointSlice(slice) => {
                let addresses = slice
                    .endpoints
                    .iter()
                    .flat_map(|endpoint| &endpoint.addresses);
                self.check_backends(owners, key, addresses)
            }
            _ => Ok(()),
        }
    }

    /// Takes back what a node owned.
    pub(super) fn release_node(&mut self, owners: &mut CidrOwners, node: &str) {
        owners.release(&self.peer.cluster, node);
        self.nodes.set(node, Vec::new());
    }

    fn accept_node(
        &mut self,
        owners: &mut CidrOwners,
        key: &RecordKey,
        node: &Node,
    ) -> Result<(), Refusal> {
        let object = key.to_string();
        let role = |addresses: [Option<IpAddr>; 2], role| {
            addresses.into_iter().flatten().map(move |ip| (ip, role))
        };
        let addresses: Vec<_> = node
            .ip_addresses
            .iter()
            .map(|address| (address.ip, Role::Node))
            .chain(role(
                [node.ipv4_health_ip, node.ipv6_health_ip],
                Role::Health,
            ))
            .chain(role(
                [node.ipv4_ingress_ip, node.ipv6_ingress_ip],
                Role::Ingress,
            ))
            .collect();
        // What a node holds on the underlay is its own too: nobody else may speak for that address. ExternalIPs may be
        // shared behind NAT.
        let underlay = node
            .addresses_of(&AddressType::InternalIP)
            .map(IpNetwork::from);
        let ranges: Vec<IpNetwork> = node
            .pod_cidrs()
            .map(|cidr| cidr.0)
            .chain(underlay)
            .collect();
        let single = addresses.iter().map(|(ip, _)| IpNetwork::from(*ip));
        if let Some(range) = ranges
            .iter()
            .copied()
            .chain(single.clone())
            .find(|range| !usable(*range))
        {
            return Err(Refusal::UnusableRange { object, range });
        }
        let taken = single
            .clone()
            .find_map(|range| owners.conflict(&self.peer.cluster, range));
        if let Some(conflict) = taken {
            return Err(Refusal::Conflict { object, conflict });
        }
        owners
            .claim(&self.peer.cluster, &node.name, &ranges)
            .map_err(|conflict| Refusal::Conflict { object, conflict })?;
        self.nodes.set(&node.name, addresses);
        Ok(())
    }

    fn check_ip(
        &self,
        owners: &CidrOwners,
        key: &RecordKey,
        pair: &IpIdentityPair,
    ) -> Result<(), Refusal> {
        let object = || key.to_string();
        let network = pair.address_or_prefix().network();
        let cluster = &self.peer.cluster;
        let on = |role| pair.mask.is_none() && self.nodes.has(pair.ip, role);
        if is_reserved(pair.id) {
            let allowed = match pair.id {
                IDENTITY_HOST | IDENTITY_REMOTE_NODE | IDENTITY_KUBE_APISERVER => on(Role::Node),
                IDENTITY_HEALTH => on(Role::Health),
                IDENTITY_INGRESS => on(Role::Ingress),
                _ => false,
            };
            if !allowed {
                return Err(Refusal::ReservedIdentity {
                    object: object(),
                    identity: pair.id,
                });
            }
        } else if !owners.holds(cluster, network) {
            let address = pair.address_or_prefix().to_string();
            return Err(Refusal::NotOwned {
                object: object(),
                address,
                cluster: cluster.clone(),
            });
        }
        match pair.host_ip {
            Some(host) if !self.nodes.has(host, Role::Node) => Err(Refusal::UnknownHost {
                object: object(),
                host,
                cluster: cluster.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn check_backends<'a>(
        &self,
        owners: &CidrOwners,
        key: &RecordKey,
        addresses: impl Iterator<Item = &'a String>,
    ) -> Result<(), Refusal> {
        for text in addresses {
            let object = key.to_string();
            let address = parse_address(text)
                .map_err(|error| Refusal::Malformed(format!("{object}: {error}")))?;
            if !owners.holds(&self.peer.cluster, address.into()) {
                return Err(Refusal::NotOwned {
                    object,
                    address: text.clone(),
                    cluster: self.peer.cluster.clone(),
                });
            }
        }
        Ok(())
    }
}

/// Ranges that a machine can have: not loopback, multicast, unspecified or link-local, and not absurdly large.
fn usable(range: IpNetwork) -> bool {
    let family = Family::of(range.ip());
    let (first, last) = bounds(range);
    let small = MAX_CIDR_HOST_BITS
        .iter()
        .all(|(limited, bits)| *limited != family || (last - first) >> bits == 0);
    let special = [
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "0.0.0.0/8",
        "::/127",
        "fe80::/10",
        "ff00::/8",
    ];
    let special = special
        .iter()
        .filter_map(|text| text.parse::<IpNetwork>().ok());
    small && !special.into_iter().any(|special| overlaps(special, range))
}
