//! Layout of the log in sled: one record per group of entries under its first index, in parts; metadata apart.
//!
//! Two things of sled 0.34 must not happen to what no `fdatasync` has covered. It gives a segment that holds no live page
//! to later writes once its own flush (`sync_file_range`) has returned: a power cut may keep the overwritten segment and
//! lose the pages that were moved out of it. And it believes the length of stable log that a segment's header states,
//! which its own flush backs: a cut may keep a later segment and lose part of an earlier one, and sled then opens a
//! tree with a hole. Both need a segment's worth of writes without a sync, so there is one after a few changes.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use bytes::{Bytes, BytesMut};
use prost::Message;

use super::{
    super::tail::{TAIL_BYTES, Tail},
    database,
};
use crate::{
    codec::{self, CodecError, entry_size_bytes},
    error::StoreError,
    folder, pb,
    types::{Entry, LogId, Vote},
};

/// Entries of one record, bytes; a larger entry has a record of its own.
const MAX_RECORD_BYTES: usize = 256 << 10;
/// One sled value, bytes: a leaf page at its fullest, 17 of them, is a fifteenth of a segment.
const MAX_PART_BYTES: usize = 32 << 10;
/// Changes of sled's trees without a sync. Together they rewrite five pages at most (one merged from its changes, one
/// split in two, its parent, a merged neighbour), and sled moves one page out of a sparse segment for each: below six
/// of a segment's eight mebibytes.
const MAX_VOLATILE_CHANGES: u32 = 8;
const VOTE: &[u8] = b"vote";
const COMMITTED: &[u8] = b"committed";
const PURGED: &[u8] = b"purged";

/// The open database.
pub(in crate::log) struct Disk {
    path: PathBuf,
    db: sled::Db,
    log: sled::Tree,
    meta: sled::Tree,
    /// sled's file, opened by us to sync it.
    file: fs::File,
    /// Changes since the last sync.
    volatile_changes: AtomicU32,
    #[cfg(feature = "flush-only")]
    flush_only: bool,
}

/// What one record holds.
struct Record {
    entries: Vec<Entry>,
    /// What was known to be committed when it was written.
    committed: Option<LogId>,
}

/// First index of a record and number of a part, both big-endian.
type Key = [u8; 10];

