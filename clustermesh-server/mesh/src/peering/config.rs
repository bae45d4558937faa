//! What a peer says of itself, judged before anything else is read from it.

use std::collections::BTreeMap;

use bytes::Bytes;
use clustermesh_api::IdentitySplit;
use clustermesh_api::keys::{Kind, Origin, RecordKey, Tree};
use clustermesh_api::records::{ClusterConfig, EndpointSlicesExportMode};
use clustermesh_api::validate::{ClusterError, check_cluster};

use crate::settings::ClusterSettings;

/// A peer whose configuration was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name, in our configuration and in all its records.
    pub cluster: String,
    /// Its cluster id.
    pub cluster_id: u32,
    /// How identities are divided, the same as ours.
    pub split: IdentitySplit,
    /// Its records stand under `cilium/cache/` of the store that we read.
    pub cached: bool,
    /// It marks complete initial lists with canaries.
    pub synced_canaries: bool,
    /// It publishes `services/v1`.
    pub services: bool,
    /// It publishes `endpointslices/v1`.
    pub endpoint_slices: bool,
}

/// Why nothing is copied from a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigRefused {
    /// No record under `cilium/cluster-config/<name>`.
    #[error(
        "peer {0}: its store has no cluster configuration under cilium/cluster-config/{0}: check that the peer's \
         cluster name is really {0}"
    )]
    Missing(String),
    /// The peer's server does not let us read it: it serves its own configuration only.
    #[error(
        "peer {0}: its server does not let us read cilium/cluster-config/{0}: check that the peer's cluster name is \
         really {0} and that our certificate for it has the role of a peer"
    )]
    Denied(String),
    /// The record cannot be read.
    #[error("peer {peer}: its cluster configuration cannot be read: {reason}")]
    Malformed {
        /// The peer.
        peer: String,
        /// What is wrong.
        reason: String,
    },
    /// The peer has our name.
    #[error("peer {0} has the name of this cluster: rename one of the two")]
    OwnName(String),
    /// The name or id cannot take part.
    #[error("peer {peer}: {reason}")]
    Cluster {
        /// The peer.
        peer: String,
        /// What is wrong.
        reason: ClusterError,
    },
    /// The peer has our id.
    #[error(
        "peer {peer} has cluster id {id}, which is this cluster's: give every cluster its own id"
    )]
    OwnId {
        /// The peer.
        peer: String,
        /// The id.
        id: u32,
    },
    /// Another peer has the id.
    #[error(
        "peer {peer} has cluster id {id}, which peer {holder} has already: give every cluster its own id"
    )]
    IdTaken {
        /// The peer.
        peer: String,
        /// The id.
        id: u32,
        /// Who had it first.
        holder: String,
    },
    /// Identities are divided in another way.
    #[error(
        "peer {peer} has max-connected-clusters {theirs}, this cluster {ours}: it must be the same in the whole mesh"
    )]
    MaxConnectedClusters {
        /// The peer.
        peer: String,
        /// Its value.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// We do not know what the peer publishes.
    #[error(
        "peer {peer} publishes endpoints in mode {mode:?}, which this version does not know: upgrade this server"
    )]
    ExportMode {
        /// The peer.
        peer: String,
        /// The mode.
        mode: String,
    },
}

/// Judges the value of `cilium/cluster-config/<name>` of a peer.
///
/// `taken` maps the ids of all other peers to their names.
///
/// # Errors
/// The peer must not be copied from; the text says why and what to do.
pub fn accept_config(
    settings: &ClusterSettings,
    name: &str,
    value: Option<&[u8]>,
    taken: &BTreeMap<u32, String>,
) -> Result<Peer, ConfigRefused> {
    let peer = || name.to_owned();
    if name == settings.name {
        return Err(ConfigRefused::OwnName(peer()));
    }
    let value = value.ok_or_else(|| ConfigRefused::Missing(peer()))?;
    let config = ClusterConfig::decode(value).map_err(|error| ConfigRefused::Malformed {
        peer: peer(),
        reason: error.to_string(),
    })?;
    let ours = u32::from(settings.split);
    let theirs = match config.capabilities.max_connected_clusters {
        // Left out by writers that know only 255.
        0 => u32::from(IdentitySplit::Clusters255),
        value => value,
    };
    if theirs != ours {
        return Err(ConfigRefused::MaxConnectedClusters {
            peer: peer(),
            theirs,
            ours,
        });
    }
    check_cluster(name, config.id, settings.split).map_err(|reason| ConfigRefused::Cluster {
        peer: peer(),
        reason,
    })?;
    if config.id == settings.id {
        return Err(ConfigRefused::OwnId {
            peer: peer(),
            id: config.id,
        });
    }
    if let Some(holder) = taken.get(&config.id).filter(|holder| *holder != name) {
        return Err(ConfigRefused::IdTaken {
            peer: peer(),
            id: config.id,
            holder: holder.clone(),
        });
    }
    let (services, endpoint_slices) = match &config.capabilities.endpoint_slices_export_mode {
        EndpointSlicesExportMode::ServicesOnly => (true, false),
        EndpointSlicesExportMode::ServicesAndEndpointSlices => (true, true),
        EndpointSlicesExportMode::EndpointSlicesOnly => (false, true),
        EndpointSlicesExportMode::Unknown(mode) => {
            return Err(ConfigRefused::ExportMode {
                peer: peer(),
                mode: mode.clone(),
            });
        }
    };
    Ok(Peer {
        cluster: peer(),
        cluster_id: config.id,
        split: settings.split,
        cached: config.capabilities.cached,
        synced_canaries: config.capabilities.synced_canaries,
        services,
        endpoint_slices,
    })
}

