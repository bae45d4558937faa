//! The key schema: every key that we read or write as one typed value, its text, and the prefixes to list and watch.
//!
//! Keys under `cilium/` are Cilium's and frozen. Those under [`OWN_PREFIX`] are ours and never leave the cluster.
//! A key has exactly one text, so that equal objects have equal keys: anything else is refused.

mod kind;

use std::{fmt, net::IpAddr, str};

pub use kind::{Kind, Origin, Tree};

use crate::{
    address::{AddressOrPrefix, parse_address, parse_decimal},
    limits::MAX_KEY_BYTES,
    names::check_cluster_name,
};

/// Prefix of everything that follows Cilium's schema.
pub const CILIUM_PREFIX: &str = "cilium/";
/// Prefix of what this cluster offers.
pub const STATE_PREFIX: &str = "cilium/state/";
/// Prefix of the copies of other clusters.
pub const CACHE_PREFIX: &str = "cilium/cache/";
/// Prefix of cluster configurations.
pub const CLUSTER_CONFIG_PREFIX: &str = "cilium/cluster-config/";
/// Prefix of the canaries that end an initial list.
pub const SYNCED_PREFIX: &str = "cilium/synced/";
/// The heartbeat; also its own prefix, without a slash.
pub const HEARTBEAT_KEY: &str = "cilium/.heartbeat";
/// Prefix of our own records.
pub const OWN_PREFIX: &str = "clustermesh.io/";
/// Prefix of the allocator's bookkeeping, which agents do not see.
pub const ALLOC_PREFIX: &str = "clustermesh.io/alloc/";
/// Prefix of stored Workloads.
pub const WORKLOADS_PREFIX: &str = "clustermesh.io/workloads/v1/";
/// Prefix of stored Services.
pub const STORED_SERVICES_PREFIX: &str = "clustermesh.io/services/v1/";
/// Prefix of endpoint slices that no other cluster reads.
pub const LOCAL_SLICES_PREFIX: &str = "clustermesh.io/endpointslices/v1/";
/// Prefix of readiness records.
pub const READINESS_PREFIX: &str = "clustermesh.io/readiness/v1/";
/// Prefix of session states.
pub const SESSIONS_PREFIX: &str = "clustermesh.io/sessions/v1/";

