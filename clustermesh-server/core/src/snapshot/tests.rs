use proptest::prelude::*;

use super::*;
use crate::{
    model_tests::requests::commands,
    pb::{Bootstrap, PeerCopy, PeerForget, proposal::Command},
    test_support::{
        TERM, apply, batch, compact, contents, delete, grant, group, numbered, one, put,
        put_with_lease,
    },
};

/// Takes all chunks, calling `between` after each.
fn take(
    state: &mut State,
    cursor: &mut SnapshotCursor,
    max_bytes: usize,
    mut between: impl FnMut(&mut State),
) -> Vec<Bytes> {
    let mut chunks = Vec::new();
    while let Some(chunk) = cursor.next_chunk(state, max_bytes).unwrap() {
        chunks.push(chunk);
        between(state);
    }
    chunks
}

fn load(chunks: impl IntoIterator<Item = Bytes>) -> Result<State, SnapshotError> {
    let mut loader = SnapshotLoader::new();
    for chunk in chunks {
        loader.push(chunk)?;
    }
    loader.finish()
}

fn sample() -> State {
    let mut state = State::new();
    apply(
        &mut state,
        [
            Command::Bootstrap(Bootstrap {
                cluster_id: 42,
                ..Bootstrap::default()
            }),
            grant(5, 60),
            grant(6, 70),
            put("a", "1"),
            put("a", "2"),
            put_with_lease("b", "1", 5),
            put("c", "1"),
            delete("c", ""),
            compact(4),
            put("d", "1"),
            Command::PeerCopy(PeerCopy {
                cluster: "east".into(),
                store_id: 9,
                revision: 100,
                synced: true,
                ..PeerCopy::default()
            }),
        ],
    );
    state
}

#[test]
fn a_snapshot_holds_how_many_steps_of_a_copy_there_were() {
    let mut state = group();
    for _ in 0..3 {
        let copy = PeerCopy {
            cluster: "east".into(),
            ..PeerCopy::default()
        };
        let copy = numbered(&state, Command::PeerCopy(copy));
        one(&mut state, copy).unwrap();
    }
    let mut cursor = state.snapshot();
    let loaded = load(take(&mut state, &mut cursor, 1 << 20, |_| {})).unwrap();
    assert_eq!(loaded.next_copy_sequence("east"), 4);
    assert_eq!(loaded.hash(), state.hash());
    let forget = Command::PeerForget(PeerForget {
        cluster: "east".into(),
        sequence: 4,
    });
    one(&mut state, forget).unwrap();
    let mut cursor = state.snapshot();
    let loaded = load(take(&mut state, &mut cursor, 1 << 20, |_| {})).unwrap();
    assert_eq!(loaded.next_copy_sequence("east"), 5);
    assert_eq!(loaded.hash(), state.hash());
}

#[test]
fn a_snapshot_holds_everything() {
    let mut state = sample();
    let mut cursor = state.snapshot();
    assert_eq!(cursor.revision(), state.revision());
    let chunks = take(&mut state, &mut cursor, 1 << 20, |_| {});
    let loaded = load(chunks).unwrap();
    assert_eq!(loaded.check(), Ok(()));
    assert_eq!(loaded.hash(), state.hash());
    assert_eq!(loaded.approximate_bytes(), state.approximate_bytes());
    assert_eq!(loaded.cluster_id(), 42);
    assert_eq!(loaded.compact_revision(), 4);
    assert_eq!(loaded.lease(5), state.lease(5));
    assert_eq!(loaded.peer_cursor("east"), state.peer_cursor("east"));
    assert_eq!(
        loaded.history(3, usize::MAX).unwrap(),
        state.history(3, usize::MAX).unwrap()
    );
}

#[test]
fn an_empty_state_has_a_snapshot() {
    let mut state = State::new();
    let mut cursor = state.snapshot();
    let chunks = take(&mut state, &mut cursor, 1, |_| {});
    assert_eq!(load(chunks).unwrap().hash(), state.hash());
}

