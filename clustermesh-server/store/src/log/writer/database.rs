//! Making and opening the sled database so that a power cut at any moment leaves one that opens.

use std::{
    fs,
    io::{self, ErrorKind},
    os::{fd::AsRawFd, unix::fs::symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{error::StoreError, folder};

/// sled's segment, bytes.
pub(super) const SEGMENT_BYTES: usize = 8 << 20;
/// sled's page cache, bytes: small, since recent entries are kept by us.
const SLED_CACHE_BYTES: u64 = 8 << 20;

/// How long an open waits for a database of this process to be let go.
const REOPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// sled tells nobody when it lets go, so it is asked this often.
const REOPEN_RETRY: Duration = Duration::from_millis(2);

/// sled's file of pages.
pub(super) const DATA: &str = "db";
/// A larger one is not copied into memory. A log of the usual length has half of it.
const MAX_REPLAY_IN_MEMORY_BYTES: u64 = 1 << 30;
/// A database that is being made has this extension.
const UNFINISHED: &str = "new";
/// A copy of the database to replay has this extension.
const REPLAYED: &str = "replay";
/// What sled's snapshots of its page table are called, before the place in its log that they stand for.
const SNAPSHOT: &str = "snap.";
/// A snapshot that is being brought over. sled must not take it for one.
const INCOMING_SNAPSHOT: &str = "incoming";
/// sled writes its snapshot under a name that ends so, and takes what a cut left of it for a snapshot.
const UNFINISHED_SNAPSHOT: &str = "generating";

pub(super) struct Opened {
    pub(super) db: sled::Db,
    pub(super) log: sled::Tree,
    pub(super) meta: sled::Tree,
}

/// Opens the database in folder `path`, or makes it.
pub(super) fn open(path: &Path) -> Result<Opened, StoreError> {
    if is_absent(path)? {
        make(path)?;
    }
    check_blobs(path)?;
    remove_unfinished_snapshots(path)?;
    replay(path)?;
    open_trees(path)
}

fn is_absent(path: &Path) -> Result<bool, StoreError> {
    match fs::read_dir(path) {
        Ok(mut found) => Ok(found.next().is_none()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(source) => Err(StoreError::Io {
            action: "list",
            path: path.to_owned(),
            source,
        }),
    }
}

/// sled syncs neither its configuration nor any name, so a database gets its name when all of it is durable.
fn make(path: &Path) -> Result<(), StoreError> {
    let unfinished = path.with_extension(UNFINISHED);
    remove_folder(&unfinished)?;
    folder::create(&unfinished)?;
    let opened = open_trees(&unfinished)?;
    opened.db.flush().map_err(|source| StoreError::Database {
        path: unfinished.clone(),
        source,
    })?;
    drop(opened);
    folder::sync_content(&unfinished)?;
    fs::rename(&unfinished, path).map_err(StoreError::io("rename", &unfinished))?;
    folder::sync(folder::parent(path))
}

/// Makes sled's snapshot of its page table durable before sled acts on it.
///
/// When sled opens a database it replays its log into a new snapshot, which it renames and never syncs the name of; then
/// it clears the segments that are free by this snapshot. After a cut the old snapshot may be back and the segments
/// gone; the next replay misses them and gives up a part of the log that was durable. So the replay is done on a copy,
/// and its snapshot is brought over first. The database itself then opens with nothing left to replay.
fn replay(path: &Path) -> Result<(), StoreError> {
    let copy = path.with_extension(REPLAYED);
    remove_folder(&copy)?;
    fs::create_dir(&copy).map_err(StoreError::io("create folder", &copy))?;
    let mut in_memory = None;
    for found in files(path)? {
        if let Some(name) = found.file_name() {
            let (is_data, name) = (name == DATA, copy.join(name));
            if is_data {
                in_memory = copy_to_memory(&found, &name);
            }
            if !is_data || in_memory.is_none() {
                fs::copy(&found, name).map_err(StoreError::io("copy", &found))?;
            }
        }
    }
    drop(open_trees(&copy)?);
    drop(in_memory);
    if let Some(newest) = snapshots(&copy)?.pop()
        && let Some(name) = newest.file_name()
        && !path.join(name).exists()
    {
        let incoming = path.join(INCOMING_SNAPSHOT);
        fs::copy(&newest, &incoming)
            .and_then(|_| fs::File::open(&incoming)?.sync_all())
            .map_err(StoreError::io("copy", &newest))?;
        fs::rename(&incoming, path.join(name)).map_err(StoreError::io("rename", &incoming))?;
        folder::sync(path)?;
    }
    let mut older = snapshots(path)?;
    older.pop();
    for older in older {
        fs::remove_file(&older).map_err(StoreError::io("remove", &older))?;
    }
    folder::sync(path)?;
    remove_folder(&copy)
}

/// A copy of a file that is never written to a disk: by far most of what a replay would cost there. Where this cannot be
/// (`None`: a file too large, a file system without symbolic links) the copy is a file.
fn copy_to_memory(file: &Path, name: &Path) -> Option<fs::File> {
    let mut source = fs::File::open(file).ok()?;
    if source.metadata().ok()?.len() > MAX_REPLAY_IN_MEMORY_BYTES {
        return None;
    }
    let memory = memfd_create("replay", MFdFlags::MFD_CLOEXEC).ok()?;
    let mut copy = fs::File::from(memory);
    io::copy(&mut source, &mut copy).ok()?;
    symlink(format!("/proc/self/fd/{}", copy.as_raw_fd()), name).ok()?;
    if name.exists() {
        return Some(copy);
    }
    // There is no /proc here.
    fs::remove_file(name).ok()?;
    None
}

fn files(path: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut files = Vec::new();
    for found in fs::read_dir(path).map_err(StoreError::io("list", path))? {
        let found = found.map_err(StoreError::io("list", path))?.path();
        if found.is_file() {
            files.push(found);
        }
    }
    Ok(files)
}

/// Oldest first.
fn snapshots(path: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut found = files(path)?;
    found.retain(|file| {
        file.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(SNAPSHOT))
    });
    found.sort_unstable();
    Ok(found)
}

fn remove_folder(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::Io {
            action: "remove folder",
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

fn open_trees(path: &Path) -> Result<Opened, StoreError> {
    let failed = |source| StoreError::Database {
        path: path.to_owned(),
        source,
    };
    let db = open_database(path).map_err(failed)?;
    let log = db.open_tree("log").map_err(failed)?;
    let meta = db.open_tree("meta").map_err(failed)?;
    Ok(Opened { db, log, meta })
}

/// Waits a little for a database of this process that was just closed, since sled's threads let go of it late.
fn open_database(path: &Path) -> Result<sled::Db, sled::Error> {
    let config = sled::Config::new()
        .path(path)
        .segment_size(SEGMENT_BYTES)
        .cache_capacity(SLED_CACHE_BYTES)
        .flush_every_ms(None);
    let started = Instant::now();
    loop {
        match config.open() {
            // Other processes are kept out by the data folder's lock already.
            Err(sled::Error::Io(error))
                if error.to_string().contains("could not acquire lock")
                    && started.elapsed() < REOPEN_TIMEOUT =>
            {
                std::thread::park_timeout(REOPEN_RETRY);
            }
            opened => return opened,
        }
    }
}

fn check_blobs(path: &Path) -> Result<(), StoreError> {
    let blobs = path.join("blobs");
    match fs::read_dir(&blobs) {
        Ok(mut found) => match found.next() {
            Some(_) => Err(StoreError::Spilled {
                path: path.to_owned(),
            }),
            None => Ok(()),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(source) => Err(StoreError::Io {
            action: "list",
            path: blobs,
            source,
        }),
    }
}

fn remove_unfinished_snapshots(path: &Path) -> Result<(), StoreError> {
    for found in files(path)? {
        if found
            .extension()
            .is_some_and(|extension| extension == UNFINISHED_SNAPSHOT)
        {
            fs::remove_file(&found).map_err(StoreError::io("remove", &found))?;
        }
    }
    Ok(())
}