/// Why bytes are not a key of the schema.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Longer than [`MAX_KEY_BYTES`].
    #[error("key of {0} bytes is longer than {MAX_KEY_BYTES}")]
    TooLong(usize),
    /// Not UTF-8.
    #[error("key {0:?} is not UTF-8")]
    NotUtf8(String),
    /// No kind of record has such keys.
    #[error("key {0:?} is of no known kind")]
    UnknownKind(String),
    /// A part is empty, missing, superfluous or malformed.
    #[error("key {key:?}: {reason}")]
    Malformed {
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A key of the schema.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKey {
    /// `cilium/.heartbeat`.
    Heartbeat,
    /// `cilium/cluster-config/<C>`.
    ClusterConfig {
        /// The described cluster.
        cluster: String,
    },
    /// `cilium/synced/<C>/cilium/<tree>/<kind>/v1`: the initial list of that prefix is complete.
    /// Identities and addresses are named without `/id`, `/default` and, like all others, without the cluster.
    Synced {
        /// The described cluster.
        cluster: String,
        /// Which prefix is complete.
        tree: Tree,
        /// Which prefix is complete.
        kind: Kind,
    },
    /// `cilium/<tree>/nodes/v1/<C>/<node>`.
    Node {
        /// Published or copied.
        tree: Tree,
        /// The node's cluster.
        cluster: String,
        /// The node.
        name: String,
    },
    /// `cilium/state/ip/v1/default/<ip>` or `cilium/cache/ip/v1/<C>/<ip>`.
    Ip {
        /// Whose address.
        origin: Origin,
        /// The address or prefix.
        address: AddressOrPrefix,
    },
    /// `cilium/state/identities/v1/id/<n>` or `cilium/cache/identities/v1/<C>/id/<n>`.
    Identity {
        /// Whose identity.
        origin: Origin,
        /// The number.
        id: u32,
    },
    /// `cilium/<tree>/services/v1/<C>/<ns>/<name>`.
    Service {
        /// Published or copied.
        tree: Tree,
        /// The publishing cluster.
        cluster: String,
        /// Namespace.
        namespace: String,
        /// Service.
        name: String,
    },
    /// `cilium/<tree>/endpointslices/v1/<C>/<ns>/<slice>`.
    EndpointSlice {
        /// Published or copied.
        tree: Tree,
        /// The publishing cluster.
        cluster: String,
        /// Namespace.
        namespace: String,
        /// Slice.
        name: String,
    },
    /// `clustermesh.io/workloads/v1/<ns>/<name>`.
    Workload {
        /// Namespace.
        namespace: String,
        /// Workload.
        name: String,
    },
    /// `clustermesh.io/services/v1/<ns>/<name>`.
    StoredService {
        /// Namespace.
        namespace: String,
        /// Service.
        name: String,
    },
    /// `clustermesh.io/endpointslices/v1/<ns>/<slice>`: endpoints of a service that is not shared with other clusters.
    LocalEndpointSlice {
        /// Namespace.
        namespace: String,
        /// Slice.
        name: String,
    },
    /// `clustermesh.io/readiness/v1/<node>/<ip>`.
    Readiness {
        /// The node that probes.
        node: String,
        /// The probed endpoint's address.
        address: IpAddr,
    },
    /// `clustermesh.io/sessions/v1/<node>`.
    Session {
        /// The node.
        node: String,
    },
    /// `clustermesh.io/alloc/<path>`: the allocator's own business.
    Alloc {
        /// What follows the prefix.
        path: String,
    },
}

impl RecordKey {
    /// Reads a key. Never panics, whatever the bytes.
    ///
    /// # Errors
    /// The bytes are too long, not UTF-8, of no known kind, or not the one text of their key.
    pub fn parse(key: &[u8]) -> Result<Self, KeyError> {
        if key.len() > MAX_KEY_BYTES {
            return Err(KeyError::TooLong(key.len()));
        }
        let text = str::from_utf8(key)
            .map_err(|_| KeyError::NotUtf8(String::from_utf8_lossy(key).into_owned()))?;
        let parsed = Self::parse_text(text).map_err(|fault| fault.at(text))?;
        if parsed.to_string() == text {
            Ok(parsed)
        } else {
            Err(KeyError::Malformed {
                key: text.to_owned(),
                reason: format!("not canonical, write {parsed}"),
            })
        }
    }

    /// The bytes to store.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.to_string().into_bytes()
    }

    /// Published or copied; `None` where that is no question.
    #[must_use]
    pub fn tree(&self) -> Option<Tree> {
        match self {
            Self::Synced { tree, .. }
            | Self::Node { tree, .. }
            | Self::Service { tree, .. }
            | Self::EndpointSlice { tree, .. } => Some(*tree),
            Self::Ip { origin, .. } | Self::Identity { origin, .. } => Some(origin.tree()),
            _ => None,
        }
    }

    /// The kind, for records that clusters exchange.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Self::Node { .. } => Some(Kind::Nodes),
            Self::Ip { .. } => Some(Kind::Ip),
            Self::Identity { .. } => Some(Kind::Identities),
            Self::Service { .. } => Some(Kind::Services),
            Self::EndpointSlice { .. } => Some(Kind::EndpointSlices),
            _ => None,
        }
    }

    /// The cluster that the key names; `None` for records of the store's own cluster that name none.
    #[must_use]
    pub fn cluster(&self) -> Option<&str> {
        match self {
            Self::ClusterConfig { cluster }
            | Self::Synced { cluster, .. }
            | Self::Node { cluster, .. }
            | Self::Service { cluster, .. }
            | Self::EndpointSlice { cluster, .. } => Some(cluster),
            Self::Ip { origin, .. } | Self::Identity { origin, .. } => origin.cluster(),
            _ => None,
        }
    }

    /// Where the copy of a published record of `cluster` goes. `None` for a key that is not copied,
    /// or that names another cluster.
    #[must_use]
    pub fn to_cache(&self, cluster: &str) -> Option<Self> {
        if self.tree() != Some(Tree::State) || self.cluster().is_some_and(|named| named != cluster)
        {
            return None;
        }
        let mut copy = self.clone();
        match &mut copy {
            Self::Synced { tree, .. }
            | Self::Node { tree, .. }
            | Self::Service { tree, .. }
            | Self::EndpointSlice { tree, .. } => *tree = Tree::Cache,
            Self::Ip { origin, .. } | Self::Identity { origin, .. } => {
                *origin = Origin::Copy(cluster.to_owned())
            }
            _ => return None,
        }
        Some(copy)
    }

    fn parse_text(text: &str) -> Result<Self, Fault> {
        if text == HEARTBEAT_KEY {
            Ok(Self::Heartbeat)
        } else if let Some(rest) = text.strip_prefix(CLUSTER_CONFIG_PREFIX) {
            Ok(Self::ClusterConfig {
                cluster: cluster(rest)?,
            })
        } else if let Some(rest) = text.strip_prefix(SYNCED_PREFIX) {
            parse_synced(rest)
        } else if let Some(rest) = text.strip_prefix(STATE_PREFIX) {
            parse_shared(Tree::State, rest)
        } else if let Some(rest) = text.strip_prefix(CACHE_PREFIX) {
            parse_shared(Tree::Cache, rest)
        } else if let Some(rest) = text.strip_prefix(OWN_PREFIX) {
            parse_own(rest)
        } else {
            Err(Fault::UnknownKind)
        }
    }
}