/// The peer's configuration as our agents read it: the data stands in the cache, with canaries.
///
/// # Errors
/// The record cannot be read.
pub fn copied_config(peer: &str, value: &[u8]) -> Result<Bytes, ConfigRefused> {
    let mut config = ClusterConfig::decode(value).map_err(|error| ConfigRefused::Malformed {
        peer: peer.to_owned(),
        reason: error.to_string(),
    })?;
    config.capabilities.synced_canaries = true;
    config.capabilities.cached = true;
    Ok(config.encode())
}

impl Peer {
    /// The tree of the peer's store that we read.
    #[must_use]
    pub fn source_tree(&self) -> Tree {
        if self.cached {
            Tree::Cache
        } else {
            Tree::State
        }
    }

    /// Prefix of one kind in the peer's store.
    #[must_use]
    pub fn source_prefix(&self, kind: Kind) -> String {
        kind.prefix(self.source_tree(), &self.cluster)
    }

    /// Whether the peer publishes this kind at all.
    #[must_use]
    pub fn exports(&self, kind: Kind) -> bool {
        match kind {
            Kind::Services => self.services,
            Kind::EndpointSlices => self.endpoint_slices,
            Kind::Nodes | Kind::Ip | Kind::Identities => true,
        }
    }

    /// Where the copy of one of the peer's records goes; `None` for keys that are not copied.
    #[must_use]
    pub fn cache_key(&self, key: &RecordKey) -> Option<RecordKey> {
        key.kind()?;
        match self.source_tree() {
            Tree::State => key.to_cache(&self.cluster),
            Tree::Cache => {
                let own = key.tree() == Some(Tree::Cache) && key.cluster() == Some(&self.cluster);
                own.then(|| key.clone())
            }
        }
    }

    /// The key under which `key`, a copy in our cache, stands in the peer's store.
    #[must_use]
    pub fn source_key(&self, copy: &RecordKey) -> Option<RecordKey> {
        if copy.tree() != Some(Tree::Cache) || copy.cluster() != Some(&self.cluster) {
            return None;
        }
        let mut key = copy.clone();
        if !self.cached {
            match &mut key {
                RecordKey::Node { tree, .. }
                | RecordKey::Service { tree, .. }
                | RecordKey::EndpointSlice { tree, .. } => {
                    *tree = Tree::State;
                }
                RecordKey::Ip { origin, .. } | RecordKey::Identity { origin, .. } => {
                    *origin = Origin::Own
                }
                _ => return None,
            }
        }
        Some(key)
    }

