use crate::{
    KvError, Outcome, State,
    limits::{FEATURE_LEVEL, NUMBERED_COPIES_LEVEL, NUMBERED_FORGETS_LEVEL},
    pb::{FeatureLevel, PeerChange, PeerCopy, PeerForget, proposal::Command},
    test_support::{apply, bytes, contents, group, one},
};

/// The step `sequence` of a copy, which brings it to a revision of the peer.
fn step(sequence: u64, revision: i64) -> Command {
    Command::PeerCopy(PeerCopy {
        cluster: "east".into(),
        store_id: 9,
        revision,
        synced: true,
        changes: vec![PeerChange {
            key: bytes("cilium/cache/x"),
            value: Some(bytes(&revision.to_string())),
        }],
        sequence,
        ..PeerCopy::default()
    })
}

fn refused(found: u64, wanted: u64) -> Result<Outcome, KvError> {
    Err(KvError::PeerCopyOutOfOrder {
        cluster: "east".into(),
        found,
        wanted,
    })
}

fn revision(state: &State) -> i64 {
    state
        .peer_cursor("east")
        .map_or(0, |cursor| cursor.revision)
}

fn level(level: u32) -> Command {
    Command::FeatureLevel(FeatureLevel { level })
}

#[test]
fn a_step_made_of_an_older_place_of_a_copy_changes_nothing() {
    let mut state = group();
    assert_eq!(state.next_copy_sequence("east"), 1);
    one(&mut state, step(1, 10)).unwrap();
    // Its proposer was told that its outcome is unknown, read the cursor at 10 and proposed another step of the same number.
    one(&mut state, step(2, 17)).unwrap();
    let hash = state.hash();
    assert_eq!(one(&mut state, step(2, 14)), refused(2, 3));
    assert_eq!(one(&mut state, step(1, 14)), refused(1, 3));
    assert_eq!(one(&mut state, step(4, 20)), refused(4, 3));
    assert_eq!(one(&mut state, step(0, 20)), refused(0, 3));
    assert_eq!((revision(&state), state.hash()), (17, hash));
    assert_eq!(
        contents(&state, "cilium/cache/x", ""),
        [("cilium/cache/x".to_owned(), "17".to_owned())]
    );
    one(&mut state, step(3, 20)).unwrap();
    assert_eq!(revision(&state), 20);
}

#[test]
fn a_refused_step_takes_no_number() {
    let mut state = group();
    let mut elsewhere = step(1, 10);
    if let Command::PeerCopy(copy) = &mut elsewhere {
        copy.changes[0].key = bytes("cilium/state/x");
    }
    assert!(matches!(
        one(&mut state, elsewhere),
        Err(KvError::PeerKeyNotAllowed { .. })
    ));
    one(&mut state, step(1, 10)).unwrap();
}

#[test]
fn a_step_that_leaves_the_cursor_where_it_is_is_counted_and_told_to_nobody() {
    let mut state = group();
    one(&mut state, step(1, 10)).unwrap();
    let applied = apply(&mut state, [step(2, 10)]);
    assert_eq!(
        applied.outcomes[0].result,
        Ok(Outcome::PeerCopy { written: 0 })
    );
    assert!(applied.cursors.is_empty());
    assert_eq!(state.next_copy_sequence("east"), 3);
}

#[test]
fn while_a_replica_may_not_know_the_numbers_all_take_any_step_alike() {
    // An older replica reads the same entry without the field.
    let (mut newer, mut older) = (State::new(), State::new());
    let before = NUMBERED_COPIES_LEVEL - 1;
    for state in [&mut newer, &mut older] {
        apply(state, [level(before)]);
        assert_eq!(state.next_copy_sequence("east"), 0);
    }
    for (sequence, to) in [(0, 10), (1, 17), (1, 14), (0, 20)] {
        let outcome = one(&mut newer, step(sequence, to));
        assert_eq!(outcome, one(&mut older, step(0, to)));
        assert_eq!(outcome, Ok(Outcome::PeerCopy { written: 1 }));
        assert_eq!(newer.hash(), older.hash());
    }
}

#[test]
fn a_copy_from_before_the_numbers_goes_on_with_the_first() {
    let mut state = State::new();
    apply(
        &mut state,
        [
            level(NUMBERED_COPIES_LEVEL - 1),
            step(0, 10),
            level(FEATURE_LEVEL),
        ],
    );
    // Proposed before the level rose.
    assert_eq!(one(&mut state, step(0, 11)), refused(0, 1));
    one(&mut state, step(1, 11)).unwrap();
    assert_eq!(revision(&state), 11);
}

fn forget(sequence: u64) -> Command {
    Command::PeerForget(PeerForget {
        cluster: "east".into(),
        sequence,
    })
}

#[test]
fn each_peer_has_numbers_of_its_own_and_one_that_was_forgotten_goes_on_after_them() {
    let mut state = group();
    one(&mut state, step(1, 10)).unwrap();
    assert_eq!(state.next_copy_sequence("west"), 1);
    one(&mut state, forget(2)).unwrap();
    assert_eq!(state.next_copy_sequence("east"), 3);
    // Made of the copy before.
    assert_eq!(one(&mut state, step(2, 11)), refused(2, 3));
    one(&mut state, step(3, 11)).unwrap();
}

#[test]
fn an_end_that_comes_late_forgets_no_copy_that_came_after() {
    let mut state = group();
    one(&mut state, step(1, 10)).unwrap();
    // The first was answered with an unknown outcome, so the copy was forgotten once more, and began anew.
    one(&mut state, forget(2)).unwrap();
    one(&mut state, step(3, 20)).unwrap();
    let hash = state.hash();
    for late in [0, 1, 2, 3] {
        assert_eq!(one(&mut state, forget(late)), refused(late, 4));
    }
    assert_eq!((revision(&state), state.hash()), (20, hash));
    assert_eq!(
        one(&mut state, forget(4)),
        Ok(Outcome::PeerForget { known: true })
    );
    assert_eq!(
        one(&mut state, forget(5)),
        Ok(Outcome::PeerForget { known: false }),
        "again, as nobody heard of it"
    );
    one(&mut state, step(5, 30)).unwrap();
}

#[test]
fn while_a_replica_may_not_know_the_number_of_an_end_all_forget_alike() {
    let (mut newer, mut older) = (State::new(), State::new());
    for state in [&mut newer, &mut older] {
        apply(state, [level(NUMBERED_FORGETS_LEVEL - 1)]);
        one(state, step(1, 10)).unwrap();
    }
    // An older replica reads the same entry without the field.
    let outcome = one(&mut newer, forget(7));
    assert_eq!(outcome, one(&mut older, forget(0)));
    assert_eq!(outcome, Ok(Outcome::PeerForget { known: true }));
    assert_eq!(newer.hash(), older.hash());
    assert_eq!(newer.next_copy_sequence("east"), 1);
}
