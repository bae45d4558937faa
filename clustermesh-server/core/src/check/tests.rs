use clustermesh_api::etcd::rpc::{Compare, LeaseGrantRequest, RequestOp};

use prost::Message;

use super::*;
use crate::{
    pb::{Batch, PeerChange, PeerCopy, proposal::Command},
    test_support::{bytes, delete_op, put_op, put_request, range, range_op, txn, txn_op},
};

#[test]
fn requests_without_key_are_refused() {
    assert_eq!(check_range(&range("", "x")), Err(KvError::EmptyKey));
    assert_eq!(check_put(&put_request("", "x")), Err(KvError::EmptyKey));
    assert_eq!(
        check_delete_range(&DeleteRangeRequest::default()),
        Err(KvError::EmptyKey)
    );
    let compare = txn(vec![Compare::default()], vec![], vec![]);
    assert_eq!(check_txn(&compare), Err(KvError::EmptyKey));
    let nested = txn(
        vec![],
        vec![],
        vec![txn_op(txn(vec![], vec![put_op("", "")], vec![]))],
    );
    assert_eq!(check_txn(&nested), Err(KvError::EmptyKey));
}

#[test]
fn what_a_client_may_nest_can_be_read_back_from_the_log() {
    let mut nested = txn(vec![], vec![put_op("a", "1")], vec![]);
    let mut accepted = 0;
    // What a decoder of requests takes.
    while TxnRequest::decode(nested.encode_to_vec().as_slice()).is_ok() {
        if check_txn(&nested).is_ok() {
            accepted += 1;
            let batch = Batch {
                proposals: vec![Command::Txn(nested.clone()).into()],
                ..Batch::default()
            };
            let read = Batch::decode(batch.encode_to_vec().as_slice());
            assert!(read.is_ok(), "depth {accepted}: {read:?}");
        } else {
            assert_eq!(check_txn(&nested), Err(KvError::TooManyOps));
        }
        nested = txn(vec![], vec![], vec![txn_op(nested)]);
    }
    assert_eq!(accepted, MAX_TXN_DEPTH);
}

#[test]
fn unknown_sort_options_are_refused() {
    for (sort_order, sort_target) in [(3, 0), (0, 5), (-1, 0)] {
        let request = RangeRequest {
            sort_order,
            sort_target,
            ..range("a", "")
        };
        assert_eq!(check_range(&request), Err(KvError::InvalidSortOption));
    }
}

#[test]
fn a_put_that_ignores_and_gives_at_once_is_refused() {
    let value = PutRequest {
        ignore_value: true,
        ..put_request("a", "1")
    };
    assert_eq!(check_put(&value), Err(KvError::ValueProvided));
    let lease = PutRequest {
        ignore_lease: true,
        lease: 1,
        ..put_request("a", "1")
    };
    assert_eq!(check_put(&lease), Err(KvError::LeaseProvided));
}

#[test]
fn an_empty_operation_is_refused() {
    let request = txn(vec![], vec![RequestOp::default()], vec![]);
    assert_eq!(check_txn(&request), Err(KvError::KeyNotFound));
}

#[test]
fn operations_are_limited_over_all_levels() {
    let ops = |count: usize| vec![range_op("a", ""); count];
    assert_eq!(check_txn(&txn(vec![], ops(128), ops(128))), Ok(()));
    assert_eq!(
        check_txn(&txn(vec![], ops(129), vec![])),
        Err(KvError::TooManyOps)
    );
    // One operation here leaves 127 to the nested transaction.
    let nested = |count| {
        txn(
            vec![],
            vec![txn_op(txn(vec![], ops(count), vec![]))],
            vec![],
        )
    };
    assert_eq!(check_txn(&nested(127)), Ok(()));
    assert_eq!(check_txn(&nested(128)), Err(KvError::TooManyOps));
}

