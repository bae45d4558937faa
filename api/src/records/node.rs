//! `Node`: a machine, its addresses and pod CIDRs. Field names are Go's, which has no tags on this struct.

use std::{collections::BTreeMap, net::IpAddr};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    error::DecodeError,
    json::{self, empty_is_null, null_is_default},
};
use crate::address::{self, Cidr};

/// A machine of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Node {
    /// Node name.
    pub name: String,
    /// Its cluster.
    pub cluster: String,
    /// Addresses, in order of preference within a type.
    #[serde(
        rename = "IPAddresses",
        serialize_with = "empty_is_null",
        deserialize_with = "null_is_default"
    )]
    pub ip_addresses: Vec<NodeAddress>,
    /// IPv4 pod CIDR.
    #[serde(rename = "IPv4AllocCIDR")]
    pub ipv4_alloc_cidr: Option<Cidr>,
    /// More IPv4 pod CIDRs.
    #[serde(
        rename = "IPv4SecondaryAllocCIDRs",
        serialize_with = "empty_is_null",
        deserialize_with = "null_is_default"
    )]
    pub ipv4_secondary_alloc_cidrs: Vec<Cidr>,
    /// IPv6 pod CIDR.
    #[serde(rename = "IPv6AllocCIDR")]
    pub ipv6_alloc_cidr: Option<Cidr>,
    /// More IPv6 pod CIDRs.
    #[serde(
        rename = "IPv6SecondaryAllocCIDRs",
        serialize_with = "empty_is_null",
        deserialize_with = "null_is_default"
    )]
    pub ipv6_secondary_alloc_cidrs: Vec<Cidr>,
    /// Address that answers health probes.
    #[serde(rename = "IPv4HealthIP", with = "address::optional")]
    pub ipv4_health_ip: Option<IpAddr>,
    /// Address that answers health probes.
    #[serde(rename = "IPv6HealthIP", with = "address::optional")]
    pub ipv6_health_ip: Option<IpAddr>,
    /// Source address of ingress traffic.
    #[serde(rename = "IPv4IngressIP", with = "address::optional")]
    pub ipv4_ingress_ip: Option<IpAddr>,
    /// Source address of ingress traffic.
    #[serde(rename = "IPv6IngressIP", with = "address::optional")]
    pub ipv6_ingress_ip: Option<IpAddr>,
    /// Id of its cluster.
    #[serde(rename = "ClusterID")]
    pub cluster_id: u32,
    /// Free text: which component knows the node.
    pub source: String,
    /// IPsec key index; not 0 with WireGuard; 0 = no node encryption.
    pub encryption_key: u8,
    /// Labels.
    #[serde(serialize_with = "empty_is_null", deserialize_with = "null_is_default")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(serialize_with = "empty_is_null", deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
    /// WireGuard public key, base64; empty = none.
    pub wireguard_pub_key: String,
    /// Id of this boot of the machine.
    #[serde(rename = "BootID")]
    pub boot_id: String,
    /// What Cilium's schema lacks.
    #[serde(rename = "clustermesh.io", skip_serializing_if = "Option::is_none")]
    pub extension: Option<NodeExtension>,
    /// Fields that we do not know (`NodeIdentity` of older writers), passed through.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// An address of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddress {
    /// Its role.
    #[serde(rename = "Type")]
    pub address_type: AddressType,
    /// The address.
    #[serde(rename = "IP", with = "address::required")]
    pub ip: IpAddr,
}

/// Roles of a machine's addresses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AddressType {
    /// Reachable inside the underlay.
    InternalIP,
    /// Reachable from outside.
    ExternalIP,
    /// The router address, at the host end of the pods' network.
    CiliumInternalIP,
    /// Any other name, kept as it is.
    #[serde(untagged)]
    Other(String),
}

/// Our additions to a node record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeExtension {
    /// Version of the agent that runs there; empty = unknown.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub agent_version: String,
    /// What belongs to `WireguardPubKey`; `None` = as Cilium has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wireguard: Option<Box<NodeWireguard>>,
    /// Fields of newer writers, passed through.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// UDP port of WireGuard where a record does not say another (Cilium's).
pub const WIREGUARD_PORT_DEFAULT: u16 = 51_871;
/// `EncryptionKey` of a node whose own traffic goes through WireGuard, and `Key` of an address that is reached through it
/// (Cilium's).
pub const WIREGUARD_ENCRYPTION_KEY: u8 = 255;

/// Ports and change of WireGuard keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeWireguard {
    /// UDP port of the device that has `WireguardPubKey`; 0 = [`WIREGUARD_PORT_DEFAULT`].
    pub port: u16,
    /// Counts the node's keys in step with all others; keys of one epoch belong together.
    pub epoch: u32,
    /// The key that comes next, while keys change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<NextWireguardKey>,
    /// Fields of newer writers, passed through.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// A key that is about to be used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NextWireguardKey {
    /// The public key, base64.
    pub pub_key: String,
    /// UDP port of the device that has it.
    pub port: u16,
    /// Its epoch.
    pub epoch: u32,
}

impl Node {
    /// Reads the JSON.
    ///
    /// # Errors
    /// Not JSON of this shape, or an address or mask in it that is none.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        json::decode(value)
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        json::encode(self)
    }

    /// Every pod CIDR, primary ones first.
    pub fn pod_cidrs(&self) -> impl Iterator<Item = Cidr> + '_ {
        self.ipv4_alloc_cidr
            .into_iter()
            .chain(self.ipv6_alloc_cidr)
            .chain(self.ipv4_secondary_alloc_cidrs.iter().copied())
            .chain(self.ipv6_secondary_alloc_cidrs.iter().copied())
    }

    /// The end of the tunnel to this machine in one address family, chosen as Cilium does: InternalIP, then ExternalIP,
    /// then any other but the router address.
    #[must_use]
    pub fn tunnel_endpoint(&self, ipv4: bool) -> Option<IpAddr> {
        let rank = |address: &&NodeAddress| match address.address_type {
            AddressType::InternalIP => 0,
            AddressType::ExternalIP => 1,
            _ => 2,
        };
        self.ip_addresses
            .iter()
            .filter(|address| {
                address.ip.is_ipv4() == ipv4
                    && address.address_type != AddressType::CiliumInternalIP
            })
            .min_by_key(rank)
            .map(|address| address.ip)
    }

    /// Addresses with this role.
    pub fn addresses_of(&self, address_type: &AddressType) -> impl Iterator<Item = IpAddr> {
        self.ip_addresses
            .iter()
            .filter(move |address| address.address_type == *address_type)
            .map(|address| address.ip)
    }
}
