//! Watchers: they follow a range through crashes from replica to replica, and note what they get.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clustermesh_core::KeyRange;
use clustermesh_oracle::{Seen, Watched};
use clustermesh_raft::{WatchEnd, WatchItem, WatchSpec};
use openraft::async_runtime::AsyncRuntime;

use crate::{
    history::changes,
    runtime::{SimRuntime, draw, elapsed},
    world::World,
};

/// Watchers at once.
pub const WATCHERS: usize = 5;
/// A watcher leaves its replica after a wait of this.
const WAIT: Duration = Duration::from_millis(200);
/// At the end, a watcher asks how far it is this often.
const LAST_LOOK: Duration = Duration::from_millis(10);
/// At the end, everything must have come within this.
const LAST_EVENTS: Duration = Duration::from_secs(20);

fn choose_range() -> (Bytes, Bytes) {
    let (first, end): (&[u8], &[u8]) = match draw(|random| random.below(5)) {
        0 => (b"k0", b"k0\0"),
        1 => (b"k1", b"k3"),
        2 => (b"lease/", b"lease0"),
        _ => (b"a", b"z"),
    };
    (Bytes::from_static(first), Bytes::from_static(end))
}

/// One watcher, from one range to the next, until it is told to stop.
pub async fn run(world: Arc<World>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let (first, end) = choose_range();
        let newest = world.history.newest();
        let back = i64::try_from(draw(|random| random.below(30))).unwrap_or(0);
        let from = (newest - back).max(world.compaction.load(Ordering::Relaxed)) + 1;
        let mut watched = Watched {
            first,
            end,
            from,
            seen: Vec::new(),
            compacted: None,
        };
        follow(&world, &stop, &mut watched).await;
        world.history.note_watched(watched);
    }
}

/// Until it is told to stop and has everything, or history is gone, or now and then for no reason.
async fn follow(world: &World, stop: &AtomicBool, watched: &mut Watched) {
    let mut next = watched.from;
    let mut stopped_at = None;
    loop {
        let place = draw(|random| random.place(world.members.len()));
        let replica = world.members.get(place).and_then(|member| member.replica());
        let Some(replica) = replica else {
            SimRuntime::sleep(WAIT).await;
            continue;
        };
        let mut watcher = replica.watch(WatchSpec {
            ranges: vec![KeyRange::new(&watched.first, &watched.end)],
            start_revision: next,
            ..WatchSpec::default()
        });
        drop(replica);
        loop {
            if draw(|random| random.chance(20)) || stop.load(Ordering::Relaxed) {
                watcher.request_progress();
            }
            match SimRuntime::timeout(WAIT, watcher.next()).await {
                Ok(Ok(WatchItem::Events(events))) => {
                    next = events.revision() + 1;
                    let seen = Seen::Events(events.revision(), changes(events.events()));
                    watched.seen.push(seen);
                }
                Ok(Ok(WatchItem::Progress { revision })) => {
                    // A watcher of the future may be told of what is before it.
                    next = next.max(revision + 1);
                    watched.seen.push(Seen::Progress(revision));
                }
                Ok(Ok(WatchItem::Cursor { .. })) => {}
                Ok(Err(WatchEnd::Compacted { compact_revision })) => {
                    watched.compacted = Some(compact_revision);
                    return;
                }
                Ok(Err(_)) => break,
                Err(_) => {
                    if draw(|random| random.chance(10)) {
                        break;
                    }
                }
            }
            if stop.load(Ordering::Relaxed) {
                let newest = world.history.newest();
                let since = *stopped_at.get_or_insert_with(elapsed);
                if next > newest || elapsed() > since + LAST_EVENTS {
                    if next <= newest {
                        world.history.fault(format!(
                            "a watcher of {:?} from {} got nothing after {} up to {newest}",
                            watched.first,
                            watched.from,
                            next - 1
                        ));
                    }
                    return;
                }
                // Answers about progress come at once: time must go on between them.
                SimRuntime::sleep(LAST_LOOK).await;
            } else if draw(|random| random.chance(1)) {
                return;
            }
        }
    }
}
