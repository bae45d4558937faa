//! `IPIdentityPair`: an address or prefix, its identity and the machine that holds it.

use std::net::IpAddr;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    error::DecodeError,
    json::{self, null_is_default},
};
use crate::address::{self, AddressOrPrefix, Mask};

/// An address with its identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpIdentityPair {
    /// The address, or the prefix's first one.
    #[serde(rename = "IP", with = "address::required")]
    pub ip: IpAddr,
    /// Present: the record is of a prefix.
    #[serde(rename = "Mask", default)]
    pub mask: Option<Mask>,
    /// Address of the machine that holds it: the tunnel's end.
    #[serde(rename = "HostIP", with = "address::optional", default)]
    pub host_ip: Option<IpAddr>,
    /// Security identity.
    #[serde(rename = "ID", default)]
    pub id: u32,
    /// IPsec key index; not 0 with WireGuard ([`WIREGUARD_ENCRYPTION_KEY`](super::WIREGUARD_ENCRYPTION_KEY)): Cilium's nodes send encrypted.
    #[serde(rename = "Key", default)]
    pub key: u8,
    /// Free text.
    #[serde(rename = "Metadata", default, deserialize_with = "null_is_default")]
    pub metadata: String,
    /// Namespace of the workload.
    #[serde(
        rename = "K8sNamespace",
        default,
        skip_serializing_if = "String::is_empty"
    )]
    pub k8s_namespace: String,
    /// Name of the workload.
    #[serde(
        rename = "K8sPodName",
        default,
        skip_serializing_if = "String::is_empty"
    )]
    pub k8s_pod_name: String,
    /// Service account of the workload.
    #[serde(
        rename = "K8sServiceAccount",
        default,
        skip_serializing_if = "String::is_empty"
    )]
    pub k8s_service_account: String,
    /// Named ports of the workload.
    #[serde(
        rename = "NamedPorts",
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub named_ports: Vec<NamedPort>,
    /// What Cilium's schema lacks.
    #[serde(
        rename = "clustermesh.io",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub extension: Option<IpExtension>,
}

/// A port with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NamedPort {
    /// Name.
    pub name: String,
    /// Number.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
}

/// Our additions to an address record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct IpExtension {
    /// Name of the machine that holds the address.
    pub node: String,
}

impl IpIdentityPair {
    /// A single address with an identity, all else empty.
    #[must_use]
    pub fn new(ip: IpAddr, id: u32, host_ip: Option<IpAddr>) -> Self {
        Self {
            ip: ip.to_canonical(),
            mask: None,
            host_ip,
            id,
            key: 0,
            metadata: String::new(),
            k8s_namespace: String::new(),
            k8s_pod_name: String::new(),
            k8s_service_account: String::new(),
            named_ports: Vec::new(),
            extension: None,
        }
    }

    /// Reads the JSON.
    ///
    /// # Errors
    /// Not JSON of this shape, an address that is none, or a mask of the other family.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        let pair: Self = json::decode(value)?;
        if pair.mask.is_some_and(|mask| mask.ipv4 != pair.ip.is_ipv4()) {
            return Err(serde::de::Error::custom(
                "Mask is of the other address family than IP",
            ))
            .map_err(|error: serde_json::Error| error.into());
        }
        Ok(pair)
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        json::encode(self)
    }

    /// The suffix of its key.
    #[must_use]
    pub fn address_or_prefix(&self) -> AddressOrPrefix {
        AddressOrPrefix {
            address: self.ip,
            prefix_bits: self.mask.map(|mask| mask.bits),
        }
    }

    /// Name of the machine that holds the address, where the writer says it.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.extension
            .as_ref()
            .map(|extension| extension.node.as_str())
    }
}
