//! `CiliumClusterConfig`: what a cluster says of itself before anything else is read from it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    error::DecodeError,
    json::{self, is_default, null_is_default},
};

/// A cluster's id and what its store can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterConfig {
    /// Cluster id; 0 (left out) is refused by readers.
    #[serde(skip_serializing_if = "is_default")]
    pub id: u32,
    /// Capabilities; Go writes the object even when it is empty.
    #[serde(deserialize_with = "null_is_default")]
    pub capabilities: ClusterConfigCapabilities,
}

/// What a store can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterConfigCapabilities {
    /// Canaries end the initial lists.
    #[serde(skip_serializing_if = "is_default")]
    pub synced_canaries: bool,
    /// Data stands under `cilium/cache/`, by cluster.
    #[serde(skip_serializing_if = "is_default")]
    pub cached: bool,
    /// 255 or 511; 0 (left out) means 255.
    #[serde(skip_serializing_if = "is_default")]
    pub max_connected_clusters: u32,
    /// Absent: the writer does not know service exports. False: known, off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_exports_enabled: Option<bool>,
    /// Which of services and endpoint slices are published.
    #[serde(skip_serializing_if = "is_default")]
    pub endpoint_slices_export_mode: EndpointSlicesExportMode,
}

/// Which of `services/v1` and `endpointslices/v1` a cluster publishes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum EndpointSlicesExportMode {
    /// Left out: services only.
    #[default]
    ServicesOnly,
    /// Both.
    ServicesAndEndpointSlices,
    /// Slices only.
    EndpointSlicesOnly,
    /// Anything else: the connection is refused, because we do not know what is published.
    Unknown(String),
}

const SERVICES_AND_SLICES: &str = "services-and-endpointslices";
const SLICES_ONLY: &str = "endpointslices-only";

impl From<String> for EndpointSlicesExportMode {
    fn from(text: String) -> Self {
        match text.as_str() {
            "" => Self::ServicesOnly,
            SERVICES_AND_SLICES => Self::ServicesAndEndpointSlices,
            SLICES_ONLY => Self::EndpointSlicesOnly,
            _ => Self::Unknown(text),
        }
    }
}

impl From<EndpointSlicesExportMode> for String {
    fn from(mode: EndpointSlicesExportMode) -> Self {
        match mode {
            EndpointSlicesExportMode::ServicesOnly => Self::new(),
            EndpointSlicesExportMode::ServicesAndEndpointSlices => SERVICES_AND_SLICES.to_owned(),
            EndpointSlicesExportMode::EndpointSlicesOnly => SLICES_ONLY.to_owned(),
            EndpointSlicesExportMode::Unknown(text) => text,
        }
    }
}

impl ClusterConfig {
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
