//! A worker: one queue of the device and one pair of sockets, both directions run to completion.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clustermesh_encryption_core::merge::Joins;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::events::Events;
use super::inbound::Inbound;
use super::outbound::{Outbound, PACKET_ROOM_BYTES};
use super::shared::{Shared, Table};
use super::tun::Queue;

/// Packets of the device that are taken before the sockets are looked at again.
const PACKETS_PER_TURN: usize = 64;
/// Receive calls before the device is looked at again.
const RECEIVES_PER_TURN: usize = 8;

/// Works until the device is closed.
///
/// # Errors
/// When the device or a socket breaks.
pub fn run(
    index: usize,
    shared: &Arc<Shared>,
    events: &Events,
    queue: &Queue,
    joins: Joins,
) -> std::io::Result<()> {
    let mut outbound = Outbound::new(Arc::clone(shared), events.clone());
    let mut inbound = Inbound::new(Arc::clone(shared), events.clone(), joins);
    let mut room = vec![0; PACKET_ROOM_BYTES];
    let Some(wake) = shared.wake(index) else {
        return Ok(());
    };
    let mut version = u64::MAX;
    let mut table = Arc::new(Table::default());
    while !shared.is_stopping.load(Ordering::Acquire) {
        if version != shared.version() {
            version = shared.version();
            table = shared.table();
            outbound.reset();
            inbound.reset();
        }
        let Some(sockets) = table.sockets.get(index) else {
            let mut fds = [PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
            wait(&mut fds)?;
            let _ = wake.read();
            continue;
        };
        let second = sockets.v6.as_ref().unwrap_or(&sockets.v4);
        let mut fds = [
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(sockets.v4.as_fd(), PollFlags::POLLIN),
            PollFd::new(second.as_fd(), PollFlags::POLLIN),
            PollFd::new(queue.as_fd(), PollFlags::POLLIN),
        ];
        wait(&mut fds)?;
        let [is_woken, has_v4, has_v6, has_packets] =
            fds.map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        if is_woken {
            let _ = wake.read();
        }
        for (has_any, socket) in [(has_v4, &sockets.v4), (has_v6, second)] {
            let mut turns = if has_any { RECEIVES_PER_TURN } else { 0 };
            while turns > 0 && inbound.receive(&table, socket, queue)? {
                turns -= 1;
            }
        }
        if has_packets {
            for _ in 0..PACKETS_PER_TURN {
                let length = queue.read(&mut room)?;
                if length == 0 {
                    break;
                }
                outbound.push(&table, sockets, room.get(..length).unwrap_or_default());
            }
            outbound.flush(sockets);
        }
    }
    Ok(())
}

fn wait(fds: &mut [PollFd<'_>]) -> std::io::Result<()> {
    match poll(fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
