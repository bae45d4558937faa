//! Key and value to [`Change`]: one bad record is one refusal and touches nothing else.

use std::net::IpAddr;

use base64::Engine as _;
use clustermesh_api::{
    IdentitySplit, Record, RecordError, RecordKey, Tree,
    address::parse_address,
    keys::{KeyError, Origin},
    manifest::{self, StoredService},
    records::{self, AddressType, Endpoint, EndpointSlicesExportMode, WIREGUARD_PORT_DEFAULT},
    validate::{Claimant, Violation},
};

use crate::change::{
    AddressOwner, Affinity, BackendEndpoint, BackendPort, Change, ClusterConfig, ClusterName,
    Condition, EndpointGroup, NodeKey, NodeRecord, ServiceDeclaration, ServiceName, ServicePort,
    SliceRecord, WireguardKey, WorkloadDeclaration,
};
use crate::refused::{Reason, Refusal};
use crate::rotation::EPOCH_ANY;

/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;

/// What decoding must know.
#[derive(Clone, Debug)]
pub struct Decoder {
    cluster: ClusterName,
    split: IdentitySplit,
}

impl Decoder {
    /// A decoder for an agent of `cluster`.
    #[must_use]
    pub fn new(cluster: ClusterName, split: IdentitySplit) -> Self {
        Self { cluster, split }
    }

    /// Reads one record of the agents' stream; no value means that it was deleted. A key of a kind that
    /// says nothing to a node is [`Change::Nothing`].
    ///
    /// # Errors
    /// A refusal that names the key, for a record that is malformed or contradicts its key.
    pub fn decode(&self, key: &[u8], value: Option<&[u8]>) -> Result<Change, Refusal> {
        let parsed = match RecordKey::parse(key) {
            Ok(parsed) => parsed,
            Err(KeyError::UnknownKind(_)) => return Ok(Change::Nothing),
            Err(error) => {
                return Err(refusal(
                    Reason::Malformed,
                    String::from_utf8_lossy(key).into_owned(),
                    &error,
                ));
            }
        };
        let record = match value {
            None => None,
            Some(value) if matters(&parsed) => {
                let record = Record::decode(&parsed, value).map_err(|error| {
                    let reason = match error {
                        RecordError::TooLarge { .. } => Reason::TooLarge,
                        _ => Reason::Malformed,
                    };
                    refusal(reason, parsed.to_string(), &error)
                })?;
                self.check(&parsed, &record)?;
                Some(record)
            }
            Some(_) => return Ok(Change::Nothing),
        };
        self.change(parsed, record)
    }

    /// The record speaks of what its key says. Whether its cluster may claim that id is the model's question.
    fn check(&self, key: &RecordKey, record: &Record) -> Result<(), Refusal> {
        let cluster = key.cluster().unwrap_or(&self.cluster);
        let cluster_id = match record {
            Record::Node(node) => node.cluster_id,
            Record::Service(service) => service.cluster_id,
            Record::EndpointSlice(slice) => slice.cluster_id,
            Record::ClusterConfig(config) => config.id,
            Record::Ip(pair) => self.split.cluster_of(pair.id),
            _ => return Ok(()),
        };
        let claimant = Claimant {
            cluster,
            cluster_id,
            split: self.split,
        };
        claimant.check(key, record).map_err(|error| {
            let reason = match error.violation {
                Violation::Cluster { .. } | Violation::Key { .. } => Reason::NotOwnName,
                Violation::Limit { .. } => Reason::TooLarge,
                _ => Reason::Malformed,
            };
            refusal(reason, error.object, &error.violation)
        })
    }

    fn name_of(&self, cluster: &str) -> ClusterName {
        if cluster == &*self.cluster {
            self.cluster.clone()
        } else {
            cluster.into()
        }
    }

