//! Backup files, as `Maintenance.Snapshot` streams them: their checksum, their content, and a new group made of one.

mod restore;

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};

use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_core::{KvError, SnapshotError, State};
use clustermesh_store::{LogId, Node, ReplicaId, SnapshotFile, StoreError};
use sha2::{Digest, Sha256};

pub use restore::{Restore, Restored};

use crate::{error::StartError, state_machine::load};

/// What the snapshot is filled up to.
const SECTOR_BYTES: u64 = 512;
/// The digest at the end.
const DIGEST_BYTES: usize = 32;
/// Read at once.
const PIECE_BYTES: usize = 256 << 10;
/// Where bbolt, etcd's database, has its magic number, and that number.
const BBOLT_MAGIC: (usize, [u8; 4]) = (16, 0xED0C_DAED_u32.to_le_bytes());

/// Why a backup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The operating system refused something.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Not as long as any backup.
    #[error(
        "{} has {bytes} bytes, which no backup has (whole sectors of {SECTOR_BYTES} and a checksum of {DIGEST_BYTES}): it was cut off, or is no backup; use another copy, or take it again with `clustermesh snapshot save`", path.display()
    )]
    NotWhole {
        /// The file.
        path: PathBuf,
        /// Its length, bytes.
        bytes: u64,
    },
    /// The checksum at its end is of something else.
    #[error(
        "{} was altered: its content does not have the SHA-256 at its end; use another copy, or take it again with `clustermesh snapshot save`", path.display()
    )]
    Altered {
        /// The file.
        path: PathBuf,
    },
    /// A backup of etcd itself.
    #[error(
        "{} is a backup of etcd's own database, which only etcd's tools read; copy its keys with `etcdctl make-mirror` from a running etcd instead", path.display()
    )]
    Etcd {
        /// The file.
        path: PathBuf,
    },
    /// The snapshot in it cannot be read.
    #[error("{}: {source}", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// Why.
        source: StoreError,
    },
    /// The state in it cannot be read.
    #[error("{}: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: SnapshotError,
    },
    /// It is of another cluster than the one that it is to be restored for.
    #[error("{} {reason}", path.display())]
    Cluster {
        /// The file.
        path: PathBuf,
        /// What it is of, and what to do.
        reason: String,
    },
    /// The revision cannot grow by so much.
    #[error("--bump-revision {bump}: {reason}")]
    Bump {
        /// What it should have grown by.
        bump: i64,
        /// Why not.
        reason: KvError,
    },
    /// The list of replicas cannot be used.
    #[error("--initial-cluster: {0}")]
    Members(String),
    /// The data folder cannot be used or written.
    #[error(transparent)]
    Folder(#[from] StartError),
}

/// A backup whose every byte was compared with its checksum.
#[derive(Debug)]
pub struct BackupFile {
    path: PathBuf,
    snapshot: SnapshotFile,
    bytes: u64,
    sha256: [u8; DIGEST_BYTES],
}

/// What is in a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSummary {
    /// Id of the group.
    pub cluster_id: u64,
    /// Newest revision.
    pub revision: i64,
    /// Lowest revision that can be read; 0 when nothing was compacted.
    pub compact_revision: i64,
    /// Keys at the newest revision.
    pub keys: u64,
    /// Leases.
    pub leases: u64,
    /// Users.
    pub users: u64,
    /// etcd's HashKV at the newest revision.
    pub hash_kv: u32,
    /// Live and historic data, as the quota counts it, bytes.
    pub state_bytes: u64,
    /// Format of the file.
    pub format: u32,
    /// Kinds of entry that the group's replicas know.
    pub feature_level: u32,
    /// Last log entry in it.
    pub last_log_id: Option<LogId>,
    /// The group's replicas.
    pub members: Vec<(ReplicaId, Node)>,
    /// Length of the file, bytes.
    pub bytes: u64,
    /// SHA-256 of the content, as it stands at the end of the file.
    pub sha256: [u8; DIGEST_BYTES],
}

