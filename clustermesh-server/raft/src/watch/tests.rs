use std::sync::Arc;

use bytes::Bytes;
use clustermesh_core::{KeyRange, pb, pb::proposal::Command};

use super::*;
use crate::{
    Replica, WatchEnd,
    test_support::{R, everything, memory, next, next_revision, put},
};

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
async fn a_reader_that_asks_for_progress_again_and_again_is_told_of_the_end() {
    let replica = Replica::<R>::start(memory()).await.unwrap();
    let mut watcher = replica.watch(everything(0));
    watcher.request_progress();
    assert!(matches!(
        next(&mut watcher).await,
        WatchItem::Progress { revision: 1 }
    ));
    replica.shutdown().await;
    let mut told = Vec::new();
    let end = loop {
        watcher.request_progress();
        match watcher.next().await {
            Ok(item) => told.push(item),
            Err(end) => break end,
        }
        assert!(told.len() < 3, "{told:?} and no end");
    };
    assert_eq!(end, WatchEnd::Stopped);
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
            keys.extend(
                events
                    .events()
                    .map(|event| Bytes::copy_from_slice(event.key())),
            );
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
    // The first step brings the copy to revision 10.
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
            sequence: revision.unsigned_abs() - 9,
            ..pb::PeerCopy::default()
        };
        pb::Proposal::from(Command::PeerCopy(copy))
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
        sequence: 4,
    };
    replica
        .propose(Command::PeerForget(forget).into())
        .await
        .unwrap();
    assert_eq!(cursor(next(&mut watcher).await), None);
    replica.shutdown().await;
}
