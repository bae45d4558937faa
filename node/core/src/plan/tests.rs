use std::collections::{BTreeSet, HashMap};

use clustermesh_ebpf_abi::{
    BackendKey, BackendValue, FrontendKey, FrontendValue, IpcacheValue, NODE_PRESENT,
    NodeAddressValue, NodeValue,
};
use proptest::prelude::*;

use super::*;
use crate::EMPTY_NODE;
use crate::tables::{Tables, address, host_key};

fn node(n: u8) -> NodeValue {
    NodeValue {
        endpoint: address([192, 0, 2, n].into()),
        cluster_id: 1,
        flags: NODE_PRESENT,
        ..EMPTY_NODE
    }
}

fn backend(n: u8) -> BackendValue {
    BackendValue {
        frontend_tag: 0,
        address: address([10, 0, 0, n].into()),
        port_be: [0, 80],
        cluster_id: 1,
    }
}

fn frontend(n: u8) -> FrontendKey {
    FrontendKey {
        address: address([172, 20, 0, n].into()),
        port_be: [0, 80],
        protocol: 6,
        reserved: 0,
    }
}

/// Tables in which everything that is pointed to is there. What a list number or a node index
/// stands for is the same on both sides, as the model gives new numbers to new contents.
fn tables() -> impl Strategy<Value = Tables> {
    let nodes = prop::collection::btree_set(1u8..12, 0..8);
    let ips = prop::collection::btree_map(0u8..40, (0usize..8, 256u32..260), 0..30);
    let services = prop::collection::btree_map(0u8..12, (0u32..30, 0u8..4), 0..12);
    (nodes, ips, services).prop_map(|(nodes, ips, services)| {
        let mut tables = Tables::default();
        let nodes: Vec<u8> = nodes.into_iter().collect();
        for n in &nodes {
            let index = u32::from(*n);
            tables.nodes.insert(index, node(*n));
            tables
                .node_addresses
                .insert(node(*n).endpoint, NodeAddressValue { node_index: index });
        }
        for (ip, (of, identity)) in ips {
            if let Some(n) = nodes.get(of) {
                let value = IpcacheValue {
                    identity,
                    node_index: u32::from(*n),
                };
                tables
                    .ipcache
                    .insert(host_key([10, 0, 0, ip].into()), value);
            }
        }
        let mut used = BTreeSet::new();
        for (key, (list, count)) in services {
            let list_id = list * 4 + u32::from(count) + 1;
            if used.insert(list_id) {
                if count > 0 {
                    let list = (0..count).map(backend).collect();
                    tables.lists.insert(list_id, list);
                }
                let value = FrontendValue {
                    list_id,
                    backend_count: u16::from(count),
                    flags: 0,
                };
                tables.frontends.insert(frontend(key), value);
            }
        }
        tables
    })
}

/// The maps as the kernel has them: entry by entry.
#[derive(Default, PartialEq, Debug)]
struct Kernel {
    tables: Tables,
    backends: HashMap<BackendKey, BackendValue>,
}

impl Kernel {
    fn new(tables: &Tables) -> Self {
        let mut backends = HashMap::new();
        for (list_id, list) in &tables.lists {
            for (slot, value) in (0..).zip(list.iter()) {
                let key = BackendKey {
                    list_id: *list_id,
                    slot,
                };
                backends.insert(key, *value);
            }
        }
        let mut tables = tables.clone();
        tables.lists.clear();
        Self { tables, backends }
    }

    /// Makes a step entry by entry; every state in between must be safe.
    fn take(&mut self, step: &Step<'_>) {
        match step {
            Step::UpsertBackends(entries) => {
                for (key, value) in *entries {
                    self.backends.insert(*key, *value);
                    self.check();
                }
            }
            Step::DeleteBackends(keys) => {
                for key in *keys {
                    self.backends.remove(key);
                    self.check();
                }
            }
            Step::UpsertFrontends(entries) => {
                for entry in entries.chunks(1) {
                    self.tables.commit(&Step::UpsertFrontends(entry));
                    self.check();
                }
            }
            Step::UpsertIpcache(entries) => {
                for entry in entries.chunks(1) {
                    self.tables.commit(&Step::UpsertIpcache(entry));
                    self.check();
                }
            }
            step => {
                self.tables.commit(step);
                self.check();
            }
        }
    }

    fn check(&self) {
        for value in self.tables.ipcache.values() {
            assert!(self.tables.nodes.contains_key(&value.node_index));
        }
        for value in self.tables.node_addresses.values() {
            assert!(self.tables.nodes.contains_key(&value.node_index));
        }
        for value in self.tables.frontends.values() {
            for slot in 0..u32::from(value.backend_count) {
                let key = BackendKey {
                    list_id: value.list_id,
                    slot,
                };
                assert!(self.backends.contains_key(&key), "{value:?} lacks {slot}");
            }
        }
    }
}

