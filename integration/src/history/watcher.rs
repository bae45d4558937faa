//! One watcher: it follows a range from replica to replica and notes what it gets.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::Event;
use clustermesh_api::etcd::mvcc::event::EventType;
use clustermesh_api::etcd::rpc::{WatchCreateRequest, WatchResponse};
use clustermesh_client::{Client, ClientError, WatchStream};
use clustermesh_oracle::{Change, Seen, Watched};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::client::key;
use super::{LoadConfig, Shared};

/// A watcher that hears nothing for so long may leave its replica.
const QUIET: Duration = Duration::from_millis(300);
/// Longest that opening a watch may take.
const OPEN: Duration = Duration::from_secs(4);
/// Pause before it tries another replica.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// At the end everything must have come within this.
const LAST_EVENTS: Duration = Duration::from_secs(30);
/// How far back a new watch may begin, revisions.
const BACK_REVISIONS: i64 = 40;

/// The range of the watcher with this number: everything, or some keys of the load.
fn range(number: usize) -> (Bytes, Bytes) {
    match number % 3 {
        0 => (Bytes::from_static(b"\0"), Bytes::from_static(b"\xff\xff")),
        1 => (key(1), key(4)),
        _ => (key(0), Bytes::from([&key(0)[..], b"\0"].concat())),
    }
}

/// One watcher: the first three follow their range to the end, others begin again now and then.
pub(super) async fn run(shared: Arc<Shared>, config: LoadConfig, number: usize, from: i64) {
    let seed = config.seed.wrapping_mul(1_000).wrapping_add(number as u64);
    let mut random = StdRng::seed_from_u64(seed);
    let mut from = from;
    loop {
        let (first, end) = range(number);
        let mut watched = Watched {
            first,
            end,
            from,
            seen: Vec::new(),
            compacted: None,
        };
        let ended = follow(&shared, &mut random, &mut watched, number >= 3).await;
        shared.records().watched.push(watched);
        if ended || shared.abandoned() {
            return;
        }
        let back = random.random_range(0..BACK_REVISIONS);
        from = (shared.newest.load(Ordering::SeqCst) - back).max(2);
    }
}

/// Follows the range; true when it has everything, or never will.
async fn follow(
    shared: &Shared,
    random: &mut StdRng,
    watched: &mut Watched,
    wanders: bool,
) -> bool {
    let mut next = watched.from;
    let mut last_call = None;
    while !shared.abandoned() {
        let replica = random.random_range(0..shared.endpoints.len());
        let opened = tokio::time::timeout(OPEN, open(shared, replica, watched, next)).await;
        let Ok(Ok(mut stream)) = opened else {
            tokio::time::sleep(RETRY_PAUSE).await;
            if is_too_late(shared, watched, next, &mut last_call) {
                return true;
            }
            continue;
        };
        loop {
            let last = shared.last.load(Ordering::SeqCst);
            if (last > 0 || random.random_range(0..5) == 0)
                && stream.request_progress().await.is_err()
            {
                break;
            }
            match tokio::time::timeout(QUIET, stream.next()).await {
                Ok(Ok(Some(response))) => {
                    if response.canceled {
                        if response.compact_revision > 0 {
                            watched.compacted = Some(response.compact_revision);
                            return false;
                        }
                        break;
                    }
                    note(watched, response, &mut next);
                }
                Ok(Ok(None) | Err(_)) => break,
                Err(_) if random.random_range(0..10) == 0 => break,
                Err(_) => {}
            }
            if (last > 0 && next > last) || is_too_late(shared, watched, next, &mut last_call) {
                return true;
            }
            if last == 0 && wanders && random.random_range(0..100) == 0 {
                return false;
            }
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    true
}

/// Whether the end has come long ago; that is a fault.
fn is_too_late(
    shared: &Shared,
    watched: &Watched,
    next: i64,
    last_call: &mut Option<Instant>,
) -> bool {
    let last = shared.last.load(Ordering::SeqCst);
    if last == 0 || next > last {
        return false;
    }
    if last_call.get_or_insert_with(Instant::now).elapsed() < LAST_EVENTS {
        return false;
    }
    shared.records().faults.push(format!(
        "a watcher of {:?} from {} got nothing after {} up to {last}",
        watched.first,
        watched.from,
        next - 1
    ));
    true
}

async fn open(
    shared: &Shared,
    replica: usize,
    watched: &Watched,
    next: i64,
) -> Result<WatchStream, ClientError> {
    let client = Client::new(&shared.endpoints[replica].config)?;
    client
        .watch([WatchCreateRequest {
            key: watched.first.clone(),
            range_end: watched.end.clone(),
            start_revision: next,
            ..WatchCreateRequest::default()
        }])
        .await
}

fn note(watched: &mut Watched, response: WatchResponse, next: &mut i64) {
    if response.events.is_empty() {
        // The answer to a creation says nothing of what has been delivered.
        if let (false, Some(header)) = (response.created, response.header) {
            watched.seen.push(Seen::Progress(header.revision));
            *next = (*next).max(header.revision + 1);
        }
        return;
    }
    for (revision, changes) in by_revision(response.events) {
        *next = (*next).max(revision + 1);
        watched.seen.push(Seen::Events(revision, changes));
    }
}

/// Events as the oracle wants them: those of one revision together, in the order of their arrival.
pub(super) fn by_revision(events: Vec<Event>) -> Vec<(i64, Vec<Change>)> {
    let mut groups: Vec<(i64, Vec<Change>)> = Vec::new();
    for event in events {
        let is_put = event.r#type() == EventType::Put;
        let Some(record) = event.kv else { continue };
        let change = Change {
            key: record.key,
            value: is_put.then_some(record.value),
            lease: record.lease,
        };
        match groups.last_mut() {
            Some((revision, changes)) if *revision == record.mod_revision => changes.push(change),
            _ => groups.push((record.mod_revision, vec![change])),
        }
    }
    groups
}
