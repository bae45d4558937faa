//! What an agent may see, and the complete state at one revision in bounded pages. Pure over [`State`].

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::KeyValue;
use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_api::keys::{ALLOC_PREFIX, CILIUM_PREFIX, OWN_PREFIX};
use clustermesh_api::limits::STREAM_MESSAGE_TARGET_BYTES;
use clustermesh_api::v1::{AgentWatchRequest, Listing};
use clustermesh_core::{KeyRange, KvError, State};
use clustermesh_mesh::prefix_end;

/// Keys read under one lock while listing.
const LISTING_PAGE_KEYS: i64 = 1_000;

/// The key ranges that agents see: everything but the allocator's bookkeeping.
#[must_use]
pub fn visible_ranges() -> [KeyRange; 3] {
    let end = |prefix: &'static str| prefix_end(prefix.as_bytes());
    [
        KeyRange::Between(CILIUM_PREFIX.into(), end(CILIUM_PREFIX)),
        KeyRange::Between(OWN_PREFIX.into(), ALLOC_PREFIX.into()),
        KeyRange::Between(end(ALLOC_PREFIX), end(OWN_PREFIX)),
    ]
}

/// Whether the stream can go on where the agent stopped: same store, and nothing after that place compacted.
#[must_use]
pub fn can_resume(state: &State, request: &AgentWatchRequest) -> bool {
    request.store_id == state.cluster_id()
        && request.resume_after_revision > 0
        && request.resume_after_revision <= state.revision()
        && request.resume_after_revision + 1 >= state.compact_revision()
}

/// A listing under way.
#[derive(Debug)]
pub struct ListingPlace {
    revision: i64,
    /// First key that was not listed yet.
    next: Bytes,
    /// Ranges that are not complete; the first one is being listed.
    rest: Vec<KeyRange>,
}

impl ListingPlace {
    /// Lists what `state` holds now.
    #[must_use]
    pub fn new(state: &State) -> Self {
        let mut rest: Vec<KeyRange> = visible_ranges().into();
        rest.reverse();
        Self {
            revision: state.revision(),
            next: CILIUM_PREFIX.into(),
            rest,
        }
    }

    /// Revision of the whole listing.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The next part; `None` after the last one.
    ///
    /// # Errors
    /// The listing's revision was compacted meanwhile.
    pub fn next(&mut self, state: &State) -> Result<Option<Listing>, KvError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let mut kvs: Vec<KeyValue> = Vec::new();
        let mut bytes = 0;
        while let Some(KeyRange::Between(_, range_end)) = self.rest.last() {
            let page = state.range(&RangeRequest {
                key: self.next.clone(),
                range_end: range_end.clone(),
                limit: LISTING_PAGE_KEYS,
                revision: self.revision,
                ..RangeRequest::default()
            })?;
            let mut found = page.kvs.into_iter();
            for kv in found.by_ref() {
                bytes += kv.key.len() + kv.value.len();
                self.next = successor(&kv.key);
                kvs.push(kv);
                if bytes >= STREAM_MESSAGE_TARGET_BYTES {
                    break;
                }
            }
            if found.len() > 0 || page.more {
                break;
            }
            self.rest.pop();
            if let Some(range) = self.rest.last() {
                self.next = range.start().clone();
            }
        }
        Ok(Some(Listing {
            revision: self.revision,
            kvs,
            last: self.rest.is_empty(),
        }))
    }
}

/// The smallest key after `key`.
fn successor(key: &[u8]) -> Bytes {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next.into()
}

#[cfg(test)]
mod tests;
