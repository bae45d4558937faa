//! Folders whose names outlive a power cut.

use std::{fs, io, path::Path};

use crate::error::StoreError;

/// Makes the names in a folder durable.
pub(crate) fn sync(path: &Path) -> Result<(), StoreError> {
    fs::File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(StoreError::io("sync folder", path))
}

/// The folder that `path` is in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// Makes folder `path` and those above it, durably: syncing what is in a folder says nothing about the folder's name.
/// The name is synced also when it is there, since whoever made it may have died before.
pub(crate) fn create(path: &Path) -> Result<(), StoreError> {
    match fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create(parent(path))?;
            fs::create_dir(path).map_err(StoreError::io("create folder", path))?;
        }
        Err(source) => {
            return Err(StoreError::Io {
                action: "create folder",
                path: path.to_owned(),
                source,
            });
        }
    }
    sync(parent(path))
}

/// Makes the content and names of a folder's files durable, and of the folders in it.
pub(crate) fn sync_content(path: &Path) -> Result<(), StoreError> {
    for found in fs::read_dir(path).map_err(StoreError::io("list", path))? {
        let found = found.map_err(StoreError::io("list", path))?.path();
        if found.is_dir() {
            sync_content(&found)?;
        } else {
            fs::File::open(&found)
                .and_then(|file| file.sync_all())
                .map_err(StoreError::io("sync", &found))?;
        }
    }
    sync(path)
}
