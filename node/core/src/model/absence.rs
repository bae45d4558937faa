//! What a store of which the kernel holds nothing yet does not list: it stays until that is known to be meant.
//!
//! A store that was lost and made anew is empty at first. What it lacks was not deleted by anybody: entries of a
//! peer stay until the new store's copy of that peer is complete, its configuration is removed there, or the server
//! turns out not to be configured with it; own ones until [`ABSENCE_GRACE_MS`] has passed, in which every node opens
//! a session and claims its own again. What the new store has named once is deleted like anything else.

use std::collections::{HashMap, HashSet};

use clustermesh_ebpf_abi::{BackendValue, FrontendKey};

use super::Model;
use crate::change::ClusterName;
use crate::plan::{Keys, Plan};

/// Own entries that a new store lacks stay so long, milliseconds.
pub const ABSENCE_GRACE_MS: u64 = 600_000;

/// Entries of the kernel that the store has never named.
#[derive(Default)]
pub(super) struct Absence {
    /// Nodes, their addresses and ipcache entries; the other sets stay empty.
    keys: Keys,
    /// Frontends, each with the backends that the store has not named for it.
    frontends: HashMap<FrontendKey, HashSet<BackendValue>>,
    own_until_ms: Option<u64>,
    /// The store is not the one of which the kernel's entries are, and may not have everything yet.
    distrusted: bool,
}

impl Absence {
    /// Another listing decides anew; a grace that runs goes on.
    pub(super) fn begin_listing(&mut self) {
        self.keys = Keys::default();
        self.frontends.clear();
    }

    /// The frontend was removed by its owner.
    pub(super) fn forget_frontend(&mut self, key: &FrontendKey) {
        self.frontends.remove(key);
    }

    /// Completes a frontend's list by the backends that the kernel has and the store has not named yet.
    pub(super) fn complete(&mut self, key: &FrontendKey, list: &mut Vec<BackendValue>) {
        if let Some(missing) = self.frontends.get_mut(key) {
            missing.retain(|backend| !list.contains(backend));
            list.extend(missing.iter());
        }
    }
}

impl Model {
    /// The listing that runs is of another store than the kernel's entries are from: what it lacks stays for now.
    /// To be called between [`Model::begin_listing`] and [`Model::end_listing`].
    pub fn distrust_absence(&mut self, now_ms: u64) {
        let actual = &self.actual;
        self.absence.keys = Keys {
            nodes: actual.nodes.keys().copied().collect(),
            node_addresses: actual.node_addresses.keys().copied().collect(),
            ipcache: actual.ipcache.keys().copied().collect(),
            ..Keys::default()
        };
        self.absence.frontends = actual
            .frontends
            .keys()
            .map(|key| {
                let list = actual.list_of(key).map_or(&[][..], |(_, list)| list);
                (*key, list.iter().copied().collect())
            })
            .collect();
        self.absence
            .own_until_ms
            .get_or_insert(now_ms.saturating_add(ABSENCE_GRACE_MS));
        self.absence.distrusted = true;
    }

    /// True from [`Model::distrust_absence`] on until the grace is over and every known peer's copy is complete.
    pub(super) fn is_distrusted(&self) -> bool {
        self.absence.distrusted
            && (self.absence.own_until_ms.is_some() || self.sources.unsynced().next().is_some())
    }

    /// The peers that the store's server is configured with, all of them: entries of a cluster that is none of
    /// them are given up. As long as one of them has not said its number, nobody knows whose entries are whose.
    pub fn peers_configured(&mut self, peers: &[ClusterName]) {
        let Some(mut ids) = peers
            .iter()
            .map(|peer| self.sources.id_of(peer))
            .collect::<Option<HashSet<u16>>>()
        else {
            return;
        };
        ids.insert(self.settings.cluster_id);
        let kept: HashSet<u16> = self
            .actual
            .nodes
            .values()
            .map(|node| node.cluster_id)
            .chain(
                self.absence
                    .frontends
                    .values()
                    .flatten()
                    .map(|backend| backend.cluster_id),
            )
            .filter(|id| !ids.contains(id))
            .collect();
        for id in kept {
            self.give_up(id);
        }
    }

