//! A replica's folder: its lock, and whose it is.

use std::{
    fs,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{codec, error::StoreError, folder, pb, types::ReplicaId};

const LOCK: &str = "LOCK";
const IDENTITY: &str = "identity";
const LOG: &str = "log";
const SNAPSHOTS: &str = "snapshots";

/// Whose folder it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The replica's id.
    pub replica_id: ReplicaId,
    /// Name of its cluster; empty for a plain store.
    pub cluster_name: String,
    /// Id of its group, once it knows it; 0 before.
    pub cluster_id: u64,
}

/// A locked data folder; clones share the lock, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct DataDir {
    path: PathBuf,
    identity: Identity,
    _lock: Arc<fs::File>,
}

impl DataDir {
    /// Makes `path` the folder of a new replica; it may hold nothing but an unused lock.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`], [`StoreError::InUse`], or [`StoreError::Io`].
    pub fn create(path: &Path, identity: Identity) -> Result<Self, StoreError> {
        NewDataDir::prepare(path)?.finish(identity)
    }

    /// Opens the folder of whichever replica lives there, to read it: nothing in it is changed.
    ///
    /// # Errors
    /// [`StoreError::Empty`], [`StoreError::InUse`], [`StoreError::Damaged`], [`StoreError::NewerFormat`], or [`StoreError::Io`].
    pub fn open_to_read(path: &Path) -> Result<Self, StoreError> {
        let empty = || StoreError::Empty {
            path: path.to_owned(),
        };
        let lock_path = path.join(LOCK);
        let lock = match fs::File::open(&lock_path) {
            Ok(file) => take(file, path)?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(empty()),
            Err(error) => return Err(StoreError::io("open", lock_path)(error)),
        };
        Ok(Self {
            path: path.to_owned(),
            identity: read_identity(path)?.ok_or_else(empty)?,
            _lock: Arc::new(lock),
        })
    }

    /// Opens the folder of the replica that lives there.
    ///
    /// # Errors
    /// [`StoreError::Empty`] when none does, [`StoreError::WrongIdentity`] when it is of another cluster,
    /// [`StoreError::InUse`], [`StoreError::Damaged`], or [`StoreError::Io`].
    pub fn open(path: &Path, cluster_name: &str) -> Result<Self, StoreError> {
        if !path.is_dir() {
            return Err(StoreError::Empty {
                path: path.to_owned(),
            });
        }
        let lock = lock(path)?;
        let identity = read_identity(path)?.ok_or_else(|| StoreError::Empty {
            path: path.to_owned(),
        })?;
        if identity.cluster_name != cluster_name {
            let name = |name: &str| {
                if name.is_empty() {
                    "a plain store".to_owned()
                } else {
                    format!("cluster {name:?}")
                }
            };
            return Err(StoreError::WrongIdentity {
                path: path.to_owned(),
                found: name(&identity.cluster_name),
                wanted: name(cluster_name),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            identity,
            _lock: Arc::new(lock),
        })
    }

    /// Whether a replica lives in `path`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] or [`StoreError::Io`] when that cannot be told.
    pub fn is_used(path: &Path) -> Result<bool, StoreError> {
        Ok(read_identity(path)?.is_some())
    }

    /// Whose folder this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Replaces the identity, durably.
    ///
    /// # Errors
    /// [`StoreError::Io`]; then the old one stands.
    pub fn set_identity(&mut self, identity: Identity) -> Result<(), StoreError> {
        write_identity(&self.path, &identity)?;
        self.identity = identity;
        Ok(())
    }

    /// Where the log lives.
    pub fn log_path(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// Where snapshots live.
    pub fn snapshots_path(&self) -> PathBuf {
        self.path.join(SNAPSHOTS)
    }
}

/// A locked, empty folder that becomes a replica's once it has an identity: until then no server starts with what is put into it.
#[derive(Debug)]
pub struct NewDataDir {
    path: PathBuf,
    lock: fs::File,
}

impl NewDataDir {
    /// Makes folder `path`, or takes it when it holds nothing but an unused lock.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`], [`StoreError::InUse`], or [`StoreError::Io`].
    pub fn prepare(path: &Path) -> Result<Self, StoreError> {
        folder::create(path)?;
        let lock = lock(path)?;
        for found in fs::read_dir(path).map_err(StoreError::io("list", path))? {
            let name = found.map_err(StoreError::io("list", path))?.file_name();
            // An interrupted creation leaves a temporary identity, which says nothing yet.
            if name != LOCK && name != "lost+found" && name != temporary(IDENTITY).as_str() {
                return Err(StoreError::NotEmpty {
                    path: path.to_owned(),
                });
            }
        }
        Ok(Self {
            path: path.to_owned(),
            lock,
        })
    }

    /// Where the log will live.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// Where snapshots will live.
    #[must_use]
    pub fn snapshots_path(&self) -> PathBuf {
        self.path.join(SNAPSHOTS)
    }

    /// Gives it to a replica, durably.
    ///
    /// # Errors
    /// [`StoreError::Io`]; then it is nobody's.
    pub fn finish(self, identity: Identity) -> Result<DataDir, StoreError> {
        write_identity(&self.path, &identity)?;
        Ok(DataDir {
            path: self.path,
            identity,
            _lock: Arc::new(self.lock),
        })
    }
}

fn temporary(name: &str) -> String {
    format!("{name}.tmp")
}

fn write_identity(path: &Path, identity: &Identity) -> Result<(), StoreError> {
    let sealed = codec::seal(pb::meta::Value::Identity(pb::Identity {
        replica_id: identity.replica_id,
        cluster_name: identity.cluster_name.clone(),
        cluster_id: identity.cluster_id,
    }));
    let unnamed = path.join(temporary(IDENTITY));
    let named = path.join(IDENTITY);
    fs::File::create(&unnamed)
        .and_then(|mut file| {
            file.write_all(&sealed)?;
            file.sync_data()
        })
        .map_err(StoreError::io("write", &unnamed))?;
    fs::rename(&unnamed, &named).map_err(StoreError::io("rename", &unnamed))?;
    folder::sync(path)
}

fn lock(path: &Path) -> Result<fs::File, StoreError> {
    let file_path = path.join(LOCK);
    let file = fs::File::create(&file_path).map_err(StoreError::io("create", &file_path))?;
    take(file, path)
}

/// Locks the lock file of folder `path`.
fn take(file: fs::File, path: &Path) -> Result<fs::File, StoreError> {
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(StoreError::InUse {
            path: path.to_owned(),
        }),
        Err(fs::TryLockError::Error(source)) => {
            Err(StoreError::io("lock", path.join(LOCK))(source))
        }
    }
}

fn read_identity(path: &Path) -> Result<Option<Identity>, StoreError> {
    let file_path = path.join(IDENTITY);
    let bytes = match fs::read(&file_path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(StoreError::Io {
                action: "read",
                path: file_path,
                source,
            });
        }
    };
    let damaged = |reason: String| StoreError::Damaged {
        what: "the identity".into(),
        path: file_path,
        reason,
    };
    match codec::unseal(&bytes) {
        Ok(pb::meta::Value::Identity(identity)) => Ok(Some(Identity {
            replica_id: identity.replica_id,
            cluster_name: identity.cluster_name,
            cluster_id: identity.cluster_id,
        })),
        Ok(_) => Err(damaged("it holds something else".into())),
        Err(codec::CodecError::NewerFormat(found)) => Err(StoreError::NewerFormat {
            what: "the identity",
            found,
            known: codec::FORMAT,
        }),
        Err(error) => Err(damaged(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
