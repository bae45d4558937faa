//! What records must satisfy, and what a cluster may claim. Pure checks; every error names its object.

use std::ops::Range;

use crate::{
    address::AddressError,
    identity_split::{IdentitySplit, NumberingError, is_reserved},
    keys::RecordKey,
    limits::{
        MAX_ADDRESSES_PER_NODE, MAX_BACKENDS_PER_SERVICE, MAX_ENDPOINTS_PER_SLICE,
        MAX_FRONTENDS_PER_SERVICE, MAX_LABELS_PER_IDENTITY, MAX_POD_CIDRS_PER_NODE,
        MAX_PORTS_PER_ENDPOINT,
    },
    names::{NameError, check_cluster_name, check_dns_subdomain},
    record::Record,
    records::{ClusterConfig, ClusterService, EndpointSlice, Identity, IpIdentityPair, Node},
};

/// Name and id that a cluster of the mesh may have.
///
/// # Errors
/// A bad name, the name `default`, or an id outside the division.
pub fn check_cluster(name: &str, id: u32, split: IdentitySplit) -> Result<(), ClusterError> {
    check_cluster_name(name)?;
    if name == "default" {
        return Err(NameError::ReservedCluster.into());
    }
    split.check_cluster_id(id)?;
    Ok(())
}

/// Why a cluster cannot take part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// Its name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Its number.
    #[error(transparent)]
    Number(#[from] NumberingError),
}

/// What a record must be, to be taken from a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Claimant<'a> {
    /// The cluster's name.
    pub cluster: &'a str,
    /// Its id, as its configuration says.
    pub cluster_id: u32,
    /// The mesh's division of identities.
    pub split: IdentitySplit,
}

/// A record that its cluster must not publish, or that is unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {violation}")]
pub struct ValidationError {
    /// Kind and name of the record.
    pub object: String,
    /// The broken rule.
    pub violation: Violation,
}

/// The rules; [`Violation::reason`] is a short name for metrics.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Another cluster's name.
    #[error("names cluster {found:?}, expected {expected:?}")]
    Cluster {
        /// In the record.
        found: String,
        /// The claimant.
        expected: String,
    },
    /// Another cluster's id.
    #[error("has cluster id {found}, expected {expected}")]
    ClusterId {
        /// In the record.
        found: u32,
        /// The claimant's.
        expected: u32,
    },
    /// The record describes another object than its key.
    #[error("names {found:?}, its key says {expected:?}")]
    Key {
        /// In the record.
        found: String,
        /// In the key.
        expected: String,
    },
    /// An identity of another cluster.
    #[error("identity {identity} is not of cluster id {cluster_id}")]
    Identity {
        /// The number.
        identity: u32,
        /// The claimant's id.
        cluster_id: u32,
    },
    /// A label set without labels, or with the label of another cluster.
    #[error("label {CLUSTER_LABEL} is {found:?}, expected {expected:?}", CLUSTER_LABEL = crate::records::CLUSTER_LABEL)]
    ClusterLabel {
        /// In the label set; empty when absent.
        found: String,
        /// The claimant.
        expected: String,
    },
    /// A name is missing or malformed.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Text that is no address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// More of something than the limit allows.
    #[error("has {count} {what}, at most {limit} are taken")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// A port number of 0.
    #[error("port {0:?} has number 0")]
    Port(String),
    /// An address family that nobody serves.
    #[error("address type {0:?} is not IPv4 or IPv6")]
    AddressType(String),
    /// The key is of another kind than the record.
    #[error("is stored under a key of another kind")]
    Kind,
}

impl Violation {
    /// A short stable name, for metrics and counters.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Cluster { .. } => "cluster-name",
            Self::ClusterId { .. } => "cluster-id",
            Self::Key { .. } => "key-mismatch",
            Self::Identity { .. } => "identity-range",
            Self::ClusterLabel { .. } => "cluster-label",
            Self::Name(_) => "name",
            Self::Address(_) => "address",
            Self::Limit { .. } => "limit",
            Self::Port(_) => "port",
            Self::AddressType(_) => "address-type",
            Self::Kind => "kind",
        }
    }
}

