//! The difference between wanted and actual maps, as ordered steps of which every prefix is safe.
//!
//! What is pointed to is written before what points, and removed after it: node,
//! node address, ipcache, backends, frontend; then frontend, backends, ipcache,
//! node address, node.

use std::collections::HashSet;

use clustermesh_ebpf_abi::{
    Address, BackendKey, BackendValue, FrontendKey, FrontendValue, IpcacheKey, IpcacheValue,
    NodeAddressValue, NodeValue,
};

use crate::tables::Tables;

/// Keys that may differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// Node indices.
    pub nodes: HashSet<u32>,
    /// Underlay addresses.
    pub node_addresses: HashSet<Address>,
    /// ipcache prefixes.
    pub ipcache: HashSet<IpcacheKey>,
    /// Virtual addresses and ports.
    pub frontends: HashSet<FrontendKey>,
    /// Backend lists.
    pub lists: HashSet<u32>,
    /// Backends outside of lists.
    pub loose_backends: HashSet<BackendKey>,
}

impl Keys {
    /// Every key of either side.
    #[must_use]
    pub fn all(wanted: &Tables, actual: &Tables) -> Self {
        let mut keys = Self::default();
        for side in [wanted, actual] {
            keys.nodes.extend(side.nodes.keys());
            keys.node_addresses.extend(side.node_addresses.keys());
            keys.ipcache.extend(side.ipcache.keys());
            keys.frontends.extend(side.frontends.keys());
            keys.lists.extend(side.lists.keys());
            keys.loose_backends.extend(&side.loose_backends);
        }
        keys
    }

    /// Adds all keys of another set.
    pub fn extend(&mut self, other: Self) {
        self.nodes.extend(other.nodes);
        self.node_addresses.extend(other.node_addresses);
        self.ipcache.extend(other.ipcache);
        self.frontends.extend(other.frontends);
        self.lists.extend(other.lists);
        self.loose_backends.extend(other.loose_backends);
    }

    /// True if there is nothing to compare.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
            && self.node_addresses.is_empty()
            && self.ipcache.is_empty()
            && self.frontends.is_empty()
            && self.lists.is_empty()
            && self.loose_backends.is_empty()
    }
}

/// What must be done, each list sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Written first.
    pub node_upserts: Vec<(u32, NodeValue)>,
    /// Second.
    pub node_address_upserts: Vec<(Address, NodeAddressValue)>,
    /// Third.
    pub ipcache_upserts: Vec<(IpcacheKey, IpcacheValue)>,
    /// Fourth: complete new lists.
    pub backend_upserts: Vec<(BackendKey, BackendValue)>,
    /// Fifth: switches to the new lists.
    pub frontend_upserts: Vec<(FrontendKey, FrontendValue)>,
    /// Sixth.
    pub frontend_deletes: Vec<FrontendKey>,
    /// Seventh: lists that no frontend uses any more.
    pub backend_deletes: Vec<BackendKey>,
    /// Eighth.
    pub ipcache_deletes: Vec<IpcacheKey>,
    /// Ninth.
    pub node_address_deletes: Vec<Address>,
    /// Last.
    pub node_deletes: Vec<u32>,
}

