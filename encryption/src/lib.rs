//! WireGuard devices behind one trait: the kernel's, and our own in user space.
//!
//! [`userspace`] opens a TUN device with segmentation offload and runs the protocol of
//! `clustermesh-encryption-core` on it; it is the program `clustermesh-wireguard`. [`process`] starts that program, or
//! finds it running, and speaks to it over the cross-platform control socket: the device outlives whoever started it.

pub mod device;
pub mod kernel;
pub mod link;
pub mod process;
mod socket_client;
pub mod userspace;

pub use device::{Backend, Device, DeviceError, DeviceStatus, Origin, Others};
