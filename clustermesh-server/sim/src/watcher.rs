//! Watchers: they follow a range through crashes from replica to replica, and note what they get.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clustermesh_core::{
    KeyRange,
    auth::{Access as AccessKind, Actor},
};
use clustermesh_oracle::{Seen, Watched};
use clustermesh_raft::{Replica, WatchEnd, WatchItem, WatchSpec};
use openraft::async_runtime::AsyncRuntime;

use crate::{
    access::Access,
    history::changes,
    member::Member,
    runtime::{SimRuntime, draw, elapsed, is_alive},
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

/// What a server looks after for a watch of one user.
struct Permit {
    access: Access,
    user: String,
    version: u64,
}

impl Permit {
    fn new(world: &World) -> Option<Self> {
        Some(Self {
            access: world.access.clone()?,
            user: Access::some_user(),
            // Another one than any replica's.
            version: u64::MAX,
        })
    }

    /// Whether the user may see the range still, by what this replica knows.
    fn holds(&mut self, replica: &Replica<SimRuntime>, watched: &Watched) -> bool {
        let version = replica.auth_version();
        if std::mem::replace(&mut self.version, version) == version {
            return true;
        }
        replica.read(|state| {
            // Were it wrong, the spy would say so.
            let _noted = self.access.note(state);
            let actor = Actor {
                user: &self.user,
                auth_revision: state.auth().revision(),
            };
            state
                .auth()
                .check_range(actor, &watched.first, &watched.end, AccessKind::Read)
                .is_ok()
        })
    }
}

/// Until it is told to stop and has everything, or history is gone, or now and then for no reason.
async fn follow(world: &World, stop: &AtomicBool, watched: &mut Watched) {
    let mut permit = Permit::new(world);
    let mut next = watched.from;
    let mut stopped_at = None;
    loop {
        let place = draw(|random| random.place(world.members.len()));
        let Some((life, replica)) = world.members.get(place).and_then(Member::alive) else {
            SimRuntime::sleep(WAIT / 10).await;
            continue;
        };
        if let Some(permit) = &mut permit {
            permit.version = u64::MAX;
            if !permit.holds(&replica, watched) {
                SimRuntime::sleep(WAIT).await;
                return;
            }
        }
        let mut watcher = replica.watch(WatchSpec {
            ranges: vec![KeyRange::new(&watched.first, &watched.end)],
            start_revision: next,
            ..WatchSpec::default()
        });
        while is_alive(life) {
            if draw(|random| random.chance(20)) || stop.load(Ordering::Relaxed) {
                watcher.request_progress();
            }
            let item = SimRuntime::timeout(WAIT, watcher.next()).await;
            if let Some(permit) = &mut permit
                && !permit.holds(&replica, watched)
            {
                return;
            }
            match item {
                Ok(Ok(WatchItem::Events(events))) => {
                    next = events.revision() + 1;
                    let changes = changes(events.events());
                    if let Some(permit) = &permit {
                        let keys: Vec<Bytes> =
                            changes.iter().map(|change| change.key.clone()).collect();
                        let (user, revision) = (&permit.user, events.revision());
                        if let Err(fault) = permit.access.check_seen(user, revision, &keys) {
                            world.history.fault(fault);
                        }
                    }
                    watched.seen.push(Seen::Events(events.revision(), changes));
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
                            "a watcher of {:?} from {} got nothing at replica {place} after {} up to {newest}",
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
        drop(watcher);
        // The end of a connection takes a while to notice.
        SimRuntime::sleep(LAST_LOOK).await;
    }
}