/// The first entries of a step: what the kernel took of a call that failed.
fn part<'a>(step: &Step<'a>, percent: usize) -> Step<'a> {
    fn cut<T>(entries: &[T], percent: usize) -> &[T] {
        &entries[..entries.len() * percent / 100]
    }
    match *step {
        Step::UpsertNodes(e) => Step::UpsertNodes(cut(e, percent)),
        Step::UpsertNodeAddresses(e) => Step::UpsertNodeAddresses(cut(e, percent)),
        Step::UpsertIpcache(e) => Step::UpsertIpcache(cut(e, percent)),
        Step::UpsertBackends(e) => Step::UpsertBackends(cut(e, percent)),
        Step::UpsertFrontends(e) => Step::UpsertFrontends(cut(e, percent)),
        Step::DeleteFrontends(k) => Step::DeleteFrontends(cut(k, percent)),
        Step::DeleteBackends(k) => Step::DeleteBackends(cut(k, percent)),
        Step::DeleteIpcache(k) => Step::DeleteIpcache(cut(k, percent)),
        Step::DeleteNodeAddresses(k) => Step::DeleteNodeAddresses(cut(k, percent)),
        Step::DeleteNodes(k) => Step::DeleteNodes(cut(k, percent)),
    }
}

#[test]
fn a_full_map_does_not_keep_what_is_gone() {
    let missed = Step::UpsertFrontends(&[]);
    assert!(Step::DeleteFrontends(&[]).may_follow_missed(&missed));
    assert!(Step::DeleteIpcache(&[]).may_follow_missed(&missed));
    assert!(Step::DeleteNodes(&[]).may_follow_missed(&missed));
    // The frontend that was not switched still uses its old list.
    assert!(!Step::DeleteBackends(&[]).may_follow_missed(&missed));
    // An address that was not moved still lives behind its old node.
    assert!(!Step::DeleteNodes(&[]).may_follow_missed(&Step::UpsertIpcache(&[])));
}

proptest! {
    #[test]
    fn a_plan_makes_actual_equal_to_wanted_by_safe_steps(
        wanted in tables(), actual in tables(), loose in prop::collection::vec((200u32..210, 0u32..3), 0..4)
    ) {
        let mut actual = actual;
        actual.loose_backends = loose
            .into_iter()
            .map(|(list_id, slot)| BackendKey { list_id, slot })
            .collect();
        let mut kernel = Kernel::new(&actual);
        for key in &actual.loose_backends {
            kernel.backends.insert(*key, backend(0));
        }
        let plan = plan(&wanted, &actual);
        for step in plan.steps() {
            kernel.take(&step);
            actual.commit(&step);
        }
        prop_assert_eq!(&actual, &wanted);
        kernel.tables.loose_backends.clear();
        prop_assert_eq!(kernel, Kernel::new(&wanted));
        prop_assert!(super::plan(&wanted, &actual).is_empty());
    }

    #[test]
    fn what_may_follow_a_missed_step_is_safe_and_the_next_plan_makes_the_rest(
        wanted in tables(), actual in tables(), failing in 0usize..10, taken_percent in 0usize..100
    ) {
        let mut kernel = Kernel::new(&actual);
        let first = plan(&wanted, &actual);
        let mut missed: Vec<Step<'_>> = Vec::new();
        for (place, step) in first.steps().enumerate() {
            if !missed.iter().all(|missed| step.may_follow_missed(missed)) {
                missed.push(step);
            } else if place == failing {
                kernel.take(&part(&step, taken_percent));
                missed.push(step);
            } else {
                kernel.take(&step);
            }
        }
        let mut actual = Tables::from_entries(
            kernel.tables.nodes.clone(),
            kernel.tables.node_addresses.clone(),
            kernel.tables.ipcache.clone(),
            kernel.tables.frontends.clone(),
            kernel.backends.clone(),
        );
        for step in plan(&wanted, &actual.clone()).steps() {
            kernel.take(&step);
            actual.commit(&step);
        }
        prop_assert_eq!(actual, wanted);
    }

    #[test]
    fn a_plan_for_some_keys_changes_nothing_else(wanted in tables(), actual in tables()) {
        let keys = Keys {
            frontends: wanted.frontends.keys().take(1).copied().collect(),
            ..Keys::default()
        };
        let plan = plan_keys(&keys, &wanted, &actual);
        let touched: usize = plan.steps().map(|step| step.len()).sum();
        prop_assert!(touched <= 1);
    }
}

#[test]
fn lists_with_a_gap_are_loose_and_are_removed() {
    let entry = |slot| (BackendKey { list_id: 9, slot }, backend(1));
    let mut actual = Tables::from_entries([], [], [], [], [entry(0), entry(2)]);
    assert_eq!(actual.loose_backends.len(), 2);
    let plan = plan(&Tables::default(), &actual);
    assert_eq!(plan.backend_deletes.len(), 2);
    for step in plan.steps() {
        actual.commit(&step);
    }
    assert_eq!(actual, Tables::default());
}