impl BackupFile {
    /// Opens a backup and reads it through once.
    ///
    /// # Errors
    /// [`BackupError`]: cut off, altered, not one of ours, of a newer format, or unreadable.
    pub fn open(path: &Path) -> Result<Self, BackupError> {
        let io = |action| {
            move |source| BackupError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = File::open(path).map_err(io("open"))?;
        let bytes = file.metadata().map_err(io("stat"))?.len();
        let mut head = Vec::new();
        let (at, magic) = BBOLT_MAGIC;
        (&mut file)
            .take(SECTOR_BYTES)
            .read_to_end(&mut head)
            .map_err(io("read"))?;
        if head.get(at..at + magic.len()) == Some(magic.as_slice()) {
            return Err(BackupError::Etcd {
                path: path.to_owned(),
            });
        }
        let content = bytes.saturating_sub(DIGEST_BYTES as u64);
        if content == 0 || content % SECTOR_BYTES != 0 {
            return Err(BackupError::NotWhole {
                path: path.to_owned(),
                bytes,
            });
        }
        let file = File::open(path).map_err(io("open"))?;
        let Some(sha256) = digest(file, content).map_err(io("read"))? else {
            return Err(BackupError::Altered {
                path: path.to_owned(),
            });
        };
        let snapshot = SnapshotFile::open(path).map_err(|source| BackupError::Snapshot {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            snapshot,
            bytes,
            sha256,
        })
    }

    fn load(&self) -> Result<State, BackupError> {
        let path = || self.path.clone();
        load(&self.snapshot).map_err(|error| match error {
            StartError::Store(source) => BackupError::Snapshot {
                path: path(),
                source,
            },
            StartError::Snapshot(source) => BackupError::State {
                path: path(),
                source,
            },
            other => BackupError::Folder(other),
        })
    }

    /// Reads all of it into memory and tells what it is.
    ///
    /// # Errors
    /// [`BackupError`]: what it says contradicts itself, or is of a newer format.
    pub fn summary(&self) -> Result<BackupSummary, BackupError> {
        let state = self.load()?;
        let broken = |source| BackupError::State {
            path: self.path.clone(),
            source,
        };
        let damaged = |error: KvError| {
            broken(SnapshotError::Damaged {
                sequence: 0,
                reason: error.to_string(),
            })
        };
        let mut hash = state.hash_kv(0).map_err(damaged)?;
        while !hash.advance(&state).map_err(broken)? {}
        let meta = self.snapshot.meta();
        Ok(BackupSummary {
            cluster_id: state.cluster_id(),
            revision: state.revision(),
            compact_revision: state.compact_revision(),
            keys: count_keys(&state).map_err(damaged)?,
            leases: state.leases().count() as u64,
            users: state.auth().users().count() as u64,
            hash_kv: hash.finish().hash,
            state_bytes: state.approximate_bytes(),
            format: self.snapshot.format(),
            feature_level: state.feature_level(),
            last_log_id: meta.last_log_id,
            members: meta
                .last_membership
                .nodes()
                .map(|(id, node)| (*id, node.clone()))
                .collect(),
            bytes: self.bytes,
            sha256: self.sha256,
        })
    }
}

/// Keys at the newest revision.
pub(crate) fn count_keys(state: &State) -> Result<u64, KvError> {
    let everything = RangeRequest {
        key: b"\0".as_slice().into(),
        range_end: b"\0".as_slice().into(),
        count_only: true,
        ..RangeRequest::default()
    };
    let counted = state.range(&everything)?;
    Ok(u64::try_from(counted.count).unwrap_or(0))
}

/// SHA-256 of the first `content` bytes, if the next ones say the same.
fn digest(mut file: File, content: u64) -> io::Result<Option<[u8; DIGEST_BYTES]>> {
    let mut digest = Sha256::new();
    let mut left = content;
    let mut piece = vec![0; PIECE_BYTES];
    while left > 0 {
        let size = usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let Some(piece) = piece.get_mut(..size) else {
            return Err(ErrorKind::InvalidInput.into());
        };
        file.read_exact(piece)?;
        digest.update(&piece);
        left -= size as u64;
    }
    let mut told = [0; DIGEST_BYTES];
    file.read_exact(&mut told)?;
    Ok((digest.finalize().as_slice() == told).then_some(told))
}

#[cfg(test)]
mod tests;
