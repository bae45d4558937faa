//! Random transactions, nested ones too.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::compare::TargetUnion;
use clustermesh_api::etcd::rpc::request_op::Request;
use clustermesh_api::etcd::rpc::{Compare, PutRequest, RequestOp, TxnRequest};
use rand::RngExt;

use super::Generator;

/// Transactions inside transactions.
const DEPTH_MAX: usize = 3;
/// Two of them fit into a request.
const LARGE_VALUE_BYTES: usize = 600_000;
/// As the end of a range: there is none.
const FROM_KEY: &[u8] = b"\0";
/// etcd takes 128 operations.
const TOO_MANY_OPS: usize = 129;

impl Generator {
    pub(super) fn txn(&mut self) -> TxnRequest {
        if self.chance(0.02) {
            return self.wide_txn();
        }
        if self.chance(0.01) {
            return large_txn();
        }
        let mut txn = self.nested_txn(DEPTH_MAX);
        spare_etcd(&mut txn);
        txn
    }

    fn nested_txn(&mut self, depth: usize) -> TxnRequest {
        let compares = self.rng.random_range(0..3);
        let (success, failure) = (self.rng.random_range(0..4), self.rng.random_range(0..3));
        TxnRequest {
            compare: (0..compares).map(|_| self.txn_compare()).collect(),
            success: (0..success).map(|_| self.txn_op(depth)).collect(),
            failure: (0..failure).map(|_| self.txn_op(depth)).collect(),
        }
    }

    /// As many operations as are allowed, or one more.
    fn wide_txn(&mut self) -> TxnRequest {
        let count = TOO_MANY_OPS - usize::from(self.chance(0.5));
        let reads = (0..count).map(|_| RequestOp {
            request: Some(Request::RequestRange(self.range())),
        });
        TxnRequest {
            success: reads.collect(),
            ..TxnRequest::default()
        }
    }

    fn txn_op(&mut self, depth: usize) -> RequestOp {
        let request = match self.rng.random_range(0..100) {
            0 => None,
            1..35 => Some(Request::RequestRange(self.range())),
            35..65 => Some(Request::RequestPut(self.put())),
            65..80 => Some(Request::RequestDeleteRange(self.delete_range())),
            _ if depth > 1 => Some(Request::RequestTxn(self.nested_txn(depth - 1))),
            _ => Some(Request::RequestRange(self.range())),
        };
        RequestOp { request }
    }

    fn txn_compare(&mut self) -> Compare {
        let (key, mut range_end) = self.key_range();
        if self.chance(0.5) {
            range_end.clear();
        }
        let target = self.option(0..=4);
        let small = self.rng.random_range(0..4);
        // Sometimes the value is of another kind than the target says, or missing.
        let kind = if self.chance(0.04) {
            self.rng.random_range(0..6)
        } else {
            target
        };
        let target_union = match kind {
            0 => Some(TargetUnion::Version(small)),
            1 => Some(TargetUnion::CreateRevision(self.compared_revision())),
            2 => Some(TargetUnion::ModRevision(self.compared_revision())),
            3 => Some(TargetUnion::Value(self.value())),
            4 => Some(TargetUnion::Lease(self.lease())),
            _ => None,
        };
        Compare {
            result: self.option(0..=3),
            target,
            key,
            range_end,
            target_union,
        }
    }

    fn compared_revision(&mut self) -> i64 {
        if self.chance(0.3) {
            0
        } else {
            self.any_revision()
        }
    }
}

/// Takes out what breaks etcd: a key that a transaction deletes and then puts. Its check for such pairs overlooks
/// deletions of everything from a key on. They end it at once where the put keeps the value or lease, and later where
/// history is compacted up to that revision.
fn spare_etcd(txn: &mut TxnRequest) {
    let mut last_put = Bytes::new();
    each_op(txn, &mut |request| {
        if let Request::RequestPut(put) = request {
            last_put = last_put.clone().max(put.key.clone());
        }
    });
    each_op(txn, &mut |request| {
        if let Request::RequestDeleteRange(delete) = request
            && delete.range_end == FROM_KEY
            && delete.key <= last_put
        {
            delete.range_end.clear();
        }
    });
}

fn each_op(txn: &mut TxnRequest, visit: &mut impl FnMut(&mut Request)) {
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut op.request {
            Some(Request::RequestTxn(inner)) => each_op(inner, visit),
            Some(request) => visit(request),
            None => {}
        }
    }
}

/// Values that do not fit together into one fragment of a watch, where many such changes are told at once.
fn large_txn() -> TxnRequest {
    let puts = [b"a", b"b"].map(|key| RequestOp {
        request: Some(Request::RequestPut(PutRequest {
            key: Bytes::from_static(key),
            value: vec![b'l'; LARGE_VALUE_BYTES].into(),
            prev_kv: true,
            ..PutRequest::default()
        })),
    });
    TxnRequest {
        success: puts.into(),
        ..TxnRequest::default()
    }
}
