use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{LeaseGrantRequest, PutRequest, RangeRequest};
use clustermesh_core::{KeyRange, Outcome, pb, pb::proposal::Command};
use openraft_rt_tokio::TokioRuntime;

use crate::{
    AutoCompaction, Data, MemoryData, ProposeError, Replica, ReplicaConfig, Start, StartError,
    StoreError, WatchEnd, WatchItem, WatchSpec, Watcher,
};

type R = TokioRuntime;

fn put(key: &str, value: impl Into<Bytes>, lease: i64) -> pb::Proposal {
    let request = PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: value.into(),
        lease,
        ..PutRequest::default()
    };
    pb::Proposal {
        command: Some(Command::Put(request)),
    }
}

fn grant(ttl: i64) -> pb::Proposal {
    pb::Proposal {
        command: Some(Command::LeaseGrant(LeaseGrantRequest { id: 0, ttl })),
    }
}

fn config(data: Data) -> ReplicaConfig {
    let mut config = ReplicaConfig::new(data, "test");
    config.heartbeat = Duration::from_millis(20);
    config.election_timeout = Duration::from_millis(60);
    config.start_timeout = Duration::from_secs(10);
    config.auto_compaction = AutoCompaction::Off;
    config
}

fn folder(path: &Path) -> ReplicaConfig {
    config(Data::Folder(path.to_owned()))
}

fn memory() -> ReplicaConfig {
    config(Data::Memory(MemoryData::default()))
}

