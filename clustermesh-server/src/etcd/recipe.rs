//! What Lock and Election share: contenders are keys below a prefix, each on its lease; the one that was created first has it.

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::KeyValue;
use clustermesh_api::etcd::rpc::compare::{CompareResult, CompareTarget, TargetUnion};
use clustermesh_api::etcd::rpc::range_request::{SortOrder, SortTarget};
use clustermesh_api::etcd::rpc::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp,
    ResponseHeader, TxnRequest, TxnResponse, request_op, response_op,
};
use clustermesh_core::{EventKind, KeyRange};
use clustermesh_mesh::prefix_end;
use clustermesh_process::Drain;
use clustermesh_raft::{WatchEnd, WatchItem, WatchSpec};
use tonic::Status;

use crate::etcd::lease::server_stopped;
use crate::store::{Store, TokioWatcher};

/// TTL of the lease that a contender without one gets, as etcd's sessions have it.
const SESSION_TTL_SECONDS: i64 = 60;

/// A key in the queue.
#[derive(Debug)]
pub(super) struct Contender {
    pub(super) key: Bytes,
    pub(super) lease: i64,
    /// Create revision: the place in the queue.
    pub(super) revision: i64,
    /// Header of the transaction that found it or put it there.
    pub(super) header: ResponseHeader,
    /// What the key held before, when it was there already.
    pub(super) before: Option<KeyValue>,
}

/// The prefix of all contenders for `name`.
pub(super) fn prefix(name: &[u8]) -> Bytes {
    [name, b"/"].concat().into()
}

/// Puts a key on `lease` into the queue below `name`, or finds it there; without a lease one is granted.
///
/// # Errors
/// etcd's.
pub(super) async fn enter(
    store: &Store,
    name: &[u8],
    lease: i64,
    value: Bytes,
) -> Result<Contender, Status> {
    let lease = match lease {
        0 => {
            let request = LeaseGrantRequest {
                ttl: SESSION_TTL_SECONDS,
                id: 0,
            };
            store.lease_grant(request).await?.id
        }
        lease => lease,
    };
    let sign = if lease < 0 { "-" } else { "" };
    let key = Bytes::from(
        [
            &prefix(name)[..],
            format!("{sign}{:x}", lease.unsigned_abs()).as_bytes(),
        ]
        .concat(),
    );
    let put = PutRequest {
        key: key.clone(),
        value,
        lease,
        ..PutRequest::default()
    };
    let get = RangeRequest {
        key: key.clone(),
        ..RangeRequest::default()
    };
    let response = store
        .txn(TxnRequest {
            compare: vec![created_at(&key, 0)],
            success: vec![op(request_op::Request::RequestPut(put))],
            failure: vec![op(request_op::Request::RequestRange(get))],
        })
        .await?;
    let header = response.header.unwrap_or_default();
    let before = first_found(response);
    Ok(Contender {
        revision: before
            .as_ref()
            .map_or(header.revision, |kv| kv.create_revision),
        key,
        lease,
        header,
        before,
    })
}

pub(super) fn op(request: request_op::Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

/// The comparison that `key` was created at `revision`; 0: that it is not there.
pub(super) fn created_at(key: &Bytes, revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
        ..Compare::default()
    }
}

fn first_found(response: TxnResponse) -> Option<KeyValue> {
    match response.responses.into_iter().next()?.response? {
        response_op::Response::ResponseRange(range) => range.kvs.into_iter().next(),
        _ => None,
    }
}

/// The contender below `prefix` that was created first, and the header of the read.
///
/// # Errors
/// etcd's.
pub(super) async fn holder(
    store: &Store,
    prefix: &Bytes,
) -> Result<(Option<KeyValue>, ResponseHeader), Status> {
    let found = store
        .range(&RangeRequest {
            sort_order: SortOrder::Ascend.into(),
            ..one_of(prefix)
        })
        .await?;
    Ok((
        found.kvs.into_iter().next(),
        found.header.unwrap_or_default(),
    ))
}