impl Claimant<'_> {
    /// Checks any record against its key and this cluster; kinds without rules pass.
    ///
    /// # Errors
    /// The first broken rule, with the key as the object's name.
    pub fn check(&self, key: &RecordKey, record: &Record) -> Result<(), ValidationError> {
        self.check_inner(key, record)
            .map_err(|violation| ValidationError {
                object: key.to_string(),
                violation,
            })
    }

    fn check_inner(&self, key: &RecordKey, record: &Record) -> Result<(), Violation> {
        match (key, record) {
            (RecordKey::Node { name, .. }, Record::Node(node)) => self.check_node(name, node),
            (RecordKey::Ip { address, .. }, Record::Ip(pair)) => {
                let found = pair.address_or_prefix();
                same(&found.to_string(), &address.to_string())?;
                self.check_ip(pair)
            }
            (RecordKey::Identity { id, .. }, Record::Identity(identity)) => {
                self.check_identity(*id, identity)
            }
            (
                RecordKey::Service {
                    namespace, name, ..
                },
                Record::Service(service),
            ) => self.check_service(namespace, name, service),
            (
                RecordKey::EndpointSlice {
                    namespace, name, ..
                },
                Record::EndpointSlice(slice),
            ) => self.check_slice(namespace, name, slice),
            (RecordKey::ClusterConfig { cluster }, Record::ClusterConfig(config)) => {
                self.check_cluster_name(cluster)?;
                self.check_cluster_config(config)
            }
            (RecordKey::Synced { cluster, .. }, Record::Canary(_)) => {
                self.check_cluster_name(cluster)
            }
            _ if key.kind().is_some() => Err(Violation::Kind),
            _ => Ok(()),
        }
    }

    fn check_cluster_name(&self, found: &str) -> Result<(), Violation> {
        if found == self.cluster {
            return Ok(());
        }
        Err(Violation::Cluster {
            found: found.to_owned(),
            expected: self.cluster.to_owned(),
        })
    }

    fn check_cluster_id(&self, found: u32) -> Result<(), Violation> {
        if found == self.cluster_id {
            return Ok(());
        }
        Err(Violation::ClusterId {
            found,
            expected: self.cluster_id,
        })
    }

    fn check_cluster_config(&self, config: &ClusterConfig) -> Result<(), Violation> {
        self.check_cluster_id(config.id)
    }

    /// A node record: its cluster, its name as in the key, its limits.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn check_node(&self, name: &str, node: &Node) -> Result<(), Violation> {
        check_dns_subdomain(&node.name)?;
        same(&node.name, name)?;
        self.check_cluster_name(&node.cluster)?;
        self.check_cluster_id(node.cluster_id)?;
        within("addresses", node.ip_addresses.len(), MAX_ADDRESSES_PER_NODE)?;
        within(
            "pod CIDRs",
            node.pod_cidrs().count(),
            MAX_POD_CIDRS_PER_NODE,
        )
    }

    /// The identity of an address: of this cluster, or reserved (whose use is the caller's question).
    ///
    /// # Errors
    /// The identity is another cluster's, or there are too many named ports.
    pub fn check_ip(&self, pair: &IpIdentityPair) -> Result<(), Violation> {
        if !is_reserved(pair.id) {
            self.check_identity_number(pair.id)?;
        }
        within(
            "named ports",
            pair.named_ports.len(),
            MAX_PORTS_PER_ENDPOINT,
        )
    }

    /// The number and the cluster label of a label set.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn check_identity(&self, id: u32, identity: &Identity) -> Result<(), Violation> {
        self.check_identity_number(id)?;
        let found = identity.cluster().unwrap_or_default();
        if found != self.cluster {
            return Err(Violation::ClusterLabel {
                found: found.to_owned(),
                expected: self.cluster.to_owned(),
            });
        }
        within("labels", identity.labels().count(), MAX_LABELS_PER_IDENTITY)
    }

    fn check_identity_number(&self, identity: u32) -> Result<(), Violation> {
        // Bits above the 24 would be another cluster's after the shift, so one comparison covers both.
        if !is_reserved(identity) && self.split.cluster_of(identity) == self.cluster_id {
            return Ok(());
        }
        Err(Violation::Identity {
            identity,
            cluster_id: self.cluster_id,
        })
    }

    /// A service record: names as in the key, addresses that parse, limits.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn check_service(
        &self,
        namespace: &str,
        name: &str,
        service: &ClusterService,
    ) -> Result<(), Violation> {
        self.check_cluster_name(&service.cluster)?;
        check_dns_subdomain(&service.namespace)?;
        check_dns_subdomain(&service.name)?;
        same(
            &format!("{}/{}", service.namespace, service.name),
            &format!("{namespace}/{name}"),
        )?;
        self.check_cluster_id(service.cluster_id)?;
        within(
            "frontends",
            service.frontends.len(),
            MAX_FRONTENDS_PER_SERVICE,
        )?;
        within("backends", service.backends.len(), MAX_BACKENDS_PER_SERVICE)?;
        for (text, ports) in service.frontends.iter().chain(&service.backends) {
            crate::address::parse_address(text)?;
            within("ports", ports.len(), MAX_PORTS_PER_ENDPOINT)?;
            if let Some((name, _)) = ports.iter().find(|(_, port)| port.port == 0) {
                return Err(Violation::Port(name.clone()));
            }
        }
        Ok(())
    }

    /// An endpoint slice: names as in the key, addresses of the slice's family, limits.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn check_slice(
        &self,
        namespace: &str,
        name: &str,
        slice: &EndpointSlice,
    ) -> Result<(), Violation> {
        self.check_cluster_name(&slice.cluster)?;
        check_dns_subdomain(&slice.namespace)?;
        check_dns_subdomain(&slice.name)?;
        same(
            &format!("{}/{}", slice.namespace, slice.name),
            &format!("{namespace}/{name}"),
        )?;
        self.check_cluster_id(slice.cluster_id)?;
        within("endpoints", slice.endpoints.len(), MAX_ENDPOINTS_PER_SLICE)?;
        within("ports", slice.ports.len(), MAX_PORTS_PER_ENDPOINT)?;
        let ipv4 = match slice.address_type.as_str() {
            "IPv4" => true,
            "IPv6" => false,
            other => return Err(Violation::AddressType(other.to_owned())),
        };
        for text in slice
            .endpoints
            .iter()
            .flat_map(|endpoint| &endpoint.addresses)
        {
            if crate::address::parse_address(text)?.is_ipv4() != ipv4 {
                return Err(AddressError::Malformed(text.clone()).into());
            }
        }
        let valid: Range<i32> = 1..65536;
        match slice
            .ports
            .iter()
            .find(|port| !port.port.is_none_or(|number| valid.contains(&number)))
        {
            Some(port) => Err(Violation::Port(port.name.clone().unwrap_or_default())),
            None => Ok(()),
        }
    }
}

fn same(found: &str, expected: &str) -> Result<(), Violation> {
    if found == expected {
        return Ok(());
    }
    Err(Violation::Key {
        found: found.to_owned(),
        expected: expected.to_owned(),
    })
}

fn within(what: &'static str, count: usize, limit: usize) -> Result<(), Violation> {
    if count <= limit {
        return Ok(());
    }
    Err(Violation::Limit { what, count, limit })
}

#[cfg(test)]
mod tests;
