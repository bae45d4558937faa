use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use clustermesh_core::Outcome;

use crate::{
    AutoCompaction, Data, DiskFault, MemoryData, ProposeError, ReadError, Replica, Start,
    StartError, StoreError, WatchEnd,
    test_support::{R, config, everything, folder, grant, memory, next_revision, put, value},
};

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
    // openraft stamps a group of one only when it is asked to; idle or not, it is its own quorum.
    assert_eq!(status.last_quorum_ack, Some(Duration::ZERO));
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
    std::fs::remove_dir_all(dir.path().join("snapshots")).unwrap();
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

#[tokio::test]
async fn a_new_group_from_lost_ones_data_has_new_ids_and_revisions() {
    let dir = tempfile::tempdir().unwrap();
    let replica = Replica::<R>::start(folder(dir.path())).await.unwrap();
    let (id, cluster_id) = (replica.id(), replica.read(|state| state.cluster_id()));
    for n in 0..20 {
        replica
            .propose(put(&format!("k{n}"), "v", 0))
            .await
            .unwrap();
    }
    replica.shutdown().await;
    let node = clustermesh_store::Node::default();
    Replica::<R>::force_new_cluster(dir.path(), "test", node)
        .await
        .unwrap();
    let replica = Replica::<R>::start(folder(dir.path())).await.unwrap();
    assert_ne!(replica.id(), id);
    let status = replica.status();
    assert_ne!(status.cluster_id, cluster_id);
    assert_eq!(status.members.len(), 1);
    let revision = 21 + 1_000_000_000;
    assert_eq!(
        (status.revision, status.compact_revision),
        (revision, revision)
    );
    assert_eq!(value(&replica, "k19").unwrap(), "v");
    let committed = replica.propose(put("more", "v", 0)).await.unwrap();
    assert_eq!(committed.revision, revision + 1);
    replica.shutdown().await;
    let replica = Replica::<R>::start(folder(dir.path())).await.unwrap();
    assert_eq!(value(&replica, "more").unwrap(), "v");
    replica.shutdown().await;
}

#[tokio::test]
async fn a_replica_whose_disk_fails_stops_and_says_so_at_once() {
    for fault in [DiskFault::Failed, DiskFault::Full] {
        let data = MemoryData::on_disk(|| Duration::from_millis(1));
        let replica = Replica::<R>::start(config(Data::Memory(data.clone())))
            .await
            .unwrap();
        replica.propose(put("a", "1", 0)).await.unwrap();
        data.faults().set(Some(fault));
        replica.propose(put("a", "2", 0)).await.unwrap_err();
        replica.stopped().await;
        assert!(replica.status().failure.is_some());
        // Nothing to wait for: no answer takes the time of a request, or the processor.
        let told = async {
            assert_eq!(replica.linearize().await, Err(ReadError::Stopped));
            assert_eq!(
                replica.propose(put("a", "3", 0)).await,
                Err(ProposeError::Stopped)
            );
            assert_eq!(replica.keep_alive(1).await, Err(ReadError::Stopped));
        };
        tokio::time::timeout(Duration::from_secs(3), told)
            .await
            .unwrap();
        assert_eq!(value(&replica, "a").unwrap(), "1");
        replica.shutdown().await;
    }
}
