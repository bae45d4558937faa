use clustermesh_api::etcd::rpc::{PutRequest, RangeRequest};

use super::*;
use crate::{
    EventKind,
    pb::{Batch, Bootstrap, LeaseExpire, PeerChange, PeerCopy, PeerForget, Proposal},
    test_support::{
        TERM, apply, batch, bytes, compact, contents, delete, grant, one, put, put_request,
        put_with_lease, range, revoke, text,
    },
};

fn kinds(applied: &Applied) -> Vec<Vec<(EventKind, String)>> {
    applied
        .groups
        .iter()
        .map(|group| {
            group
                .events
                .iter()
                .map(|event| (event.kind(), text(event.key())))
                .collect()
        })
        .collect()
}

#[test]
fn each_writing_request_of_a_batch_gets_one_revision() {
    let mut state = State::new();
    assert_eq!(state.revision(), 1);
    let applied = apply(
        &mut state,
        [
            put("a", "1"),
            delete("missing", ""),
            put("b", "1"),
            delete("a", "\0"),
            grant(5, 60),
        ],
    );
    let revisions: Vec<_> = applied.outcomes.iter().map(|o| o.revision).collect();
    assert_eq!(revisions, [2, 2, 3, 4, 4]);
    assert_eq!(
        kinds(&applied),
        [
            vec![(EventKind::Put, "a".to_owned())],
            vec![(EventKind::Put, "b".to_owned())],
            vec![
                (EventKind::Delete, "a".to_owned()),
                (EventKind::Delete, "b".to_owned())
            ],
        ]
    );
    let subs: Vec<_> = applied.groups[2]
        .events
        .iter()
        .map(|e| e.kv().sub())
        .collect();
    assert_eq!(subs, [0, 1]);
}

#[test]
fn versions_count_from_creation_and_start_again_after_a_delete() {
    let mut state = State::new();
    apply(&mut state, [put("a", "1"), put("a", "2")]);
    let kv = state.range(&range("a", "")).unwrap().kvs.remove(0);
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (2, 3, 2));
    apply(&mut state, [delete("a", ""), put("a", "3")]);
    let kv = state.range(&range("a", "")).unwrap().kvs.remove(0);
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (5, 5, 1));
}

#[test]
fn previous_values_are_returned_on_request_only() {
    let mut state = State::new();
    let asked = |key: &str, value: &str| {
        Command::Put(PutRequest {
            prev_kv: true,
            ..put_request(key, value)
        })
    };
    let previous = |outcome| match outcome {
        Ok(Outcome::Put(response)) => response.prev_kv.map(|kv| text(&kv.value)),
        other => panic!("{other:?}"),
    };
    assert_eq!(previous(one(&mut state, asked("a", "1"))), None);
    assert_eq!(previous(one(&mut state, asked("a", "2"))), Some("1".into()));
    assert_eq!(previous(one(&mut state, put("a", "3"))), None);
    let Ok(Outcome::DeleteRange(deleted)) = one(&mut state, delete("a", "b")) else {
        panic!("delete failed");
    };
    assert_eq!(deleted.deleted, 1);
    assert_eq!(text(&deleted.prev_kvs[0].value), "3");
    assert_eq!(previous(one(&mut state, asked("a", "4"))), None);
}

#[test]
fn a_put_may_keep_value_or_lease() {
    let mut state = State::new();
    let keep = |ignore_value, ignore_lease, value: &str, lease| {
        Command::Put(PutRequest {
            ignore_value,
            ignore_lease,
            lease,
            ..put_request("a", value)
        })
    };
    assert_eq!(
        one(&mut state, keep(true, false, "", 0)),
        Err(KvError::KeyNotFound)
    );
    apply(
        &mut state,
        [grant(5, 60), grant(6, 60), put_with_lease("a", "1", 5)],
    );
    one(&mut state, keep(false, true, "2", 0)).unwrap();
    let kv = state.range(&range("a", "")).unwrap().kvs.remove(0);
    assert_eq!((text(&kv.value).as_str(), kv.lease), ("2", 5));
    one(&mut state, keep(true, false, "", 6)).unwrap();
    let kv = state.range(&range("a", "")).unwrap().kvs.remove(0);
    assert_eq!((text(&kv.value).as_str(), kv.lease), ("2", 6));
    assert_eq!(state.lease(5).unwrap().keys, Vec::<bytes::Bytes>::new());
    assert_eq!(state.lease(6).unwrap().keys, [bytes("a")]);
}

