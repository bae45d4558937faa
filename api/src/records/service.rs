//! `ClusterService`: a shared service as readers of `services/v1` know it.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    error::DecodeError,
    json::{self, empty_is_null, null_is_default},
};

/// Ports by name, which may be empty.
pub type PortMap = BTreeMap<String, ServicePortNumber>;

/// A shared service of one cluster. Addresses are text, in Go's order of map keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterService {
    /// Publishing cluster.
    pub cluster: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Ports by virtual address; none for a headless service.
    #[serde(deserialize_with = "null_is_default")]
    pub frontends: BTreeMap<String, PortMap>,
    /// Ports by backend address.
    #[serde(deserialize_with = "null_is_default")]
    pub backends: BTreeMap<String, PortMap>,
    /// Host names by backend address.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub hostnames: BTreeMap<String, String>,
    /// Zones by backend address.
    #[serde(
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub zones: BTreeMap<String, BackendZone>,
    /// Labels of the service.
    #[serde(deserialize_with = "null_is_default")]
    pub labels: BTreeMap<String, String>,
    /// Selector of the service.
    #[serde(deserialize_with = "null_is_default")]
    pub selector: BTreeMap<String, String>,
    /// True in every published record.
    pub include_external: bool,
    /// True in every published record: un-sharing deletes it.
    pub shared: bool,
    /// Id of the publishing cluster.
    #[serde(rename = "clusterID")]
    pub cluster_id: u32,
}

/// A port of a frontend or backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ServicePortNumber {
    /// `TCP`, `UDP` or `SCTP`.
    #[serde(default)]
    pub protocol: String,
    /// Number.
    #[serde(default)]
    pub port: u16,
}

/// Where a backend is, and for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct BackendZone {
    /// Its zone.
    pub zone: String,
    /// Zones that should use it.
    #[serde(serialize_with = "empty_is_null", deserialize_with = "null_is_default")]
    pub for_zones: Vec<ZoneName>,
}

/// A zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ZoneName {
    /// Its name.
    pub name: String,
}

impl ClusterService {
    /// Reads the JSON.
    ///
    /// # Errors
    /// Not JSON of this shape.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        json::decode(value)
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        json::encode(self)
    }
}