fn value(replica: &Replica<R>, key: &str) -> Option<Bytes> {
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

fn everything(start_revision: i64) -> WatchSpec {
    WatchSpec {
        ranges: vec![KeyRange::From(Bytes::from_static(b"\0"))],
        start_revision,
        ..WatchSpec::default()
    }
}

async fn next(watcher: &mut Watcher<R>) -> WatchItem {
    tokio::time::timeout(Duration::from_secs(10), watcher.next())
        .await
        .expect("in time")
        .expect("an item")
}

async fn next_revision(watcher: &mut Watcher<R>) -> i64 {
    match next(watcher).await {
        WatchItem::Events(events) => events.revision(),
        other => panic!("expected events, got {other:?}"),
    }
}

#[tokio::test]
async fn a_new_group_gets_an_id_and_serves_writes_and_reads() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    assert_ne!(replica.read(|state| state.cluster_id()), 0);
    let committed = replica.propose(put("a", "1", 0)).await.unwrap();
    assert!(matches!(committed.outcome, Ok(Outcome::Put(_))));
    assert_eq!(committed.revision, 2);
    replica.linearize().await.unwrap();
    assert_eq!(value(&replica, "a").unwrap(), "1");
    let status = replica.status();
    assert!(status.is_leader);
    assert_eq!((status.revision, status.members.len()), (2, 1));
    assert_eq!(status.failure, None);
    replica.shutdown().await;
    assert_eq!(
        replica.propose(put("a", "2", 0)).await,
        Err(ProposeError::Stopped)
    );
    assert!(replica.linearize().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_proposals_share_entries_and_each_gets_its_own_revision() {
    const WRITES: usize = 2000;
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let writes: Vec<_> = (0..WRITES)
        .map(|n| {
            let replica = replica.clone();
            tokio::spawn(async move {
                replica
                    .propose(put(&format!("k{n}"), "v", 0))
                    .await
                    .unwrap()
                    .revision
            })
        })
        .collect();
    let mut revisions = Vec::new();
    for write in writes {
        revisions.push(write.await.unwrap());
    }
    revisions.sort_unstable();
    assert_eq!(
        revisions,
        (2..2 + i64::try_from(WRITES).unwrap()).collect::<Vec<_>>()
    );
    let entries = replica
        .metrics()
        .entries_proposed_total
        .load(std::sync::atomic::Ordering::Relaxed);
    assert!(
        entries < u64::try_from(WRITES).unwrap() / 2,
        "{entries} entries for {WRITES} writes"
    );
    replica.shutdown().await;
}

#[tokio::test]
async fn a_restart_recovers_everything_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let replica = Replica::<R>::start(folder(dir.path())).await.unwrap();
    let (id, cluster_id) = (replica.id(), replica.read(|state| state.cluster_id()));
    for n in 0..50 {
        replica
            .propose(put(&format!("k{n}"), format!("v{n}"), 0))
            .await
            .unwrap();
    }
    let hash = replica.read(|state| state.hash());
    replica.shutdown().await;
    let replica = Replica::<R>::start(folder(dir.path())).await.unwrap();
    assert_eq!(replica.id(), id);
    assert_eq!(replica.read(|state| state.cluster_id()), cluster_id);
    assert_eq!(replica.read(|state| state.hash()), hash);
    assert_eq!(
        replica.propose(put("more", "x", 0)).await.unwrap().revision,
        52
    );
    replica.shutdown().await;
}

#[tokio::test]
async fn a_snapshot_lets_the_log_shrink_and_a_restart_begins_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = folder(dir.path());
    config.snapshot_log_bytes = 20_000;
    let replica = Replica::<R>::start(config.clone()).await.unwrap();
    for n in 0..300 {
        replica
            .propose(put(&format!("k{}", n % 20), vec![b'x'; 500], 0))
            .await
            .unwrap();
    }
    let metrics = replica.metrics();
    let purged = async {
        let mut raft = replica.inner.raft.metrics();
        use openraft::async_runtime::WatchReceiver;
        while raft.borrow_and_update().purged.is_none() {
            raft.changed().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(10), purged)
        .await
        .unwrap();
    assert!(
        metrics
            .snapshots_total
            .load(std::sync::atomic::Ordering::Relaxed)
            >= 2
    );
    let hash = replica.read(|state| state.hash());
    replica.shutdown().await;

    let replica = Replica::<R>::start(config.clone()).await.unwrap();
    assert_eq!(replica.read(|state| state.hash()), hash);
    assert_eq!(
        replica.propose(put("more", "x", 0)).await.unwrap().revision,
        302
    );
    let hash = replica.read(|state| state.hash());
    replica.shutdown().await;

    // The newest snapshot is damaged: the one before and the log give the same state.
    let mut snapshots: Vec<_> = std::fs::read_dir(dir.path().join("snapshots"))
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    snapshots.sort();
    let mut bytes = std::fs::read(snapshots.last().unwrap()).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(snapshots.last().unwrap(), bytes).unwrap();
    let replica = Replica::<R>::start(config.clone()).await.unwrap();
    assert_eq!(replica.read(|state| state.hash()), hash);
    replica.shutdown().await;

    // Without any snapshot the log does not reach back far enough.
    for path in snapshots {
        std::fs::remove_file(path).unwrap();
    }
    assert!(matches!(
        Replica::<R>::start(config).await,
        Err(StartError::Gap { .. })
    ));
}

#[tokio::test]
async fn a_folder_of_another_cluster_or_an_empty_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut empty = folder(dir.path());
    empty.start = Start::Existing;
    assert!(matches!(
        Replica::<R>::start(empty).await,
        Err(StartError::Store(StoreError::Empty { .. }))
    ));
    let replica = Replica::<R>::start(folder(dir.path())).await.unwrap();
    assert!(matches!(
        Replica::<R>::start(folder(dir.path())).await,
        Err(StartError::Store(StoreError::InUse { .. }))
    ));
    replica.shutdown().await;
    let mut other = folder(dir.path());
    other.cluster_name = "other".into();
    assert!(matches!(
        Replica::<R>::start(other).await,
        Err(StartError::Store(StoreError::WrongIdentity { .. }))
    ));
    let mut new = folder(dir.path());
    new.start = Start::NewGroup;
    assert!(matches!(
        Replica::<R>::start(new).await,
        Err(StartError::Store(StoreError::NotEmpty { .. }))
    ));
}

