use std::collections::BTreeMap;

use clustermesh_api::etcd::rpc::{CompactionRequest, PutRequest};
use clustermesh_core::pb;
use proptest::prelude::*;

use super::*;

fn apply(state: &mut State, command: pb::proposal::Command) {
    let batch = pb::Batch {
        format: clustermesh_core::limits::BATCH_FORMAT,
        proposals: vec![command.into()],
        ..pb::Batch::default()
    };
    let applied = state.apply(&batch, 1).unwrap();
    assert!(applied.outcomes[0].result.is_ok(), "{applied:?}");
}

fn put(state: &mut State, key: &str, value: &[u8]) {
    apply(
        state,
        pb::proposal::Command::Put(PutRequest {
            key: key.to_owned().into(),
            value: value.to_vec().into(),
            ..Default::default()
        }),
    );
}

fn state() -> State {
    let mut state = State::new();
    apply(
        &mut state,
        pb::proposal::Command::Bootstrap(pb::Bootstrap {
            cluster_id: 7,
            ..pb::Bootstrap::default()
        }),
    );
    state
}

fn is_visible(key: &[u8]) -> bool {
    (key.starts_with(b"cilium/") || key.starts_with(b"clustermesh.io/"))
        && !key.starts_with(b"clustermesh.io/alloc/")
}

fn visible(state: &State) -> BTreeMap<Bytes, Bytes> {
    let everything = state
        .range(&RangeRequest {
            key: Bytes::from_static(&[0]),
            range_end: Bytes::from_static(&[0]),
            ..Default::default()
        })
        .unwrap();
    everything
        .kvs
        .into_iter()
        .filter(|kv| is_visible(&kv.key))
        .map(|kv| (kv.key, kv.value))
        .collect()
}

/// Everything listed, and the number of parts; `between` runs after each part.
fn list(state: &mut State, mut between: impl FnMut(&mut State)) -> (BTreeMap<Bytes, Bytes>, usize) {
    let mut place = ListingPlace::new(state);
    let (mut map, mut parts, mut last) = (BTreeMap::new(), 0, false);
    while let Some(part) = place.next(state).unwrap() {
        assert!(!last, "a part after the last one");
        assert_eq!(part.revision, place.revision());
        last = part.last;
        parts += 1;
        for kv in part.kvs {
            assert!(map.insert(kv.key, kv.value).is_none(), "listed twice");
        }
        between(state);
    }
    assert!(last);
    (map, parts)
}

#[test]
fn a_listing_is_cut_by_size_and_hides_the_bookkeeping() {
    let mut state = state();
    for index in 0..5 {
        put(
            &mut state,
            &format!("cilium/state/{index}"),
            &vec![0; STREAM_MESSAGE_TARGET_BYTES / 2],
        );
    }
    for key in [
        "clustermesh.io/alloc/a",
        "clustermesh.io/a",
        "clustermesh.io/workloads/v1/a/b",
        "registry/a",
    ] {
        put(&mut state, key, b"x");
    }
    let before = visible(&state);
    assert_eq!(before.len(), 7);
    let mut index = 0;
    let (listed, parts) = list(&mut state, |state| {
        index += 1;
        put(state, &format!("cilium/later/{index}"), b"x");
    });
    assert_eq!(
        listed, before,
        "one revision, whatever is written meanwhile"
    );
    assert!(parts >= 3);
}

#[test]
fn an_empty_store_gives_one_last_part() {
    assert_eq!(list(&mut state(), |_| ()), (BTreeMap::new(), 1));
}

#[test]
fn a_resume_continues_only_in_the_same_store_above_the_compact_revision() {
    let mut state = state();
    for index in 0..5 {
        put(&mut state, &format!("cilium/{index}"), b"x");
    }
    apply(
        &mut state,
        pb::proposal::Command::Compact(CompactionRequest {
            revision: 4,
            physical: false,
        }),
    );
    let resumes = |store_id, resume_after_revision| {
        can_resume(
            &state,
            &AgentWatchRequest {
                store_id,
                resume_after_revision,
            },
        )
    };
    assert!(resumes(7, 5));
    assert!(resumes(7, 3), "the next revision is still there");
    assert!(!resumes(7, 2), "compacted");
    assert!(!resumes(8, 5), "another store");
    assert!(!resumes(7, 1_000), "a future revision");
    assert!(!resumes(7, 0));
}

proptest! {
    #[test]
    fn a_listing_equals_the_visible_state(
        keys in prop::collection::btree_set((0_u8..5, 0_u16..2_000), 0..80),
        large in any::<bool>(),
    ) {
        let mut state = state();
        let value = vec![0; if large { STREAM_MESSAGE_TARGET_BYTES / 20 } else { 1 }];
        for (prefix, key) in keys {
            let prefix = ["cilium/state/", "clustermesh.io/alloc/", "clustermesh.io/services/v1/", "clustermesh.io/A", "other/"][usize::from(prefix)];
            put(&mut state, &format!("{prefix}{key}"), &value);
        }
        let expected = visible(&state);
        prop_assert_eq!(list(&mut state, |_| ()).0, expected);
    }
}
