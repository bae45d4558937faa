//! Each kind of fault is told, and none where there is none.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use crate::{Action, Answer, Change, Committed, Operation, Seen, Watched, check};

fn change(value: Option<&'static str>) -> Change {
    Change {
        key: "k".into(),
        value: value.map(Bytes::from),
        lease: 0,
    }
}

/// Revisions from 2 on, each one change of `k`.
fn committed(values: &[Option<&'static str>]) -> BTreeMap<i64, Committed> {
    let group = |value: &Option<&'static str>| Committed {
        changes: vec![change(*value)],
        seen_at: Duration::ZERO,
    };
    (2..).zip(values.iter().map(group)).collect()
}

/// Asked and answered at these moments.
fn operation((asked, answered): (u64, u64), action: Action, answer: Answer) -> Operation {
    Operation {
        client: usize::try_from(asked).unwrap(),
        replica: 0,
        life: 1,
        asked,
        asked_at: Duration::ZERO,
        answered,
        action,
        answer,
    }
}

fn put(moments: (u64, u64), value: &'static str, answer: Answer) -> Operation {
    let action = Action::Put {
        key: "k".into(),
        value: value.into(),
        lease: 0,
    };
    operation(moments, action, answer)
}

fn swap(moments: (u64, u64), value: &'static str, expected: i64, answer: Answer) -> Operation {
    let action = Action::Swap {
        key: "k".into(),
        value: value.into(),
        expected,
    };
    operation(moments, action, answer)
}

fn get(moments: (u64, u64), linearizable: bool, answer: Answer) -> Operation {
    let action = Action::Get {
        key: "k".into(),
        linearizable,
        revision: 0,
    };
    operation(moments, action, answer)
}

fn written(revision: i64) -> Answer {
    Answer::Written {
        revision,
        deleted: 0,
    }
}