#[test]
fn a_key_is_written_once_on_any_path() {
    let nested = |success, failure| txn_op(txn(vec![], success, failure));
    let cases = [
        (vec![put_op("a", ""), put_op("a", "")], false),
        (vec![put_op("a", ""), put_op("b", "")], true),
        (vec![put_op("b", ""), delete_op("a", "c")], false),
        (vec![put_op("c", ""), delete_op("a", "c")], true),
        (vec![delete_op("a", ""), put_op("a", "")], false),
        (vec![delete_op("a", "c"), delete_op("b", "d")], true),
        // An inverted range deletes nothing.
        (vec![delete_op("c", "a"), put_op("b", "")], true),
        // "From key on" is read literally by etcd and overlaps nothing.
        (vec![delete_op("a", "\0"), put_op("b", "")], true),
        // Branches exclude each other …
        (
            vec![nested(vec![put_op("a", "")], vec![put_op("a", "")])],
            true,
        ),
        // … but not what stands beside them.
        (
            vec![nested(vec![put_op("a", "")], vec![]), put_op("a", "")],
            false,
        ),
        (
            vec![
                nested(vec![put_op("a", "")], vec![]),
                nested(vec![], vec![put_op("a", "")]),
            ],
            false,
        ),
        (
            vec![nested(vec![put_op("b", "")], vec![]), delete_op("a", "c")],
            false,
        ),
        // The order of nested transactions counts: a later delete of what an earlier one put is allowed.
        (
            vec![
                nested(vec![put_op("a", "")], vec![]),
                nested(vec![delete_op("a", "")], vec![]),
            ],
            true,
        ),
        (
            vec![
                nested(vec![delete_op("a", "")], vec![]),
                nested(vec![put_op("a", "")], vec![]),
            ],
            false,
        ),
    ];
    for (ops, allowed) in cases {
        let expected = if allowed {
            Ok(())
        } else {
            Err(KvError::DuplicateKey)
        };
        assert_eq!(
            check_txn(&txn(vec![], ops.clone(), vec![])),
            expected,
            "{ops:?}"
        );
        assert_eq!(
            check_txn(&txn(vec![], vec![], ops.clone())),
            expected,
            "{ops:?}"
        );
    }
}

#[test]
fn overlapping_deletes_are_merged() {
    let mut deletes = DeletedRanges::default();
    for (start, end) in [("d", "f"), ("a", "b"), ("h", "k"), ("b", "e"), ("e", "g")] {
        deletes.add(start.as_bytes(), end.as_bytes());
    }
    assert_eq!(deletes.ranges.len(), 2);
    for (key, expected) in [
        ("a", true),
        ("f", true),
        ("g", false),
        ("j", true),
        ("k", false),
    ] {
        assert_eq!(deletes.contains(key.as_bytes()), expected, "{key}");
    }
}

#[test]
fn sizes_and_ttls_are_limited() {
    assert_eq!(check_size(MAX_REQUEST_BYTES), Ok(()));
    assert_eq!(
        check_size(MAX_REQUEST_BYTES + 1),
        Err(KvError::RequestTooLarge)
    );
    let grant = |ttl| check_lease_grant(&LeaseGrantRequest { id: 0, ttl });
    assert_eq!(grant(MAX_LEASE_TTL_SECONDS), Ok(()));
    assert_eq!(
        grant(MAX_LEASE_TTL_SECONDS + 1),
        Err(KvError::LeaseTtlTooLarge)
    );
}

#[test]
fn a_peer_copy_writes_only_ranges_of_copies() {
    let check = |key: &str| {
        check_peer_copy(&PeerCopy {
            cluster: "east".into(),
            changes: vec![PeerChange {
                key: bytes(key),
                value: None,
            }],
            ..PeerCopy::default()
        })
    };
    for key in [
        "cilium/cache/nodes/v1/east/n1",
        "cilium/synced/east/cilium/state/nodes/v1",
        "cilium/cluster-config/east",
    ] {
        assert_eq!(check(key), Ok(()), "{key}");
    }
    for key in [
        "cilium/state/nodes/v1/east/n1",
        "cilium/synced/west/cilium/state/nodes/v1",
        "cilium/synced/east",
        "cilium/synced/eastern/x",
        "cilium/cluster-config/west",
        "cilium/cluster-config/east/x",
        "cilium/cache",
        "clustermesh.io/alloc/x",
    ] {
        let error = check(key).unwrap_err();
        assert!(error.to_string().contains(key), "{error}");
    }
    assert_eq!(check(""), Err(KvError::EmptyKey));
    assert_eq!(
        check_peer_copy(&PeerCopy::default()),
        Err(KvError::PeerClusterMissing)
    );
}