#[test]
fn leases_are_granted_once_and_take_their_keys_with_them() {
    let mut state = State::new();
    assert_eq!(one(&mut state, grant(0, 60)), Err(KvError::LeaseNotFound));
    let Ok(Outcome::LeaseGrant(granted)) = one(&mut state, grant(5, -3)) else {
        panic!("grant failed");
    };
    assert_eq!((granted.id, granted.ttl), (5, 2));
    assert_eq!(one(&mut state, grant(5, 60)), Err(KvError::LeaseExists));
    assert_eq!(
        one(&mut state, grant(9, i64::MAX)),
        Err(KvError::LeaseTtlTooLarge)
    );
    assert_eq!(
        one(&mut state, put_with_lease("a", "1", 6)),
        Err(KvError::LeaseNotFound)
    );
    assert_eq!(state.revision(), 1);
    apply(
        &mut state,
        [
            put_with_lease("b", "1", 5),
            put_with_lease("a", "1", 5),
            put_with_lease("c", "1", 5),
            put("c", "2"),
            put("d", "1"),
        ],
    );
    assert_eq!(state.lease(5).unwrap().keys, [bytes("a"), bytes("b")]);
    let applied = apply(&mut state, [revoke(5), revoke(5)]);
    assert!(applied.outcomes[0].result.is_ok());
    assert_eq!(applied.outcomes[1].result, Err(KvError::LeaseNotFound));
    assert_eq!(applied.groups.len(), 1);
    assert_eq!(
        kinds(&applied),
        [[
            (EventKind::Delete, "a".to_owned()),
            (EventKind::Delete, "b".to_owned())
        ]]
    );
    assert_eq!(state.lease(5), None);
    assert_eq!(contents(&state, "\0", "\0").len(), 2);
}

#[test]
fn a_lease_without_keys_goes_without_a_revision() {
    let mut state = State::new();
    let applied = apply(&mut state, [grant(5, 60), revoke(5)]);
    assert!(applied.groups.is_empty());
    assert_eq!(state.revision(), 1);
}

#[test]
fn leases_expire_only_in_the_term_that_said_so() {
    let mut state = State::new();
    apply(
        &mut state,
        [
            grant(5, 60),
            grant(6, 60),
            put_with_lease("a", "1", 5),
            put_with_lease("b", "1", 6),
        ],
    );
    let expire = |term| {
        Command::LeaseExpire(LeaseExpire {
            term,
            ids: vec![5, 77, 6],
        })
    };
    let outcome = one(&mut state, expire(TERM - 1)).unwrap();
    assert_eq!(outcome, Outcome::LeaseExpire { expired: vec![] });
    assert_eq!(state.leases().count(), 2);
    let revision = state.revision();
    let outcome = one(&mut state, expire(TERM)).unwrap();
    assert_eq!(
        outcome,
        Outcome::LeaseExpire {
            expired: vec![5, 6]
        }
    );
    assert_eq!(state.revision(), revision + 1);
    assert!(contents(&state, "\0", "\0").is_empty());
}

#[test]
fn compaction_follows_etcd() {
    let mut state = State::new();
    apply(
        &mut state,
        [
            put("a", "1"),
            put("a", "2"),
            put("b", "1"),
            delete("b", ""),
            put("c", "1"),
        ],
    );
    assert_eq!(one(&mut state, compact(-1)), Err(KvError::Compacted));
    assert_eq!(one(&mut state, compact(7)), Err(KvError::FutureRevision));
    one(&mut state, compact(0)).unwrap();
    assert_eq!(one(&mut state, compact(0)), Err(KvError::Compacted));
    let before = state.approximate_bytes();
    one(&mut state, compact(4)).unwrap();
    assert!(state.approximate_bytes() < before);
    assert_eq!(one(&mut state, compact(4)), Err(KvError::Compacted));
    assert_eq!(state.compact_revision(), 4);
    let at = |revision| {
        state.range(&RangeRequest {
            revision,
            ..range("a", "z")
        })
    };
    assert_eq!(at(3), Err(KvError::Compacted));
    assert_eq!(at(4).unwrap().count, 2);
    assert_eq!(at(7), Err(KvError::FutureRevision));
    // A watch may start at the compact revision, not below.
    assert_eq!(state.history(2, 1 << 20).unwrap_err().compact_revision, 4);
    let groups = state.history(3, 1 << 20).unwrap();
    let revisions: Vec<_> = groups.iter().map(|group| group.revision).collect();
    assert_eq!(revisions, [4, 5, 6]);
    assert_eq!(
        text(&groups[1].events[0].prev().unwrap().value()),
        "1",
        "the value before the delete"
    );
}

#[test]
fn a_delete_at_the_compact_revision_is_still_seen_by_a_watch() {
    let mut state = State::new();
    apply(&mut state, [put("a", "1"), delete("a", ""), compact(3)]);
    let groups = state.history(2, 1 << 20).unwrap();
    assert_eq!(groups[0].events[0].kind(), EventKind::Delete);
    assert_eq!(groups[0].events[0].prev(), None);
    apply(&mut state, [put("b", "1"), compact(4)]);
    assert_eq!(state.keyspace.index().len(), 1);
}

