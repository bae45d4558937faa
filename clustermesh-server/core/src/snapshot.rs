//! Snapshots at a fixed revision, taken piece by piece while applies go on.

mod loader;

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    vec,
};

use bytes::Bytes;
use prost::Message;
use thiserror::Error;

pub use loader::SnapshotLoader;

use crate::{
    limits::{MAX_SNAPSHOT_CHUNK_KEYS, SNAPSHOT_FORMAT},
    pb,
    state::State,
    version::Version,
};

/// What a lease, a key or a version adds to a chunk beside its bytes: tags, lengths and numbers at their longest.
const ITEM_OVERHEAD_BYTES: usize = 64;

/// Why a snapshot could not be taken or loaded.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SnapshotError {
    /// The state that the snapshot was taken of was replaced meanwhile.
    #[error("the state was replaced while its snapshot was taken: take a new one")]
    StateReplaced,
    /// A chunk is no protobuf.
    #[error("snapshot chunk {sequence} cannot be decoded: {reason}")]
    Undecodable {
        /// Number of the chunk.
        sequence: u64,
        /// The decoder's words.
        reason: String,
    },
    /// The chunk was written by a newer build.
    #[error("snapshot has format {found}, this build knows up to {known}: upgrade this replica")]
    UnknownFormat {
        /// Format of the chunk.
        found: u32,
        /// Newest format known here.
        known: u32,
    },
    /// Chunks are missing, doubled or contradict each other.
    #[error("snapshot is damaged at chunk {sequence}: {reason}")]
    Damaged {
        /// Number of the chunk.
        sequence: u64,
        /// What is wrong.
        reason: String,
    },
}

/// Keeps for a running snapshot what compaction takes out of the index.
#[derive(Debug)]
pub(crate) struct Pin {
    revision: i64,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Keys below are in the snapshot already.
    position: Bytes,
    versions: BTreeMap<Bytes, Vec<Arc<Version>>>,
}

