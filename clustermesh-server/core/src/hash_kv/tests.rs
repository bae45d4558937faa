//! Golden values of etcd 3.7.3, taken with the same requests over its API.

use clustermesh_api::etcd::rpc::TxnRequest;
use proptest::prelude::*;

use super::*;
use crate::{
    Applied,
    model_tests::requests::commands,
    pb::proposal::Command,
    test_support::{
        TERM, apply, batch, compact, delete, delete_op, grant, put, put_op, put_with_lease, txn,
    },
};

fn finish(state: &State, mut cursor: HashCursor) -> KvHash {
    while !cursor.advance(state).unwrap() {}
    cursor.finish()
}

/// As the server answers: the hashes of compactions first.
struct Store {
    state: State,
    compactions: CompactionHashes,
}

impl Store {
    fn new() -> Self {
        Self {
            state: State::new(),
            compactions: CompactionHashes::default(),
        }
    }

    fn run(&mut self, command: Command) {
        let Applied {
            compaction_hash,
            outcomes,
            ..
        } = apply(&mut self.state, [command]);
        assert!(outcomes[0].result.is_ok(), "{outcomes:?}");
        if let Some(cursor) = compaction_hash {
            self.compactions.keep(finish(&self.state, cursor));
        }
    }

    fn hash(&self, revision: i64) -> Result<(u32, i64, i64), KvError> {
        let hash = match self.compactions.at(revision) {
            Some(hash) => hash,
            None => finish(&self.state, self.state.hash_kv(revision)?),
        };
        Ok((hash.hash, hash.compact_revision, hash.revision))
    }
}

fn sample() -> Store {
    let mut store = Store::new();
    let request: TxnRequest = txn(
        vec![],
        vec![
            put_op("d", ""),
            put_op("e", &"x".repeat(300)),
            delete_op("a", ""),
        ],
        vec![],
    );
    for command in [
        put("a", "1"),
        put("a", "2"),
        put("b", "1"),
        grant(7, 600),
        put_with_lease("c", "leased", 7),
        Command::Txn(request),
        put("a", "again"),
        delete("b", ""),
        delete("d", "f"),
        put("f", "last"),
    ] {
        store.run(command);
    }
    store
}

#[test]
fn the_hash_is_etcds_own() {
    let empty = Store::new();
    assert_eq!(empty.hash(0), Ok((1_084_519_789, -1, 1)));
    let mut store = sample();
    let history = [
        1_084_519_789,
        2_587_454_935,
        535_221_974,
        1_662_700_350,
        4_005_837_001,
        2_812_080_488,
        2_949_603_844,
        2_683_810_068,
        2_806_592_613,
        2_264_340_974,
    ];
    assert_eq!(store.hash(0), Ok((2_264_340_974, -1, 10)));
    for (revision, hash) in (1..).zip(history) {
        assert_eq!(store.hash(revision), Ok((hash, -1, revision)), "{revision}");
    }
    assert_eq!(store.hash(11), Err(KvError::FutureRevision));

    store.run(compact(5));
    assert_eq!(store.hash(4), Err(KvError::Compacted));
    for (revision, hash, compacted) in [
        (0, 3_055_393_641, 5),
        (5, 4_005_837_001, -1),
        (6, 4_003_306_343, 5),
        (7, 726_432_268, 5),
        (8, 3_935_257_187, 5),
        (9, 3_057_996_547, 5),
        (10, 3_055_393_641, 5),
    ] {
        let at = if revision == 0 { 10 } else { revision };
        assert_eq!(store.hash(revision), Ok((hash, compacted, at)));
    }

    store.run(compact(8));
    assert_eq!(store.hash(0), Ok((1_485_284_278, 8, 10)));
    assert_eq!(store.hash(8), Ok((3_935_257_187, 5, 8)));
    assert_eq!(store.hash(9), Ok((420_979_704, 8, 9)));

    store.run(put("g", "after"));
    store.run(delete("a", "z"));
    assert_eq!(store.hash(11), Ok((3_679_045_836, 8, 11)));
    assert_eq!(store.hash(0), Ok((2_802_293_602, 8, 12)));
    store.run(compact(11));
    assert_eq!(store.hash(11), Ok((3_679_045_836, 8, 11)));
    // No key is left, but the tombstones and what they hide.
    assert_eq!(store.hash(12), Ok((3_406_577_631, 11, 12)));
    store.run(compact(12));
    assert_eq!(store.hash(0), Ok((1_084_519_789, 12, 12)));
    assert_eq!(store.hash(12), Ok((1_462_932_955, 11, 12)));
    store.run(put("h", "new"));
    assert_eq!(store.hash(0), Ok((2_168_215_458, 12, 13)));
}

#[test]
fn only_the_newest_hashes_of_compactions_are_kept() {
    let mut store = Store::new();
    for number in 0..12 {
        store.run(put("a", &number.to_string()));
        store.run(compact(store.state.revision()));
    }
    let kept: Vec<i64> = store
        .compactions
        .all()
        .iter()
        .map(|hash| hash.revision)
        .collect();
    assert_eq!(kept, (4..=13).collect::<Vec<_>>());
}

#[test]
fn a_hash_ends_with_the_state_that_it_was_started_on() {
    let store = sample();
    let mut cursor = store.state.hash_kv(0).unwrap();
    let other = sample();
    assert_eq!(
        cursor.advance(&other.state),
        Err(SnapshotError::StateReplaced)
    );
}

proptest! {
    /// Applies, compactions too, go on between the steps of a hash; it is that of the beginning.
    #[test]
    fn a_running_hash_sees_nothing_of_what_comes_after(
        before in commands(30),
        after in commands(30),
        back in 0..6_i64,
    ) {
        let mut state = State::new();
        state.apply(&batch(before), TERM).unwrap();
        let wanted = state.revision() - back;
        prop_assume!(wanted > 0 && wanted >= state.compact_revision);
        let expected = finish(&state, state.hash_kv(wanted).unwrap());
        let mut cursor = state.hash_kv(wanted).unwrap();
        let mut complete = false;
        for command in after {
            state.apply(&batch([command]), TERM).unwrap();
            complete = complete || cursor.advance(&state).unwrap();
        }
        prop_assert_eq!(finish(&state, cursor), expected);
    }
}