    /// The canary in our store that says that the copy of this kind is complete.
    #[must_use]
    pub fn own_canary(&self, kind: Kind) -> RecordKey {
        RecordKey::Synced {
            cluster: self.cluster.clone(),
            tree: Tree::Cache,
            kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::settings::example;

    fn judge(name: &str, json: &str) -> Result<Peer, ConfigRefused> {
        let taken = BTreeMap::from([(7, "c7".to_owned()), (2, "c2".to_owned())]);
        accept_config(&example(), name, Some(json.as_bytes()), &taken)
    }

    #[test]
    fn refusals_name_the_peer_and_the_remedy() {
        let cases = [
            (
                "c2",
                r#"{"capabilities":{}}"#,
                "cluster id 0 is not within 1..=255",
            ),
            (
                "c2",
                r#"{"id":256,"capabilities":{}}"#,
                "cluster id 256 is not within",
            ),
            (
                "c2",
                r#"{"id":1,"capabilities":{}}"#,
                "which is this cluster's",
            ),
            (
                "c2",
                r#"{"id":7,"capabilities":{}}"#,
                "which peer c7 has already",
            ),
            (
                "c2",
                r#"{"id":2,"capabilities":{"maxConnectedClusters":511}}"#,
                "max-connected-clusters 511",
            ),
            (
                "c2",
                r#"{"id":2,"capabilities":{"endpointSlicesExportMode":"later"}}"#,
                "mode \"later\"",
            ),
            ("c2", "{", "cannot be read"),
            (
                "c1",
                r#"{"id":2,"capabilities":{}}"#,
                "has the name of this cluster",
            ),
        ];
        for (name, json, expected) in cases {
            let text = judge(name, json).unwrap_err().to_string();
            assert!(
                text.contains(expected) && text.contains(name),
                "{json}: {text}"
            );
        }
        let missing = accept_config(&example(), "c2", None, &BTreeMap::new())
            .unwrap_err()
            .to_string();
        assert!(missing.contains("cilium/cluster-config/c2"), "{missing}");
    }

    #[test]
    fn export_modes_say_what_to_read() {
        for (mode, services, slices) in [
            ("", true, false),
            ("services-and-endpointslices", true, true),
            ("endpointslices-only", false, true),
        ] {
            let peer = judge(
                "c2",
                &format!(r#"{{"id":2,"capabilities":{{"endpointSlicesExportMode":"{mode}"}}}}"#),
            )
            .unwrap();
            assert_eq!(
                (peer.services, peer.endpoint_slices),
                (services, slices),
                "{mode}"
            );
        }
    }

    #[test]
    fn the_copied_config_says_cached_with_canaries() {
        let copy = copied_config(
            "c2",
            br#"{"id":2,"capabilities":{"maxConnectedClusters":255}}"#,
        )
        .unwrap();
        let config = ClusterConfig::decode(&copy).unwrap();
        assert!(config.capabilities.cached && config.capabilities.synced_canaries);
        assert_eq!(config.capabilities.max_connected_clusters, 255);
    }

    #[test]
    fn keys_of_other_clusters_and_kinds_are_not_copied() {
        let mut peer = judge("c2", r#"{"id":2,"capabilities":{}}"#).unwrap();
        let map = |peer: &Peer, key: &str| {
            peer.cache_key(&RecordKey::parse(key.as_bytes()).unwrap())
                .map(|key| key.to_string())
        };
        assert_eq!(
            map(&peer, "cilium/state/nodes/v1/c2/n1").as_deref(),
            Some("cilium/cache/nodes/v1/c2/n1")
        );
        assert_eq!(
            map(&peer, "cilium/state/ip/v1/default/10.2.0.1").as_deref(),
            Some("cilium/cache/ip/v1/c2/10.2.0.1")
        );
        assert_eq!(map(&peer, "cilium/state/nodes/v1/c3/n1"), None);
        assert_eq!(map(&peer, "cilium/cache/nodes/v1/c2/n1"), None);
        assert_eq!(map(&peer, "cilium/.heartbeat"), None);
        peer.cached = true;
        assert_eq!(
            map(&peer, "cilium/cache/nodes/v1/c2/n1").as_deref(),
            Some("cilium/cache/nodes/v1/c2/n1")
        );
        assert_eq!(map(&peer, "cilium/cache/nodes/v1/c3/n1"), None);
        assert_eq!(map(&peer, "cilium/state/nodes/v1/c2/n1"), None);
    }

    proptest! {
        #[test]
        fn source_key_is_the_inverse_of_cache_key(cached: bool, low: u8, id: u32) {
            let mut peer = judge("c2", r#"{"id":2,"capabilities":{}}"#).unwrap();
            peer.cached = cached;
            for key in [
                RecordKey::Ip { origin: Origin::Copy("c2".into()), address: std::net::IpAddr::from([10, 2, 0, low]).into() },
                RecordKey::Identity { origin: Origin::Copy("c2".into()), id },
                RecordKey::Node { tree: Tree::Cache, cluster: "c2".into(), name: format!("n{low}") },
            ] {
                let source = peer.source_key(&key).unwrap();
                prop_assert_eq!(peer.cache_key(&source), Some(key));
            }
        }
    }
}
