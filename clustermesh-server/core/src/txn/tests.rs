use super::*;
use crate::{
    Outcome, State,
    pb::proposal::Command,
    test_support::{
        apply, bytes, compact, compare, contents, delete_op, grant, one, op, put, put_op,
        put_request, put_with_lease, range, range_op, text, txn, txn_op,
    },
};

fn run(state: &mut State, request: TxnRequest) -> Result<TxnResponse, KvError> {
    match one(state, Command::Txn(request))? {
        Outcome::Txn(response) => Ok(response),
        other => panic!("{other:?}"),
    }
}

fn inner_revision(response: &ResponseOp) -> i64 {
    let header = match response.response.as_ref().unwrap() {
        Response::ResponseRange(response) => &response.header,
        Response::ResponsePut(response) => &response.header,
        Response::ResponseDeleteRange(response) => &response.header,
        Response::ResponseTxn(response) => &response.header,
    };
    header.as_ref().unwrap().revision
}

#[test]
fn comparisons_see_every_target() {
    use CompareResult::{Equal, Greater, Less, NotEqual};
    use TargetUnion as T;
    let mut state = State::new();
    apply(
        &mut state,
        [grant(9, 60), put("a", "1"), put_with_lease("a", "2", 9)],
    );
    let cases = [
        ("a", CompareTarget::Version, Equal, T::Version(2), true),
        ("a", CompareTarget::Version, Less, T::Version(2), false),
        (
            "a",
            CompareTarget::Create,
            Equal,
            T::CreateRevision(2),
            true,
        ),
        (
            "a",
            CompareTarget::Create,
            Greater,
            T::CreateRevision(1),
            true,
        ),
        ("a", CompareTarget::Mod, NotEqual, T::ModRevision(2), true),
        ("a", CompareTarget::Mod, Less, T::ModRevision(4), true),
        ("a", CompareTarget::Value, Equal, T::Value(bytes("2")), true),
        (
            "a",
            CompareTarget::Value,
            Greater,
            T::Value(bytes("10")),
            true,
        ),
        ("a", CompareTarget::Lease, Equal, T::Lease(9), true),
        ("x", CompareTarget::Version, Equal, T::Version(0), true),
        (
            "x",
            CompareTarget::Create,
            Equal,
            T::CreateRevision(0),
            true,
        ),
        ("x", CompareTarget::Lease, Equal, T::Lease(0), true),
        // An absent key has no value, so no comparison of values holds.
        ("x", CompareTarget::Value, Equal, T::Value(bytes("")), false),
        (
            "x",
            CompareTarget::Value,
            NotEqual,
            T::Value(bytes("2")),
            false,
        ),
        // A union of another kind counts as 0.
        ("a", CompareTarget::Mod, Equal, T::Version(3), false),
        ("x", CompareTarget::Mod, Equal, T::Version(3), true),
    ];
    for (key, target, result, wanted, expected) in cases {
        let request = txn(
            vec![compare(key, target, result, wanted.clone())],
            vec![],
            vec![],
        );
        let response = state.read_txn(&request).unwrap();
        assert_eq!(
            response.succeeded, expected,
            "{key} {target:?} {result:?} {wanted:?}"
        );
    }
}

#[test]
fn a_comparison_of_a_range_holds_for_each_key() {
    let mut state = State::new();
    apply(&mut state, [put("a", "1"), put("b", "1"), put("b", "2")]);
    let holds = |key: &str, version| {
        let mut compare = compare(
            key,
            CompareTarget::Version,
            CompareResult::Equal,
            TargetUnion::Version(version),
        );
        compare.range_end = bytes("\0");
        state
            .read_txn(&txn(vec![compare], vec![], vec![]))
            .unwrap()
            .succeeded
    };
    assert!(!holds("a", 1));
    assert!(holds("b", 2));
    assert!(holds("c", 0), "an empty range is one absent key");
}

#[test]
fn a_transaction_has_one_revision_and_reads_its_own_writes() {
    let mut state = State::new();
    apply(&mut state, [put("a", "1"), put("b", "1")]);
    let response = run(
        &mut state,
        txn(
            vec![],
            vec![
                range_op("a", "\0"),
                put_op("c", "1"),
                range_op("a", "\0"),
                delete_op("a", "b"),
                range_op("a", "\0"),
            ],
            vec![],
        ),
    )
    .unwrap();
    assert!(response.succeeded);
    assert_eq!(response.header, None);
    let counts: Vec<i64> = response
        .responses
        .iter()
        .filter_map(|op| match op.response.as_ref().unwrap() {
            Response::ResponseRange(response) => Some(response.count),
            _ => None,
        })
        .collect();
    assert_eq!(counts, [2, 3, 2]);
    let revisions: Vec<i64> = response.responses.iter().map(inner_revision).collect();
    assert_eq!(revisions, [3, 4, 4, 4, 4]);
    assert_eq!(state.revision(), 4);
    let group = &state.history(3, usize::MAX).unwrap()[0];
    let events: Vec<_> = group
        .events
        .iter()
        .map(|event| {
            (
                text(event.key()),
                event.kv().mod_revision(),
                event.kv().sub(),
            )
        })
        .collect();
    assert_eq!(events, [("c".to_owned(), 4, 0), ("a".to_owned(), 4, 1)]);
}

