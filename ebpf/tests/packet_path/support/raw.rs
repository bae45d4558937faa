//! Frames sent as they are, past the sender's stack.
#![expect(unsafe_code, reason = "packet sockets have no safe wrapper")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::net::{device, inside};

/// Sends a frame out of a device.
pub fn send(namespace: &str, link: &str, frame: &[u8]) {
    let (index, _) = device(namespace, link);
    inside(namespace, || {
        // SAFETY: takes numbers, gives a new descriptor.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(
            socket >= 0,
            "packet socket: {}",
            std::io::Error::last_os_error()
        );
        // SAFETY: the descriptor is ours alone.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: plain integers, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as i32;
        address.sll_protocol = u16::from_ne_bytes([frame[12], frame[13]]);
        // SAFETY: both buffers are as long as is said.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        assert_eq!(
            sent,
            frame.len() as isize,
            "send: {}",
            std::io::Error::last_os_error()
        );
    });
}
