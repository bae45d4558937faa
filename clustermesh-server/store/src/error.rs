//! Errors of storage, each naming the object and what to do about it.

use std::{io, path::PathBuf};

/// Why storage failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused something.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The log's database failed.
    #[error("log database {path}: {source}")]
    Database {
        /// Folder of the database.
        path: PathBuf,
        /// The database's reason.
        source: sled::Error,
    },
    /// Another process has the folder.
    #[error("data folder {path} is in use by another process; stop it, or choose another folder")]
    InUse {
        /// The data folder.
        path: PathBuf,
    },
    /// No replica ever lived here.
    #[error(
        "data folder {path} holds no replica; to start a new group use a new-group start, otherwise restore the folder: an empty replica must not come back under its old id"
    )]
    Empty {
        /// The data folder.
        path: PathBuf,
    },
    /// Something lives here already.
    #[error("data folder {path} is not empty; a new replica needs an empty folder")]
    NotEmpty {
        /// The data folder.
        path: PathBuf,
    },
    /// The folder belongs to something else.
    #[error(
        "data folder {path} belongs to {found}, not to {wanted}; point the server at its own folder"
    )]
    WrongIdentity {
        /// The data folder.
        path: PathBuf,
        /// Who lives here.
        found: String,
        /// Who was expected.
        wanted: String,
    },
    /// Bytes that do not check out.
    #[error(
        "{what} in {path} is damaged: {reason}; restore this replica from its group or a backup"
    )]
    Damaged {
        /// What was read.
        what: String,
        /// From where.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Written by a newer release.
    #[error("{what} has format {found}, this release reads up to {known}; start the newer release")]
    NewerFormat {
        /// What was read.
        what: &'static str,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// sled spilled a record into a file that it does not sync.
    #[error(
        "log database {path} has spilled records into blobs/, which are not durable; restore this replica from its group or a backup"
    )]
    Spilled {
        /// Folder of the database.
        path: PathBuf,
    },
    /// The log's writer has stopped.
    #[error("the log has failed and takes no more writes: {reason}; restart the replica")]
    Failed {
        /// The first error.
        reason: String,
    },
    /// More than a limit allows.
    #[error("{what} of {size} bytes is over the limit of {limit} bytes")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size, bytes.
        size: usize,
        /// The limit, bytes.
        limit: usize,
    },
}

impl StoreError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> Self {
        io::Error::other(error)
    }
}
