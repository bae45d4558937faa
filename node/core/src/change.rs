//! One decoded and checked record, as the model takes it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

/// Name of a cluster, shared by everything that it describes.
pub type ClusterName = Arc<str>;

/// A record's new value; `None` in an inner option means that it was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node of own or a peer cluster.
    Node {
        /// Cluster that the node belongs to.
        cluster: ClusterName,
        /// Node name.
        name: Box<str>,
        /// The node.
        node: Option<Box<NodeRecord>>,
    },
    /// An address or prefix and who has it.
    Address {
        /// Cluster that wrote it.
        cluster: ClusterName,
        /// The address.
        prefix: IpNetwork,
        /// Who has it.
        owner: Option<AddressOwner>,
    },
    /// Backends by endpoint slice.
    Slice {
        /// Cluster of the backends.
        cluster: ClusterName,
        /// Unique in the cluster.
        name: Box<str>,
        /// The slice.
        slice: Option<Box<SliceRecord>>,
    },
    /// Backends as the older schema has them: one record for a service.
    LegacyBackends {
        /// Cluster of the backends.
        cluster: ClusterName,
        /// Service.
        service: ServiceName,
        /// Backends.
        groups: Option<Vec<EndpointGroup>>,
    },
    /// What a cluster says of itself.
    Cluster {
        /// Cluster.
        name: ClusterName,
        /// Its settings.
        config: Option<ClusterConfig>,
    },
    /// A service declared in this cluster.
    Service {
        /// Service.
        service: ServiceName,
        /// Its declaration.
        declaration: Option<Box<ServiceDeclaration>>,
    },
    /// A workload declared in this cluster.
    Workload {
        /// Workload.
        workload: WorkloadName,
        /// Its declaration.
        declaration: Option<Box<WorkloadDeclaration>>,
    },
    /// A record that says nothing to the kernel (identity, canary, heartbeat, session …).
    Nothing,
}

/// Namespace and name of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// Namespace.
    pub namespace: Box<str>,
    /// Name.
    pub name: Box<str>,
}

/// Namespace and name of a workload.
pub type WorkloadName = ServiceName;

impl std::fmt::Display for ServiceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What the model needs of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRecord {
    /// Addresses on the underlay in order of preference: internal, then external, then others.
    pub underlay: Vec<IpAddr>,
    /// Addresses of its side of the pair between host and pods.
    pub routers: Vec<IpAddr>,
    /// Health addresses.
    pub health: Vec<IpAddr>,
    /// Ingress addresses.
    pub ingress: Vec<IpAddr>,
    /// Pod CIDRs.
    pub pod_cidrs: Vec<IpNetwork>,
    /// WireGuard keys: the present one, and while keys change the next; empty = it does not encrypt.
    pub keys: Vec<NodeKey>,
}

/// A WireGuard public key.
pub type WireguardKey = [u8; 32];

/// A key of a node and where its device listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeKey {
    /// Keys of one epoch belong together.
    pub epoch: u32,
    /// The public key.
    pub key: WireguardKey,
    /// UDP port.
    pub port: u16,
}

/// Who has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressOwner {
    /// Security identity, as claimed.
    pub identity: u32,
    /// Underlay address of the node that holds it.
    pub host: Option<IpAddr>,
}

/// An endpoint slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceRecord {
    /// Service that the slice belongs to.
    pub service: ServiceName,
    /// Ports and endpoints.
    pub group: EndpointGroup,
}

/// Endpoints that serve the same ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointGroup {
    /// Named ports.
    pub ports: Vec<BackendPort>,
    /// Addresses and what is known of them.
    pub endpoints: Vec<BackendEndpoint>,
}

/// A port of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendPort {
    /// Name, may be empty.
    pub name: Box<str>,
    /// IP protocol number.
    pub protocol: u8,
    /// Port.
    pub port: u16,
}

/// A backend's address and condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendEndpoint {
    /// Address.
    pub address: IpAddr,
    /// Condition.
    pub condition: Condition,
}

/// What Kubernetes' three flags of an endpoint mean to a load-balancer (KEP-1669).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Condition {
    /// Takes new connections.
    Ready,
    /// Leaving but still answering: used when nothing is ready.
    Draining,
    /// Not to be used.
    Unusable,
}

/// What a cluster says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Cluster id.
    pub id: u16,
    /// It publishes endpoint slices; otherwise its backends are read from service records.
    pub slices: bool,
}

/// A service of this cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceDeclaration {
    /// Virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Labels of the workloads behind it; empty = none.
    pub selector: BTreeMap<String, String>,
    /// Merged with services of the same name in peer clusters.
    pub global: bool,
    /// Which backends are preferred.
    pub affinity: Affinity,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, may be empty; backends' ports are matched by it.
    pub name: Box<str>,
    /// IP protocol number.
    pub protocol: u8,
    /// Port of the virtual address.
    pub port: u16,
    /// Port of the workloads.
    pub target_port: u16,
}

/// Which backends of a global service are used (`service.cilium.io/affinity`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Affinity {
    /// All alike.
    #[default]
    None,
    /// This cluster's while one is ready.
    Local,
    /// Other clusters' while one is usable.
    Remote,
}

/// A workload of this cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadDeclaration {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Security identity that the server gave it; `None` until then.
    pub identity: Option<u32>,
}
