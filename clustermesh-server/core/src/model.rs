//! The model: what etcd's documentation says, in the most obvious way, with a copy of all keys for each revision.
//!
//! For tests, here and in other crates (feature `model`): it takes what [`crate::check`] lets through, and panics on kinds of command that tests
//! do not make.
#![expect(
    clippy::unwrap_used,
    reason = "only tests use it: what cannot be is a failed test"
)]

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use clustermesh_api::etcd::{
    mvcc::KeyValue,
    rpc::{
        CompactionResponse, Compare, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantResponse,
        LeaseRevokeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp,
        ResponseHeader, ResponseOp, TxnRequest, TxnResponse, compare::TargetUnion,
        request_op::Request, response_op::Response,
    },
};

use crate::{KvError, Outcome, check, pb::proposal::Command};

/// Term of all entries: what another one expires is ignored.
pub const TERM: u64 = 7;

type Keys = BTreeMap<Bytes, KeyValue>;
/// Deleted or not, the key, the key before the revision.
pub type Change = (bool, KeyValue, Option<KeyValue>);

/// Keys, history and leases after some commands.
#[derive(Clone, Debug)]
pub struct Model {
    /// Keys as each revision left them; index is the revision, 0 and 1 are empty.
    revisions: Vec<Keys>,
    /// Changes of each revision; index is the revision.
    changes: Vec<Vec<Change>>,
    compact_revision: i64,
    leases: BTreeSet<i64>,
}

/// A request at work.
struct Draft {
    keys: Keys,
    changes: Vec<Change>,
}

fn in_range(key: &Bytes, start: &Bytes, end: &Bytes) -> bool {
    if end.is_empty() {
        key == start
    } else if end.as_ref() == b"\0" {
        key >= start
    } else {
        key >= start && key < end
    }
}

fn select(keys: &Keys, start: &Bytes, end: &Bytes) -> Vec<KeyValue> {
    keys.values()
        .filter(|kv| in_range(&kv.key, start, end))
        .cloned()
        .collect()
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader {
        revision,
        ..ResponseHeader::default()
    })
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

impl Model {
    /// Without keys, at revision 1.
    #[must_use]
    pub fn new() -> Self {
        Self {
            revisions: vec![Keys::new(), Keys::new()],
            changes: vec![Vec::new(), Vec::new()],
            compact_revision: -1,
            leases: BTreeSet::new(),
        }
    }

    /// Newest revision.
    #[must_use]
    pub fn revision(&self) -> i64 {
        i64::try_from(self.revisions.len()).unwrap() - 1
    }

    fn at(&self, revision: i64) -> &Keys {
        &self.revisions[usize::try_from(revision).unwrap()]
    }

    fn now(&self) -> &Keys {
        self.revisions.last().unwrap()
    }

    fn draft(&self) -> Draft {
        Draft {
            keys: self.now().clone(),
            changes: Vec::new(),
        }
    }

    fn commit(&mut self, draft: Draft) {
        if !draft.changes.is_empty() {
            self.revisions.push(draft.keys);
            self.changes.push(draft.changes);
        }
    }

    /// What a command in an entry of its own comes to.
    ///
    /// # Errors
    /// etcd's.
    pub fn apply(&mut self, command: &Command) -> Result<Outcome, KvError> {
        match command {
            Command::Put(request) => {
                check::check_put(request)?;
                let mut draft = self.draft();
                let response = self.put(&mut draft, request)?;
                self.commit(draft);
                Ok(Outcome::Put(response))
            }
            Command::DeleteRange(request) => {
                check::check_delete_range(request)?;
                let mut draft = self.draft();
                let response = self.delete(&mut draft, request);
                self.commit(draft);
                Ok(Outcome::DeleteRange(response))
            }
            Command::Txn(request) => {
                check::check_txn(request)?;
                self.check_txn(request)?;
                let mut draft = self.draft();
                let response = self.txn(&mut draft, request)?;
                self.commit(draft);
                Ok(Outcome::Txn(response))
            }
            Command::Compact(request) => {
                if request.revision <= self.compact_revision {
                    return Err(KvError::Compacted);
                }
                if request.revision > self.revision() {
                    return Err(KvError::FutureRevision);
                }
                self.compact_revision = request.revision;
                Ok(Outcome::Compact(CompactionResponse::default()))
            }
            Command::LeaseGrant(request) => {
                if request.id == 0 {
                    return Err(KvError::LeaseNotFound);
                }
                if !self.leases.insert(request.id) {
                    return Err(KvError::LeaseExists);
                }
                Ok(Outcome::LeaseGrant(LeaseGrantResponse {
                    id: request.id,
                    ttl: request.ttl.max(2),
                    ..LeaseGrantResponse::default()
                }))
            }
            Command::LeaseRevoke(request) => {
                if self.drop_leases(&[request.id]).is_empty() {
                    return Err(KvError::LeaseNotFound);
                }
                Ok(Outcome::LeaseRevoke(LeaseRevokeResponse::default()))
            }
            Command::LeaseExpire(request) => Ok(Outcome::LeaseExpire {
                expired: if request.term == TERM {
                    self.drop_leases(&request.ids)
                } else {
                    Vec::new()
                },
            }),
            Command::PeerCopy(request) => {
                let mut draft = self.draft();
                for (place, change) in request.changes.iter().enumerate() {
                    let later = &request.changes[place + 1..];
                    if later.iter().any(|other| other.key == change.key) {
                        continue;
                    }
                    let current = draft.keys.get(&change.key).map(|kv| &kv.value);
                    match &change.value {
                        Some(value) if current != Some(value) => {
                            self.write(&mut draft, &change.key, value, 0);
                        }
                        None if current.is_some() => self.erase(&mut draft, &change.key),
                        _ => {}
                    }
                }
                let written = draft.changes.len();
                self.commit(draft);
                Ok(Outcome::PeerCopy { written })
            }
            other => panic!("not generated: {other:?}"),
        }
    }