#[test]
fn compaction_takes_nothing_from_a_running_snapshot() {
    let mut state = sample();
    let hash = state.hash();
    let mut cursor = state.snapshot();
    let mut round = 0;
    let chunks = take(&mut state, &mut cursor, 1, |state| {
        round += 1;
        apply(
            state,
            [
                delete("\0", "\0"),
                put("a", "new"),
                put(&format!("z{round}"), ""),
            ],
        );
        let newest = state.revision();
        apply(state, [compact(newest)]);
    });
    assert!(chunks.len() > 6, "one version a chunk");
    let loaded = load(chunks).unwrap();
    assert_eq!(loaded.hash(), hash);
    assert_eq!(
        contents(&loaded, "a", ""),
        [("a".to_owned(), "2".to_owned())]
    );
    assert_eq!(state.pins.live().len(), 1);
    drop(cursor);
    assert!(state.pins.live().is_empty());
}

#[test]
fn chunks_keep_to_their_size() {
    let mut state = State::new();
    let value = "v".repeat(100);
    apply(
        &mut state,
        (0..200).map(|n| put(&format!("k{:03}", n % 50), &value)),
    );
    let mut cursor = state.snapshot();
    let chunks = take(&mut state, &mut cursor, 1000, |_| {});
    assert!(chunks.len() > 20);
    assert!(chunks.iter().all(|chunk| chunk.len() < 1300));
    assert_eq!(load(chunks).unwrap().hash(), state.hash());
}

#[test]
fn a_replaced_state_ends_the_snapshot() {
    let state = sample();
    let mut cursor = state.snapshot();
    cursor.next_chunk(&state, 1000).unwrap();
    let other = sample();
    assert_eq!(
        cursor.next_chunk(&other, 1000),
        Err(SnapshotError::StateReplaced)
    );
}

#[test]
fn damaged_snapshots_are_refused() {
    let mut state = sample();
    let mut cursor = state.snapshot();
    let chunks = take(&mut state, &mut cursor, 1, |_| {});
    let count = chunks.len();
    for missing in 0..count {
        let mut some = chunks.clone();
        some.remove(missing);
        assert!(load(some).is_err(), "chunk {missing} is missing");
    }
    for (one, other) in (1..count).map(|n| (n - 1, n)) {
        let mut some = chunks.clone();
        some.swap(one, other);
        assert!(load(some).is_err(), "chunks {one} and {other} are swapped");
    }
    let mut some = chunks.clone();
    some.push(chunks[count - 1].clone());
    assert!(load(some).is_err(), "a chunk after the end");
    let mut newer = pb::SnapshotChunk::decode(chunks[0].clone()).unwrap();
    newer.format = 3;
    assert_eq!(
        load([Bytes::from(newer.encode_to_vec())]).unwrap_err(),
        SnapshotError::UnknownFormat { found: 3, known: 2 }
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// A replica that installs the snapshot and applies what came after is equal to one that applied everything.
    #[test]
    fn a_snapshot_and_the_rest_of_the_log_give_the_same_state(
        before in commands(40),
        during in commands(40),
        max_bytes in 1..400_usize,
    ) {
        let mut state = State::new();
        state.apply(&batch(before), TERM).unwrap();
        let hash = state.hash();
        let mut cursor = state.snapshot();
        let mut rest = during.clone().into_iter();
        let chunks = take(&mut state, &mut cursor, max_bytes, |state| {
            if let Some(command) = rest.next() {
                state.apply(&batch([command]), TERM).unwrap();
            }
        });
        for command in rest {
            state.apply(&batch([command]), TERM).unwrap();
        }
        let mut loaded = load(chunks).unwrap();
        prop_assert_eq!(loaded.check(), Ok(()));
        prop_assert_eq!(loaded.hash(), hash);
        for command in during {
            loaded.apply(&batch([command]), TERM).unwrap();
        }
        prop_assert_eq!(loaded.hash(), state.hash());
        prop_assert_eq!(loaded.approximate_bytes(), state.approximate_bytes());
    }

    #[test]
    fn loading_never_panics(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..3)) {
        prop_assert!(load(chunks.into_iter().map(Bytes::from)).is_err());
    }

    #[test]
    fn a_flipped_byte_never_panics(at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut state = sample();
        let mut cursor = state.snapshot();
        let mut chunks = take(&mut state, &mut cursor, 64, |_| {});
        let chunk = at.index(chunks.len());
        let mut damaged = chunks[chunk].to_vec();
        let place = at.index(damaged.len());
        damaged[place] = value;
        chunks[chunk] = Bytes::from(damaged);
        if let Ok(loaded) = load(chunks) {
            // What the loader lets through may be other data, but never a broken state.
            prop_assert_eq!(loaded.check(), Ok(()));
        }
    }
}
