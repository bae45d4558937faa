//! Strategies for requests over a small set of keys, values and leases, so that they meet.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest, compare::TargetUnion, request_op::Request,
};
use proptest::prelude::*;

use crate::{
    model::TERM,
    pb::{LeaseExpire, PeerChange, PeerCopy, proposal::Command},
    test_support::op,
};

pub(crate) fn key() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        4 => prop::collection::vec(b'a'..=b'c', 1..3).prop_map(Bytes::from),
        1 => (b'a'..=b'c').prop_map(|n| Bytes::from(format!("cilium/cache/{}", char::from(n)))),
    ]
}

pub(crate) fn key_range() -> impl Strategy<Value = (Bytes, Bytes)> {
    let end = prop_oneof![
        2 => Just(Bytes::new()),
        1 => Just(Bytes::from_static(b"\0")),
        2 => key(),
    ];
    (
        prop_oneof![5 => key(), 1 => Just(Bytes::from_static(b"\0"))],
        end,
    )
}

fn value() -> impl Strategy<Value = Bytes> {
    prop::collection::vec(b'0'..=b'2', 0..3).prop_map(Bytes::from)
}

fn lease() -> impl Strategy<Value = i64> {
    prop_oneof![3 => Just(0_i64), 2 => 1..4_i64]
}

fn put() -> impl Strategy<Value = PutRequest> {
    let flag = || prop::bool::weighted(0.15);
    (key(), value(), lease(), any::<bool>(), flag(), flag()).prop_map(
        |(key, value, lease, prev_kv, ignore_value, ignore_lease)| PutRequest {
            key,
            value: if ignore_value { Bytes::new() } else { value },
            lease: if ignore_lease { 0 } else { lease },
            prev_kv,
            ignore_value,
            ignore_lease,
        },
    )
}

fn delete() -> impl Strategy<Value = DeleteRangeRequest> {
    (key_range(), any::<bool>()).prop_map(|((key, range_end), prev_kv)| DeleteRangeRequest {
        key,
        range_end,
        prev_kv,
    })
}

fn compare() -> impl Strategy<Value = Compare> {
    let number = 0..8_i64;
    let union = prop_oneof![
        number
            .clone()
            .prop_map(|n| (0, Some(TargetUnion::Version(n)))),
        number
            .clone()
            .prop_map(|n| (1, Some(TargetUnion::CreateRevision(n)))),
        number.prop_map(|n| (2, Some(TargetUnion::ModRevision(n)))),
        value().prop_map(|value| (3, Some(TargetUnion::Value(value)))),
        lease().prop_map(|id| (4, Some(TargetUnion::Lease(id)))),
        (0..6_i32).prop_map(|target| (target, None)),
    ];
    (key_range(), 0..5_i32, union).prop_map(|((key, range_end), result, (target, target_union))| {
        Compare {
            result,
            target,
            key,
            range_end,
            target_union,
        }
    })
}

fn leaf() -> impl Strategy<Value = RequestOp> {
    let range = (key_range(), prop_oneof![3 => Just(0_i64), 1 => -1..20_i64]).prop_map(
        |((key, range_end), revision)| RangeRequest {
            key,
            range_end,
            revision,
            ..RangeRequest::default()
        },
    );
    prop_oneof![
        put().prop_map(|put| op(Request::RequestPut(put))),
        delete().prop_map(|delete| op(Request::RequestDeleteRange(delete))),
        range.prop_map(|range| op(Request::RequestRange(range))),
    ]
}

fn txn_of(op: impl Strategy<Value = RequestOp> + Clone) -> impl Strategy<Value = TxnRequest> {
    (
        prop::collection::vec(compare(), 0..3),
        prop::collection::vec(op.clone(), 0..4),
        prop::collection::vec(op, 0..4),
    )
        .prop_map(|(compare, success, failure)| TxnRequest {
            compare,
            success,
            failure,
        })
}

fn txn() -> impl Strategy<Value = TxnRequest> {
    let op = leaf().boxed().prop_recursive(2, 12, 4, |inner| {
        txn_of(inner).prop_map(|txn| op(Request::RequestTxn(txn)))
    });
    txn_of(op)
}

fn peer_copy() -> impl Strategy<Value = PeerCopy> {
    let change = (b'a'..=b'c', prop::option::of(value())).prop_map(|(n, value)| PeerChange {
        key: Bytes::from(format!("cilium/cache/{}", char::from(n))),
        value,
    });
    (0..9_i64, any::<bool>(), prop::collection::vec(change, 0..4)).prop_map(
        |(revision, synced, changes)| PeerCopy {
            cluster: "east".into(),
            store_id: 1,
            revision,
            synced,
            changes,
            ..PeerCopy::default()
        },
    )
}

pub(crate) fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        8 => put().prop_map(Command::Put),
        3 => delete().prop_map(Command::DeleteRange),
        6 => txn().prop_map(Command::Txn),
        2 => (-1..30_i64).prop_map(|revision| Command::Compact(CompactionRequest { revision, physical: false })),
        2 => (0..4_i64, 0..90_i64).prop_map(|(id, ttl)| Command::LeaseGrant(LeaseGrantRequest { id, ttl })),
        1 => (1..4_i64).prop_map(|id| Command::LeaseRevoke(LeaseRevokeRequest { id })),
        1 => (TERM - 1..=TERM, prop::collection::vec(1..4_i64, 0..3))
            .prop_map(|(term, ids)| Command::LeaseExpire(LeaseExpire { term, ids })),
        1 => peer_copy().prop_map(Command::PeerCopy),
    ]
}

/// Up to `most` commands after grants of some leases.
pub(crate) fn commands(most: usize) -> impl Strategy<Value = Vec<Command>> {
    prop::collection::vec(command(), 1..most).prop_map(|mut commands| {
        for id in [1, 2] {
            commands.insert(0, Command::LeaseGrant(LeaseGrantRequest { id, ttl: 60 }));
        }
        commands
    })
}
