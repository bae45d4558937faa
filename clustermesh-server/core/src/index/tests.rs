use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::version::VersionNumbers;

fn version(key: &Bytes, lives: bool) -> Arc<Version> {
    if !lives {
        return Arc::new(Version::tombstone(key.clone(), 2, 0));
    }
    let numbers = VersionNumbers {
        mod_revision: 2,
        sub: 0,
        create_revision: 2,
        version: 1,
        lease: 0,
    };
    Arc::new(Version::put(key.clone(), &Bytes::new(), numbers))
}

#[derive(Clone, Debug)]
enum Step {
    Add(u8, bool),
    Drop(u8),
    Count(Bound<u8>, Bound<u8>),
}

fn bound() -> impl Strategy<Value = Bound<u8>> {
    prop_oneof![
        any::<u8>().prop_map(Bound::Included),
        any::<u8>().prop_map(Bound::Excluded),
        Just(Bound::Unbounded),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<u8>(), any::<bool>()).prop_map(|(key, lives)| Step::Add(key, lives)),
        2 => any::<u8>().prop_map(Step::Drop),
        1 => (bound(), bound()).prop_map(|(start, end)| Step::Count(start, end)),
    ]
}

/// What a `BTreeMap` would panic at.
fn is_empty(start: &Bound<u8>, end: &Bound<u8>) -> bool {
    match (start, end) {
        (Bound::Included(start), Bound::Included(end)) => start > end,
        (
            Bound::Included(start) | Bound::Excluded(start),
            Bound::Excluded(end) | Bound::Included(end),
        ) => start >= end,
        _ => false,
    }
}

proptest! {
    #[test]
    fn the_index_is_an_ordered_map_that_counts(steps in proptest::collection::vec(step(), 0..200)) {
        let mut index = Index::default();
        let mut model: BTreeMap<u8, Versions> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Add(key, lives) => {
                    let name = Bytes::from(vec![key]);
                    let version = version(&name, lives);
                    match model.get_mut(&key) {
                        Some(versions) => {
                            versions.push(version.clone());
                            prop_assert!(index.update(&name, |versions| versions.push(version)).is_some());
                        }
                        None => {
                            model.insert(key, SmallVec::from_iter([version.clone()]));
                            index.insert(name, SmallVec::from_iter([version]));
                        }
                    }
                }
                Step::Drop(key) => {
                    let dropped = index.update(&[key], |versions| versions.pop()).flatten();
                    let expected = model.get_mut(&key).and_then(SmallVec::pop);
                    prop_assert_eq!(dropped, expected);
                    model.retain(|_, versions| !versions.is_empty());
                }
                Step::Count(start, end) => {
                    let keys: Vec<_> = if is_empty(&start, &end) {
                        Vec::new()
                    } else {
                        model.range((start, end)).collect()
                    };
                    let (start, end) = (start.map(|key| [key]), end.map(|key| [key]));
                    let bounds = (
                        start.as_ref().map(|key| key.as_slice()),
                        end.as_ref().map(|key| key.as_slice()),
                    );
                    let found: Vec<_> = index.range(bounds).map(|(key, _)| key[0]).collect();
                    let expected: Vec<_> = keys.iter().map(|(key, _)| **key).collect();
                    prop_assert_eq!(found, expected);
                    let live = keys.iter().filter(|(_, versions)| lives(versions)).count();
                    prop_assert_eq!(index.count_live(bounds), live);
                }
            }
            prop_assert_eq!(index.check(), Ok(()));
            prop_assert_eq!(index.len(), model.len());
        }
        let sorted = model.into_iter().map(|(key, versions)| (Bytes::from(vec![key]), versions));
        let loaded = Index::from_sorted(sorted);
        prop_assert_eq!(loaded.check(), Ok(()));
        prop_assert!(loaded.iter().eq(index.iter()));
    }
}