    fn change(&self, key: RecordKey, record: Option<Record>) -> Result<Change, Refusal> {
        let change = match (key, record) {
            (
                RecordKey::Node {
                    tree,
                    cluster,
                    name,
                },
                record,
            ) => {
                if !self.readable(tree, &cluster) {
                    return Ok(Change::Nothing);
                }
                let node = match record {
                    Some(Record::Node(node)) => Some(Box::new(node_record(&node))),
                    _ => None,
                };
                Change::Node {
                    cluster: self.name_of(&cluster),
                    name: name.into(),
                    node,
                }
            }
            (RecordKey::Ip { origin, address }, record) => {
                let cluster = match &origin {
                    Origin::Own => self.cluster.clone(),
                    Origin::Copy(cluster) if self.readable(Tree::Cache, cluster) => {
                        self.name_of(cluster)
                    }
                    Origin::Copy(_) => return Ok(Change::Nothing),
                };
                let owner = match record {
                    Some(Record::Ip(pair)) => Some(AddressOwner {
                        identity: pair.id,
                        host: pair.host_ip.map(|host| host.to_canonical()),
                    }),
                    _ => None,
                };
                Change::Address {
                    cluster,
                    prefix: address.network(),
                    owner,
                }
            }
            (
                RecordKey::Service {
                    tree,
                    cluster,
                    namespace,
                    name,
                },
                record,
            ) => {
                // Our own copy of this record is for peers; our backends come from slices.
                if tree == Tree::State || !self.readable(tree, &cluster) {
                    return Ok(Change::Nothing);
                }
                let groups = match record {
                    Some(Record::Service(service)) => Some(legacy_groups(&service)),
                    _ => None,
                };
                Change::LegacyBackends {
                    cluster: self.name_of(&cluster),
                    service: service_name(namespace, name),
                    groups,
                }
            }
            (
                RecordKey::EndpointSlice {
                    tree,
                    cluster,
                    namespace,
                    name,
                },
                record,
            ) => {
                if !self.readable(tree, &cluster) {
                    return Ok(Change::Nothing);
                }
                self.slice(cluster, Part::Published, &namespace, &name, record)?
            }
            (RecordKey::LocalEndpointSlice { namespace, name }, record) => {
                let own = self.cluster.to_string();
                self.slice(own, Part::Local, &namespace, &name, record)?
            }
            (RecordKey::ClusterConfig { cluster }, record) => {
                let config = match record {
                    Some(Record::ClusterConfig(config)) => Some(ClusterConfig {
                        id: u16::try_from(config.id).unwrap_or(0),
                        slices: matches!(
                            config.capabilities.endpoint_slices_export_mode,
                            EndpointSlicesExportMode::ServicesAndEndpointSlices
                                | EndpointSlicesExportMode::EndpointSlicesOnly
                        ),
                    }),
                    _ => None,
                };
                Change::Cluster {
                    name: self.name_of(&cluster),
                    config,
                }
            }
            (RecordKey::StoredService { namespace, name }, record) => {
                let declaration = match record {
                    Some(Record::StoredService(stored)) => Some(Box::new(declaration(&stored))),
                    _ => None,
                };
                Change::Service {
                    service: service_name(namespace, name),
                    declaration,
                }
            }
            (RecordKey::Workload { namespace, name }, record) => {
                let declaration = match record {
                    Some(Record::Workload(stored)) => Some(Box::new(WorkloadDeclaration {
                        labels: stored.object.metadata.labels,
                        identity: Some(stored.status.identity).filter(|identity| *identity != 0),
                    })),
                    _ => None,
                };
                Change::Workload {
                    workload: service_name(namespace, name),
                    declaration,
                }
            }
            _ => Change::Nothing,
        };
        Ok(change)
    }

    /// Own records are read where we publish them, peers' records in their copies.
    fn readable(&self, tree: Tree, cluster: &str) -> bool {
        (tree == Tree::State) == (cluster == &*self.cluster)
    }