#[test]
fn a_large_compaction_is_dropped_over_the_entries_after_it() {
    let mut state = State::new();
    apply(&mut state, (0..20).map(|i| put("a", &i.to_string())));
    let before = state.approximate_bytes();
    one(&mut state, compact(21)).unwrap();
    assert!(state.history(19, usize::MAX).is_err());
    let first = state.approximate_bytes();
    assert!(first < before);
    let mut entries = 0;
    while state.floor_revision() < 21 {
        apply(&mut state, []);
        entries += 1;
    }
    assert!(entries > 3);
    assert_eq!(state.keyspace.index().iter().flatten().count(), 1);
    assert!(state.approximate_bytes() < first);
}

#[test]
fn history_is_cut_by_bytes_but_never_empty() {
    let mut state = State::new();
    apply(
        &mut state,
        (0..10).map(|i| put(&format!("k{i}"), "0123456789")),
    );
    let group_bytes = state.history(1, usize::MAX).unwrap()[0].encoded_bytes();
    assert_eq!(state.history(1, usize::MAX).unwrap().len(), 10);
    assert_eq!(state.history(1, 0).unwrap().len(), 1);
    assert_eq!(state.history(1, 3 * group_bytes).unwrap().len(), 3);
    assert_eq!(state.history(8, 3 * group_bytes).unwrap()[0].revision, 9);
    assert!(state.history(11, usize::MAX).unwrap().is_empty());
    assert!(state.history(i64::MAX, usize::MAX).unwrap().is_empty());
}

#[test]
fn the_cluster_id_is_set_once() {
    let mut state = State::new();
    let bootstrap = |cluster_id| {
        Command::Bootstrap(Bootstrap {
            cluster_id,
            ..Bootstrap::default()
        })
    };
    assert_eq!(one(&mut state, bootstrap(0)), Err(KvError::ClusterIdZero));
    one(&mut state, bootstrap(42)).unwrap();
    assert_eq!(
        one(&mut state, bootstrap(43)),
        Err(KvError::ClusterIdAlreadySet)
    );
    assert_eq!((state.cluster_id(), state.revision()), (42, 1));
}

fn copy(revision: i64, changes: &[(&str, Option<&str>)]) -> Command {
    Command::PeerCopy(PeerCopy {
        cluster: "east".into(),
        store_id: 9,
        revision,
        synced: true,
        changes: changes
            .iter()
            .map(|(key, value)| PeerChange {
                key: bytes(key),
                value: value.map(bytes),
            })
            .collect(),
        ..PeerCopy::default()
    })
}

#[test]
fn a_peer_copy_writes_only_what_differs_in_one_revision() {
    let mut state = State::new();
    let node = |n: u8| format!("cilium/cache/nodes/v1/east/n{n}");
    let (n1, n2, n3) = (node(1), node(2), node(3));
    let applied = apply(
        &mut state,
        [
            put("before", ""),
            copy(100, &[(&n1, Some("a")), (&n2, Some("b")), (&n3, None)]),
            put("after", ""),
        ],
    );
    assert_eq!(
        applied.outcomes[1].result,
        Ok(Outcome::PeerCopy { written: 2 })
    );
    assert_eq!(applied.groups.len(), 3);
    assert_eq!(applied.groups[1].events.len(), 2);
    assert_eq!(applied.cursors.len(), 1);
    assert_eq!(applied.cursors[0].after_groups, 2);
    let revision = state.revision();
    let applied = apply(&mut state, [copy(101, &[(&n1, Some("a")), (&n3, None)])]);
    assert!(applied.groups.is_empty());
    assert_eq!(applied.cursors.len(), 1);
    assert_eq!(state.revision(), revision);
    assert_eq!(state.peer_cursor("east").unwrap().revision, 101);
    let applied = apply(&mut state, [copy(101, &[])]);
    assert!(applied.cursors.is_empty(), "the same cursor is no change");
    apply(&mut state, [copy(102, &[(&n1, None), (&n2, Some("c"))])]);
    assert_eq!(state.revision(), revision + 1);
    assert_eq!(
        contents(&state, "cilium/", "cilium0"),
        [(n2, "c".to_owned())]
    );
}

#[test]
fn the_last_change_of_a_key_in_a_peer_copy_counts() {
    let mut state = State::new();
    let key = "cilium/cache/x";
    apply(
        &mut state,
        [copy(1, &[(key, Some("1")), (key, None), (key, Some("2"))])],
    );
    apply(&mut state, [copy(2, &[(key, None), (key, Some("2"))])]);
    let kv = state.range(&range(key, "")).unwrap().kvs.remove(0);
    assert_eq!(
        (text(&kv.value).as_str(), kv.version, kv.mod_revision),
        ("2", 1, 2)
    );
}

