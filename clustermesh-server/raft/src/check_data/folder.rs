//! The files of a data folder, as they are.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use clustermesh_store::StoreError;

/// Files in the folder of snapshots, newest first.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    pub(super) complete: Vec<PathBuf>,
    pub(super) unfinished: Vec<PathBuf>,
    pub(super) set_aside: Vec<PathBuf>,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}

/// The snapshots in folder `path`; none when it is not there.
pub(super) fn snapshots(path: &Path) -> Result<Snapshots, StoreError> {
    let mut found = Snapshots::default();
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(failed("list", path)(error)),
    };
    for entry in entries {
        let file = entry.map_err(failed("list", path))?.path();
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("snapshot") => found.complete.push(file),
            Some("tmp") => found.unfinished.push(file),
            Some("damaged") => found.set_aside.push(file),
            _ => {}
        }
    }
    found.complete.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// Copies the log's folder, subfolders too.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::create_dir(to).map_err(failed("create folder", to))?;
    for entry in fs::read_dir(from).map_err(failed("list", from))? {
        let file = entry.map_err(failed("list", from))?.path();
        let Some(name) = file.file_name() else {
            continue;
        };
        if file.is_dir() {
            copy(&file, &to.join(name))?;
        } else {
            fs::copy(&file, to.join(name)).map_err(failed("copy", &file))?;
        }
    }
    Ok(())
}