#[tokio::test]
async fn a_watch_yields_history_then_changes_and_progress() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    replica.propose(put("a", "1", 0)).await.unwrap();
    replica.propose(put("b", "2", 0)).await.unwrap();
    let mut watcher = replica.watch(everything(2));
    assert_eq!(next_revision(&mut watcher).await, 2);
    assert_eq!(next_revision(&mut watcher).await, 3);
    let mut from_now = replica.watch(everything(0));
    assert_eq!(from_now.start_revision(), 4);
    replica.propose(put("c", "3", 0)).await.unwrap();
    assert_eq!(next_revision(&mut watcher).await, 4);
    assert_eq!(next_revision(&mut from_now).await, 4);
    watcher.request_progress();
    assert!(matches!(
        next(&mut watcher).await,
        WatchItem::Progress { revision: 4 }
    ));
    // A watch of the future gets nothing before its revision.
    let mut future = replica.watch(everything(6));
    future.request_progress();
    assert!(matches!(
        next(&mut future).await,
        WatchItem::Progress { revision: 4 }
    ));
    future.request_progress();
    assert!(matches!(
        next(&mut future).await,
        WatchItem::Progress { revision: 4 }
    ));
    replica.propose(put("d", "4", 0)).await.unwrap();
    replica.propose(put("e", "5", 0)).await.unwrap();
    assert_eq!(next_revision(&mut future).await, 6);
    replica.shutdown().await;
    assert_eq!(next_revision(&mut watcher).await, 5);
    assert_eq!(next_revision(&mut watcher).await, 6);
    assert_eq!(watcher.next().await.unwrap_err(), WatchEnd::Stopped);
}

