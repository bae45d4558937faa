use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

#[test]
fn watchers_match_by_key_range_and_prefix() {
    let mut index = WatchIndex::new();
    index.add(1, KeyRange::new(&bytes("b"), &bytes("")));
    index.add(2, KeyRange::new(&bytes("a"), &bytes("c")));
    index.add(3, KeyRange::new(&bytes("b"), &bytes("\0")));
    index.add(4, KeyRange::new(&bytes("c"), &bytes("a")));
    let matching = |index: &WatchIndex, key: &str| {
        let mut ids = index.matching(key.as_bytes());
        ids.sort_unstable();
        ids
    };
    assert_eq!(matching(&index, "a"), [2]);
    assert_eq!(matching(&index, "b"), [1, 2, 3]);
    assert_eq!(matching(&index, "zz"), [3]);
    assert_eq!(
        index.remove(2),
        Some(KeyRange::Between(bytes("a"), bytes("c")))
    );
    assert_eq!(index.remove(2), None);
    assert_eq!(matching(&index, "a"), Vec::<WatchId>::new());
    assert_eq!(index.len(), 3);
}

fn key() -> impl Strategy<Value = Bytes> {
    prop::collection::vec(b'a'..=b'd', 1..4).prop_map(Bytes::from)
}

fn key_range() -> impl Strategy<Value = KeyRange> {
    (
        key(),
        prop_oneof![Just(bytes("")), Just(bytes("\0")), key()],
    )
        .prop_map(|(key, end)| KeyRange::new(&key, &end))
}

#[derive(Clone, Debug)]
enum Step {
    Add(WatchId, KeyRange),
    Remove(WatchId),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..40_u64, key_range()).prop_map(|(id, range)| Step::Add(id, range)),
        1 => (0..40_u64).prop_map(Step::Remove),
    ]
}

proptest! {
    #[test]
    fn index_matches_like_a_list(steps in prop::collection::vec(step(), 1..200), probes in prop::collection::vec(key(), 20)) {
        let mut index = WatchIndex::new();
        let mut list = BTreeMap::new();
        for step in steps {
            match step {
                Step::Add(id, range) => {
                    prop_assert_eq!(index.add(id, range.clone()), list.insert(id, range));
                }
                Step::Remove(id) => {
                    prop_assert_eq!(index.remove(id), list.remove(&id));
                }
            }
            index.intervals.check();
        }
        prop_assert_eq!(index.len(), list.len());
        for key in probes {
            let expected: Vec<WatchId> = list
                .iter()
                .filter(|(_, range)| range.contains(&key))
                .map(|(id, _)| *id)
                .collect();
            let found = index.matching(&key);
            let unique: BTreeSet<WatchId> = found.iter().copied().collect();
            prop_assert_eq!(unique.len(), found.len(), "each once");
            prop_assert_eq!(unique.into_iter().collect::<Vec<_>>(), expected);
        }
    }
}
