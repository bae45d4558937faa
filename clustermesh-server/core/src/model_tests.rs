//! Random requests against a naive model that keeps a full copy of the keys at every revision.

pub(crate) mod requests;

use clustermesh_api::etcd::rpc::RangeRequest;
use proptest::prelude::*;

use crate::{
    EventKind, State,
    model::{Model, TERM},
    model_tests::requests::{command, commands, key, key_range},
    test_support::batch,
};

fn range_request() -> impl Strategy<Value = RangeRequest> {
    let bound = || prop_oneof![4 => Just(0_i64), 1 => 0..40_i64];
    (
        key_range(),
        prop_oneof![2 => Just(0_i64), 2 => -1..40_i64],
        prop_oneof![2 => Just(0_i64), 1 => -1..6_i64],
        (0..3_i32, 0..5_i32),
        any::<(bool, bool)>(),
        (bound(), bound(), bound(), bound()),
    )
        .prop_map(
            |((key, range_end), revision, limit, (sort_order, sort_target), only, bounds)| {
                RangeRequest {
                    key,
                    range_end,
                    limit,
                    revision,
                    sort_order,
                    sort_target,
                    serializable: false,
                    keys_only: only.0,
                    count_only: only.1,
                    min_mod_revision: bounds.0,
                    max_mod_revision: bounds.1,
                    min_create_revision: bounds.2,
                    max_create_revision: bounds.3,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn state_answers_like_the_model(
        commands in commands(40),
        ranges in prop::collection::vec(range_request(), 30),
    ) {
        let mut state = State::new();
        let mut model = Model::new();
        for command in commands {
            let applied = state.apply(&batch([command.clone()]), TERM).unwrap();
            let expected = model.apply(&command);
            prop_assert_eq!(&applied.outcomes[0].result, &expected, "{:?}", command);
            prop_assert_eq!(applied.outcomes[0].revision, model.revision());
            prop_assert_eq!(state.check(), Ok(()));
        }
        for request in ranges {
            prop_assert_eq!(state.range(&request), model.range(&request), "{:?}", request);
        }
        for after in -1..=model.revision() + 1 {
            let history = state.history(after, usize::MAX).ok().map(|groups| {
                groups
                    .iter()
                    .flat_map(|group| &group.events)
                    .map(|event| {
                        (
                            event.kind() == EventKind::Delete,
                            event.kv().to_key_value(),
                            event.prev().map(|prev| prev.to_key_value()),
                        )
                    })
                    .collect::<Vec<_>>()
            });
            prop_assert_eq!(history, model.history(after));
        }
    }

    #[test]
    fn batches_apply_like_single_entries_and_alike_on_every_replica(commands in commands(40)) {
        let mut whole = State::new();
        let mut twin = State::new();
        let mut single = State::new();
        whole.apply(&batch(commands.clone()), TERM).unwrap();
        twin.apply(&batch(commands.clone()), TERM).unwrap();
        for command in commands {
            single.apply(&batch([command]), TERM).unwrap();
        }
        prop_assert_eq!(whole.hash(), twin.hash());
        prop_assert_eq!(whole.hash(), single.hash());
        prop_assert_eq!(whole.approximate_bytes(), twin.approximate_bytes());
    }

    #[test]
    fn any_change_of_keys_changes_the_hash(commands in commands(20), more in command(), key in key()) {
        let mut state = State::new();
        state.apply(&batch(commands), TERM).unwrap();
        let (before, revision) = (state.hash(), state.revision());
        state.apply(&batch([more]), TERM).unwrap();
        if state.revision() != revision {
            prop_assert_ne!(state.hash(), before, "{:?}", key);
        }
    }
}