    fn drop_leases(&mut self, ids: &[i64]) -> Vec<i64> {
        let mut dropped = Vec::new();
        let mut draft = self.draft();
        for id in ids {
            if self.leases.remove(id) {
                dropped.push(*id);
                let keys: Vec<Bytes> = draft
                    .keys
                    .values()
                    .filter(|kv| kv.lease == *id)
                    .map(|kv| kv.key.clone())
                    .collect();
                for key in keys {
                    self.erase(&mut draft, &key);
                }
            }
        }
        self.commit(draft);
        dropped
    }

    fn write(&self, draft: &mut Draft, key: &Bytes, value: &Bytes, lease: i64) {
        let revision = self.revision() + 1;
        let old = draft.keys.get(key);
        let kv = KeyValue {
            key: key.clone(),
            create_revision: old.map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
            version: old.map_or(1, |kv| kv.version + 1),
            value: value.clone(),
            lease,
        };
        let before = self.now().get(key).filter(|_| kv.version > 1);
        draft.changes.push((false, kv.clone(), before.cloned()));
        draft.keys.insert(key.clone(), kv);
    }

    fn erase(&self, draft: &mut Draft, key: &Bytes) {
        draft.keys.remove(key);
        let tombstone = KeyValue {
            key: key.clone(),
            mod_revision: self.revision() + 1,
            ..KeyValue::default()
        };
        draft
            .changes
            .push((true, tombstone, self.now().get(key).cloned()));
    }

    fn put(&self, draft: &mut Draft, request: &PutRequest) -> Result<PutResponse, KvError> {
        let old = draft.keys.get(&request.key).cloned();
        self.check_put(old.as_ref(), request)?;
        let mut value = request.value.clone();
        let mut lease = request.lease;
        if let Some(old) = &old {
            if request.ignore_value {
                value = old.value.clone();
            }
            if request.ignore_lease {
                lease = old.lease;
            }
        }
        self.write(draft, &request.key, &value, lease);
        Ok(PutResponse {
            header: None,
            prev_kv: old.filter(|_| request.prev_kv),
        })
    }

    fn check_put(&self, old: Option<&KeyValue>, request: &PutRequest) -> Result<(), KvError> {
        if request.lease != 0 && !self.leases.contains(&request.lease) {
            return Err(KvError::LeaseNotFound);
        }
        if (request.ignore_value || request.ignore_lease) && old.is_none() {
            return Err(KvError::KeyNotFound);
        }
        Ok(())
    }

    fn delete(&self, draft: &mut Draft, request: &DeleteRangeRequest) -> DeleteRangeResponse {
        let old = select(&draft.keys, &request.key, &request.range_end);
        for kv in &old {
            self.erase(draft, &kv.key);
        }
        DeleteRangeResponse {
            header: None,
            deleted: i64::try_from(old.len()).unwrap(),
            prev_kvs: if request.prev_kv { old } else { Vec::new() },
        }
    }

