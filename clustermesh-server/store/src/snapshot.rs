//! Snapshots: streamed in checksummed chunks, to files or to memory; the newest and the one before are kept.

mod file;
mod frame;

use std::{
    collections::VecDeque,
    fs,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;

use self::frame::{Frame, FrameReader};
use crate::{error::StoreError, faults::DiskFaults, types::SnapshotMeta};

pub use self::file::SnapshotWriter;

/// One chunk of a snapshot, bytes.
pub const MAX_CHUNK_BYTES: usize = 4 << 20;
/// Snapshots kept: the newest, and one to fall back to.
const KEPT_SNAPSHOTS: usize = 2;

/// Where snapshots are kept. Clones share it.
#[derive(Debug, Clone)]
pub struct SnapshotStore(Arc<Place>);

#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    Memory {
        kept: Mutex<VecDeque<SnapshotFile>>,
        faults: DiskFaults,
    },
}

/// A complete snapshot.
#[derive(Debug, Clone)]
pub struct SnapshotFile {
    meta: SnapshotMeta,
    format: u32,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    File { path: PathBuf, bytes: u64 },
    Memory(Bytes),
}

impl SnapshotStore {
    /// Snapshots as files in folder `path`; leftovers of an interrupted write are removed.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the folder cannot be used.
    pub fn folder(path: &Path) -> Result<Self, StoreError> {
        file::prepare(path)?;
        Ok(Self(Arc::new(Place::Folder(path.to_owned()))))
    }

    /// Snapshots that live as long as one of the clones.
    pub fn memory() -> Self {
        Self::on_disk(DiskFaults::default())
    }

    /// The same on a simulated disk: what is written while it fails does not exist.
    pub fn on_disk(faults: DiskFaults) -> Self {
        let kept = Mutex::default();
        Self(Arc::new(Place::Memory { kept, faults }))
    }

    /// Whether snapshots are kept in memory, where nothing blocks.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        matches!(&*self.0, Place::Memory { .. })
    }

    /// Starts writing a snapshot; it exists once [`SnapshotWriter::finish`] returns.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the file cannot be created.
    pub fn create(&self, meta: SnapshotMeta) -> Result<SnapshotWriter, StoreError> {
        SnapshotWriter::new(self.clone(), meta)
    }

    /// The complete snapshots, newest first, their content not yet checked.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the folder cannot be read.
    fn all(&self) -> Result<Vec<Result<SnapshotFile, StoreError>>, StoreError> {
        match &*self.0 {
            Place::Folder(path) => file::all(path),
            Place::Memory { kept, .. } => Ok(kept.lock().iter().rev().cloned().map(Ok).collect()),
        }
    }

    /// The newest snapshot whose every byte checks out. A damaged one is set aside, with an error in the process's log.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the folder cannot be used; [`StoreError::Damaged`] when there are snapshots and none is
    /// valid; [`StoreError::NewerFormat`] when a newer release wrote the newest.
    pub fn newest(&self) -> Result<Option<SnapshotFile>, StoreError> {
        let newest = self.newest_with(SnapshotFile::check)?;
        Ok(newest.map(|(snapshot, ())| snapshot))
    }

    /// The same with what `read` makes of it, which reads it to its end: so it is read once only.
    ///
    /// # Errors
    /// As [`SnapshotStore::newest`], and those of `read` that do not tell of damage.
    pub fn newest_with<T>(
        &self,
        read: impl Fn(&SnapshotFile) -> Result<T, StoreError>,
    ) -> Result<Option<(SnapshotFile, T)>, StoreError> {
        let mut damage = None;
        for found in self.all()? {
            match found.and_then(|snapshot| read(&snapshot).map(|content| (snapshot, content))) {
                Ok(newest) => return Ok(Some(newest)),
                Err(error) => {
                    let StoreError::Damaged { path, .. } = &error else {
                        return Err(error);
                    };
                    tracing::error!(%error, "snapshot set aside");
                    if let Place::Folder(folder) = &*self.0 {
                        file::set_aside(folder, path)?;
                    }
                    damage.get_or_insert(error);
                }
            }
        }
        damage.map_or(Ok(None), Err)
    }

    /// The snapshot before the newest, by name alone.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the folder cannot be read.
    pub fn previous(&self) -> Result<Option<SnapshotFile>, StoreError> {
        Ok(self.all()?.into_iter().filter_map(Result::ok).nth(1))
    }

    fn add_to_memory(&self, snapshot: SnapshotFile) {
        if let Place::Memory { kept, .. } = &*self.0 {
            let mut kept = kept.lock();
            kept.retain(|other| other.meta.last_log_id != snapshot.meta.last_log_id);
            // As names of files sort: one that was received for long may be older than what there is by now.
            let place =
                kept.partition_point(|other| other.meta.last_log_id < snapshot.meta.last_log_id);
            kept.insert(place, snapshot);
            while kept.len() > KEPT_SNAPSHOTS {
                kept.pop_front();
            }
        }
    }
}