    fn slice(
        &self,
        cluster: String,
        part: Part,
        namespace: &str,
        name: &str,
        record: Option<Record>,
    ) -> Result<Change, Refusal> {
        let name = match part {
            Part::Published => format!("{namespace}/{name}"),
            Part::Local => format!("{namespace}/{name}/local"),
        };
        let slice = match record {
            Some(Record::EndpointSlice(slice)) => {
                let object = format!("endpoint slice {cluster}/{name}");
                Some(Box::new(slice_record(&slice).map_err(|detail| {
                    Refusal {
                        reason: Reason::Malformed,
                        object,
                        detail,
                    }
                })?))
            }
            _ => None,
        };
        Ok(Change::Slice {
            cluster: self.name_of(&cluster),
            name: name.into(),
            slice,
        })
    }
}

/// Where a slice stands; a service that becomes shared has both for a moment, perhaps of one name.
#[derive(Clone, Copy)]
enum Part {
    Published,
    Local,
}

/// Kinds of which the value says something to a node.
fn matters(key: &RecordKey) -> bool {
    matches!(
        key,
        RecordKey::Node { .. }
            | RecordKey::Ip { .. }
            | RecordKey::Service { .. }
            | RecordKey::EndpointSlice { .. }
            | RecordKey::LocalEndpointSlice { .. }
            | RecordKey::ClusterConfig { .. }
            | RecordKey::StoredService { .. }
            | RecordKey::Workload { .. }
    )
}

fn refusal(reason: Reason, object: String, error: &impl std::fmt::Display) -> Refusal {
    Refusal {
        reason,
        object,
        detail: error.to_string(),
    }
}

