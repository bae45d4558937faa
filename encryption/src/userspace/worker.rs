//! A worker: one queue of the device and one pair of sockets, both directions run to completion.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clustermesh_encryption_core::merge::Joins;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::events::Events;
use super::fence::{FENCE_PACKETS_MAX, FENCE_RECEIVES_MAX};
use super::inbound::Inbound;
use super::outbound::{Outbound, PACKET_ROOM_BYTES};
use super::shared::{Shared, Sockets, Table};
use super::tun::Queue;
use super::udp::Socket;

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
    let mut passed = shared.fence.asked();
    shared.fence.pass(index, passed);
    let mut table = Arc::new(Table::default());
    while !shared.is_stopping.load(Ordering::Acquire) {
        if version != shared.version() {
            version = shared.version();
            table = shared.table();
            outbound.reset();
            inbound.reset();
        }
        let asked = shared.fence.asked();
        let Some(sockets) = table.sockets.get(index) else {
            shared.fence.pass(index, asked);
            let mut fds = [PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
            wait(&mut fds)?;
            let _ = wake.read();
            continue;
        };
        let second = sockets.v6.as_ref().unwrap_or(&sockets.v4);
        if asked != passed {
            receive(&mut inbound, &table, &sockets.v4, queue, FENCE_RECEIVES_MAX)?;
            receive(&mut inbound, &table, second, queue, FENCE_RECEIVES_MAX)?;
            let packets = FENCE_PACKETS_MAX;
            send(&mut outbound, &table, sockets, queue, &mut room, packets)?;
            passed = asked;
            shared.fence.pass(index, asked);
        }
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
            inbound.let_go(queue)?;
        }
        for (has_any, socket) in [(has_v4, &sockets.v4), (has_v6, second)] {
            if has_any {
                receive(&mut inbound, &table, socket, queue, RECEIVES_PER_TURN)?;
            }
        }
        if has_packets {
            let packets = PACKETS_PER_TURN;
            send(&mut outbound, &table, sockets, queue, &mut room, packets)?;
        }
    }
    Ok(())
}

/// Takes what waits in a socket, by so many calls at most.
fn receive(
    inbound: &mut Inbound,
    table: &Table,
    socket: &Socket,
    queue: &Queue,
    calls: usize,
) -> std::io::Result<()> {
    for _ in 0..calls {
        if !inbound.receive(table, socket, queue)? {
            break;
        }
    }
    Ok(())
}

/// Sends so many packets of the device at most.
fn send(
    outbound: &mut Outbound,
    table: &Table,
    sockets: &Sockets,
    queue: &Queue,
    room: &mut [u8],
    packets: usize,
) -> std::io::Result<()> {
    for _ in 0..packets {
        let length = queue.read(room)?;
        if length == 0 {
            break;
        }
        outbound.push(table, sockets, room.get(..length).unwrap_or_default());
    }
    outbound.flush(sockets);
    Ok(())
}

fn wait(fds: &mut [PollFd<'_>]) -> std::io::Result<()> {
    match poll(fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
