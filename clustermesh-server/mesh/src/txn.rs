//! What a planner hands out: guards and writes that become one etcd transaction.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    Compare, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
};

use crate::view::{Kv, View};

/// A condition under which a plan stays true.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Guard {
    /// The key does not exist.
    Absent(Bytes),
    /// The key exists and was last changed at this revision.
    Unchanged(Bytes, i64),
    /// No key with this prefix was put after this revision (deletions do not count).
    PrefixUnchanged(Bytes, i64),
}

/// Guards and writes of one plan. Every key is written at most once, as etcd demands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    guards: BTreeSet<Guard>,
    writes: BTreeMap<Bytes, Option<Bytes>>,
}

impl Txn {
    /// A plan that changes nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// True when there is nothing to propose.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// About what the transaction takes in the log, bytes.
    #[must_use]
    pub fn approximate_bytes(&self) -> usize {
        /// Tags, lengths and numbers of one compare or operation.
        const FRAMING_BYTES: usize = 32;
        let guards = self.guards.iter().map(|guard| match guard {
            Guard::Absent(key) | Guard::Unchanged(key, _) => key.len(),
            Guard::PrefixUnchanged(prefix, _) => 2 * prefix.len(),
        });
        let writes = self
            .writes
            .iter()
            .map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len));
        guards
            .chain(writes)
            .map(|bytes| bytes + FRAMING_BYTES)
            .sum()
    }

    /// Conditions, each once.
    #[must_use]
    pub fn guards(&self) -> &BTreeSet<Guard> {
        &self.guards
    }

    /// Writes in key order; `None` deletes.
    #[must_use]
    pub fn writes(&self) -> &BTreeMap<Bytes, Option<Bytes>> {
        &self.writes
    }

    /// Conditions and writes.
    pub(crate) fn into_parts(self) -> (BTreeSet<Guard>, BTreeMap<Bytes, Option<Bytes>>) {
        (self.guards, self.writes)
    }

    /// Adds a condition once.
    pub fn guard(&mut self, guard: Guard) {
        self.guards.insert(guard);
    }

    /// The key is still what the planner saw: this version, or absent.
    pub fn guard_seen(&mut self, key: impl Into<Bytes>, seen: Option<&Kv>) {
        let key = key.into();
        self.guard(match seen {
            Some(kv) => Guard::Unchanged(key, kv.mod_revision),
            None => Guard::Absent(key),
        });
    }

    /// Stores a value; the last call for a key counts.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.writes.insert(key.into(), Some(value.into()));
    }

    /// Removes a key; the last call for a key counts.
    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.writes.insert(key.into(), None);
    }

    /// Whether every condition holds in `view`: what the store decides when it applies the transaction.
    #[must_use]
    pub fn holds(&self, view: &dyn View) -> bool {
        self.guards.iter().all(|guard| match guard {
            Guard::Absent(key) => view.get(key).is_none(),
            Guard::Unchanged(key, revision) => {
                view.get(key).is_some_and(|kv| kv.mod_revision == *revision)
            }
            Guard::PrefixUnchanged(prefix, revision) => view
                .list(prefix)
                .iter()
                .all(|kv| kv.mod_revision <= *revision),
        })
    }

    /// The etcd form: compares, puts and deletes; nothing in the failure branch.
    #[must_use]
    pub fn into_request(self) -> TxnRequest {
        TxnRequest {
            compare: self.guards.into_iter().map(compare).collect(),
            success: self
                .writes
                .into_iter()
                .map(|(key, value)| operation(key, value))
                .collect(),
            failure: Vec::new(),
        }
    }
}

fn compare(guard: Guard) -> Compare {
    let (key, range_end, target, result, union) = match guard {
        Guard::Absent(key) => (
            key,
            Bytes::new(),
            CompareTarget::Create,
            CompareResult::Equal,
            TargetUnion::CreateRevision(0),
        ),
        Guard::Unchanged(key, revision) => (
            key,
            Bytes::new(),
            CompareTarget::Mod,
            CompareResult::Equal,
            TargetUnion::ModRevision(revision),
        ),
        Guard::PrefixUnchanged(prefix, revision) => {
            let end = prefix_end(&prefix);
            (
                prefix,
                end,
                CompareTarget::Mod,
                CompareResult::Less,
                TargetUnion::ModRevision(revision + 1),
            )
        }
    };
    Compare {
        key,
        range_end,
        target: target.into(),
        result: result.into(),
        target_union: Some(union),
    }
}

fn operation(key: Bytes, value: Option<Bytes>) -> RequestOp {
    let request = match value {
        Some(value) => Request::RequestPut(PutRequest {
            key,
            value,
            ..Default::default()
        }),
        None => Request::RequestDeleteRange(DeleteRangeRequest {
            key,
            ..Default::default()
        }),
    };
    RequestOp {
        request: Some(request),
    }
}

/// The end of the range of all keys with this prefix, in the type that requests take.
#[must_use]
pub fn prefix_end(prefix: &[u8]) -> Bytes {
    clustermesh_api::keys::prefix_end(prefix).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::MapView;

    #[test]
    fn guards_fail_when_what_they_name_moved() {
        let mut view = MapView::new();
        view.put("p/a", "1");
        let mut txn = Txn::new();
        txn.guard_seen("p/a", view.get(b"p/a").as_ref());
        txn.guard_seen("p/b", None);
        txn.guard(Guard::PrefixUnchanged("p/".into(), view.revision()));
        assert!(txn.holds(&view));

        let mut moved = view.clone();
        moved.put("p/a", "2");
        assert!(!txn.holds(&moved));
        let mut created = view.clone();
        created.put("p/b", "1");
        assert!(!txn.holds(&created));
        let mut elsewhere = view;
        elsewhere.put("q/c", "1");
        assert!(txn.holds(&elsewhere));
    }

    #[test]
    fn request_holds_one_operation_per_key_in_key_order() {
        let mut txn = Txn::new();
        txn.put("b", "1");
        txn.put("a", "1");
        txn.delete("b");
        txn.guard(Guard::PrefixUnchanged("p/".into(), 7));
        let request = txn.into_request();
        assert_eq!(request.success.len(), 2);
        assert!(
            matches!(&request.success[1].request, Some(Request::RequestDeleteRange(d)) if d.key == "b".as_bytes())
        );
        assert_eq!(request.compare[0].range_end, b"p0".to_vec());
        assert_eq!(
            request.compare[0].target_union,
            Some(TargetUnion::ModRevision(8))
        );
    }
}