enum Fault {
    UnknownKind,
    Malformed(String),
}

impl Fault {
    fn at(self, key: &str) -> KeyError {
        match self {
            Self::UnknownKind => KeyError::UnknownKind(key.to_owned()),
            Self::Malformed(reason) => KeyError::Malformed {
                key: key.to_owned(),
                reason,
            },
        }
    }
}

fn malformed(reason: impl fmt::Display) -> Fault {
    Fault::Malformed(reason.to_string())
}

fn cluster(name: &str) -> Result<String, Fault> {
    check_cluster_name(name).map_err(malformed)?;
    Ok(name.to_owned())
}

/// Exactly `N` parts, none of them empty.
fn parts<const N: usize>(rest: &str) -> Result<[&str; N], Fault> {
    let found: Vec<&str> = rest.split('/').collect();
    if found.iter().any(|part| part.is_empty()) {
        return Err(malformed("a part is empty"));
    }
    let count = found.len();
    found
        .try_into()
        .map_err(|_| malformed(format!("{count} parts after the prefix, expected {N}")))
}

fn parse_synced(rest: &str) -> Result<RecordKey, Fault> {
    let [name, "cilium", tree, kind, "v1"] = parts::<5>(rest)? else {
        return Err(Fault::UnknownKind);
    };
    let tree = match tree {
        "state" => Tree::State,
        "cache" => Tree::Cache,
        _ => return Err(Fault::UnknownKind),
    };
    Ok(RecordKey::Synced {
        cluster: cluster(name)?,
        tree,
        kind: Kind::from_name(kind).ok_or(Fault::UnknownKind)?,
    })
}

fn parse_shared(tree: Tree, rest: &str) -> Result<RecordKey, Fault> {
    let (kind, rest) = rest.split_once("/v1/").ok_or(Fault::UnknownKind)?;
    match Kind::from_name(kind).ok_or(Fault::UnknownKind)? {
        Kind::Nodes => {
            let [name, node] = parts(rest)?;
            Ok(RecordKey::Node {
                tree,
                cluster: cluster(name)?,
                name: node.to_owned(),
            })
        }
        Kind::Ip => {
            let (space, address) = rest
                .split_once('/')
                .ok_or_else(|| malformed("no address"))?;
            let origin = match (tree, space) {
                (Tree::State, "default") => Origin::Own,
                (Tree::State, _) => return Err(malformed("the address space is not \"default\"")),
                (Tree::Cache, name) => Origin::Copy(cluster(name)?),
            };
            Ok(RecordKey::Ip {
                origin,
                address: address.parse().map_err(malformed)?,
            })
        }
        Kind::Identities => {
            let (origin, id) = match tree {
                // `value` and `locks` belong to Cilium's allocator.
                Tree::State => (
                    Origin::Own,
                    rest.strip_prefix("id/").ok_or(Fault::UnknownKind)?,
                ),
                Tree::Cache => match parts(rest)? {
                    [name, "id", id] => (Origin::Copy(cluster(name)?), id),
                    _ => return Err(Fault::UnknownKind),
                },
            };
            let id = parse_decimal(id)
                .ok_or_else(|| malformed(format!("{id:?} is not an identity number")))?;
            Ok(RecordKey::Identity { origin, id })
        }
        Kind::Services => {
            let [name, namespace, service] = parts(rest)?;
            Ok(RecordKey::Service {
                tree,
                cluster: cluster(name)?,
                namespace: namespace.to_owned(),
                name: service.to_owned(),
            })
        }
        Kind::EndpointSlices => {
            let [name, namespace, slice] = parts(rest)?;
            Ok(RecordKey::EndpointSlice {
                tree,
                cluster: cluster(name)?,
                namespace: namespace.to_owned(),
                name: slice.to_owned(),
            })
        }
    }
}

