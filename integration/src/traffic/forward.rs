//! A tunnel that does nothing but forward: what any device in user space costs before it encrypts.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::lab::tap::open_tun;

/// Largest packet.
const PACKET_BYTES_MAX: usize = 65_536;

/// Sends each packet of a TUN device that is up as a datagram to the other end and back, until it is killed.
///
/// # Errors
/// When the device or the socket cannot be opened, or breaks.
pub fn forward(device: &str, from: SocketAddr, to: SocketAddr) -> Result<()> {
    let mut tun = open_tun(device)?;
    let socket = UdpSocket::bind(from).with_context(|| from.to_string())?;
    socket.connect(to).with_context(|| to.to_string())?;
    socket.set_nonblocking(true)?;
    clustermesh_process::notify_ready()?;
    let mut packet = vec![0; PACKET_BYTES_MAX];
    loop {
        let mut fds = [
            PollFd::new(tun.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        let [has_packet, has_datagram] = fds.map(|fd| {
            fd.revents()
                .is_some_and(|events| events.contains(PollFlags::POLLIN))
        });
        anyhow::ensure!(has_packet || has_datagram, "{device} is down");
        if has_packet && let Some(length) = unless_empty(tun.read(&mut packet))? {
            // The other end is not there yet.
            let _ = socket.send(&packet[..length]);
        }
        if has_datagram && let Ok(length) = socket.recv(&mut packet) {
            tun.write_all(&packet[..length])?;
        }
    }
}

fn unless_empty(read: std::io::Result<usize>) -> std::io::Result<Option<usize>> {
    match read {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        other => other.map(Some),
    }
}
