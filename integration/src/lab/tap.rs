//! TAP devices: the system calls behind the lab's wide-area link.
#![expect(
    unsafe_code,
    reason = "TUNSETIFF and setns have no safe wrapper in the crates used"
)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};

#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::c_int);

/// Opens a TAP device of that name in the calling thread's network namespace, non-blocking.
///
/// Frames pass whole, checksums complete and segments cut: the device has no offloads.
///
/// # Errors
/// When `/dev/net/tun` is missing or the name is too long or taken.
pub fn open_tap(name: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    let mut request = IfReq {
        name: [0; libc::IFNAMSIZ],
        flags: libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI)?,
        padding: [0; 22],
    };
    anyhow::ensure!(name.len() < libc::IFNAMSIZ, "device name {name} is too long");
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is a tun file and the pointer is to a whole ifreq that outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), (&raw const request).cast()) }
        .with_context(|| format!("TUNSETIFF {name}"))?;
    Ok(file)
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
