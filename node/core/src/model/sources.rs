//! Source clusters: names to small numbers, and which cluster id is accepted from each.

use std::collections::HashMap;

use crate::change::{ClusterConfig, ClusterName};

/// A source cluster's place in [`Sources`].
pub(super) type SourceId = u16;

/// Own cluster.
pub(super) const OWN: SourceId = 0;

/// Source clusters, own one included: the largest mesh has 511.
pub(super) const SOURCES_MAX: usize = 512;

struct Source {
    name: ClusterName,
    config: Option<ClusterConfig>,
    accepted: Option<u16>,
    synced: bool,
}

pub(super) struct Sources {
    by_name: HashMap<ClusterName, SourceId>,
    list: Vec<Source>,
}

impl Sources {
    pub(super) fn new(name: ClusterName, cluster_id: u16) -> Self {
        let own = Source {
            name: name.clone(),
            config: Some(ClusterConfig {
                id: cluster_id,
                slices: true,
            }),
            accepted: Some(cluster_id),
            synced: true,
        };
        Self {
            by_name: HashMap::from([(name, OWN)]),
            list: vec![own],
        }
    }

    /// The number of a cluster; `None` past [`SOURCES_MAX`].
    pub(super) fn intern(&mut self, name: &ClusterName) -> Option<SourceId> {
        if let Some(id) = self.by_name.get(name) {
            return Some(*id);
        }
        if self.list.len() >= SOURCES_MAX {
            return None;
        }
        let id = SourceId::try_from(self.list.len()).ok()?;
        self.list.push(Source {
            name: name.clone(),
            config: None,
            accepted: None,
            synced: false,
        });
        self.by_name.insert(name.clone(), id);
        Some(id)
    }

    pub(super) fn name(&self, source: SourceId) -> &str {
        self.list
            .get(usize::from(source))
            .map_or("", |source| &source.name)
    }

    /// The cluster id under which records of the source are accepted.
    pub(super) fn cluster_id(&self, source: SourceId) -> Option<u16> {
        self.list.get(usize::from(source))?.accepted
    }

    /// The cluster id under which records of the cluster of that name are accepted.
    pub(super) fn id_of(&self, name: &ClusterName) -> Option<u16> {
        self.cluster_id(*self.by_name.get(name)?)
    }

    /// True if backends of the source are read from slices, not from service records.
    pub(super) fn has_slices(&self, source: SourceId) -> bool {
        self.list
            .get(usize::from(source))
            .and_then(|source| source.config)
            .is_some_and(|config| config.slices)
    }

    /// Sets what a peer says of itself. Gives the sources of which the accepted id changed; an id that
    /// is 0, ours or held by an earlier source is not accepted.
    pub(super) fn set_config(
        &mut self,
        source: SourceId,
        config: Option<ClusterConfig>,
    ) -> Vec<SourceId> {
        if source == OWN {
            return Vec::new();
        }
        if let Some(entry) = self.list.get_mut(usize::from(source)) {
            entry.config = config;
            if config.is_none() {
                entry.synced = false;
            }
        }
        let mut changed = Vec::new();
        // The incumbent keeps a disputed id: sources that hold one go first.
        let mut order: Vec<usize> = (0..self.list.len()).collect();
        order.sort_by_key(|i| self.list.get(*i).is_none_or(|s| s.accepted.is_none()));
        let mut taken = std::collections::HashSet::from([0]);
        for i in order {
            let Some(entry) = self.list.get_mut(i) else {
                continue;
            };
            let wanted = entry.config.map(|config| config.id);
            let accepted = wanted.filter(|id| taken.insert(*id));
            if entry.accepted != accepted {
                entry.accepted = accepted;
                changed.extend(SourceId::try_from(i));
            }
        }
        changed
    }

    /// True if this made a source complete that was not.
    pub(super) fn mark_synced(&mut self, name: &ClusterName) -> bool {
        let Some(source) = self.intern(name) else {
            return false;
        };
        self.list
            .get_mut(usize::from(source))
            .is_some_and(|entry| !std::mem::replace(&mut entry.synced, true))
    }

    /// The number of a cluster that is known.
    pub(super) fn find(&self, name: &str) -> Option<SourceId> {
        self.by_name.get(name).copied()
    }

    /// True for the own cluster, and for a peer of which a complete copy has been seen.
    pub(super) fn is_synced(&self, name: &str) -> bool {
        let source = self.by_name.get(name);
        source
            .and_then(|id| self.list.get(usize::from(*id)))
            .is_some_and(|source| source.synced)
    }

    /// Peers that are known but of which no complete copy has been seen yet.
    pub(super) fn unsynced(&self) -> impl Iterator<Item = u16> + '_ {
        self.list
            .iter()
            .filter(|source| !source.synced)
            .filter_map(|source| source.accepted)
    }
}