fn service_name(namespace: String, name: String) -> ServiceName {
    ServiceName {
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn node_record(node: &records::Node) -> NodeRecord {
    let of_type = |wanted: &AddressType| -> Vec<IpAddr> {
        node.addresses_of(wanted)
            .map(|ip| ip.to_canonical())
            .collect()
    };
    let mut underlay = of_type(&AddressType::InternalIP);
    underlay.extend(of_type(&AddressType::ExternalIP));
    for ipv4 in [true, false] {
        // A family of which only other types are known.
        if let Some(ip) = node.tunnel_endpoint(ipv4)
            && !underlay.contains(&ip)
        {
            underlay.push(ip);
        }
    }
    let present = |ips: [Option<IpAddr>; 2]| ips.into_iter().flatten().collect();
    NodeRecord {
        underlay,
        routers: of_type(&AddressType::CiliumInternalIP),
        health: present([node.ipv4_health_ip, node.ipv6_health_ip]),
        ingress: present([node.ipv4_ingress_ip, node.ipv6_ingress_ip]),
        pod_cidrs: node.pod_cidrs().map(|cidr| cidr.0).collect(),
        keys: node_keys(node),
    }
}

/// Keys that are none are left out: such a node is one that does not encrypt.
fn node_keys(node: &records::Node) -> Vec<NodeKey> {
    let key = |text: &str, port: u16, epoch: u32| {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text);
        let key: WireguardKey = bytes.ok()?.try_into().ok()?;
        let port = if port == 0 {
            WIREGUARD_PORT_DEFAULT
        } else {
            port
        };
        Some(NodeKey { epoch, key, port })
    };
    let more = node
        .extension
        .as_ref()
        .and_then(|extension| extension.wireguard.as_ref());
    let current = match more {
        // Who counts epochs cannot mean all of them: such a key would stand beside others of its node on one device.
        Some(more) if more.epoch == EPOCH_ANY => None,
        Some(more) => key(&node.wireguard_pub_key, more.port, more.epoch),
        None => key(&node.wireguard_pub_key, 0, EPOCH_ANY),
    };
    let next = more
        .and_then(|more| more.next.as_ref())
        .filter(|next| next.epoch != EPOCH_ANY)
        .and_then(|next| key(&next.pub_key, next.port, next.epoch));
    // A next key without a present one, or the same, or of the same epoch, has no device of its own.
    let next = next.filter(|next| {
        current.is_some_and(|current| current.epoch != next.epoch && current.key != next.key)
    });
    current.into_iter().chain(next).collect()
}

/// The protocol number; `None` for one that the data path does not balance.
fn protocol(name: &str) -> Option<u8> {
    match name {
        "" | "TCP" => Some(PROTOCOL_TCP),
        "UDP" => Some(PROTOCOL_UDP),
        _ => None,
    }
}

/// Backends of a service record: grouped by equal ports.
fn legacy_groups(service: &records::ClusterService) -> Vec<EndpointGroup> {
    let mut groups: Vec<EndpointGroup> = Vec::new();
    for (text, ports) in &service.backends {
        let Ok(address) = parse_address(text) else {
            continue;
        };
        let ports: Vec<BackendPort> = ports
            .iter()
            .filter_map(|(name, port)| {
                Some(BackendPort {
                    name: name.as_str().into(),
                    protocol: protocol(&port.protocol)?,
                    port: port.port,
                })
            })
            .collect();
        // The older schema lists usable backends only.
        let endpoint = BackendEndpoint {
            address: address.to_canonical(),
            condition: Condition::Ready,
        };
        match groups.iter_mut().find(|group| group.ports == ports) {
            Some(group) => group.endpoints.push(endpoint),
            None => groups.push(EndpointGroup {
                ports,
                endpoints: vec![endpoint],
            }),
        }
    }
    groups
}

fn slice_record(slice: &records::EndpointSlice) -> Result<SliceRecord, String> {
    let Some(service) = slice.service_name() else {
        return Err(format!("label {} is missing", records::SERVICE_NAME_LABEL));
    };
    let ports = slice
        .ports
        .iter()
        .filter_map(|port| {
            Some(BackendPort {
                name: port.name.as_deref().unwrap_or_default().into(),
                protocol: protocol(port.protocol.as_deref().unwrap_or_default())?,
                port: port.port.and_then(|port| u16::try_from(port).ok())?,
            })
        })
        .collect();
    let mut endpoints = Vec::with_capacity(slice.endpoints.len());
    for endpoint in &slice.endpoints {
        let condition = condition(endpoint);
        // The addresses of one endpoint are interchangeable: readers take the first (Kubernetes, EndpointSlice).
        if let Some(text) = endpoint.addresses.first() {
            let address = parse_address(text).map_err(|error| error.to_string())?;
            endpoints.push(BackendEndpoint {
                address: address.to_canonical(),
                condition,
            });
        }
    }
    Ok(SliceRecord {
        service: service_name(slice.namespace.clone(), service.to_owned()),
        group: EndpointGroup { ports, endpoints },
    })
}

/// The condition of an endpoint by its record (KEP-1669).
fn condition(endpoint: &Endpoint) -> Condition {
    if endpoint.is_ready() {
        Condition::Ready
    } else if endpoint.is_serving() && endpoint.is_terminating() {
        Condition::Draining
    } else {
        Condition::Unusable
    }
}

fn declaration(stored: &StoredService) -> ServiceDeclaration {
    let annotations = manifest::ServiceAnnotations::read(&stored.object.metadata.annotations);
    let spec = &stored.object.spec;
    ServiceDeclaration {
        addresses: stored.status.cluster_ips.clone(),
        ports: spec
            .ports
            .iter()
            .map(|port| ServicePort {
                name: port.name.as_str().into(),
                protocol: match port.protocol {
                    manifest::Protocol::Tcp => PROTOCOL_TCP,
                    manifest::Protocol::Udp => PROTOCOL_UDP,
                },
                port: port.port,
                target_port: port.target(),
            })
            .collect(),
        selector: spec.selector.clone(),
        global: annotations.global,
        affinity: match annotations.affinity {
            manifest::Affinity::None => Affinity::None,
            manifest::Affinity::Local => Affinity::Local,
            manifest::Affinity::Remote => Affinity::Remote,
        },
    }
}

#[cfg(test)]
mod tests;
