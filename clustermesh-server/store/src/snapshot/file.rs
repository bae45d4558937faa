//! Snapshot files: written under a temporary name, synced, renamed; old ones removed.

use std::{
    fs,
    io::{self, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;

use super::{
    Content, KEPT_SNAPSHOTS, MAX_CHUNK_BYTES, Place, SnapshotFile, SnapshotStore,
    frame::{FORMAT, FrameReader, FrameWriter},
};
use crate::{error::StoreError, folder as durable, types::SnapshotMeta};

const EXTENSION: &str = "snapshot";
const TEMPORARY: &str = "tmp";
/// Kept for a person to look at, until there are enough valid snapshots.
const DAMAGED: &str = "damaged";

/// Synced piece by piece: the log's next sync would otherwise wait for all of a large snapshot.
const MAX_UNSYNCED_BYTES: usize = 4 << 20;

/// A snapshot being written.
pub struct SnapshotWriter {
    store: SnapshotStore,
    meta: SnapshotMeta,
    frames: FrameWriter<Sink>,
}

enum Sink {
    File {
        path: PathBuf,
        file: BufWriter<fs::File>,
        unsynced_bytes: usize,
        finished: bool,
    },
    Memory(Vec<u8>),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File {
                file,
                unsynced_bytes,
                ..
            } => {
                let written = file.write(bytes)?;
                *unsynced_bytes += written;
                if *unsynced_bytes >= MAX_UNSYNCED_BYTES {
                    file.flush()?;
                    file.get_ref().sync_data()?;
                    *unsynced_bytes = 0;
                }
                Ok(written)
            }
            Self::Memory(buffer) => buffer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.flush(),
            Self::Memory(_) => Ok(()),
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Self::File {
            path,
            finished: false,
            ..
        } = self
            && let Err(error) = fs::remove_file(&*path)
        {
            tracing::warn!(path = %path.display(), %error, "unfinished snapshot not removed");
        }
    }
}

impl SnapshotWriter {
    pub(super) fn new(store: SnapshotStore, meta: SnapshotMeta) -> Result<Self, StoreError> {
        let (sink, path) = match &*store.0 {
            Place::Folder(folder) => {
                let path = folder.join(file_name(&meta)).with_extension(TEMPORARY);
                let file = fs::File::create(&path).map_err(StoreError::io("create", &path))?;
                (
                    Sink::File {
                        path: path.clone(),
                        file: BufWriter::new(file),
                        unsynced_bytes: 0,
                        finished: false,
                    },
                    path,
                )
            }
            Place::Memory { .. } => (Sink::Memory(Vec::new()), "(memory)".into()),
        };
        let frames = FrameWriter::new(sink, &meta).map_err(StoreError::io("write", path))?;
        Ok(Self {
            store,
            meta,
            frames,
        })
    }

    /// Adds a chunk, at most [`MAX_CHUNK_BYTES`].
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], or [`StoreError::Io`].
    pub fn chunk(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        if chunk.len() > MAX_CHUNK_BYTES {
            return Err(StoreError::TooLarge {
                what: "snapshot chunk",
                size: chunk.len(),
                limit: MAX_CHUNK_BYTES,
            });
        }
        self.frames
            .chunk(chunk)
            .map_err(StoreError::io("write snapshot", file_name(&self.meta)))
    }

    /// Makes the snapshot durable and visible, and removes those that are too old.
    ///
    /// # Errors
    /// [`StoreError::Io`]; then the snapshot does not exist.
    pub fn finish(self) -> Result<SnapshotFile, StoreError> {
        let Self {
            store,
            meta,
            frames,
        } = self;
        let mut sink = frames
            .finish()
            .map_err(StoreError::io("write snapshot", file_name(&meta)))?;
        let content = match &mut sink {
            Sink::File {
                path,
                file,
                finished,
                ..
            } => {
                file.get_ref()
                    .sync_data()
                    .map_err(StoreError::io("sync", &*path))?;
                let bytes = file
                    .get_ref()
                    .metadata()
                    .map_err(StoreError::io("stat", &*path))?
                    .len();
                let named = path.with_extension(EXTENSION);
                fs::rename(&*path, &named).map_err(StoreError::io("rename", &*path))?;
                *finished = true;
                if let Place::Folder(folder) = &*store.0 {
                    durable::sync(folder)?;
                    remove_old(folder)?;
                }
                Content::File { path: named, bytes }
            }
            Sink::Memory(buffer) => {
                if let Place::Memory { faults, .. } = &*store.0 {
                    faults.check().map_err(StoreError::io("sync", "(memory)"))?;
                }
                Content::Memory(std::mem::take(buffer).into())
            }
        };
        let snapshot = SnapshotFile {
            meta,
            format: FORMAT,
            content,
        };
        store.add_to_memory(snapshot.clone());
        Ok(snapshot)
    }
}

/// Sorts as the snapshots do: by term and index, fixed width.
fn file_name(meta: &SnapshotMeta) -> String {
    let (term, index) = meta
        .last_log_id
        .map_or((0, 0), |id| (id.leader_id.term, id.index));
    format!("{term:016x}-{index:016x}.{EXTENSION}")
}

/// Files of one extension, greatest name first: the newest of complete snapshots.
fn names(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, StoreError> {
    let mut names = Vec::new();
    for found in fs::read_dir(folder).map_err(StoreError::io("list", folder))? {
        let path = found.map_err(StoreError::io("list", folder))?.path();
        if path.extension().is_some_and(|found| found == extension) {
            names.push(path);
        }
    }
    names.sort_unstable_by(|a, b| b.cmp(a));
    Ok(names)
}

fn remove(path: &Path) -> Result<(), StoreError> {
    fs::remove_file(path).map_err(StoreError::io("remove", path))
}

pub(super) fn prepare(folder: &Path) -> Result<(), StoreError> {
    durable::create(folder)?;
    for path in names(folder, TEMPORARY)? {
        remove(&path)?;
    }
    durable::sync(folder)
}

/// A damaged snapshot counts no more: neither as one to fall back to, nor for the purge of the log.
pub(super) fn set_aside(folder: &Path, path: &Path) -> Result<(), StoreError> {
    fs::rename(path, path.with_extension(DAMAGED)).map_err(StoreError::io("rename", path))?;
    durable::sync(folder)
}

pub(super) fn all(folder: &Path) -> Result<Vec<Result<SnapshotFile, StoreError>>, StoreError> {
    Ok(names(folder, EXTENSION)?.into_iter().map(open).collect())
}

pub(super) fn open(path: PathBuf) -> Result<SnapshotFile, StoreError> {
    let file = fs::File::open(&path).map_err(StoreError::io("open", &path))?;
    let bytes = file
        .metadata()
        .map_err(StoreError::io("stat", &path))?
        .len();
    let mut frames = FrameReader::new(BufReader::new(file), path.clone());
    let meta = frames.header()?;
    Ok(SnapshotFile {
        meta,
        format: frames.format,
        content: Content::File { path, bytes },
    })
}

fn remove_old(folder: &Path) -> Result<(), StoreError> {
    let complete = names(folder, EXTENSION)?;
    if complete.len() >= KEPT_SNAPSHOTS {
        for path in names(folder, DAMAGED)? {
            remove(&path)?;
        }
    }
    for path in complete.iter().skip(KEPT_SNAPSHOTS) {
        remove(path)?;
    }
    Ok(())
}
