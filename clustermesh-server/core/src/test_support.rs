//! Short ways for tests to build requests and to apply them, with the invariants checked after each entry.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
};

use crate::{
    Applied, KvError, Outcome, State,
    limits::{BATCH_FORMAT, FEATURE_LEVEL},
    pb::{Batch, FeatureLevel, Proposal, proposal::Command},
};

pub(crate) use crate::model::TERM;

/// An empty store of the newest feature level.
pub(crate) fn group() -> State {
    let mut state = State::new();
    apply(
        &mut state,
        [Command::FeatureLevel(FeatureLevel {
            level: FEATURE_LEVEL,
        })],
    );
    state
}

pub(crate) fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub(crate) fn batch(commands: impl IntoIterator<Item = Command>) -> Batch {
    Batch {
        format: BATCH_FORMAT,
        proposals: commands.into_iter().map(Proposal::from).collect(),
        ..Batch::default()
    }
}

pub(crate) fn apply(state: &mut State, commands: impl IntoIterator<Item = Command>) -> Applied {
    let applied = state.apply(&batch(commands), TERM).unwrap();
    if let Err(broken) = state.check() {
        panic!("{broken}");
    }
    applied
}

/// Applies one command in an entry of its own.
pub(crate) fn one(state: &mut State, command: Command) -> Result<Outcome, KvError> {
    let mut applied = apply(state, [command]);
    assert_eq!(applied.outcomes.len(), 1);
    applied.outcomes.remove(0).result
}

/// A step of a peer's copy, its end too, with the number that is next; anything else as it is.
pub(crate) fn numbered(state: &State, mut command: Command) -> Command {
    match &mut command {
        Command::PeerCopy(copy) => copy.sequence = state.next_copy_sequence(&copy.cluster),
        Command::PeerForget(forget) => {
            forget.sequence = state.next_copy_sequence(&forget.cluster);
        }
        _ => {}
    }
    command
}

pub(crate) fn put_request(key: &str, value: &str) -> PutRequest {
    PutRequest {
        key: bytes(key),
        value: bytes(value),
        ..PutRequest::default()
    }
}

pub(crate) fn put(key: &str, value: &str) -> Command {
    Command::Put(put_request(key, value))
}

pub(crate) fn put_with_lease(key: &str, value: &str, lease: i64) -> Command {
    Command::Put(PutRequest {
        lease,
        ..put_request(key, value)
    })
}

pub(crate) fn delete_request(key: &str, range_end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest {
        key: bytes(key),
        range_end: bytes(range_end),
        prev_kv: true,
    }
}

pub(crate) fn delete(key: &str, range_end: &str) -> Command {
    Command::DeleteRange(delete_request(key, range_end))
}

pub(crate) fn compact(revision: i64) -> Command {
    Command::Compact(CompactionRequest {
        revision,
        physical: false,
    })
}

pub(crate) fn grant(id: i64, ttl: i64) -> Command {
    Command::LeaseGrant(LeaseGrantRequest { id, ttl })
}

pub(crate) fn revoke(id: i64) -> Command {
    Command::LeaseRevoke(LeaseRevokeRequest { id })
}

pub(crate) fn range(key: &str, range_end: &str) -> RangeRequest {
    RangeRequest {
        key: bytes(key),
        range_end: bytes(range_end),
        ..RangeRequest::default()
    }
}

pub(crate) fn op(request: Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

pub(crate) fn put_op(key: &str, value: &str) -> RequestOp {
    op(Request::RequestPut(put_request(key, value)))
}

pub(crate) fn delete_op(key: &str, range_end: &str) -> RequestOp {
    op(Request::RequestDeleteRange(delete_request(key, range_end)))
}

pub(crate) fn range_op(key: &str, range_end: &str) -> RequestOp {
    op(Request::RequestRange(range(key, range_end)))
}

pub(crate) fn txn_op(txn: TxnRequest) -> RequestOp {
    op(Request::RequestTxn(txn))
}

pub(crate) fn txn(
    compare: Vec<Compare>,
    success: Vec<RequestOp>,
    failure: Vec<RequestOp>,
) -> TxnRequest {
    TxnRequest {
        compare,
        success,
        failure,
    }
}

pub(crate) fn compare(
    key: &str,
    target: CompareTarget,
    result: CompareResult,
    wanted: TargetUnion,
) -> Compare {
    Compare {
        result: result.into(),
        target: target.into(),
        key: bytes(key),
        range_end: Bytes::new(),
        target_union: Some(wanted),
    }
}

/// Keys and values of a range now.
pub(crate) fn contents(state: &State, key: &str, range_end: &str) -> Vec<(String, String)> {
    state
        .range(&range(key, range_end))
        .unwrap()
        .kvs
        .iter()
        .map(|kv| (text(&kv.key), text(&kv.value)))
        .collect()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
