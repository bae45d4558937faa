//! The replica's state as the planners read it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::ControlFlow;

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::KeyValue;
use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_core::{EventKind, State};
use clustermesh_mesh::{ClusterIndex, Kv, View, prefix_end};

/// One state, held for as long as the planner runs.
#[derive(Debug, Clone, Copy)]
pub struct StateView<'a>(pub &'a State);

impl StateView<'_> {
    fn range(&self, key: Bytes, range_end: Bytes) -> Vec<KeyValue> {
        let request = RangeRequest {
            key,
            range_end,
            ..RangeRequest::default()
        };
        // The newest revision can be neither compacted nor in the future; an empty key reads as nothing.
        self.0
            .range(&request)
            .map(|response| response.kvs)
            .unwrap_or_default()
    }
}

fn kv(kv: KeyValue) -> Kv {
    Kv {
        key: kv.key,
        value: kv.value,
        mod_revision: kv.mod_revision,
    }
}

impl View for StateView<'_> {
    fn revision(&self) -> i64 {
        self.0.revision()
    }

    fn get(&self, key: &[u8]) -> Option<Kv> {
        self.0.get(key).map(kv)
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(Kv) -> ControlFlow<()>) {
        for found in self.range(Bytes::copy_from_slice(prefix), prefix_end(prefix)) {
            if visit(kv(found)).is_break() {
                return;
            }
        }
    }
}

/// A state with an index over it, which is brought up to the state's revision when a planner asks it.
#[derive(Debug)]
pub struct IndexedView<'a> {
    state: StateView<'a>,
    cluster: &'a str,
    index: RefCell<&'a mut ClusterIndex>,
}

impl<'a> IndexedView<'a> {
    /// `index` is of cluster `cluster` and of an earlier revision of the same history.
    pub fn new(state: &'a State, cluster: &'a str, index: &'a mut ClusterIndex) -> Self {
        Self {
            state: StateView(state),
            cluster,
            index: RefCell::new(index),
        }
    }

    fn asked<T>(&self, ask: impl FnOnce(&ClusterIndex) -> T) -> T {
        let mut index = self.index.borrow_mut();
        catch_up(&mut index, self.cluster, self.state);
        ask(&index)
    }
}

fn catch_up(index: &mut ClusterIndex, cluster: &str, view: StateView<'_>) {
    let StateView(state) = view;
    let revision = state.revision();
    if index.revision() == revision {
        return;
    }
    let history = (index.revision() > 0 && index.revision() < revision)
        .then(|| state.history(index.revision(), usize::MAX));
    let Some(Ok(groups)) = history else {
        // Never read, another history (a snapshot of a restored store), or compacted away.
        *index = ClusterIndex::of(cluster, &view);
        return;
    };
    for event in groups.iter().flat_map(|group| &group.events) {
        let value = (event.kind() == EventKind::Put).then(|| event.kv().value_bytes());
        index.apply(event.key(), value);
    }
    index.advance(revision);
}

impl View for IndexedView<'_> {
    fn revision(&self) -> i64 {
        self.state.revision()
    }

    fn get(&self, key: &[u8]) -> Option<Kv> {
        self.state.get(key)
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(Kv) -> ControlFlow<()>) {
        self.state.scan(prefix, visit);
    }

    fn addresses_of(&self, node: &str) -> BTreeSet<IpAddr> {
        self.asked(|index| index.addresses_of(node))
    }

    fn nodes_at(&self, cluster: &str, address: IpAddr) -> BTreeSet<String> {
        // The index is of this cluster's nodes only, and no other is planned for.
        debug_assert_eq!(cluster, self.cluster);
        self.asked(|index| index.nodes_at(address))
    }
}
