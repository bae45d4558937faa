use clustermesh_api::etcd::rpc::RangeRequest;

use super::*;
use crate::{
    State,
    test_support::{apply, delete, put, range, text},
};

/// a=3 (created 2, changed 5), b=1 (3), c=2 (4, deleted 6), d=0 (7).
fn sample() -> State {
    let mut state = State::new();
    apply(
        &mut state,
        [
            put("a", "9"),
            put("b", "1"),
            put("c", "2"),
            put("a", "3"),
            delete("c", ""),
            put("d", "0"),
        ],
    );
    state
}

fn keys(response: &RangeResponse) -> String {
    response.kvs.iter().map(|kv| text(&kv.key)).collect()
}

#[test]
fn range_ends_mean_what_etcd_means() {
    let state = sample();
    for (key, range_end, expected) in [
        ("a", "", "a"),
        ("c", "", ""),
        ("a", "c", "ab"),
        ("b", "\0", "bd"),
        ("\0", "\0", "abd"),
        ("d", "a", ""),
        ("b", "b", ""),
    ] {
        let response = state.range(&range(key, range_end)).unwrap();
        assert_eq!(keys(&response), expected, "{key:?} {range_end:?}");
        assert_eq!(response.count, i64::try_from(expected.len()).unwrap());
        assert!(!response.more);
    }
}

#[test]
fn old_revisions_stay_readable() {
    let state = sample();
    for (revision, expected) in [
        (1, ""),
        (2, "a"),
        (4, "abc"),
        (6, "ab"),
        (7, "abd"),
        (-5, "abd"),
    ] {
        let request = RangeRequest {
            revision,
            ..range("\0", "\0")
        };
        assert_eq!(
            keys(&state.range(&request).unwrap()),
            expected,
            "{revision}"
        );
    }
    let request = RangeRequest {
        revision: 8,
        ..range("\0", "\0")
    };
    assert_eq!(state.range(&request), Err(KvError::FutureRevision));
}

#[test]
fn limits_set_more_and_leave_the_count() {
    let state = sample();
    for (limit, expected, more) in [
        (0, "abd", false),
        (1, "a", true),
        (2, "ab", true),
        (3, "abd", false),
        (-1, "abd", false),
        (i64::MAX, "abd", false),
    ] {
        let response = state
            .range(&RangeRequest {
                limit,
                ..range("\0", "\0")
            })
            .unwrap();
        assert_eq!(
            (keys(&response).as_str(), response.more, response.count),
            (expected, more, 3),
            "{limit}"
        );
    }
}

#[test]
fn sorting_comes_before_the_limit_unless_only_a_target_is_given() {
    let state = sample();
    let sorted = |sort_target: SortTarget, sort_order: SortOrder, limit| {
        let response = state
            .range(&RangeRequest {
                sort_target: sort_target.into(),
                sort_order: sort_order.into(),
                limit,
                ..range("\0", "\0")
            })
            .unwrap();
        keys(&response)
    };
    assert_eq!(sorted(SortTarget::Key, SortOrder::Descend, 0), "dba");
    assert_eq!(sorted(SortTarget::Value, SortOrder::Ascend, 0), "dba");
    assert_eq!(sorted(SortTarget::Value, SortOrder::Ascend, 1), "d");
    assert_eq!(sorted(SortTarget::Value, SortOrder::None, 0), "dba");
    // The limit takes one key more than asked in key order, and only these are sorted.
    assert_eq!(sorted(SortTarget::Value, SortOrder::None, 1), "b");
    assert_eq!(sorted(SortTarget::Mod, SortOrder::Descend, 0), "dab");
    assert_eq!(sorted(SortTarget::Create, SortOrder::Descend, 0), "dba");
    assert_eq!(sorted(SortTarget::Version, SortOrder::Ascend, 0), "bda");
}

#[test]
fn revision_filters_apply_before_the_limit_and_not_to_the_count() {
    let state = sample();
    let filtered = |min_mod, max_mod, min_create, max_create, limit| {
        let response = state
            .range(&RangeRequest {
                min_mod_revision: min_mod,
                max_mod_revision: max_mod,
                min_create_revision: min_create,
                max_create_revision: max_create,
                limit,
                ..range("\0", "\0")
            })
            .unwrap();
        assert_eq!(response.count, 3);
        (keys(&response), response.more)
    };
    assert_eq!(filtered(5, 0, 0, 0, 0), ("ad".into(), false));
    assert_eq!(filtered(0, 5, 0, 0, 0), ("ab".into(), false));
    assert_eq!(filtered(4, 6, 0, 0, 0), ("a".into(), false));
    assert_eq!(filtered(0, 0, 3, 0, 1), ("b".into(), true));
    assert_eq!(filtered(0, 0, 0, 2, 1), ("a".into(), false));
}

#[test]
fn keys_only_and_count_only_leave_out_what_they_say() {
    let state = sample();
    let response = state
        .range(&RangeRequest {
            keys_only: true,
            ..range("a", "c")
        })
        .unwrap();
    assert_eq!(keys(&response), "ab");
    assert!(
        response
            .kvs
            .iter()
            .all(|kv| kv.value.is_empty() && kv.mod_revision > 0)
    );
    let response = state
        .range(&RangeRequest {
            count_only: true,
            limit: 1,
            ..range("a", "c")
        })
        .unwrap();
    assert_eq!(
        (response.count, response.kvs.len(), response.more),
        (2, 0, false)
    );
}