#[test]
fn a_peer_copy_outside_its_ranges_changes_nothing() {
    let mut state = State::new();
    let hash = state.hash();
    let outcome = one(
        &mut state,
        copy(
            100,
            &[("cilium/cache/x", Some("")), ("cilium/state/x", Some(""))],
        ),
    );
    assert!(matches!(outcome, Err(KvError::PeerKeyNotAllowed { .. })));
    assert_eq!(state.hash(), hash);
}

#[test]
fn a_forgotten_peer_loses_its_cursor_only() {
    let mut state = State::new();
    apply(&mut state, [copy(100, &[("cilium/cache/x", Some("1"))])]);
    let forget = Command::PeerForget(PeerForget {
        cluster: "east".into(),
        ..PeerForget::default()
    });
    let applied = apply(&mut state, [forget.clone(), forget]);
    assert_eq!(
        applied.outcomes[0].result,
        Ok(Outcome::PeerForget { known: true })
    );
    assert_eq!(
        applied.outcomes[1].result,
        Ok(Outcome::PeerForget { known: false })
    );
    assert_eq!(applied.cursors.len(), 1);
    assert_eq!(applied.cursors[0].cursor, None);
    assert_eq!(state.peer_cursors().count(), 0);
    assert_eq!(contents(&state, "cilium/cache/x", "").len(), 1);
}

#[test]
fn an_unknown_entry_stops_the_replica_and_changes_nothing() {
    let mut state = State::new();
    let newer = Batch {
        format: 3,
        ..batch([put("a", "1")])
    };
    assert_eq!(
        state.apply(&newer, TERM).unwrap_err(),
        ApplyError::UnknownFormat { found: 3, known: 2 }
    );
    let mut unknown = batch([put("a", "1")]);
    unknown.proposals.push(Proposal::default());
    assert_eq!(
        state.apply(&unknown, TERM).unwrap_err(),
        ApplyError::UnknownCommand { position: 1 }
    );
    assert_eq!(state.revision(), 1);
}

#[test]
fn stored_bytes_are_copies_of_the_entry() {
    let mut state = State::new();
    let entry = bytes::Bytes::from(vec![b'x'; 4096]);
    apply(
        &mut state,
        [Command::Put(PutRequest {
            key: entry.slice(..4),
            value: entry.slice(4..8),
            ..PutRequest::default()
        })],
    );
    assert!(
        entry.is_unique(),
        "a small key keeps a whole entry in memory"
    );
}

#[test]
fn the_encoded_event_is_the_message() {
    use prost::Message;
    let mut state = State::new();
    let applied = apply(
        &mut state,
        [
            grant(i64::MAX, 60),
            put_with_lease("a", "1", i64::MAX),
            put("a", ""),
            delete("a", ""),
        ],
    );
    for group in &applied.groups {
        let event = &group.events[0];
        assert_eq!(event.encoded(), event.to_event(false).encode_to_vec());
    }
    let last = applied.groups[2].events[0].to_event(true);
    assert_eq!(last.kv.unwrap().mod_revision, 4);
    assert_eq!(last.prev_kv.unwrap().version, 2);
    assert_eq!(text(&applied.groups[0].events[0].kv().value()), "1");
}

#[test]
fn errors_carry_the_codes_and_texts_of_etcd() {
    let expected = [
        (
            KvError::Compacted,
            11,
            "etcdserver: mvcc: required revision has been compacted",
        ),
        (
            KvError::FutureRevision,
            11,
            "etcdserver: mvcc: required revision is a future revision",
        ),
        (KvError::EmptyKey, 3, "etcdserver: key is not provided"),
        (KvError::KeyNotFound, 3, "etcdserver: key not found"),
        (KvError::ValueProvided, 3, "etcdserver: value is provided"),
        (KvError::LeaseProvided, 3, "etcdserver: lease is provided"),
        (
            KvError::TooManyOps,
            3,
            "etcdserver: too many operations in txn request",
        ),
        (
            KvError::DuplicateKey,
            3,
            "etcdserver: duplicate key given in txn request",
        ),
        (
            KvError::InvalidSortOption,
            3,
            "etcdserver: invalid sort option",
        ),
        (
            KvError::RequestTooLarge,
            3,
            "etcdserver: request is too large",
        ),
        (
            KvError::LeaseNotFound,
            5,
            "etcdserver: requested lease not found",
        ),
        (KvError::LeaseExists, 9, "etcdserver: lease already exists"),
        (
            KvError::LeaseTtlTooLarge,
            11,
            "etcdserver: too large lease TTL",
        ),
    ];
    for (error, code, text) in expected {
        assert_eq!((error.code(), error.to_string().as_str()), (code, text));
    }
}
