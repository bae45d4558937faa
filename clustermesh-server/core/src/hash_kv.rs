//! etcd's HashKV: CRC-32C over all changes up to a revision, in order, as etcd's backend stores them. Equal to etcd's own value for the same requests.

use std::{
    ops::Bound,
    sync::{Arc, Mutex},
};

use bytes::{BufMut, Bytes, BytesMut};
use clustermesh_api::etcd::mvcc::KeyValue;
use prost::Message;

use crate::{
    error::KvError, index::key_of, keyspace::visible_at, limits::MAX_HASHED_CHUNK_KEYS, pin::Pin,
    snapshot::SnapshotError, state::State, version::Version,
};

/// Name of the bucket that etcd keeps changes in; hashed first.
const BUCKET: &[u8] = b"key";

/// A finished hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvHash {
    /// CRC-32C (Castagnoli).
    pub hash: u32,
    /// Compact revision that it was taken at; -1 where there was none.
    pub compact_revision: i64,
    /// Last revision in it.
    pub revision: i64,
}

/// A change in etcd's order, and whether a reader at the hashed revision still sees it.
#[derive(Debug)]
struct Change {
    version: Version,
    kept: bool,
}

/// A hash being taken: of the state as it was when [`State::hash_kv`] was called.
///
/// Dropping it ends it and frees what it kept.
#[derive(Debug)]
pub struct HashCursor {
    pin: Arc<Pin>,
    compact_revision: i64,
    revision: i64,
    next_key: Bytes,
    changes: Vec<Change>,
    /// Some key is there at the hashed revision.
    any_kept: bool,
    /// Of a compaction: for etcd a key counts as there that was deleted at the very revision.
    compaction: bool,
    complete: bool,
}

impl State {
    /// Starts a hash up to `revision`, 0 for the newest. Short.
    ///
    /// # Errors
    /// [`KvError::Compacted`], [`KvError::FutureRevision`].
    pub fn hash_kv(&self, revision: i64) -> Result<HashCursor, KvError> {
        if revision > 0 && revision < self.compact_revision {
            return Err(KvError::Compacted);
        }
        if revision > self.revision {
            return Err(KvError::FutureRevision);
        }
        Ok(HashCursor {
            pin: self.pins.add(self.revision),
            compact_revision: self.compact_revision,
            revision: if revision == 0 {
                self.revision
            } else {
                revision
            },
            next_key: Bytes::new(),
            changes: Vec::new(),
            any_kept: false,
            compaction: false,
            complete: false,
        })
    }

    /// The hash that etcd keeps of a compaction at `revision`; to be started before it.
    pub(crate) fn hash_compaction(&self, revision: i64) -> Option<HashCursor> {
        let mut cursor = self.hash_kv(revision).ok().filter(|_| revision > 0)?;
        cursor.compaction = true;
        Some(cursor)
    }

    /// [`State::hash_beside_keys`] in four bytes. With the hash of the keys it tells replicas apart.
    #[must_use]
    pub fn hash_group(&self) -> u32 {
        let hash = self.hash_beside_keys();
        crc32c::crc32c(&hash.to_be_bytes())
    }
}

impl HashCursor {
    /// Revision that is hashed.
    #[must_use]
    pub const fn revision(&self) -> i64 {
        self.revision
    }

    /// Looks at the next keys; true when it has seen all. The caller holds a read lock on the state for this call only.
    ///
    /// # Errors
    /// [`SnapshotError::StateReplaced`] when `state` is not the one that the hash was started on.
    pub fn advance(&mut self, state: &State) -> Result<bool, SnapshotError> {
        if !state.pins.hold(&self.pin) {
            return Err(SnapshotError::StateReplaced);
        }
        if self.complete {
            return Ok(true);
        }
        let pin = Arc::clone(&self.pin);
        let mut kept = pin.lock();
        let from = (Bound::Included(self.next_key.clone()), Bound::Unbounded);
        let indexed = (Bound::Included(self.next_key.as_ref()), Bound::Unbounded);
        let mut indexed = state.keyspace.index().range(indexed).peekable();
        let mut pinned = kept.versions.range(from).peekable();
        let mut looked_at = 0;
        loop {
            let key = match (indexed.peek(), pinned.peek()) {
                (None, None) => {
                    self.complete = true;
                    break;
                }
                (Some(versions), None) => key_of(versions),
                (None, Some((key, _))) => *key,
                (Some(versions), Some((key, _))) => key_of(versions).min(key),
            };
            self.next_key = Bytes::copy_from_slice(key);
            if looked_at >= MAX_HASHED_CHUNK_KEYS {
                break;
            }
            let old = pinned.next_if(|(other, _)| *other == key);
            let new = indexed.next_if(|versions| key_of(versions) == key);
            // Compaction takes from the front: what the pin kept is older than what the index still has.
            let old = old.map_or(&[][..], |(_, versions)| versions.as_slice());
            let new = new.map_or(&[][..], |versions| versions.as_slice());
            looked_at += 1 + (old.len() + new.len()) / MAX_VERSIONS_PER_STEP;
            self.see(old, new);
        }
        let position = if self.complete {
            None
        } else {
            Some(self.next_key.clone())
        };
        drop(indexed);
        drop(pinned);
        kept.done_below(position);
        Ok(self.complete)
    }