#[tokio::test]
async fn a_watch_gets_only_its_ranges_each_event_once_and_what_its_filter_lets_through() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let range = |a: &'static str, b: &'static str| {
        KeyRange::Between(
            Bytes::from_static(a.as_bytes()),
            Bytes::from_static(b.as_bytes()),
        )
    };
    let spec = WatchSpec {
        ranges: vec![
            range("a", "c"),
            range("b", "d"),
            KeyRange::Single(Bytes::from_static(b"z")),
        ],
        filter: Some(Arc::new(|event| event.kv().value_bytes() != b"hidden")),
        ..WatchSpec::default()
    };
    let mut live = replica.watch(spec.clone());
    // Joins the hub before the writes.
    live.request_progress();
    assert!(matches!(
        next(&mut live).await,
        WatchItem::Progress { revision: 1 }
    ));
    for (key, value) in [
        ("a", "1"),
        ("b", "2"),
        ("x", "3"),
        ("c", "hidden"),
        ("z", "4"),
    ] {
        replica.propose(put(key, value, 0)).await.unwrap();
    }
    let mut past = replica.watch(WatchSpec {
        start_revision: 1,
        ..spec
    });
    for watcher in [&mut live, &mut past] {
        let mut keys = Vec::new();
        for _ in 0..3 {
            let WatchItem::Events(events) = next(watcher).await else {
                panic!("events")
            };
            keys.extend(events.events().map(|event| event.key().clone()));
        }
        assert_eq!(keys, ["a", "b", "z"]);
        watcher.request_progress();
        assert!(matches!(
            next(watcher).await,
            WatchItem::Progress { revision: 6 }
        ));
    }
    replica.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_watcher_falls_back_to_history_and_misses_nothing() {
    const WRITES: i64 = 5000;
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let mut watcher = replica.watch(everything(0));
    watcher.request_progress();
    assert!(matches!(
        next(&mut watcher).await,
        WatchItem::Progress { .. }
    ));
    let writes: Vec<_> = (0..WRITES)
        .map(|n| {
            let replica = replica.clone();
            tokio::spawn(async move {
                replica
                    .propose(put(&format!("k{n}"), "v", 0))
                    .await
                    .unwrap()
            })
        })
        .collect();
    for write in writes {
        write.await.unwrap();
    }
    for revision in 2..2 + WRITES {
        assert_eq!(next_revision(&mut watcher).await, revision);
    }
    assert!(
        replica
            .metrics()
            .watch_fallbacks_total
            .load(std::sync::atomic::Ordering::Relaxed)
            >= 1
    );
    replica.propose(put("last", "v", 0)).await.unwrap();
    assert_eq!(next_revision(&mut watcher).await, 2 + WRITES);
    replica.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn list_and_watch_are_gapless_under_concurrent_writes() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let writer = {
        let replica = replica.clone();
        tokio::spawn(async move {
            for n in 0..2000 {
                replica
                    .propose(put(&format!("k{}", n % 7), format!("{n}"), 0))
                    .await
                    .unwrap();
            }
        })
    };
    let mut readers = Vec::new();
    for _ in 0..8 {
        let replica = replica.clone();
        readers.push(tokio::spawn(async move {
            let listed = replica.read(|state| state.revision());
            let mut watcher = replica.watch(everything(listed + 1));
            for expected in listed + 1..=2001 {
                assert_eq!(next_revision(&mut watcher).await, expected);
            }
        }));
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
    for reader in readers {
        reader.await.unwrap();
    }
    replica.shutdown().await;
}

#[tokio::test]
async fn cursors_come_in_their_place_and_existing_ones_first() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let copy = |revision: i64, key: Option<&'static str>| {
        let change = key.map(|key| pb::PeerChange {
            key: Bytes::from(format!("cilium/cache/{key}")),
            value: Some(Bytes::from(revision.to_string())),
        });
        let copy = pb::PeerCopy {
            cluster: "east".into(),
            store_id: 7,
            revision,
            synced: true,
            changes: change.into_iter().collect(),
        };
        pb::Proposal {
            command: Some(Command::PeerCopy(copy)),
        }
    };
    replica.propose(copy(10, None)).await.unwrap();
    let mut watcher = replica.watch(WatchSpec {
        cursors: true,
        ..everything(0)
    });
    let cursor = |item: WatchItem| match item {
        WatchItem::Cursor { cursor, .. } => cursor.map(|cursor| cursor.revision),
        other => panic!("expected a cursor, got {other:?}"),
    };
    assert_eq!(cursor(next(&mut watcher).await), Some(10));
    replica.propose(copy(11, Some("a"))).await.unwrap();
    replica.propose(copy(12, None)).await.unwrap();
    assert_eq!(next_revision(&mut watcher).await, 2);
    assert_eq!(cursor(next(&mut watcher).await), Some(11));
    assert_eq!(cursor(next(&mut watcher).await), Some(12));
    let forget = pb::PeerForget {
        cluster: "east".into(),
    };
    replica
        .propose(pb::Proposal {
            command: Some(Command::PeerForget(forget)),
        })
        .await
        .unwrap();
    assert_eq!(cursor(next(&mut watcher).await), None);
    replica.shutdown().await;
}

#[tokio::test]
async fn a_lease_expires_with_its_keys_unless_kept_alive() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let granted = |committed: crate::Committed| match committed.outcome {
        Ok(Outcome::LeaseGrant(response)) => response.id,
        other => panic!("expected a grant, got {other:?}"),
    };
    let short = granted(replica.propose(grant(2)).await.unwrap());
    let long = granted(replica.propose(grant(600)).await.unwrap());
    assert!(short > 0 && long > 0 && short != long);
    replica.propose(put("short", "v", short)).await.unwrap();
    replica.propose(put("long", "v", long)).await.unwrap();
    assert_eq!(
        replica.keep_alive(short).await.unwrap(),
        Some(Duration::from_secs(2))
    );
    assert_eq!(replica.keep_alive(12345).await.unwrap(), None);
    let left = replica.time_to_live(long).await.unwrap().unwrap();
    assert_eq!(
        (left.granted_ttl_s, left.keys),
        (600, vec![Bytes::from_static(b"long")])
    );
    assert!(left.remaining > Duration::from_secs(590));
    let mut watcher = replica.watch(everything(0));
    let before = std::time::Instant::now();
    assert_eq!(next_revision(&mut watcher).await, 4);
    assert!(before.elapsed() > Duration::from_secs(1));
    assert_eq!(value(&replica, "short"), None);
    assert_eq!(value(&replica, "long").unwrap(), "v");
    assert_eq!(replica.keep_alive(short).await.unwrap(), None);
    assert_eq!(replica.time_to_live(short).await.unwrap(), None);
    replica.shutdown().await;
}