fn read(revision: i64, found: Option<(&'static str, i64)>) -> Answer {
    Answer::Read {
        revision,
        found: found.map(|(value, at)| (value.into(), at)),
    }
}

fn faults(operations: &[Operation], values: &[Option<&'static str>]) -> usize {
    check(operations, &[], &committed(values), 0).len()
}

#[test]
fn a_history_of_a_good_store_has_no_fault() {
    let operations = [
        put((1, 4), "a", written(2)),
        get((2, 3), true, read(1, None)),
        get((5, 6), true, read(2, Some(("a", 2)))),
        swap((7, 8), "b", 2, written(3)),
        swap((9, 10), "c", 2, read(3, Some(("b", 3)))),
        put((11, 12), "d", Answer::Unknown),
        put((13, 14), "e", Answer::Refused),
        get((15, 16), false, read(2, Some(("a", 2)))),
    ];
    let values = [Some("a"), Some("b"), Some("d")];
    assert_eq!(
        check(&operations, &[], &committed(&values), 0),
        Vec::<String>::new()
    );
}

#[test]
fn a_write_that_is_lost_done_twice_or_not_acknowledged_as_it_was_is_a_fault() {
    assert_eq!(faults(&[put((1, 2), "a", written(2))], &[Some("x")]), 1);
    assert_eq!(
        faults(&[put((1, 2), "a", written(2))], &[Some("a"), Some("a")]),
        1
    );
    assert_eq!(
        faults(
            &[put((1, 2), "a", Answer::Unknown)],
            &[Some("a"), Some("a")]
        ),
        1
    );
    assert_eq!(
        faults(&[put((1, 2), "a", Answer::Refused)], &[Some("a")]),
        1
    );
    assert_eq!(
        faults(&[put((1, 2), "a", written(3))], &[Some("a"), Some("b")]),
        1
    );
}

#[test]
fn a_stale_read_is_a_fault_only_if_it_is_linearizable() {
    let history = |linearizable| {
        [
            put((1, 2), "a", written(2)),
            put((3, 4), "b", written(3)),
            get((5, 6), linearizable, read(2, Some(("a", 2)))),
        ]
    };
    assert_eq!(faults(&history(true), &[Some("a"), Some("b")]), 1);
    assert_eq!(faults(&history(false), &[Some("a"), Some("b")]), 0);
}

#[test]
fn a_read_of_what_was_not_there_is_a_fault() {
    assert_eq!(
        faults(&[get((1, 2), false, read(2, Some(("b", 2))))], &[Some("a")]),
        1
    );
    assert_eq!(
        faults(&[get((1, 2), false, read(2, None))], &[Some("a")]),
        1
    );
}

#[test]
fn a_swap_whose_condition_did_not_hold_is_a_fault_and_so_is_one_refused_though_it_did() {
    let values = [Some("a"), Some("b")];
    assert_eq!(faults(&[swap((1, 2), "b", 0, written(3))], &values), 1);
    let refused = swap((1, 2), "c", 3, read(3, Some(("b", 3))));
    assert_eq!(faults(&[refused], &values), 1);
}

#[test]
fn a_client_that_goes_back_at_one_replica_is_a_fault_until_that_starts_again() {
    let mut operations = [
        get((1, 2), false, read(3, Some(("b", 3)))),
        get((3, 4), false, read(2, Some(("a", 2)))),
    ];
    operations[1].client = operations[0].client;
    let values = [Some("a"), Some("b")];
    assert_eq!(faults(&operations, &values), 1);
    operations[1].life = 2;
    assert_eq!(faults(&operations, &values), 0);
}

#[test]
fn a_watcher_gets_everything_once_and_in_order() {
    let values = [Some("a"), Some("b"), None];
    let event = |revision, value| Seen::Events(revision, vec![change(value)]);
    let all = [
        event(2, Some("a")),
        Seen::Progress(2),
        event(3, Some("b")),
        event(4, None),
    ];
    let faults = |seen: &[Seen]| {
        let watched = Watched {
            first: "a".into(),
            end: "z".into(),
            from: 2,
            seen: seen.to_vec(),
            compacted: None,
        };
        check(&[], &[watched], &committed(&values), 0).len()
    };
    assert_eq!(faults(&all), 0);
    assert_ne!(faults(&[all[0].clone(), all[3].clone()]), 0, "a gap");
    assert_ne!(faults(&[all[0].clone(), all[0].clone()]), 0, "twice");
    assert_ne!(faults(&[all[2].clone(), all[0].clone()]), 0, "order");
    assert_ne!(faults(&[event(2, Some("x"))]), 0, "another value");
    assert_ne!(
        faults(&[all[0].clone(), Seen::Progress(3)]),
        0,
        "progress past what it did not get"
    );
}

#[test]
fn a_hole_in_what_replicas_have_is_a_fault() {
    let mut committed = committed(&[Some("a"), Some("b")]);
    committed.remove(&2);
    assert_eq!(check(&[], &[], &committed, 0).len(), 1);
}

/// One key on a lease: written at revision 2, gone at revision 3 after so many seconds.
fn leased(gone_at_s: u64) -> BTreeMap<i64, Committed> {
    let group = |value: Option<&'static str>, seen_at_s| Committed {
        changes: vec![Change {
            key: "lease/7".into(),
            value: value.map(Bytes::from),
            lease: 7,
        }],
        seen_at: Duration::from_secs(seen_at_s),
    };
    BTreeMap::from([(2, group(Some("a"), 0)), (3, group(None, gone_at_s))])
}

fn keep_alive(moments: (u64, u64)) -> Operation {
    let action = Action::KeepAlive {
        lease: 7,
        ttl_s: 10,
    };
    operation(moments, action, Answer::Done)
}

fn revoke(moments: (u64, u64), answer: Answer) -> Operation {
    operation(moments, Action::Revoke { lease: 7 }, answer)
}

#[test]
fn a_lease_that_ends_before_its_time_is_a_fault_unless_it_was_revoked() {
    let faults =
        |operations: &[Operation], gone_at_s| check(operations, &[], &leased(gone_at_s), 0).len();
    assert_eq!(faults(&[keep_alive((1, 2))], 10), 0);
    assert_eq!(faults(&[keep_alive((1, 2))], 5), 1);
    for answer in [written(3), Answer::Unknown] {
        let operations = [keep_alive((1, 2)), revoke((3, 4), answer)];
        assert_eq!(faults(&operations, 5), 0);
    }
    let mut late = revoke((3, 4), Answer::Unknown);
    late.asked_at = Duration::from_secs(6);
    assert_eq!(faults(&[keep_alive((1, 2)), late], 5), 1);
}

#[test]
fn a_revoked_lease_that_goes_on_is_a_fault() {
    let faults = |operations: &[Operation]| check(operations, &[], &leased(10), 0).len();
    assert_eq!(faults(&[revoke((1, 2), written(3))]), 0);
    assert_eq!(faults(&[revoke((1, 2), written(2))]), 1, "its key is there");
    assert_eq!(faults(&[revoke((1, 2), written(1))]), 1, "a key came later");
    let kept = [revoke((1, 2), written(3)), keep_alive((3, 4))];
    assert_eq!(faults(&kept), 1);
    let before = [keep_alive((1, 4)), revoke((2, 3), written(3))];
    assert_eq!(faults(&before), 0);
}