impl Pin {
    /// Takes a version that leaves the index, if the snapshot still needs it.
    pub(crate) fn keep(&self, version: &Arc<Version>) {
        if version.mod_revision() > self.revision {
            return;
        }
        let mut kept = self.lock();
        if version.key() >= &kept.position {
            kept.versions
                .entry(version.key().clone())
                .or_default()
                .push(Arc::clone(version));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // A panic elsewhere leaves the map whole: each change is one call.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
enum Phase {
    Header,
    Leases,
    Keys,
    Trailer,
    Done,
}

/// A snapshot being taken: everything that apply reads, as it was when [`State::snapshot`] was called.
///
/// Dropping it ends the snapshot and frees what it kept.
#[derive(Debug)]
pub struct SnapshotCursor {
    pin: Arc<Pin>,
    header: pb::SnapshotHeader,
    leases: vec::IntoIter<pb::SnapshotLease>,
    phase: Phase,
    sequence: u64,
    /// Next key to look at.
    next_key: Bytes,
    /// Last (mod revision, sub) of `next_key` that was sent.
    sent: Option<(i64, u32)>,
    counts: pb::SnapshotTrailer,
}

impl State {
    /// Starts a snapshot at the current revision. Short: copies leases' ids and cursors, no keys.
    pub fn snapshot(&mut self) -> SnapshotCursor {
        let pin = Arc::new(Pin {
            revision: self.revision,
            kept: Mutex::default(),
        });
        self.live_pins();
        self.pins.push(Arc::downgrade(&pin));
        let leases: Vec<_> = self
            .leases
            .iter()
            .map(|(id, granted_ttl_seconds)| pb::SnapshotLease {
                id,
                granted_ttl_seconds,
            })
            .collect();
        SnapshotCursor {
            pin,
            header: pb::SnapshotHeader {
                cluster_id: self.cluster_id,
                revision: self.revision,
                compact_revision: (self.compact_revision >= 0).then_some(self.compact_revision),
                floor_revision: (self.compact_revision >= 0).then(|| self.floor_revision()),
                cursors: self
                    .cursors
                    .values()
                    .map(|cursor| pb::SnapshotCursor {
                        cluster: cursor.cluster.clone(),
                        store_id: cursor.store_id,
                        revision: cursor.revision,
                        synced: cursor.synced,
                    })
                    .collect(),
                ..pb::SnapshotHeader::default()
            },
            counts: pb::SnapshotTrailer {
                leases: leases.len() as u64,
                ..pb::SnapshotTrailer::default()
            },
            leases: leases.into_iter(),
            phase: Phase::Header,
            sequence: 0,
            next_key: Bytes::new(),
            sent: None,
        }
    }
}

impl SnapshotCursor {
    /// Revision at which the snapshot is taken.
    #[must_use]
    pub const fn revision(&self) -> i64 {
        self.header.revision
    }

    /// Next chunk of about `max_bytes` (one version larger than that makes a larger chunk); `None` after the last. The caller holds a read lock
    /// on the state for this call only.
    ///
    /// # Errors
    /// [`SnapshotError::StateReplaced`] when `state` is not the one that the snapshot was started on.
    pub fn next_chunk(
        &mut self,
        state: &State,
        max_bytes: usize,
    ) -> Result<Option<Bytes>, SnapshotError> {
        let pinned = state
            .pins
            .iter()
            .any(|pin| std::ptr::eq(pin.as_ptr(), Arc::as_ptr(&self.pin)));
        if !pinned {
            return Err(SnapshotError::StateReplaced);
        }
        let mut chunk = pb::SnapshotChunk {
            format: SNAPSHOT_FORMAT,
            sequence: self.sequence,
            ..pb::SnapshotChunk::default()
        };
        match self.phase {
            Phase::Header => {
                chunk.header = Some(self.header.clone());
                self.phase = Phase::Leases;
            }
            Phase::Leases => {
                let count = (max_bytes / ITEM_OVERHEAD_BYTES).max(1);
                chunk.leases = self.leases.by_ref().take(count).collect();
                if self.leases.len() == 0 {
                    self.phase = Phase::Keys;
                }
            }
            Phase::Keys => {
                if self.fill_keys(state, max_bytes, &mut chunk) {
                    self.phase = Phase::Trailer;
                }
            }
            Phase::Trailer => {
                chunk.trailer = Some(self.counts);
                self.phase = Phase::Done;
            }
            Phase::Done => return Ok(None),
        }
        self.sequence += 1;
        Ok(Some(Bytes::from(chunk.encode_to_vec())))
    }

    /// Adds keys from the index and the pin, merged; true when all are in.
    fn fill_keys(
        &mut self,
        state: &State,
        max_bytes: usize,
        chunk: &mut pb::SnapshotChunk,
    ) -> bool {
        let pin = Arc::clone(&self.pin);
        let mut kept = pin.lock();
        let from = (Bound::Included(self.next_key.clone()), Bound::Unbounded);
        let mut indexed = state.keyspace.index().range(from.clone()).peekable();
        let mut pinned = kept.versions.range(from).peekable();
        let mut bytes = 0;
        let mut looked_at = 0;
        let complete = loop {
            let key = match (indexed.peek(), pinned.peek()) {
                (None, None) => break true,
                (Some((key, _)), None) | (None, Some((key, _))) => *key,
                (Some((indexed_key, _)), Some((pinned_key, _))) => *indexed_key.min(pinned_key),
            };
            if key != &self.next_key {
                self.next_key = key.clone();
                self.sent = None;
            }
            if bytes >= max_bytes || looked_at >= MAX_SNAPSHOT_CHUNK_KEYS {
                break false;
            }
            looked_at += 1;
            let old = pinned.next_if(|(other, _)| *other == key);
            let new = indexed.next_if(|(other, _)| *other == key);
            // Compaction takes from the front: what the pin kept is older than what the index still has.
            let versions = old
                .into_iter()
                .flat_map(|(_, versions)| versions)
                .chain(new.into_iter().flat_map(|(_, versions)| versions));
            let mut entry = pb::SnapshotKey {
                key: key.clone(),
                versions: Vec::new(),
            };
            let first_part = self.sent.is_none();
            let mut whole = true;
            for version in versions {
                let place = (version.mod_revision(), version.sub());
                if place.0 > self.header.revision || self.sent.is_some_and(|sent| place <= sent) {
                    continue;
                }
                if bytes >= max_bytes {
                    whole = false;
                    break;
                }
                let value = version.value();
                bytes += value.len() + ITEM_OVERHEAD_BYTES;
                entry.versions.push(pb::SnapshotVersion {
                    mod_revision: place.0,
                    sub: place.1,
                    create_revision: version.create_revision(),
                    version: version.version(),
                    lease: version.lease(),
                    value,
                });
                self.sent = Some(place);
            }
            if !entry.versions.is_empty() {
                bytes += key.len() + ITEM_OVERHEAD_BYTES;
                self.counts.keys += u64::from(first_part);
                self.counts.versions += entry.versions.len() as u64;
                chunk.keys.push(entry);
            }
            if !whole {
                break false;
            }
        };
        drop(indexed);
        drop(pinned);
        kept.position = self.next_key.clone();
        kept.versions = kept.versions.split_off(&self.next_key);
        complete
    }
}

#[cfg(test)]
mod tests;
