//! Network namespaces: a thread of its own enters one and ends there.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs};

use super::NetlinkError;

/// `NSFS_MAGIC` (linux/magic.h).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// Opens a network namespace by its path.
///
/// # Errors
/// There is no such file, or it is no namespace.
pub fn open(path: &Path) -> Result<OwnedFd, NetlinkError> {
    let action = || format!("open the network namespace {}", path.display());
    let file = File::open(path).map_err(|error| NetlinkError::other(action(), error))?;
    let kind = fstatfs(&file).map_err(|error| NetlinkError::other(action(), error.into()))?;
    if kind.filesystem_type() != NSFS_MAGIC {
        return Err(NetlinkError::other(
            action(),
            io::Error::new(io::ErrorKind::InvalidInput, "it is not a namespace"),
        ));
    }
    Ok(file.into())
}

/// Runs `work` on a thread that has entered the namespace; the thread ends with it, so nothing else is ever in there.
///
/// # Errors
/// The namespace cannot be entered, or what `work` gives.
pub async fn inside<T, F>(
    namespace: OwnedFd,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T, NetlinkError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, NetlinkError>>,
{
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let failed = |error| NetlinkError::other("enter a network namespace", error);
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            let outcome = enter(&namespace)
                .map_err(failed)
                .and_then(|runtime| runtime.block_on(work()));
            // The caller may have given up.
            let _ = sender.send(outcome);
        })
        .map_err(failed)?;
    receiver
        .await
        .map_err(|_| failed(io::Error::other("the thread inside it ended early")))?
}

fn enter(namespace: &OwnedFd) -> io::Result<tokio::runtime::Runtime> {
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}