/// One kind of call on one map. Steps are made in the order of [`Plan::steps`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Fill slots of the node map.
    UpsertNodes(&'a [(u32, NodeValue)]),
    /// Write underlay addresses.
    UpsertNodeAddresses(&'a [(Address, NodeAddressValue)]),
    /// Write ipcache entries.
    UpsertIpcache(&'a [(IpcacheKey, IpcacheValue)]),
    /// Write backends.
    UpsertBackends(&'a [(BackendKey, BackendValue)]),
    /// Switch frontends.
    UpsertFrontends(&'a [(FrontendKey, FrontendValue)]),
    /// Remove frontends.
    DeleteFrontends(&'a [FrontendKey]),
    /// Remove backends.
    DeleteBackends(&'a [BackendKey]),
    /// Remove ipcache entries.
    DeleteIpcache(&'a [IpcacheKey]),
    /// Remove underlay addresses.
    DeleteNodeAddresses(&'a [Address]),
    /// Clear slots of the node map.
    DeleteNodes(&'a [u32]),
}

impl Step<'_> {
    /// The map that the step writes, as its pin is called.
    #[must_use]
    pub const fn map(&self) -> &'static str {
        match self {
            Self::UpsertNodes(_) | Self::DeleteNodes(_) => "nodes",
            Self::UpsertNodeAddresses(_) | Self::DeleteNodeAddresses(_) => "node_addresses",
            Self::UpsertIpcache(_) | Self::DeleteIpcache(_) => "ipcache",
            Self::UpsertBackends(_) | Self::DeleteBackends(_) => "backends",
            Self::UpsertFrontends(_) | Self::DeleteFrontends(_) => "frontends",
        }
    }

    /// Entries that the step writes or removes.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::UpsertNodes(e) => e.len(),
            Self::UpsertNodeAddresses(e) => e.len(),
            Self::UpsertIpcache(e) => e.len(),
            Self::UpsertBackends(e) => e.len(),
            Self::UpsertFrontends(e) => e.len(),
            Self::DeleteFrontends(e) => e.len(),
            Self::DeleteBackends(e) => e.len(),
            Self::DeleteIpcache(e) => e.len(),
            Self::DeleteNodeAddresses(e) => e.len(),
            Self::DeleteNodes(e) => e.len(),
        }
    }

    /// True for a step without entries.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the step is safe although an earlier one, `missed`, was not or only partly made: it removes what
    /// nothing points to. So a map that is full does not keep what is gone from being removed, which may make room.
    #[must_use]
    pub const fn may_follow_missed(&self, missed: &Self) -> bool {
        matches!(
            (self, missed),
            (
                Self::DeleteFrontends(_) | Self::DeleteIpcache(_),
                Self::UpsertNodes(_)
                    | Self::UpsertNodeAddresses(_)
                    | Self::UpsertIpcache(_)
                    | Self::UpsertBackends(_)
                    | Self::UpsertFrontends(_),
            ) | (Self::DeleteIpcache(_), Self::DeleteBackends(_))
                | (
                    Self::DeleteBackends(_),
                    Self::UpsertNodes(_) | Self::UpsertNodeAddresses(_) | Self::UpsertIpcache(_),
                )
                | (
                    Self::DeleteNodeAddresses(_) | Self::DeleteNodes(_),
                    Self::UpsertBackends(_) | Self::UpsertFrontends(_) | Self::DeleteBackends(_),
                )
        )
    }
}

impl Plan {
    /// The steps that have entries, in order.
    pub fn steps(&self) -> impl Iterator<Item = Step<'_>> {
        [
            Step::UpsertNodes(&self.node_upserts),
            Step::UpsertNodeAddresses(&self.node_address_upserts),
            Step::UpsertIpcache(&self.ipcache_upserts),
            Step::UpsertBackends(&self.backend_upserts),
            Step::UpsertFrontends(&self.frontend_upserts),
            Step::DeleteFrontends(&self.frontend_deletes),
            Step::DeleteBackends(&self.backend_deletes),
            Step::DeleteIpcache(&self.ipcache_deletes),
            Step::DeleteNodeAddresses(&self.node_address_deletes),
            Step::DeleteNodes(&self.node_deletes),
        ]
        .into_iter()
        .filter(|step| !step.is_empty())
    }

    /// True if nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps().next().is_none()
    }
}

/// What makes `actual` equal to `wanted`, looking at all keys.
#[must_use]
pub fn plan(wanted: &Tables, actual: &Tables) -> Plan {
    plan_keys(&Keys::all(wanted, actual), wanted, actual)
}

/// What makes `actual` equal to `wanted` in these keys.
#[must_use]
pub fn plan_keys(keys: &Keys, wanted: &Tables, actual: &Tables) -> Plan {
    let (node_upserts, node_deletes) = differences(&keys.nodes, &wanted.nodes, &actual.nodes);
    let (node_address_upserts, node_address_deletes) = differences(
        &keys.node_addresses,
        &wanted.node_addresses,
        &actual.node_addresses,
    );
    let (ipcache_upserts, ipcache_deletes) =
        differences(&keys.ipcache, &wanted.ipcache, &actual.ipcache);
    let (frontend_upserts, frontend_deletes) =
        differences(&keys.frontends, &wanted.frontends, &actual.frontends);
    let mut plan = Plan {
        node_upserts,
        node_address_upserts,
        ipcache_upserts,
        backend_upserts: Vec::new(),
        frontend_upserts,
        frontend_deletes,
        backend_deletes: Vec::new(),
        ipcache_deletes,
        node_address_deletes,
        node_deletes,
    };
    lists(keys, wanted, actual, &mut plan);
    plan
}

/// Backends are compared by list: the number of a list is never given to other contents.
fn lists(keys: &Keys, wanted: &Tables, actual: &Tables, plan: &mut Plan) {
    let mut ids: Vec<u32> = keys.lists.iter().copied().collect();
    ids.sort_unstable();
    for list_id in ids {
        let want = wanted.lists.get(&list_id).map_or(&[][..], |list| list);
        let have = actual.lists.get(&list_id).map_or(&[][..], |list| list);
        for (slot, backend) in (0u32..).zip(want) {
            if have.get(slot as usize) != Some(backend) {
                plan.backend_upserts
                    .push((BackendKey { list_id, slot }, *backend));
            }
        }
        for (slot, _) in (0u32..).zip(have).skip(want.len()) {
            plan.backend_deletes.push(BackendKey { list_id, slot });
        }
    }
    for key in &keys.loose_backends {
        let rewritten = wanted
            .lists
            .get(&key.list_id)
            .is_some_and(|list| (key.slot as usize) < list.len());
        if actual.loose_backends.contains(key) && !rewritten {
            plan.backend_deletes.push(*key);
        }
    }
    plan.backend_deletes.sort_unstable();
}

type Differences<K, V> = (Vec<(K, V)>, Vec<K>);

fn differences<K, V>(
    keys: &HashSet<K>,
    wanted: &std::collections::HashMap<K, V>,
    actual: &std::collections::HashMap<K, V>,
) -> Differences<K, V>
where
    K: Copy + Ord + std::hash::Hash,
    V: Copy + PartialEq,
{
    let mut upserts = Vec::new();
    let mut deletes = Vec::new();
    for key in keys {
        match (wanted.get(key), actual.get(key)) {
            (Some(want), have) if have != Some(want) => upserts.push((*key, *want)),
            (None, Some(_)) => deletes.push(*key),
            _ => {}
        }
    }
    upserts.sort_unstable_by_key(|(key, _)| *key);
    deletes.sort_unstable();
    (upserts, deletes)
}

impl Tables {
    /// Records that the kernel took a step.
    pub fn commit(&mut self, step: &Step<'_>) {
        match step {
            Step::UpsertNodes(entries) => self.nodes.extend(entries.iter().copied()),
            Step::UpsertNodeAddresses(entries) => {
                self.node_addresses.extend(entries.iter().copied());
            }
            Step::UpsertIpcache(entries) => self.ipcache.extend(entries.iter().copied()),
            Step::UpsertBackends(entries) => self.commit_backends(entries),
            Step::UpsertFrontends(entries) => self.frontends.extend(entries.iter().copied()),
            Step::DeleteFrontends(keys) => remove(&mut self.frontends, keys),
            Step::DeleteBackends(keys) => self.uncommit_backends(keys),
            Step::DeleteIpcache(keys) => remove(&mut self.ipcache, keys),
            Step::DeleteNodeAddresses(keys) => remove(&mut self.node_addresses, keys),
            Step::DeleteNodes(keys) => remove(&mut self.nodes, keys),
        }
    }

    fn commit_backends(&mut self, entries: &[(BackendKey, BackendValue)]) {
        for run in entries.chunk_by(|(a, _), (b, _)| a.list_id == b.list_id) {
            let Some((first, _)) = run.first() else {
                continue;
            };
            let mut list = self
                .lists
                .remove(&first.list_id)
                .map_or_else(Vec::new, Vec::from);
            for (key, value) in run {
                self.loose_backends.remove(key);
                let slot = key.slot as usize;
                if let Some(place) = list.get_mut(slot) {
                    *place = *value;
                } else {
                    list.push(*value);
                }
            }
            self.lists.insert(first.list_id, list.into_boxed_slice());
        }
    }

    fn uncommit_backends(&mut self, keys: &[BackendKey]) {
        for run in keys.chunk_by(|a, b| a.list_id == b.list_id) {
            let Some(first) = run.first() else { continue };
            for key in run {
                self.loose_backends.remove(key);
            }
            if let Some(list) = self.lists.remove(&first.list_id) {
                let kept = list.len().min(first.slot as usize);
                if kept > 0 {
                    let mut list = Vec::from(list);
                    list.truncate(kept);
                    self.lists.insert(first.list_id, list.into_boxed_slice());
                }
            }
        }
    }
}

fn remove<K: Eq + std::hash::Hash, V>(map: &mut std::collections::HashMap<K, V>, keys: &[K]) {
    for key in keys {
        map.remove(key);
    }
}

#[cfg(test)]
mod tests;