    fn taken<'a>(&self, request: &'a TxnRequest) -> (bool, &'a [RequestOp]) {
        let succeeded = request.compare.iter().all(|compare| self.compare(compare));
        let ops = if succeeded {
            &request.success
        } else {
            &request.failure
        };
        (succeeded, ops)
    }

    fn compare(&self, compare: &Compare) -> bool {
        let found = select(self.now(), &compare.key, &compare.range_end);
        if found.is_empty() {
            return compare.target != 3 && compare_one(compare, &KeyValue::default());
        }
        found.iter().all(|kv| compare_one(compare, kv))
    }

    fn check_txn(&self, request: &TxnRequest) -> Result<(), KvError> {
        for op in self.taken(request).1 {
            match op.request.as_ref().unwrap() {
                Request::RequestRange(range) => {
                    if range.revision > self.revision() {
                        return Err(KvError::FutureRevision);
                    }
                    if range.revision != 0 && range.revision < self.compact_revision {
                        return Err(KvError::Compacted);
                    }
                }
                Request::RequestPut(put) => self.check_put(self.now().get(&put.key), put)?,
                Request::RequestDeleteRange(_) => {}
                Request::RequestTxn(txn) => self.check_txn(txn)?,
            }
        }
        Ok(())
    }

    fn txn(&self, draft: &mut Draft, request: &TxnRequest) -> Result<TxnResponse, KvError> {
        let (succeeded, ops) = self.taken(request);
        let mut responses = Vec::new();
        for op in ops {
            let written = |draft: &Draft| self.revision() + i64::from(!draft.changes.is_empty());
            let response = match op.request.as_ref().unwrap() {
                Request::RequestRange(range) => {
                    let keys = if range.revision > 0 {
                        self.at(range.revision)
                    } else {
                        &draft.keys
                    };
                    let mut response = answer(keys, range);
                    response.header = header(written(draft));
                    Response::ResponseRange(response)
                }
                Request::RequestPut(put) => {
                    let mut response = self.put(draft, put)?;
                    response.header = header(written(draft));
                    Response::ResponsePut(response)
                }
                Request::RequestDeleteRange(delete) => {
                    let mut response = self.delete(draft, delete);
                    response.header = header(written(draft));
                    Response::ResponseDeleteRange(response)
                }
                Request::RequestTxn(txn) => {
                    let mut response = self.txn(draft, txn)?;
                    response.header = header(0);
                    Response::ResponseTxn(response)
                }
            };
            responses.push(ResponseOp {
                response: Some(response),
            });
        }
        Ok(TxnResponse {
            header: None,
            succeeded,
            responses,
        })
    }

    /// What a range answers, without header.
    ///
    /// # Errors
    /// A revision that is compacted or not there yet.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, KvError> {
        let revision = match request.revision {
            revision if revision > self.revision() => return Err(KvError::FutureRevision),
            revision if revision <= 0 => self.revision(),
            revision if revision < self.compact_revision => return Err(KvError::Compacted),
            revision => revision,
        };
        Ok(answer(self.at(revision), request))
    }

    /// All changes after a revision; `None` when compacted. What lies before the compact revision is not known any more.
    #[must_use]
    pub fn history(&self, after: i64) -> Option<Vec<Change>> {
        if after + 1 < self.compact_revision {
            return None;
        }
        let mut changes = Vec::new();
        let first = self.compact_revision.max(after + 1).max(0);
        for (revision, group) in self.changes.iter().enumerate() {
            let revision = i64::try_from(revision).unwrap();
            if revision < first {
                continue;
            }
            for (deleted, kv, prev) in group {
                let prev = prev.clone().filter(|_| revision > self.compact_revision);
                changes.push((*deleted, kv.clone(), prev));
            }
        }
        Some(changes)
    }
}

fn compare_one(compare: &Compare, kv: &KeyValue) -> bool {
    let wanted = |target| match (target, &compare.target_union) {
        (0, Some(TargetUnion::Version(n)))
        | (1, Some(TargetUnion::CreateRevision(n)))
        | (2, Some(TargetUnion::ModRevision(n)))
        | (4, Some(TargetUnion::Lease(n))) => *n,
        _ => 0,
    };
    let value = match &compare.target_union {
        Some(TargetUnion::Value(value)) => value.clone(),
        _ => Bytes::new(),
    };
    let order = match compare.target {
        0 => kv.version.cmp(&wanted(0)),
        1 => kv.create_revision.cmp(&wanted(1)),
        2 => kv.mod_revision.cmp(&wanted(2)),
        3 => kv.value.cmp(&value),
        4 => kv.lease.cmp(&wanted(4)),
        _ => 0.cmp(&0),
    };
    match compare.result {
        0 => order.is_eq(),
        1 => order.is_gt(),
        2 => order.is_lt(),
        3 => order.is_ne(),
        _ => true,
    }
}

fn answer(keys: &Keys, request: &RangeRequest) -> RangeResponse {
    let mut kvs = select(keys, &request.key, &request.range_end);
    let count = i64::try_from(kvs.len()).unwrap();
    if request.count_only {
        return RangeResponse {
            count,
            ..RangeResponse::default()
        };
    }
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let filters = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    if limit > 0 && request.sort_order == 0 && filters == [0; 4] {
        kvs.truncate(limit + 1);
    }
    kvs.retain(|kv| {
        kv.mod_revision >= filters[0]
            && (filters[1] == 0 || kv.mod_revision <= filters[1])
            && kv.create_revision >= filters[2]
            && (filters[3] == 0 || kv.create_revision <= filters[3])
    });
    kvs.sort_by(|a, b| {
        let order = match request.sort_target {
            0 => a.key.cmp(&b.key),
            1 => a.version.cmp(&b.version),
            2 => a.create_revision.cmp(&b.create_revision),
            3 => a.mod_revision.cmp(&b.mod_revision),
            _ => a.value.cmp(&b.value),
        };
        if request.sort_order == 2 {
            order.reverse()
        } else {
            order
        }
    });
    let more = limit > 0 && kvs.len() > limit;
    if more {
        kvs.truncate(limit);
    }
    if request.keys_only {
        for kv in &mut kvs {
            kv.value.clear();
            // etcd answers from its index, which knows no leases, unless it has to sort by value.
            if request.sort_target != 4 {
                kv.lease = 0;
            }
        }
    }
    RangeResponse {
        header: None,
        kvs,
        more,
        count,
    }
}
