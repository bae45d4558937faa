//! What the tests of this crate share.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{LeaseGrantRequest, PutRequest, RangeRequest};
use clustermesh_core::{KeyRange, pb, pb::proposal::Command};
use openraft_rt_tokio::TokioRuntime;

use crate::{
    AutoCompaction, Data, MemoryData, Replica, ReplicaConfig, WatchItem, WatchSpec, Watcher,
};

pub(crate) type R = TokioRuntime;

pub(crate) fn put(key: &str, value: impl Into<Bytes>, lease: i64) -> pb::Proposal {
    let request = PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: value.into(),
        lease,
        ..PutRequest::default()
    };
    Command::Put(request).into()
}

pub(crate) fn grant(ttl: i64) -> pb::Proposal {
    Command::LeaseGrant(LeaseGrantRequest { id: 0, ttl }).into()
}

pub(crate) fn config(data: Data) -> ReplicaConfig {
    let mut config = ReplicaConfig::new(data, "test");
    config.heartbeat = Duration::from_millis(20);
    config.election_timeout = Duration::from_millis(60);
    config.start_timeout = Duration::from_secs(30);
    config.auto_compaction = AutoCompaction::Off;
    config
}

pub(crate) fn folder(path: &Path) -> ReplicaConfig {
    config(Data::Folder(path.to_owned()))
}

pub(crate) fn memory() -> ReplicaConfig {
    config(Data::Memory(MemoryData::default()))
}

pub(crate) fn value(replica: &Replica<R>, key: &str) -> Option<Bytes> {
    let request = RangeRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        ..RangeRequest::default()
    };
    replica.read(|state| {
        state
            .range(&request)
            .unwrap()
            .kvs
            .first()
            .map(|kv| kv.value.clone())
    })
}

pub(crate) fn everything(start_revision: i64) -> WatchSpec {
    WatchSpec {
        ranges: vec![KeyRange::From(Bytes::from_static(b"\0"))],
        start_revision,
        ..WatchSpec::default()
    }
}

pub(crate) async fn next(watcher: &mut Watcher<R>) -> WatchItem {
    tokio::time::timeout(Duration::from_secs(10), watcher.next())
        .await
        .expect("in time")
        .expect("an item")
}

pub(crate) async fn next_revision(watcher: &mut Watcher<R>) -> i64 {
    match next(watcher).await {
        WatchItem::Events(events) => events.revision(),
        other => panic!("expected events, got {other:?}"),
    }
}
