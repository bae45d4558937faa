//! The values of the schema: typed, and written byte for byte as Cilium writes them.
//!
//! Our additions to its records travel under one more JSON key, `clustermesh.io`.

mod cluster_config;
mod endpoint_slice;
pub(crate) mod error;
pub(crate) mod identity;
mod ip;
pub(crate) mod json;
mod node;
mod own;
mod service;
mod timestamp;

pub use cluster_config::{ClusterConfig, ClusterConfigCapabilities, EndpointSlicesExportMode};
pub use endpoint_slice::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForZone,
    SERVICE_NAME_LABEL,
};
pub use error::{DecodeError, IdentityError};
pub use identity::{
    CLUSTER_LABEL, Identity, Label, NAMESPACE_LABEL, SERVICE_ACCOUNT_LABEL, SOURCE_K8S,
};
pub use ip::{IpExtension, IpIdentityPair, NamedPort};
pub use node::{
    AddressType, NextWireguardKey, Node, NodeAddress, NodeExtension, NodeWireguard,
    WIREGUARD_ENCRYPTION_KEY, WIREGUARD_PORT_DEFAULT,
};
pub use own::{PortReadiness, Readiness, Session, SessionState};
pub use service::{BackendZone, ClusterService, PortMap, ServicePortNumber, ZoneName};
pub use timestamp::Timestamp;
