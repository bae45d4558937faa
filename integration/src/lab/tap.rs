//! TAP and TUN devices: the system calls behind the lab's wide-area link and the forwarder of benchmarks.
#![expect(
    unsafe_code,
    reason = "TUNSETIFF has no safe wrapper, nor has registering a descriptor with the runtime"
)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use tokio::io::unix::AsyncFd;

#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

/// Opens a TAP device of that name in the calling thread's network namespace, non-blocking.
///
/// Frames pass whole, checksums complete and segments cut: the device has no offloads.
///
/// # Errors
/// When `/dev/net/tun` is missing or the name is too long or taken.
pub fn open_tap(name: &str) -> Result<File> {
    open(name, libc::IFF_TAP)
}

/// Opens a TUN device likewise: packets without a link header.
///
/// # Errors
/// As [`open_tap`].
pub fn open_tun(name: &str) -> Result<File> {
    open(name, libc::IFF_TUN)
}

fn open(name: &str, layer: libc::c_int) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    let mut request = IfReq {
        name: [0; libc::IFNAMSIZ],
        flags: libc::c_short::try_from(layer | libc::IFF_NO_PI)?,
        padding: [0; 22],
    };
    anyhow::ensure!(
        name.len() < libc::IFNAMSIZ,
        "device name {name} is too long"
    );
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is a tun file and the pointer is to a whole ifreq that outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    nix::errno::Errno::result(result).with_context(|| format!("TUNSETIFF {name}"))?;
    Ok(file)
}

/// Makes a device's descriptor known to the runtime.
///
/// # Errors
/// When it cannot be polled.
pub fn poll_tap(file: File) -> Result<AsyncFd<File>> {
    // SAFETY: the AsyncFd owns the file, so the descriptor stays open and its own while registered.
    Ok(unsafe { AsyncFd::register(file) }?)
}

/// Runs `work` on a thread of its own inside the network namespace at `netns`.
///
/// # Errors
/// When the namespace cannot be entered, or `work` fails.
pub fn in_netns<T: Send + 'static>(
    netns: &Path,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let handle = File::open(netns).with_context(|| netns.display().to_string())?;
    std::thread::spawn(move || {
        nix::sched::setns(&handle, nix::sched::CloneFlags::CLONE_NEWNET).context("setns")?;
        work()
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the thread in the namespace panicked"))?
}
