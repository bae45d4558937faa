//! Commands on the keyspace and on its model: outcomes, ranges and history are equal.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::compare::TargetUnion;
use clustermesh_api::etcd::rpc::request_op::Request;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use clustermesh_core::limits::BATCH_FORMAT;
use clustermesh_core::model::{Model, TERM};
use clustermesh_core::pb::proposal::Command;
use clustermesh_core::pb::{Batch, LeaseExpire, Proposal};
use clustermesh_core::{EventKind, State, check};

use crate::input::Input;

/// Commands of one input: the model copies all keys for each.
const COMMANDS_MAX: usize = 64;
/// Ranges asked at the end.
const RANGES_MAX: usize = 16;
/// Operations of a list, and lists inside lists.
const OPS_MAX: u8 = 4;
const DEPTH_MAX: u8 = 3;
/// Ids of leases; 0 is none.
const LEASES: u8 = 4;

pub(crate) fn like_the_model(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let mut state = State::new();
    let mut model = Model::new();
    let mut done = 0;
    while !input.is_empty() && done < COMMANDS_MAX {
        done += 1;
        let command = command(&mut input);
        let expected = model.apply(&command);
        let batch = Batch {
            format: BATCH_FORMAT,
            proposals: vec![Proposal::from(command.clone())],
            ..Batch::default()
        };
        let applied = match state.apply(&batch, TERM) {
            Ok(applied) => applied,
            Err(error) => panic!("{command:?}: {error}"),
        };
        let outcome = applied.outcomes.first().map(|outcome| &outcome.result);
        assert_eq!(outcome, Some(&expected), "{command:?}");
        assert_eq!(state.revision(), model.revision(), "{command:?}");
        assert_eq!(state.check(), Ok(()), "{command:?}");
    }
    for _ in 0..RANGES_MAX {
        let request = range(&mut input);
        if check::check_range(&request).is_ok() {
            assert_eq!(state.range(&request), model.range(&request), "{request:?}");
        }
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
        assert_eq!(history, model.history(after), "after {after}");
    }
    done > 0
}

fn command(input: &mut Input<'_>) -> Command {
    match input.choice(12) {
        0..4 => Command::Put(put(input)),
        4 => Command::DeleteRange(delete(input)),
        5..8 => Command::Txn(txn(input, DEPTH_MAX)),
        8 => Command::Compact(CompactionRequest {
            revision: input.number(),
            physical: input.flag(),
        }),
        9 => Command::LeaseGrant(LeaseGrantRequest {
            id: lease(input),
            ttl: i64::from(input.byte()),
        }),
        10 => Command::LeaseRevoke(LeaseRevokeRequest { id: lease(input) }),
        _ => Command::LeaseExpire(LeaseExpire {
            term: TERM - u64::from(input.flag()),
            ids: (0..input.choice(3)).map(|_| lease(input)).collect(),
        }),
    }
}

fn lease(input: &mut Input<'_>) -> i64 {
    i64::from(input.choice(LEASES))
}

fn put(input: &mut Input<'_>) -> PutRequest {
    let flags = input.byte();
    PutRequest {
        key: input.key(),
        value: if flags & 1 == 0 {
            input.value()
        } else {
            Bytes::new()
        },
        lease: if flags & 2 == 0 { lease(input) } else { 0 },
        prev_kv: flags & 4 != 0,
        ignore_value: flags & 8 != 0,
        ignore_lease: flags & 16 != 0,
    }
}

fn delete(input: &mut Input<'_>) -> DeleteRangeRequest {
    let (key, range_end) = input.range();
    DeleteRangeRequest {
        key,
        range_end,
        prev_kv: input.flag(),
    }
}

fn range(input: &mut Input<'_>) -> RangeRequest {
    let (key, range_end) = input.range();
    let flags = input.byte();
    let mut bound = |bit: u8| {
        if flags & bit == 0 { 0 } else { input.number() }
    };
    RangeRequest {
        key,
        range_end,
        limit: bound(1).clamp(-1, 255),
        revision: bound(2),
        min_mod_revision: bound(4),
        max_mod_revision: bound(8),
        min_create_revision: bound(16),
        max_create_revision: bound(32),
        serializable: false,
        keys_only: flags & 64 != 0,
        count_only: flags & 128 != 0,
        sort_order: i32::from(input.choice(3)),
        sort_target: i32::from(input.choice(5)),
    }
}

fn txn(input: &mut Input<'_>, depth: u8) -> TxnRequest {
    let list = |input: &mut Input<'_>| -> Vec<RequestOp> {
        let count = input.choice(OPS_MAX);
        (0..count).map(|_| op(input, depth)).collect()
    };
    TxnRequest {
        compare: (0..input.choice(3)).map(|_| compare(input)).collect(),
        success: list(input),
        failure: list(input),
    }
}

fn op(input: &mut Input<'_>, depth: u8) -> RequestOp {
    let request = match input.choice(8) {
        0..3 => Some(Request::RequestPut(put(input))),
        3 => Some(Request::RequestDeleteRange(delete(input))),
        4 if depth > 1 => Some(Request::RequestTxn(txn(input, depth - 1))),
        5 if input.byte() == 0 => None,
        _ => Some(Request::RequestRange(range(input))),
    };
    RequestOp { request }
}

fn compare(input: &mut Input<'_>) -> Compare {
    let (key, range_end) = input.range();
    let kind = input.byte();
    let target_union = match kind % 7 {
        0 => Some(TargetUnion::Version(input.number())),
        1 => Some(TargetUnion::CreateRevision(input.number())),
        2 => Some(TargetUnion::ModRevision(input.number())),
        3 => Some(TargetUnion::Value(input.value())),
        4 => Some(TargetUnion::Lease(lease(input))),
        _ => None,
    };
    Compare {
        result: i32::from(input.choice(5)),
        // Sometimes of another kind than the value.
        target: i32::from(if kind < 200 {
            kind % 7
        } else {
            input.choice(6)
        }),
        key,
        range_end,
        target_union,
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // Any bytes are commands; these begin with puts, leases, transactions, compactions.
    let ramp = |step: usize| (0..=255_u8).step_by(step).collect::<Vec<u8>>();
    vec![
        ramp(1),
        ramp(3),
        ramp(7),
        [[0, 0, 0, 2, 1, 1, 1].repeat(8), ramp(5)].concat(),
        [9, 1, 60, 0, 0, 0, 1, 2, 1, 4, 0, 0, 2, 1, 5, 1].repeat(6),
    ]
}