impl SnapshotFile {
    /// A snapshot in the file at `path`; what follows its last frame is not looked at.
    ///
    /// # Errors
    /// [`StoreError::Io`]; [`StoreError::Damaged`] or [`StoreError::NewerFormat`] by its first frame, the others are checked when they
    /// are read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        file::open(path.to_owned())
    }

    /// A snapshot whose bytes are in memory.
    ///
    /// # Errors
    /// As [`SnapshotFile::open`].
    pub fn from_bytes(bytes: Bytes) -> Result<Self, StoreError> {
        let mut frames = FrameReader::new(io::Cursor::new(bytes.clone()), "(memory)".into());
        let meta = frames.header()?;
        Ok(Self {
            meta,
            format: frames.format,
            content: Content::Memory(bytes),
        })
    }

    /// What it covers.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// Format that it was written in.
    #[must_use]
    pub fn format(&self) -> u32 {
        self.format
    }

    /// Whether it is kept in memory, where nothing blocks.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        matches!(self.content, Content::Memory(_))
    }

    /// Size, bytes.
    pub fn size_bytes(&self) -> u64 {
        match &self.content {
            Content::File { bytes, .. } => *bytes,
            Content::Memory(bytes) => bytes.len() as u64,
        }
    }

    fn name(&self) -> PathBuf {
        match &self.content {
            Content::File { path, .. } => path.clone(),
            Content::Memory(_) => "(memory)".into(),
        }
    }

    /// Its bytes as they are stored. An open one stays readable when a newer snapshot replaces it.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it cannot be opened.
    pub fn bytes(&self) -> Result<Box<dyn Read + Send>, StoreError> {
        Ok(match &self.content {
            Content::File { path, .. } => {
                Box::new(fs::File::open(path).map_err(StoreError::io("open", path))?)
            }
            Content::Memory(bytes) => Box::new(io::Cursor::new(bytes.clone())),
        })
    }

    /// Reads its chunks in order.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it cannot be opened.
    pub fn read(&self) -> Result<SnapshotReader, StoreError> {
        Ok(SnapshotReader {
            frames: FrameReader::new(Box::new(BufReader::new(self.bytes()?)), self.name()),
            started: false,
            done: false,
        })
    }

    /// Reads it through once.
    fn check(&self) -> Result<(), StoreError> {
        self.read()?.try_for_each(|chunk| chunk.map(drop))
    }
}

/// Chunks of a snapshot, each checked; an incomplete file ends with an error, never silently.
pub struct SnapshotReader {
    frames: FrameReader<Box<dyn Read + Send>>,
    started: bool,
    done: bool,
}

impl SnapshotReader {
    fn step(&mut self) -> Result<Option<Bytes>, StoreError> {
        if !self.started {
            self.frames.header()?;
            self.started = true;
        }
        match self.frames.next()? {
            Frame::Chunk(chunk) => Ok(Some(chunk)),
            Frame::End => Ok(None),
        }
    }
}

impl Iterator for SnapshotReader {
    type Item = Result<Bytes, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let step = self.step();
        self.done = !matches!(step, Ok(Some(_)));
        step.transpose()
    }
}

#[cfg(test)]
mod tests;