fn key(first_index: u64, part: u16) -> Key {
    let mut key = [0; 10];
    key[..8].copy_from_slice(&first_index.to_be_bytes());
    key[8..].copy_from_slice(&part.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Option<(u64, u16)> {
    let (index, part) = key.split_first_chunk::<8>()?;
    Some((
        u64::from_be_bytes(*index),
        u16::from_be_bytes(part.try_into().ok()?),
    ))
}

impl Disk {
    /// Opens the database and reads the whole log once.
    pub(in crate::log) fn open(path: &Path) -> Result<(Self, Tail), StoreError> {
        let database::Opened { db, log, meta } = database::open(path)?;
        let file_path = path.join(database::DATA);
        let file = fs::File::open(&file_path).map_err(StoreError::io("open", &file_path))?;
        let disk = Self {
            path: path.to_owned(),
            db,
            log,
            meta,
            file,
            volatile_changes: AtomicU32::new(0),
            #[cfg(feature = "flush-only")]
            flush_only: false,
        };
        let tail = disk.recover()?;
        disk.sync()?;
        // sled leaves names unsynced when it replaces its own snapshot.
        folder::sync(path)?;
        Ok((disk, tail))
    }

    #[cfg(feature = "flush-only")]
    pub(in crate::log) fn open_flush_only(path: &Path) -> Result<(Self, Tail), StoreError> {
        let (mut disk, tail) = Self::open(path)?;
        disk.flush_only = true;
        Ok((disk, tail))
    }

    fn database(&self) -> impl Fn(sled::Error) -> StoreError + '_ {
        |source| StoreError::Database {
            path: self.path.clone(),
            source,
        }
    }

    fn damaged(&self, what: impl Into<String>) -> impl FnOnce(CodecError) -> StoreError + '_ {
        let what = what.into();
        move |reason| match reason {
            CodecError::NewerFormat(found) => StoreError::NewerFormat {
                what: "the log",
                found,
                known: codec::FORMAT,
            },
            reason => StoreError::Damaged {
                what,
                path: self.path.clone(),
                reason: reason.to_string(),
            },
        }
    }

    fn get_meta(&self, name: &'static [u8]) -> Result<Option<pb::meta::Value>, StoreError> {
        let Some(bytes) = self.meta.get(name).map_err(self.database())? else {
            return Ok(None);
        };
        let what = String::from_utf8_lossy(name).into_owned();
        codec::unseal(&bytes).map(Some).map_err(self.damaged(what))
    }

    fn put_meta(&self, name: &'static [u8], value: pb::meta::Value) -> Result<(), StoreError> {
        self.meta
            .insert(name, codec::seal(value))
            .map_err(self.database())?;
        self.changed()
    }

    /// Counts a change of a tree; every few there is a sync.
    fn changed(&self) -> Result<(), StoreError> {
        if self.volatile_changes.fetch_add(1, Ordering::Relaxed) + 1 < MAX_VOLATILE_CHANGES {
            return Ok(());
        }
        self.sync()
    }

    fn recover(&self) -> Result<Tail, StoreError> {
        let mut tail = Tail::default();
        if let Some(pb::meta::Value::Vote(vote)) = self.get_meta(VOTE)? {
            tail.vote = Some(codec::vote_from_pb(&vote));
        }
        if let Some(pb::meta::Value::Committed(id)) = self.get_meta(COMMITTED)? {
            tail.committed = Some(codec::log_id_from_pb(&id));
        }
        if let Some(pb::meta::Value::Purged(id)) = self.get_meta(PURGED)? {
            tail.purge(codec::log_id_from_pb(&id));
        }
        let first_index = tail.next_index();
        let mut next = 0;
        while let Some(first) = self.first_key_from(next)? {
            let Some(Record { entries, committed }) = self.record(first)? else {
                if first < first_index {
                    // A purge was interrupted within it. Had it held more than that, the next would not follow.
                    self.remove_record(first)?;
                    next = first + 1;
                    continue;
                }
                self.drop_torn(first)?;
                tail.torn = Some(first);
                break;
            };
            tail.committed = tail.committed.max(committed);
            let last = entries.last().map_or(first, |entry| entry.log_id.index);
            next = last + 1;
            if next <= first_index {
                // Left by a purge that was interrupted after its mark.
                self.remove_record(first)?;
                continue;
            }
            for entry in entries
                .into_iter()
                .filter(|entry| entry.log_id.index >= first_index)
            {
                if entry.log_id.index != tail.next_index() {
                    let reason = format!(
                        "entry {} follows {:?}",
                        entry.log_id,
                        tail.last.map(|id| id.index)
                    );
                    return Err(StoreError::Damaged {
                        what: "the log".into(),
                        path: self.path.clone(),
                        reason,
                    });
                }
                tail.push(entry);
            }
            tail.trim(u64::MAX, TAIL_BYTES);
        }
        Ok(tail)
    }

    /// A record whose parts are not all there was never acknowledged, if it is the last one.
    fn drop_torn(&self, first: u64) -> Result<(), StoreError> {
        if self.first_key_from(first + 1)?.is_some() {
            let what = format!("log record {first}");
            return Err(self.damaged(what)(CodecError::Missing("a part")));
        }
        tracing::info!(
            index = first,
            "dropped a log record that was being written when the process ended"
        );
        self.remove_record(first)
    }

    fn first_key_from(&self, index: u64) -> Result<Option<u64>, StoreError> {
        let Some(found) = self.log.range(key(index, 0)..).next() else {
            return Ok(None);
        };
        let (found, _) = found.map_err(self.database())?;
        let (first, _) = parse_key(&found)
            .ok_or_else(|| self.damaged("log key")(CodecError::Missing("an index")))?;
        Ok(Some(first))
    }

    /// The record at `first`; `None` when a part is missing.
    fn record(&self, first: u64) -> Result<Option<Record>, StoreError> {
        let what = || format!("log record {first}");
        let mut data = BytesMut::new();
        let mut parts = 1;
        let mut checksum = 0;
        let mut at = 0;
        while at < parts {
            let part = u16::try_from(at)
                .map_err(|_| self.damaged(what())(CodecError::Missing("a part number")))?;
            let Some(bytes) = self.log.get(key(first, part)).map_err(self.database())? else {
                return Ok(None);
            };
            let part = pb::LogPart::decode(&*bytes).map_err(|e| self.damaged(what())(e.into()))?;
            parts = part.parts;
            checksum = part.crc32c;
            data.extend_from_slice(&part.data);
            at += 1;
        }
        let data: Bytes = data.freeze();
        if crc32c::crc32c(&data) != checksum {
            return Err(self.damaged(what())(CodecError::Checksum));
        }
        codec::record_from_bytes(data)
            .map(|(entries, committed)| Some(Record { entries, committed }))
            .map_err(self.damaged(what()))
    }

    fn remove_record(&self, first: u64) -> Result<(), StoreError> {
        for found in self.log.range(key(first, 0)..=key(first, u16::MAX)).keys() {
            self.remove(&found.map_err(self.database())?)?;
        }
        Ok(())
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.log.remove(key).map_err(self.database())?;
        self.changed()
    }

    fn parts(
        &self,
        entries: &[Entry],
        committed: Option<LogId>,
    ) -> Result<Vec<(Key, Vec<u8>)>, StoreError> {
        let Some(first) = entries.first() else {
            return Ok(Vec::new());
        };
        let data = Bytes::from(codec::record_to_bytes(entries, committed));
        let crc32c = crc32c::crc32c(&data);
        let count = data.len().div_ceil(MAX_PART_BYTES);
        let too_large = |_| StoreError::TooLarge {
            what: "log record",
            size: data.len(),
            limit: MAX_PART_BYTES * usize::from(u16::MAX),
        };
        let parts = u32::from(u16::try_from(count).map_err(too_large)?);
        (0..count)
            .map(|at| {
                let range = at * MAX_PART_BYTES..data.len().min((at + 1) * MAX_PART_BYTES);
                let part = pb::LogPart {
                    parts,
                    crc32c,
                    data: data.slice(range),
                };
                let number = u16::try_from(at).map_err(too_large)?;
                Ok((key(first.log_id.index, number), part.encode_to_vec()))
            })
            .collect()
    }

    /// Writes consecutive entries as few records; not durable before `sync`. Each says what is known to be committed up to
    /// its own end: the next one may be lost.
    pub(super) fn append(
        &self,
        entries: &[Entry],
        committed: Option<LogId>,
    ) -> Result<(), StoreError> {
        let mut rest = entries;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest
                .iter()
                .take_while(|entry| {
                    bytes += entry_size_bytes(entry);
                    bytes <= MAX_RECORD_BYTES
                })
                .count();
            let (record, later) = rest.split_at(fits.max(1));
            let record_end = record.last().map(|entry| entry.log_id);
            for (key, value) in self.parts(record, committed.min(record_end))? {
                self.log.insert(key, value).map_err(self.database())?;
                self.changed()?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Removes entries after `keep`, splitting the record that holds it. A cut in between leaves a log that ends
    /// somewhere between its old end and the new one.
    pub(super) fn truncate_after(&self, keep: Option<u64>) -> Result<(), StoreError> {
        let from = keep.map_or(0, |keep| keep + 1);
        // From the end on, so that what is left has no hole.
        for found in self.log.range(key(from, 0)..).keys().rev() {
            self.remove(&found.map_err(self.database())?)?;
        }
        let Some(holding) = self.record_of(from)? else {
            return Ok(());
        };
        let Some(Record { entries, committed }) = self.record(holding)? else {
            return Ok(());
        };
        let kept = entries.partition_point(|entry| entry.log_id.index < from);
        let Some(kept) = entries.get(..kept).filter(|_| kept < entries.len()) else {
            return Ok(());
        };
        let mut batch = sled::Batch::default();
        for found in self
            .log
            .range(key(holding, 0)..=key(holding, u16::MAX))
            .keys()
        {
            batch.remove(found.map_err(self.database())?);
        }
        for (key, value) in self.parts(kept, committed)? {
            batch.insert(&key, value);
        }
        // Up to sixteen changes that must be there together, so with nothing else volatile.
        self.sync()?;
        self.log.apply_batch(batch).map_err(self.database())?;
        self.sync()
    }

    /// First index of the record that would hold `index`.
    fn record_of(&self, index: u64) -> Result<Option<u64>, StoreError> {
        let Some(found) = self.log.range(..=key(index, u16::MAX)).next_back() else {
            return Ok(None);
        };
        let (found, _) = found.map_err(self.database())?;
        Ok(parse_key(&found).map(|(first, _)| first))
    }

    /// Marks everything up to `upto` as gone, then removes the records that hold nothing else.
    pub(super) fn purge(&self, upto: LogId) -> Result<(), StoreError> {
        self.put_meta(PURGED, pb::meta::Value::Purged(codec::log_id_to_pb(&upto)))?;
        // The mark must be durable before what it stands for is gone.
        self.sync()?;
        let holding = self.record_of(upto.index)?;
        let covered = match holding {
            Some(first) => {
                let last = self
                    .record(first)?
                    .and_then(|record| record.entries.last().map(|entry| entry.log_id.index));
                if last <= Some(upto.index) {
                    upto.index + 1
                } else {
                    first
                }
            }
            None => upto.index + 1,
        };
        for found in self.log.range(..key(covered, 0)).keys() {
            self.remove(&found.map_err(self.database())?)?;
        }
        Ok(())
    }

    /// Entries of `range` in their order, about `max_bytes` at most but at least one.
    pub(in crate::log) fn read(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut record = self.record_of(range.start)?;
        while let Some(first) = record.filter(|first| *first < range.end) {
            let Some(Record { entries: found, .. }) = self.record(first)? else {
                break;
            };
            let next = found.last().map_or(first, |entry| entry.log_id.index) + 1;
            for entry in found
                .into_iter()
                .filter(|entry| range.contains(&entry.log_id.index))
            {
                if bytes > 0 && bytes >= max_bytes {
                    return Ok(entries);
                }
                bytes += entry_size_bytes(&entry);
                entries.push(entry);
            }
            record = self.first_key_from(next)?;
        }
        Ok(entries)
    }

    pub(super) fn put_vote(&self, vote: &Vote) -> Result<(), StoreError> {
        self.put_meta(VOTE, pb::meta::Value::Vote(codec::vote_to_pb(vote)))
    }

    pub(super) fn put_committed(&self, committed: LogId) -> Result<(), StoreError> {
        let committed = codec::log_id_to_pb(&committed);
        self.put_meta(COMMITTED, pb::meta::Value::Committed(committed))
    }

    /// Makes all that was written durable.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.volatile_changes.store(0, Ordering::Relaxed);
        self.db.flush().map_err(self.database())?;
        #[cfg(feature = "flush-only")]
        if self.flush_only {
            return Ok(());
        }
        self.file
            .sync_data()
            .map_err(StoreError::io("sync", self.path.join("db")))
    }

    /// Size of the database's files, bytes.
    pub(in crate::log) fn size_bytes(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }
}
