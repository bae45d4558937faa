//! `KV.RangeStream`: a range in messages of bounded size, all at one revision.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::range_request::{SortOrder, SortTarget};
use clustermesh_api::etcd::rpc::{RangeRequest, RangeResponse, RangeStreamResponse};
use clustermesh_api::limits::MAX_VALUE_BYTES;
use clustermesh_core::{KvError, State, check};
use prost::Message;
use tokio::sync::mpsc;
use tonic::Status;

use crate::status::kv_status;
use crate::store::Store;

/// Keys of the first message; later ones follow from the size that keys turn out to have.
const FIRST_MESSAGE_KEYS: i64 = 10;
/// Size that messages aim at: etcd's request limit.
const MESSAGE_TARGET_BYTES: usize = MAX_VALUE_BYTES;
/// A message is cut there: keys to come may be larger than those that the number of keys was derived from.
const MAX_MESSAGE_BYTES: usize = 2 * MESSAGE_TARGET_BYTES;
/// What one stream holds in memory: a message being sent and the next one.
pub(super) const HELD_BYTES: usize = 2 * MAX_MESSAGE_BYTES;

type Pieces = mpsc::Sender<Result<RangeStreamResponse, Status>>;

/// What etcd streams: key order only, no filters by revision.
///
/// # Errors
/// etcd's.
pub(super) fn check(request: &RangeRequest) -> Result<(), Status> {
    check::check_range(request).map_err(|error| kv_status(&error))?;
    let default_order = request.sort_order() == SortOrder::None
        || (request.sort_target() == SortTarget::Key && request.sort_order() == SortOrder::Ascend);
    if !default_order {
        return Err(Status::unimplemented(
            "RangeStream does not support custom sort orders",
        ));
    }
    let filters = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    if filters.iter().any(|filter| *filter != 0) {
        return Err(Status::unimplemented(
            "RangeStream does not support revision filters",
        ));
    }
    Ok(())
}

/// Sends the pieces until all are sent, the client is gone, or one fails.
pub(super) async fn run(store: Store, request: RangeRequest, pieces: Pieces) {
    let mut cursor = Cursor::new(request);
    while !cursor.done {
        let piece = cursor.next(&store);
        let failed = piece.is_err();
        if pieces.send(piece).await.is_err() || failed {
            return;
        }
    }
}

struct Cursor {
    request: RangeRequest,
    /// Keys that the client still wants.
    left: i64,
    sent: i64,
    /// The store's revision when the stream began; every message is read there.
    revision: Option<i64>,
    done: bool,
}

impl Cursor {
    fn new(mut request: RangeRequest) -> Self {
        let left = if request.limit > 0 {
            request.limit
        } else {
            i64::MAX
        };
        request.limit = FIRST_MESSAGE_KEYS.min(left);
        Self {
            request,
            left,
            sent: 0,
            revision: None,
            done: false,
        }
    }

    fn next(&mut self, store: &Store) -> Result<RangeStreamResponse, Status> {
        store.check_not_diverged()?;
        let found = store
            .read(|state| self.read(state))
            .map_err(|error| kv_status(&error))?;
        // etcd sends it with the last message only.
        let header = self
            .revision
            .filter(|_| self.done)
            .map(|revision| store.header(revision));
        Ok(RangeStreamResponse {
            range_response: Some(RangeResponse { header, ..found }),
        })
    }

    /// One message: in one piece, so that its parts are of one state.
    fn read(&mut self, state: &State) -> Result<RangeResponse, KvError> {
        let mut found = state.range_page(&self.request)?;
        if self.revision.is_none() {
            self.revision = Some(state.revision());
            if self.request.revision <= 0 {
                self.request.revision = state.revision();
            }
        }
        if self.request.count_only {
            self.done = true;
            return Ok(found);
        }
        let bytes = cut(&mut found);
        let keys = i64::try_from(found.kvs.len()).unwrap_or(i64::MAX);
        self.left -= keys;
        self.sent += keys;
        if let Some(last) = found.kvs.last() {
            let mut next = last.key.to_vec();
            next.push(0);
            self.request.key = Bytes::from(next);
        }
        self.done = !found.more || self.left == 0;
        if self.done {
            found.count = self.sent;
            if found.more {
                let rest = RangeRequest {
                    count_only: true,
                    ..self.request.clone()
                };
                found.count += state.range_page(&rest)?.count;
            }
            return Ok(found);
        }
        self.request.limit = next_limit(self.request.limit, bytes).min(self.left);
        found.more = false;
        Ok(found)
    }
}

/// Takes back what makes the message too large, at least one key stays; its size, bytes.
fn cut(found: &mut RangeResponse) -> usize {
    let mut bytes = 0;
    let too_many = found.kvs.iter().enumerate().position(|(index, kv)| {
        bytes += kv.encoded_len();
        bytes > MAX_MESSAGE_BYTES && index > 0
    });
    if let Some(keep) = too_many {
        found.kvs.truncate(keep);
        found.more = true;
    }
    bytes
}

/// Doubles or halves the keys of a message when its size is off the target by more than a factor of two.
fn next_limit(limit: i64, bytes: usize) -> i64 {
    if bytes < MESSAGE_TARGET_BYTES / 2 {
        limit.saturating_mul(2)
    } else if bytes > MAX_MESSAGE_BYTES {
        (limit / 2).max(1)
    } else {
        limit
    }
}
