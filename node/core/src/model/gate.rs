//! What must wait: nothing of a peer is removed before its copy has been seen in full.

use std::collections::HashSet;

use clustermesh_ebpf_abi::FrontendKey;

use super::Model;
use crate::plan::{Keys, Plan};

impl Model {
    /// Takes out of a plan what would remove something of a peer that is not in sync.
    pub(super) fn hold_protected(&mut self, plan: &mut Plan) {
        let protected: HashSet<u16> = self.sources.unsynced().collect();
        if protected.is_empty() {
            return;
        }
        let mut held = Keys::default();
        let of_node = |index: &u32| {
            self.actual
                .nodes
                .get(index)
                .is_some_and(|node| protected.contains(&node.cluster_id))
        };
        plan.node_deletes.retain(|index| {
            let hold = of_node(index);
            if hold {
                held.nodes.insert(*index);
            }
            !hold
        });
        plan.node_address_deletes.retain(|key| {
            let value = self.actual.node_addresses.get(key);
            let hold = value.is_some_and(|value| of_node(&value.node_index));
            if hold {
                held.node_addresses.insert(*key);
            }
            !hold
        });
        plan.ipcache_deletes.retain(|key| {
            let value = self.actual.ipcache.get(key);
            let hold = value.is_some_and(|value| of_node(&value.node_index));
            if hold {
                held.ipcache.insert(*key);
            }
            !hold
        });
        let losing = |key: &FrontendKey| {
            let have = self.actual.list_of(key).map_or(&[][..], |(_, list)| list);
            let want = self.wanted.list_of(key).map_or(&[][..], |(_, list)| list);
            have.iter()
                .any(|b| protected.contains(&b.cluster_id) && want.binary_search(b).is_err())
        };
        let mut kept_lists = HashSet::new();
        plan.frontend_upserts.retain(|(key, value)| {
            let hold = losing(key);
            if hold {
                held.frontends.insert(*key);
                kept_lists.insert(value.list_id);
                held.lists.insert(value.list_id);
                if let Some(actual) = self.actual.frontends.get(key) {
                    kept_lists.insert(actual.list_id);
                    held.lists.insert(actual.list_id);
                }
            }
            !hold
        });
        plan.backend_upserts
            .retain(|(key, _)| !kept_lists.contains(&key.list_id));
        plan.backend_deletes
            .retain(|key| !kept_lists.contains(&key.list_id));
        self.held.extend(held);
    }

    /// A peer became complete: what was held back is looked at again.
    pub(super) fn release_protected(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.dirty.extend(held);
    }
}