#[tokio::test]
async fn a_restart_gives_leases_their_full_ttl_again() {
    let data = MemoryData::default();
    let replica = Replica::<R>::start(config(Data::Memory(data.clone())))
        .await
        .unwrap();
    let committed = replica.propose(grant(100)).await.unwrap();
    let Ok(Outcome::LeaseGrant(granted)) = committed.outcome else {
        panic!("a grant")
    };
    replica.shutdown().await;
    let replica = Replica::<R>::start(config(Data::Memory(data)))
        .await
        .unwrap();
    let left = replica.time_to_live(granted.id).await.unwrap().unwrap();
    assert!(left.remaining > Duration::from_secs(95), "{left:?}");
    replica.shutdown().await;
}

#[tokio::test]
async fn old_revisions_are_compacted_and_a_watch_below_ends_with_the_compact_revision() {
    let mut config = memory();
    config.auto_compaction = AutoCompaction::Revisions {
        keep: 10,
        every: Duration::from_millis(10),
    };
    let replica = Replica::<R>::start(config).await.unwrap();
    for n in 0..40 {
        replica.propose(put("k", n.to_string(), 0)).await.unwrap();
    }
    let compacted = async {
        while replica.status().compact_revision < 31 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), compacted)
        .await
        .unwrap();
    let mut watcher = replica.watch(everything(2));
    assert_eq!(
        watcher.next().await.unwrap_err(),
        WatchEnd::Compacted {
            compact_revision: 31
        }
    );
    replica.shutdown().await;
}

#[tokio::test]
async fn too_large_a_proposal_is_refused_before_it_is_proposed() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let refused = replica.propose(put("big", vec![0; 5 << 20], 0)).await;
    assert!(matches!(refused, Err(ProposeError::TooLarge { .. })));
    replica.shutdown().await;
}

/// Ends every task at once, as the death of the process would, and hands back what was acknowledged.
fn write_and_die(path: &Path, first: u64) -> u64 {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let acknowledged = Arc::new(std::sync::atomic::AtomicU64::new(first));
    runtime.block_on(async {
        let replica = Replica::<R>::start(folder(path)).await.unwrap();
        for n in 0..first {
            assert_eq!(value(&replica, &format!("k{n}")).unwrap(), n.to_string());
        }
        let acknowledged = acknowledged.clone();
        let writer = tokio::spawn(async move {
            for n in first.. {
                replica
                    .propose(put(&format!("k{n}"), n.to_string(), 0))
                    .await
                    .unwrap();
                acknowledged.store(n + 1, std::sync::atomic::Ordering::SeqCst);
            }
        });
        let died = tokio::time::timeout(Duration::from_millis(150), writer).await;
        assert!(died.is_err(), "the writer ended by itself");
    });
    runtime.shutdown_timeout(Duration::from_secs(10));
    acknowledged.load(std::sync::atomic::Ordering::SeqCst)
}

#[test]
fn what_was_acknowledged_survives_a_sudden_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut written = 0;
    for _ in 0..3 {
        let before = written;
        written = write_and_die(dir.path(), before);
        assert!(written > before);
    }
}
