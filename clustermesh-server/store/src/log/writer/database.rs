//! Making and opening the sled database so that a power cut at any moment leaves one that opens.

use std::{
    fs,
    io::ErrorKind,
    path::Path,
    time::{Duration, Instant},
};

use crate::{error::StoreError, folder};

/// sled's segment, bytes.
pub(super) const SEGMENT_BYTES: usize = 8 << 20;
/// sled's page cache, bytes: small, since recent entries are kept by us.
const SLED_CACHE_BYTES: u64 = 32 << 20;

/// How long an open waits for a database of this process to be let go.
const REOPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// sled tells nobody when it lets go, so it is asked this often.
const REOPEN_RETRY: Duration = Duration::from_millis(2);

/// A database that is being made has this extension.
const UNFINISHED: &str = "new";
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
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(StoreError::io("remove folder", &unfinished))?;
    }
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
    for found in fs::read_dir(path).map_err(StoreError::io("list", path))? {
        let found = found.map_err(StoreError::io("list", path))?.path();
        if found
            .extension()
            .is_some_and(|extension| extension == UNFINISHED_SNAPSHOT)
        {
            fs::remove_file(&found).map_err(StoreError::io("remove", &found))?;
        }
    }
    Ok(())
}
