use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::version::{Revision, VersionNumbers};

fn version(key: &[u8], lives: bool) -> Version {
    let revision = Revision { main: 2, sub: 0 };
    if !lives {
        return Version::tombstone(key, revision);
    }
    let numbers = VersionNumbers {
        revision,
        create_revision: 2,
        version: 1,
        lease: 0,
    };
    Version::put(key, &[], numbers)
}

#[derive(Clone, Debug)]
enum Step {
    Add(u8, bool),
    /// So many keys in order.
    Run(u8, u8),
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
        1 => (any::<u8>(), 1_u8..40).prop_map(|(from, count)| Step::Run(from, count)),
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

fn add(
    index: &mut Index,
    model: &mut BTreeMap<u8, Versions>,
    key: u8,
    lives: bool,
) -> Result<(), TestCaseError> {
    let added = version(&[key], lives);
    if let Some(versions) = model.get_mut(&key) {
        versions.push(added.clone());
        prop_assert!(
            index
                .update(&[key], |versions| versions.push(added))
                .is_some()
        );
    } else {
        model.insert(key, SmallVec::from_iter([added.clone()]));
        index.insert(SmallVec::from_iter([added]));
    }
    Ok(())
}

#[test]
fn a_run_of_keys_leaves_full_leaves_behind() {
    let mut index = Index::default();
    let keys =
        |of: u8| (0..10 * MAX_LEAF_KEYS).map(move |number| [of, u8::try_from(number).unwrap()]);
    // Each run is inserted before the one that is there.
    for of in [2, 1, 0] {
        for key in keys(of) {
            index.insert(SmallVec::from_iter([version(&key, true)]));
        }
    }
    assert_eq!(index.check(), Ok(()));
    assert_eq!(index.len(), 30 * MAX_LEAF_KEYS);
    assert!(index.leaves.len() <= 33, "{} leaves", index.leaves.len());
}

proptest! {
    #[test]
    fn the_index_is_an_ordered_map_that_counts(steps in proptest::collection::vec(step(), 0..200)) {
        let mut index = Index::default();
        let mut model: BTreeMap<u8, Versions> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Add(key, lives) => add(&mut index, &mut model, key, lives)?,
                Step::Run(from, count) => {
                    for key in (from..=u8::MAX).take(count.into()) {
                        add(&mut index, &mut model, key, true)?;
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
                    let found: Vec<_> = index.range(bounds).map(|versions| key_of(versions)[0]).collect();
                    let expected: Vec<_> = keys.iter().map(|(key, _)| **key).collect();
                    prop_assert_eq!(found, expected);
                    let live = keys.iter().filter(|(_, versions)| lives(versions)).count();
                    prop_assert_eq!(index.count_live(bounds), live);
                }
            }
            prop_assert_eq!(index.check(), Ok(()));
            prop_assert_eq!(index.len(), model.len());
        }
        let mut loaded = Index::default();
        model.into_values().for_each(|versions| loaded.push_last(versions));
        prop_assert_eq!(loaded.check(), Ok(()));
        prop_assert!(loaded.iter().eq(index.iter()));
    }
}
