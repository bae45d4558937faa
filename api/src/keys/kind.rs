//! Kinds of shared records, the trees they stand in, and the prefixes to list and watch.

use std::fmt;

use super::{CACHE_PREFIX, STATE_PREFIX};

/// Where a record stands: published by this cluster, or copied from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    /// `cilium/state/`.
    State,
    /// `cilium/cache/`.
    Cache,
}

impl Tree {
    /// The prefix, with the slash.
    #[must_use]
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::State => STATE_PREFIX,
            Self::Cache => CACHE_PREFIX,
        }
    }
}

/// Kinds of records that clusters exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Machines.
    Nodes,
    /// Addresses of endpoints with their identities.
    Ip,
    /// Label sets of identities.
    Identities,
    /// Shared services.
    Services,
    /// Endpoints of shared services.
    EndpointSlices,
}

impl Kind {
    /// Every kind, in the order in which a reader wants them: identity, node, address, backends.
    pub const ALL: [Self; 5] = [
        Self::Identities,
        Self::Nodes,
        Self::Ip,
        Self::EndpointSlices,
        Self::Services,
    ];

    /// The part of the key that names the kind.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Ip => "ip",
            Self::Identities => "identities",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What a cluster publishes of this kind: the prefix to list and watch, ending in a slash.
    #[must_use]
    pub fn state_prefix(self, cluster: &str) -> String {
        match self {
            Self::Ip => "cilium/state/ip/v1/default/".to_owned(),
            Self::Identities => "cilium/state/identities/v1/id/".to_owned(),
            Self::Nodes | Self::Services | Self::EndpointSlices => {
                format!("cilium/state/{}/v1/{cluster}/", self.name())
            }
        }
    }

    /// The copy of a cluster's records of this kind: the prefix to list and watch, ending in a slash.
    #[must_use]
    pub fn cache_prefix(self, cluster: &str) -> String {
        match self {
            Self::Identities => format!("cilium/cache/identities/v1/{cluster}/id/"),
            Self::Ip | Self::Nodes | Self::Services | Self::EndpointSlices => {
                format!("cilium/cache/{}/v1/{cluster}/", self.name())
            }
        }
    }

    /// [`Self::state_prefix`] or [`Self::cache_prefix`].
    #[must_use]
    pub fn prefix(self, tree: Tree, cluster: &str) -> String {
        match tree {
            Tree::State => self.state_prefix(cluster),
            Tree::Cache => self.cache_prefix(cluster),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The cluster of an address or identity: keys under `state` do not name it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// The cluster that owns this store.
    Own,
    /// Copied from this cluster.
    Copy(String),
}

impl Origin {
    /// The name in the key; `None` for the store's own cluster.
    #[must_use]
    pub fn cluster(&self) -> Option<&str> {
        match self {
            Self::Own => None,
            Self::Copy(cluster) => Some(cluster),
        }
    }

    pub(super) fn tree(&self) -> Tree {
        match self {
            Self::Own => Tree::State,
            Self::Copy(_) => Tree::Cache,
        }
    }
}