#[test]
fn a_transaction_that_writes_nothing_uses_no_revision() {
    let mut state = State::new();
    let response = run(&mut state, txn(vec![], vec![delete_op("a", "\0")], vec![])).unwrap();
    assert_eq!(inner_revision(&response.responses[0]), 1);
    assert_eq!(state.revision(), 1);
}

#[test]
fn comparisons_of_nested_transactions_are_decided_before_any_write() {
    let mut state = State::new();
    let absent = compare(
        "a",
        CompareTarget::Version,
        CompareResult::Equal,
        TargetUnion::Version(0),
    );
    let nested = txn(vec![absent], vec![put_op("b", "absent")], vec![]);
    let response = run(
        &mut state,
        txn(vec![], vec![put_op("a", "1"), txn_op(nested)], vec![]),
    )
    .unwrap();
    assert_eq!(
        contents(&state, "b", ""),
        [("b".to_owned(), "absent".to_owned())]
    );
    assert_eq!(inner_revision(&response.responses[1]), 0);
}

#[test]
fn a_key_put_and_deleted_in_one_revision_leaves_both_events() {
    let mut state = State::new();
    apply(&mut state, [put("a", "old")]);
    let child = |op| txn_op(txn(vec![], vec![op], vec![]));
    run(
        &mut state,
        txn(
            vec![],
            vec![child(put_op("a", "new")), child(delete_op("a", ""))],
            vec![],
        ),
    )
    .unwrap();
    assert!(contents(&state, "a", "").is_empty());
    let group = &state.history(2, usize::MAX).unwrap()[0];
    assert_eq!(group.events.len(), 2);
    for event in &group.events {
        assert_eq!(text(&event.prev().unwrap().value()), "old");
    }
}

#[test]
fn a_key_deleted_and_put_in_one_revision_is_created_anew() {
    let mut state = State::new();
    apply(&mut state, [put("a", "old")]);
    let request = txn(
        vec![],
        vec![delete_op("a", "\0"), put_op("a", "new")],
        vec![],
    );
    run(&mut state, request).unwrap();
    let created = &state.history(2, usize::MAX).unwrap()[0].events;
    let prev = |event: &StoredEvent| event.prev().map(|prev| text(&prev.value()).to_owned());
    assert_eq!(created.len(), 2);
    assert_eq!(prev(&created[0]).as_deref(), Some("old"));
    assert_eq!((prev(&created[1]), created[1].kv().version()), (None, 1));
}

#[test]
fn failing_operations_leave_no_trace() {
    let mut state = State::new();
    apply(
        &mut state,
        [
            grant(5, 60),
            put_with_lease("a", "1", 5),
            put("b", "1"),
            compact(2),
        ],
    );
    let hash = state.hash();
    let with_lease = op(Request::RequestPut(PutRequest {
        lease: 6,
        ..put_request("c", "")
    }));
    let keep_value = |key: &str| {
        op(Request::RequestPut(PutRequest {
            ignore_value: true,
            ..put_request(key, "")
        }))
    };
    let at = |revision| {
        op(Request::RequestRange(RangeRequest {
            revision,
            ..range("a", "")
        }))
    };
    let delete_all = delete_op("\0", "\0");
    for (last, expected) in [
        (with_lease, KvError::LeaseNotFound),
        (keep_value("missing"), KvError::KeyNotFound),
        (at(9), KvError::FutureRevision),
        (at(1), KvError::Compacted),
        (at(-1), KvError::Compacted),
        // Found only while executing: the delete before it took the key away.
        (keep_value("a"), KvError::KeyNotFound),
    ] {
        let request = txn(
            vec![],
            vec![put_op("a0", "x"), delete_all.clone(), last],
            vec![],
        );
        assert_eq!(run(&mut state, request).unwrap_err(), expected);
        assert_eq!(state.hash(), hash);
        assert_eq!(state.lease(5).unwrap().keys, [bytes("a")]);
    }
}

#[test]
fn only_the_taken_branch_is_checked_against_the_state() {
    let mut state = State::new();
    let bad = op(Request::RequestPut(PutRequest {
        lease: 6,
        ..put_request("c", "")
    }));
    run(&mut state, txn(vec![], vec![put_op("a", "")], vec![bad])).unwrap();
}

#[test]
fn read_only_means_no_write_in_any_branch() {
    let nested = |op| txn(vec![], vec![], vec![txn_op(txn(vec![], vec![op], vec![]))]);
    assert!(is_read_only(&nested(range_op("a", ""))));
    assert!(!is_read_only(&nested(put_op("a", ""))));
    assert!(!is_read_only(&txn(
        vec![],
        vec![delete_op("a", "")],
        vec![]
    )));
    let mut state = State::new();
    apply(&mut state, [put("a", "1")]);
    let request = nested(range_op("a", ""));
    let request = txn(request.compare, request.failure, vec![]);
    let read = state.read_txn(&request).unwrap();
    assert_eq!(read, run(&mut state, request).unwrap());
    let written = txn(vec![], vec![put_op("a", "")], vec![]);
    assert!(state.read_txn(&written).is_err());
}