fn one_of(prefix: &Bytes) -> RangeRequest {
    RangeRequest {
        key: prefix.clone(),
        range_end: prefix_end(prefix),
        limit: 1,
        sort_target: SortTarget::Create.into(),
        ..RangeRequest::default()
    }
}

/// Waits until every contender before `revision` is gone. Each waits for the one right before it, so that a release wakes one.
///
/// # Errors
/// etcd's; `Unavailable` when the server stops.
pub(super) async fn wait_for_turn(
    store: &Store,
    name: &[u8],
    revision: i64,
    drain: &Drain,
) -> Result<(), Status> {
    let prefix = prefix(name);
    loop {
        let before = store
            .range(&RangeRequest {
                sort_order: SortOrder::Descend.into(),
                max_create_revision: revision - 1,
                ..one_of(&prefix)
            })
            .await?;
        let Some(kv) = before.kvs.into_iter().next() else {
            return Ok(());
        };
        let read_at = before
            .header
            .map_or(kv.mod_revision, |header| header.revision);
        let mut watcher = watch(store, KeyRange::Single(kv.key), read_at + 1);
        loop {
            match next(&mut watcher, drain).await? {
                Some(WatchItem::Events(events))
                    if events
                        .events()
                        .any(|event| event.kind() == EventKind::Delete) =>
                {
                    break;
                }
                Some(_) => {}
                // Compacted under us: look again.
                None => break,
            }
        }
    }
}

/// Events of `range` from `revision` on.
pub(super) fn watch(store: &Store, range: KeyRange, revision: i64) -> TokioWatcher {
    store.watch(WatchSpec {
        ranges: vec![range],
        start_revision: revision,
        ..WatchSpec::default()
    })
}

/// The next item; `None` when the history that the watcher needs was compacted.
///
/// # Errors
/// `Unavailable` when the server stops.
pub(super) async fn next(
    watcher: &mut TokioWatcher,
    drain: &Drain,
) -> Result<Option<WatchItem>, Status> {
    let item = tokio::select! {
        item = watcher.next() => item,
        () = drain.draining() => return Err(server_stopped()),
    };
    match item {
        Ok(item) => Ok(Some(item)),
        Err(WatchEnd::Compacted { .. }) => Ok(None),
        Err(WatchEnd::Stopped) => Err(server_stopped()),
    }
}

/// Takes a contender out of the queue again when the call that waits for its turn is given up.
#[derive(Debug)]
pub(super) struct Withdrawal {
    store: Store,
    key: Option<Bytes>,
    revision: i64,
}

impl Withdrawal {
    pub(super) fn of(store: &Store, contender: &Contender) -> Self {
        Self {
            store: store.clone(),
            key: Some(contender.key.clone()),
            revision: contender.revision,
        }
    }

    /// The contender stays.
    pub(super) fn disarm(mut self) {
        self.key = None;
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        let (Some(key), store, revision) = (self.key.take(), self.store.clone(), self.revision)
        else {
            return;
        };
        tokio::spawn(async move {
            if let Err(status) = withdraw(&store, key, revision).await {
                // Its lease will.
                tracing::debug!(%status, "contender not withdrawn");
            }
        });
    }
}

/// Deletes `key` if it is still the one that was created at `revision`.
///
/// # Errors
/// etcd's.
pub(super) async fn withdraw(
    store: &Store,
    key: Bytes,
    revision: i64,
) -> Result<ResponseHeader, Status> {
    let delete = DeleteRangeRequest {
        key: key.clone(),
        ..DeleteRangeRequest::default()
    };
    let response = store
        .txn(TxnRequest {
            compare: vec![created_at(&key, revision)],
            success: vec![op(request_op::Request::RequestDeleteRange(delete))],
            failure: Vec::new(),
        })
        .await?;
    Ok(response.header.unwrap_or_default())
}