fn parse_own(rest: &str) -> Result<RecordKey, Fault> {
    if let Some(rest) = rest.strip_prefix("workloads/v1/") {
        let [namespace, name] = parts(rest)?;
        Ok(RecordKey::Workload {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    } else if let Some(rest) = rest.strip_prefix("services/v1/") {
        let [namespace, name] = parts(rest)?;
        Ok(RecordKey::StoredService {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    } else if let Some(rest) = rest.strip_prefix("endpointslices/v1/") {
        let [namespace, name] = parts(rest)?;
        Ok(RecordKey::LocalEndpointSlice {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    } else if let Some(rest) = rest.strip_prefix("readiness/v1/") {
        let [node, address] = parts(rest)?;
        Ok(RecordKey::Readiness {
            node: node.to_owned(),
            address: parse_address(address).map_err(malformed)?,
        })
    } else if let Some(rest) = rest.strip_prefix("sessions/v1/") {
        let [node] = parts(rest)?;
        Ok(RecordKey::Session {
            node: node.to_owned(),
        })
    } else if let Some(path) = rest.strip_prefix("alloc/") {
        if path.is_empty() {
            return Err(malformed("a part is empty"));
        }
        Ok(RecordKey::Alloc {
            path: path.to_owned(),
        })
    } else {
        Err(Fault::UnknownKind)
    }
}

impl fmt::Display for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Heartbeat => f.write_str(HEARTBEAT_KEY),
            Self::ClusterConfig { cluster } => write!(f, "{CLUSTER_CONFIG_PREFIX}{cluster}"),
            Self::Synced {
                cluster,
                tree,
                kind,
            } => {
                write!(f, "{SYNCED_PREFIX}{cluster}/{}{kind}/v1", tree.prefix())
            }
            Self::Node {
                tree,
                cluster,
                name,
            } => write!(f, "{}nodes/v1/{cluster}/{name}", tree.prefix()),
            Self::Ip { origin, address } => {
                let space = origin.cluster().unwrap_or("default");
                write!(f, "{}ip/v1/{space}/{address}", origin.tree().prefix())
            }
            Self::Identity { origin, id } => match origin {
                Origin::Own => write!(f, "{STATE_PREFIX}identities/v1/id/{id}"),
                Origin::Copy(cluster) => write!(f, "{CACHE_PREFIX}identities/v1/{cluster}/id/{id}"),
            },
            Self::Service {
                tree,
                cluster,
                namespace,
                name,
            } => write!(
                f,
                "{}services/v1/{cluster}/{namespace}/{name}",
                tree.prefix()
            ),
            Self::EndpointSlice {
                tree,
                cluster,
                namespace,
                name,
            } => write!(
                f,
                "{}endpointslices/v1/{cluster}/{namespace}/{name}",
                tree.prefix()
            ),
            Self::Workload { namespace, name } => write!(f, "{WORKLOADS_PREFIX}{namespace}/{name}"),
            Self::StoredService { namespace, name } => {
                write!(f, "{STORED_SERVICES_PREFIX}{namespace}/{name}")
            }
            Self::LocalEndpointSlice { namespace, name } => {
                write!(f, "{LOCAL_SLICES_PREFIX}{namespace}/{name}")
            }
            Self::Readiness { node, address } => write!(f, "{READINESS_PREFIX}{node}/{address}"),
            Self::Session { node } => write!(f, "{SESSIONS_PREFIX}{node}"),
            Self::Alloc { path } => write!(f, "{ALLOC_PREFIX}{path}"),
        }
    }
}

/// The end of the range of all keys that start with `prefix`, as etcd clients compute it;
/// a single zero byte, which means "to the end", when there is no such key.
#[must_use]
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
pub(crate) mod tests;