    /// Takes what the hash needs of one key's versions.
    fn see(&mut self, old: &[Version], new: &[Version]) {
        let all: Vec<Version>;
        let versions = if old.is_empty() {
            new
        } else {
            all = old.iter().chain(new).cloned().collect();
            &all
        };
        // A key that is deleted and put again at the hashed revision itself counts as deleted: etcd looks at generations.
        let deleted_at_revision = versions
            .iter()
            .any(|version| version.mod_revision() == self.revision && version.is_tombstone());
        let seen = visible_at(versions, self.revision)
            .filter(|_| !deleted_at_revision)
            .map(Version::revision);
        self.any_kept |= seen.is_some() || (self.compaction && deleted_at_revision);
        let at_compact = visible_at(versions, self.compact_revision).map(Version::revision);
        for version in versions {
            let is_new = version.mod_revision() > self.compact_revision;
            if version.mod_revision() > self.revision {
                break;
            }
            if is_new || at_compact == Some(version.revision()) {
                self.changes.push(Change {
                    version: version.clone(),
                    kept: is_new || seen == Some(version.revision()),
                });
            }
        }
    }

    /// The hash, once [`HashCursor::advance`] said that it has seen all. Sorts and reads everything: not on a thread that others wait for.
    #[must_use]
    pub fn finish(mut self) -> KvHash {
        self.changes
            .sort_unstable_by_key(|change| change.version.revision());
        let mut hash = crc32c::crc32c(BUCKET);
        let mut tombstone = BytesMut::new();
        for change in &self.changes {
            // What etcd drops at compaction, unless no key at all is left: then it looks at none of it.
            if !change.kept && self.any_kept {
                continue;
            }
            let version = &change.version;
            hash = crc32c::crc32c_append(hash, &revision_key(version));
            if version.is_tombstone() {
                tombstone.clear();
                let stored = KeyValue {
                    key: Bytes::copy_from_slice(version.key()),
                    ..KeyValue::default()
                };
                // A buffer that grows takes everything.
                let _grows = stored.encode(&mut tombstone);
                hash = crc32c::crc32c_append(hash, &tombstone);
            } else {
                hash = crc32c::crc32c_append(hash, version.encoded_key_value());
            }
        }
        KvHash {
            hash,
            compact_revision: self.compact_revision,
            revision: self.revision,
        }
    }
}

/// Versions of one key that count like another key in the length of a step.
const MAX_VERSIONS_PER_STEP: usize = 16;

/// etcd's key of a change: both parts of the revision, and a mark on tombstones.
fn revision_key(version: &Version) -> Bytes {
    let mut key = BytesMut::with_capacity(18);
    key.put_i64(version.mod_revision());
    key.put_u8(b'_');
    key.put_i64(i64::from(version.sub()));
    if version.is_tombstone() {
        key.put_u8(b't');
    }
    key.freeze()
}

/// Hashes of the newest compactions as etcd keeps them: each taken at its compact revision just before it was compacted.
#[derive(Debug, Default)]
pub struct CompactionHashes {
    hashes: Mutex<Vec<KvHash>>,
}

/// Hashes of compactions that are kept (etcd's `hashStorageMaxSize`).
pub const MAX_COMPACTION_HASHES: usize = 10;

impl CompactionHashes {
    /// Keeps a hash; that of the lowest revision goes where there are too many.
    pub fn keep(&self, hash: KvHash) {
        let mut hashes = self.lock();
        hashes.push(hash);
        hashes.sort_by_key(|hash| hash.revision);
        let surplus = hashes.len().saturating_sub(MAX_COMPACTION_HASHES);
        hashes.drain(..surplus);
    }

    /// The hash of the compaction at `revision`, if it is kept.
    #[must_use]
    pub fn at(&self, revision: i64) -> Option<KvHash> {
        self.lock()
            .iter()
            .find(|hash| hash.revision == revision)
            .copied()
    }

    /// All that are kept, by revision.
    #[must_use]
    pub fn all(&self) -> Vec<KvHash> {
        self.lock().clone()
    }

    /// Forgets all: the state is another one.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<KvHash>> {
        self.hashes
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
