//! Snapshots at a fixed revision, taken piece by piece while applies go on.

mod auth;
mod loader;

use std::{ops::Bound, sync::Arc, vec};

use bytes::Bytes;
use prost::Message;
use thiserror::Error;

pub use loader::SnapshotLoader;

use auth::AuthPart;

use crate::{
    group::Group,
    index::key_of,
    limits::{MAX_SNAPSHOT_CHUNK_KEYS, SNAPSHOT_FORMAT, SNAPSHOT_FORMAT_GROUP},
    pb,
    peer::CopyPlace,
    pin::Pin,
    state::{FIRST_REVISION, State},
    version::Revision,
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
    /// The group of the snapshot uses what this build does not know.
    #[error(
        "snapshot has feature level {found}, this build knows up to {known}: upgrade this replica"
    )]
    UnknownFeatureLevel {
        /// Level of the group.
        found: u32,
        /// Newest level known here.
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

#[derive(Debug)]
enum Phase {
    Header,
    Auth,
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
    format: u32,
    auth: AuthPart,
    leases: vec::IntoIter<pb::SnapshotLease>,
    phase: Phase,
    sequence: u64,
    /// Next key to look at.
    next_key: Bytes,
    /// Last version of `next_key` that was sent.
    sent: Option<Revision>,
    counts: pb::SnapshotTrailer,
}

impl State {
    /// Starts a snapshot at the current revision. Short: copies leases' ids, cursors, users and roles, no keys.
    pub fn snapshot(&self) -> SnapshotCursor {
        let pin = self.pins.add(self.revision);
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
                    .map(|CopyPlace { cursor, sequence }| pb::SnapshotCursor {
                        cluster: cursor.cluster.clone(),
                        store_id: cursor.store_id,
                        revision: cursor.revision,
                        synced: cursor.synced,
                        sequence: *sequence,
                    })
                    .collect(),
                feature_level: self.group.feature_level,
                auth: (!self.auth.is_untouched()).then(|| pb::SnapshotAuth {
                    enabled: self.auth.is_enabled(),
                    revision: self.auth.revision(),
                    seeded: self.auth.is_seeded(),
                }),
                alarms: self.alarms().collect(),
                removed_members: self.removed_members().collect(),
                downgrade_target: self.group.downgrade_target.clone(),
                history_revision: Some(self.first_history_revision())
                    .filter(|first| *first > self.compact_revision.max(FIRST_REVISION + 1)),
                forgotten_sequence: self.forgotten_sequence,
            },
            format: if self.group == Group::default() && self.auth.is_untouched() {
                SNAPSHOT_FORMAT
            } else {
                SNAPSHOT_FORMAT_GROUP
            },
            auth: AuthPart::new(&self.auth),
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
        if !state.pins.hold(&self.pin) {
            return Err(SnapshotError::StateReplaced);
        }
        let mut chunk = pb::SnapshotChunk {
            format: self.format,
            sequence: self.sequence,
            ..pb::SnapshotChunk::default()
        };
        match self.phase {
            Phase::Header => {
                chunk.header = Some(self.header.clone());
                self.phase = if self.auth.is_sent() {
                    Phase::Leases
                } else {
                    Phase::Auth
                };
            }
            Phase::Auth => {
                self.auth.fill(max_bytes, &mut chunk);
                self.counts.roles += chunk.roles.len() as u64;
                self.counts.users += chunk.users.len() as u64;
                self.counts.tokens += chunk.tokens.len() as u64;
                if self.auth.is_sent() {
                    self.phase = Phase::Leases;
                }
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
        let indexed = (Bound::Included(self.next_key.as_ref()), Bound::Unbounded);
        let mut indexed = state.keyspace.index().range(indexed).peekable();
        let mut pinned = kept.versions.range(from).peekable();
        let mut bytes = 0;
        let mut looked_at = 0;
        let complete = loop {
            let key = match (indexed.peek(), pinned.peek()) {
                (None, None) => break true,
                (Some(versions), None) => key_of(versions),
                (None, Some((key, _))) => *key,
                (Some(versions), Some((key, _))) => key_of(versions).min(key),
            };
            if key != self.next_key {
                self.next_key = Bytes::copy_from_slice(key);
                self.sent = None;
            }
            if bytes >= max_bytes || looked_at >= MAX_SNAPSHOT_CHUNK_KEYS {
                break false;
            }
            looked_at += 1;
            let old = pinned.next_if(|(other, _)| *other == key);
            let new = indexed.next_if(|versions| key_of(versions) == key);
            // Compaction takes from the front: what the pin kept is older than what the index still has.
            let versions = old
                .into_iter()
                .flat_map(|(_, versions)| versions)
                .chain(new.into_iter().flatten());
            let mut entry = pb::SnapshotKey {
                key: self.next_key.clone(),
                versions: Vec::new(),
            };
            let first_part = self.sent.is_none();
            let mut whole = true;
            for version in versions {
                let revision = version.revision();
                if revision.main > self.header.revision
                    || self.sent.is_some_and(|sent| revision <= sent)
                {
                    continue;
                }
                if bytes >= max_bytes {
                    whole = false;
                    break;
                }
                let value = version.value();
                bytes += value.len() + ITEM_OVERHEAD_BYTES;
                entry.versions.push(pb::SnapshotVersion {
                    mod_revision: revision.main,
                    sub: revision.sub,
                    create_revision: version.create_revision(),
                    version: version.version(),
                    lease: version.lease(),
                    value,
                });
                self.sent = Some(revision);
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
        kept.done_below((!complete).then(|| self.next_key.clone()));
        complete
    }
}

#[cfg(test)]
mod tests;
