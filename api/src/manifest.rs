//! Manifests: what an operator applies, their validation, and how the server stores them.

mod annotations;
mod check;

use std::{collections::BTreeMap, net::IpAddr};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use annotations::{
    AFFINITY_ANNOTATION, Affinity, AnnotationError, GLOBAL_ANNOTATION, SHARED_ANNOTATION,
    ServiceAnnotations,
};
pub use check::{Fault, ManifestError};

use crate::{
    limits::MAX_MANIFEST_BYTES,
    records::{error::DecodeError, json},
};

/// The only `apiVersion`.
pub const API_VERSION: &str = "clustermesh.io/v1";
/// `kind` of a Service.
pub const KIND_SERVICE: &str = "Service";
/// `kind` of a Workload.
pub const KIND_WORKLOAD: &str = "Workload";
/// Namespace of a manifest that names none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// What every object has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Name, unique in its namespace and kind.
    pub name: String,
    /// Namespace.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

fn default_namespace() -> String {
    DEFAULT_NAMESPACE.to_owned()
}

/// An object of one kind: `apiVersion`, `kind`, `metadata`, `spec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Object<Spec> {
    /// [`API_VERSION`].
    pub api_version: String,
    /// [`KIND_SERVICE`] or [`KIND_WORKLOAD`].
    pub kind: String,
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// What is wanted; may be left out where nothing of it is required.
    #[serde(default, bound(deserialize = "Spec: Deserialize<'de> + Default"))]
    pub spec: Spec,
}

/// A stored object: the manifest and what the server decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored<Spec, Status> {
    /// The manifest as applied.
    #[serde(flatten, bound(deserialize = "Spec: Deserialize<'de> + Default"))]
    pub object: Object<Spec>,
    /// What the server decided.
    pub status: Status,
}

/// A Service manifest.
pub type ServiceManifest = Object<ServiceSpec>;
/// A Workload manifest.
pub type WorkloadManifest = Object<WorkloadSpec>;
/// The value of `clustermesh.io/services/v1/<ns>/<name>`.
pub type StoredService = Stored<ServiceSpec, ServiceStatus>;
/// The value of `clustermesh.io/workloads/v1/<ns>/<name>`.
pub type StoredWorkload = Stored<WorkloadSpec, WorkloadStatus>;

/// A service: which workloads back it, on which ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// Labels that a workload of the same namespace must have to back the service.
    pub selector: BTreeMap<String, String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Families of its virtual addresses; empty = all that the cluster has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ip_families: Vec<IpFamily>,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl IpFamily {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::IPv4,
            IpAddr::V6(_) => Self::IPv6,
        }
    }

    /// `IPv4` or `IPv6`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::IPv4 => "IPv4",
            Self::IPv6 => "IPv6",
        }
    }
}

/// A transport protocol.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Protocol {
    /// TCP.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// UDP.
    #[serde(rename = "UDP")]
    Udp,
}

impl Protocol {
    /// `TCP` or `UDP`, as records write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Name; required when there are several.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Protocol; TCP when left out.
    #[serde(default)]
    pub protocol: Protocol,
    /// Port of the virtual address.
    pub port: u16,
    /// Port of the workload; `port` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<u16>,
}

impl ServicePort {
    /// Port of the workload.
    #[must_use]
    pub fn target(&self) -> u16 {
        self.target_port.unwrap_or(self.port)
    }
}

/// A workload: labels (in its metadata) for an endpoint that appears under its namespace and name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSpec {
    /// Service account, part of the identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
}

/// What the server decided for a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceStatus {
    /// Virtual addresses.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<IpAddr>,
}

/// What the server decided for a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkloadStatus {
    /// Security identity.
    pub identity: u32,
}

/// Any manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manifest {
    /// A Service.
    Service(ServiceManifest),
    /// A Workload.
    Workload(WorkloadManifest),
}

impl Manifest {
    /// Reads and validates one manifest. An unknown field is an error: a typing mistake must not pass in silence.
    ///
    /// # Errors
    /// Too long, no JSON, another `apiVersion` or `kind`, an unknown field, or a broken rule; the error names the object.
    pub fn from_json(json: &[u8]) -> Result<Self, ManifestError> {
        if json.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge(json.len()));
        }
        let manifest = check::read(json)?;
        check::validate(&manifest)?;
        Ok(manifest)
    }

    /// The JSON, with defaults filled in.
    #[must_use]
    pub fn to_json(&self) -> Bytes {
        match self {
            Self::Service(object) => json::encode(object),
            Self::Workload(object) => json::encode(object),
        }
    }

    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Service(_) => KIND_SERVICE,
            Self::Workload(_) => KIND_WORKLOAD,
        }
    }

    /// Its metadata.
    #[must_use]
    pub const fn metadata(&self) -> &Metadata {
        match self {
            Self::Service(object) => &object.metadata,
            Self::Workload(object) => &object.metadata,
        }
    }
}

impl Object<ServiceSpec> {
    /// What the annotations say.
    #[must_use]
    pub fn service_annotations(&self) -> ServiceAnnotations {
        ServiceAnnotations::read(&self.metadata.annotations)
    }
}

impl<Spec, Status> Stored<Spec, Status>
where
    Spec: Serialize + for<'de> Deserialize<'de> + Default,
    Status: Serialize + for<'de> Deserialize<'de>,
{
    /// Reads the JSON; unknown fields, of newer writers, are ignored.
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

#[cfg(test)]
mod tests;