    /// Entries that stay although the store does not name them.
    #[must_use]
    pub fn kept_entries(&self) -> usize {
        let Absence {
            keys, frontends, ..
        } = &self.absence;
        let of_frontends: usize = frontends
            .iter()
            .map(|(key, missing)| {
                let unnamed = !self.wanted.frontends.contains_key(key);
                missing.len() + usize::from(unnamed)
            })
            .sum();
        keys.nodes.len() + keys.node_addresses.len() + keys.ipcache.len() + of_frontends
    }

    /// Time goes on: own entries that the store still does not name are given up when their grace is over.
    pub fn pass_time(&mut self, now_ms: u64) {
        if self.listing || self.absence.own_until_ms.is_none_or(|until| now_ms < until) {
            return;
        }
        self.absence.own_until_ms = None;
        self.give_up(self.settings.cluster_id);
        let owners: HashSet<FrontendKey> = self.wanted.frontends.keys().copied().collect();
        let given_up: Vec<FrontendKey> = self
            .absence
            .frontends
            .extract_if(|key, _| !owners.contains(key))
            .map(|(key, _)| key)
            .collect();
        for key in given_up {
            self.touch_frontend(key);
        }
        self.absence
            .frontends
            .retain(|_, missing| !missing.is_empty());
    }

    /// The store's word about this cluster is complete: what it lacks is gone.
    pub(super) fn give_up(&mut self, cluster_id: u16) {
        let actual = &self.actual;
        let of_node = |index: &u32| {
            actual
                .nodes
                .get(index)
                .is_none_or(|node| node.cluster_id == cluster_id)
        };
        let keys = &mut self.absence.keys;
        let node_addresses = keys.node_addresses.extract_if(|key| {
            let value = actual.node_addresses.get(key);
            value.is_none_or(|value| of_node(&value.node_index))
        });
        self.dirty.node_addresses.extend(node_addresses);
        let ipcache = keys.ipcache.extract_if(|key| {
            let value = actual.ipcache.get(key);
            value.is_none_or(|value| of_node(&value.node_index))
        });
        self.dirty.ipcache.extend(ipcache);
        self.dirty.nodes.extend(keys.nodes.extract_if(of_node));
        let mut shorter = Vec::new();
        for (key, missing) in &mut self.absence.frontends {
            let before = missing.len();
            missing.retain(|backend| backend.cluster_id != cluster_id);
            if missing.len() != before {
                shorter.push(*key);
            }
        }
        for key in shorter {
            self.services.mark_frontend(&key);
        }
    }

    /// Takes out of a plan what would remove an entry that the store has never named.
    pub(super) fn keep_absent(&mut self, keys: &Keys, plan: &mut Plan) {
        let absence = &mut self.absence;
        if absence.keys.is_empty() && absence.frontends.is_empty() {
            return;
        }
        named(&mut absence.keys.nodes, &keys.nodes, &self.wanted.nodes);
        named(
            &mut absence.keys.node_addresses,
            &keys.node_addresses,
            &self.wanted.node_addresses,
        );
        named(
            &mut absence.keys.ipcache,
            &keys.ipcache,
            &self.wanted.ipcache,
        );
        let kept = &absence.keys;
        plan.node_deletes.retain(|key| !kept.nodes.contains(key));
        plan.node_address_deletes
            .retain(|key| !kept.node_addresses.contains(key));
        plan.ipcache_deletes
            .retain(|key| !kept.ipcache.contains(key));
        plan.frontend_deletes
            .retain(|key| !absence.frontends.contains_key(key));
        let lists: HashSet<u32> = absence
            .frontends
            .keys()
            .filter(|key| !self.wanted.frontends.contains_key(key))
            .filter_map(|key| self.actual.frontends.get(key))
            .map(|value| value.list_id)
            .collect();
        plan.backend_deletes
            .retain(|key| !lists.contains(&key.list_id));
    }

    fn touch_frontend(&mut self, key: FrontendKey) {
        self.dirty.frontends.insert(key);
        let list = self.actual.frontends.get(&key).map(|value| value.list_id);
        self.dirty.lists.extend(list);
    }
}

/// Drops from `absent` the keys of this round that are wanted.
fn named<K: Copy + Eq + std::hash::Hash, V>(
    absent: &mut HashSet<K>,
    looked_at: &HashSet<K>,
    wanted: &HashMap<K, V>,
) {
    if absent.is_empty() {
        return;
    }
    for key in looked_at {
        if wanted.contains_key(key) {
            absent.remove(key);
        }
    }
}
