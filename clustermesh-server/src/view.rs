//! The replica's state as the planners read it.

use std::ops::ControlFlow;

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::KeyValue;
use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_core::State;
use clustermesh_mesh::{Kv, View, prefix_end};

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
