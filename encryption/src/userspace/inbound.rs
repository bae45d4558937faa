//! From the network to the TUN device: a run of datagrams is opened in place and joined into super-packets.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

use clustermesh_encryption_core::engine::{Engine, Slot};
use clustermesh_encryption_core::merge::{Joins, Merger, PIECES_MAX};
use clustermesh_encryption_core::message::{Message, TRANSPORT_HEADER_BYTES, parse};
use clustermesh_encryption_core::packet;
use clustermesh_encryption_core::session::{Session, SessionError};
use nix::errno::Errno;

use super::events::{Event, Events, Handshake};
use super::peer::Peer;
use super::shared::{Shared, Table, count};
use super::tun::{Queue, Writer};
use super::turn::{HeldBytes, Turn, Way};
use super::udp::{MESSAGES_MAX, Received, Receiver, Socket};

/// A message of so many bytes is a run, and more of its kind are likely: they are taken one by one, while they are warm
/// in the cache.
const RUN_BYTES: usize = 16_384;
/// Bytes after which super-packets are written, for the same reason.
const WRITE_BYTES: usize = 65_536;

/// Whose messages were opened last.
#[derive(Debug)]
struct Open {
    index: u32,
    epoch: u32,
    peer: Arc<Peer>,
    session: Arc<Session>,
    endpoint: Option<SocketAddr>,
    /// Whether packets may have to wait for their turn.
    is_held: bool,
}

/// Packets of one peer that wait for their turn.
#[derive(Debug)]
struct Held {
    peer: Arc<Peer>,
    buffer: Vec<u8>,
    /// Where they lie in the buffer.
    packets: Vec<Range<usize>>,
    bytes: HeldBytes,
}

/// What one thread needs to receive; keeps its memory.
#[derive(Debug)]
pub struct Inbound {
    shared: Arc<Shared>,
    events: Events,
    receiver: Receiver,
    merger: Merger,
    writer: Writer,
    open: Option<Open>,
    last_source: Option<(IpAddr, Slot)>,
    most: usize,
    pending_bytes: usize,
    held: Vec<Held>,
}

/// What a run came to.
#[derive(Default)]
struct Opened {
    bytes: usize,
    has_data: bool,
    is_authentic: bool,
}

impl Inbound {
    /// With empty memory.
    #[must_use]
    pub fn new(shared: Arc<Shared>, events: Events, joins: Joins) -> Self {
        Self {
            shared,
            events,
            receiver: Receiver::default(),
            merger: Merger::new(joins),
            writer: Writer::new(PIECES_MAX),
            open: None,
            last_source: None,
            most: MESSAGES_MAX,
            pending_bytes: 0,
            held: Vec::new(),
        }
    }

    /// Forgets what an old table said.
    pub fn reset(&mut self) {
        self.open = None;
        self.last_source = None;
    }

    /// Receives once; gives whether more may wait.
    ///
    /// # Errors
    /// When the device or the socket is broken.
    pub fn receive(
        &mut self,
        table: &Table,
        socket: &Socket,
        queue: &Queue,
    ) -> std::io::Result<bool> {
        // First what has waited.
        self.let_go(queue)?;
        let asked = self.most;
        let received = self.receiver.receive(socket, asked)?;
        let mut is_run = false;
        for index in 0..received {
            let Some(message) = self.receiver.message(index) else {
                count(&self.shared.counters.malformed_messages);
                continue;
            };
            is_run |= message.range.len() >= RUN_BYTES;
            self.pending_bytes += message.range.len();
            self.take(table, &message);
            if self.pending_bytes >= WRITE_BYTES || self.merger.is_full() {
                self.write(queue, None)?;
            }
        }
        self.write(queue, None)?;
        if received > 0 {
            self.most = if is_run { 1 } else { MESSAGES_MAX };
        }
        Ok(received == asked)
    }

    /// Looks at every datagram of a run.
    fn take(&mut self, table: &Table, message: &Received) {
        let mut at = message.range.start;
        while at < message.range.end {
            let end = (at + message.segment).min(message.range.end);
            let datagram = self.receiver.buffer().get(at..end).unwrap_or_default();
            match parse(datagram) {
                Ok(Message::Transport { receiver, .. }) => {
                    at = self.take_transport(table, message, at, receiver);
                }
                Ok(_) => {
                    let handshake = Handshake::new(datagram, message.from);
                    if let Some(handshake) = handshake
                        && !self.events.offer(Event::Handshake(handshake))
                    {
                        count(&self.shared.counters.handshakes_dropped);
                    }
                    at = end;
                }
                Err(_) => {
                    count(&self.shared.counters.malformed_messages);
                    at = end;
                }
            }
        }
    }

    /// Opens the datagrams from `at` on that are of session `index`; gives where the next is.
    fn take_transport(
        &mut self,
        table: &Table,
        message: &Received,
        at: usize,
        index: u32,
    ) -> usize {
        if !self.find(table, index) {
            count(&self.shared.counters.unknown_sessions);
            return at + message.segment;
        }
        let Some(open) = self.open.take() else {
            return at + message.segment;
        };
        let (next, opened) = self.open_run(table, message, at, &open);
        if opened.is_authentic {
            self.heard(&open, &opened, message.from);
        }
        self.open = Some(open);
        next
    }

    /// Makes the session of this index the open one; false: there is none.
    fn find(&mut self, table: &Table, index: u32) -> bool {
        if let Some(open) = &self.open
            && open.index == index
            && open.epoch == open.peer.epoch()
        {
            return true;
        }
        let slot = Engine::slot_of_index(self.shared.index_mask, index);
        self.open = table.peer(slot).and_then(|peer| {
            let epoch = peer.epoch();
            let (session, endpoint, turn) = peer.read(|state| {
                let session = state.sessions.find(index).cloned();
                (session, state.endpoint, state.inward)
            });
            let has_held = self.held.iter().any(|held| Arc::ptr_eq(&held.peer, peer));
            Some(Open {
                index,
                epoch,
                peer: Arc::clone(peer),
                session: session?,
                endpoint,
                is_held: turn != Turn::Open || has_held,
            })
        });
        self.open.is_some()
    }

    fn open_run(
        &mut self,
        table: &Table,
        message: &Received,
        mut at: usize,
        open: &Open,
    ) -> (usize, Opened) {
        let mut opened = Opened::default();
        let mut opener = open.session.opener();
        while at < message.range.end {
            let end = (at + message.segment).min(message.range.end);
            let Some(datagram) = self.receiver.buffer().get_mut(at..end) else {
                break;
            };
            let Ok(Message::Transport { receiver, counter }) = parse(datagram) else {
                break;
            };
            if receiver != open.index {
                break;
            }
            match opener.open(counter, datagram) {
                Ok(length) => {
                    opened.is_authentic = true;
                    opened.bytes += end - at;
                    let from = at + TRANSPORT_HEADER_BYTES;
                    if length > 0 {
                        opened.has_data = true;
                        self.take_packet(table, from..from + length, message.tos, open);
                    }
                }
                Err(error) => {
                    count(&open.peer.errors);
                    count(match error {
                        SessionError::Replay(_) => &self.shared.counters.replayed,
                        _ => &self.shared.counters.not_authentic,
                    });
                }
            }
            at = end;
        }
        (at, opened)
    }

    /// Takes a packet that was opened, if its peer may send it.
    fn take_packet(&mut self, table: &Table, range: Range<usize>, tos: u8, open: &Open) {
        let peer = &open.peer;
        let refused = |counter| {
            count(counter);
            count(&peer.errors);
        };
        let packet = self
            .receiver
            .buffer()
            .get_mut(range.clone())
            .unwrap_or_default();
        let Some((length, source)) = packet::stated_len(packet).zip(packet::source(packet)) else {
            return refused(&self.shared.counters.malformed_messages);
        };
        if self.last_source != Some((source, peer.slot)) {
            if table.allowed_ips.lookup(source) != Some(peer.slot) {
                return refused(&self.shared.counters.wrong_source);
            }
            self.last_source = Some((source, peer.slot));
        }
        if !packet::take_over_ecn(packet, tos) {
            return refused(&self.shared.counters.congestion_dropped);
        }
        let range = range.start..range.start + length;
        if open.is_held {
            return self.hold(peer, range);
        }
        self.merger.push(self.receiver.buffer(), range);
    }

    /// Keeps a packet that may have to wait for its turn; [`Self::let_go`] follows before anything else of its peer.
    fn hold(&mut self, peer: &Arc<Peer>, range: Range<usize>) {
        let Some(handover) = &self.shared.handover else {
            return self.merger.push(self.receiver.buffer(), range);
        };
        let is_held = self.shared.holds(peer, Way::Inward);
        let place = self
            .held
            .iter()
            .position(|held| Arc::ptr_eq(&held.peer, peer));
        let place = place.unwrap_or_else(|| {
            self.held.push(Held {
                peer: Arc::clone(peer),
                buffer: Vec::new(),
                packets: Vec::new(),
                bytes: HeldBytes::new(&handover.held_bytes),
            });
            self.held.len() - 1
        });
        let packet = self.receiver.buffer().get(range).unwrap_or_default();
        let Some(held) = self.held.get_mut(place) else {
            return;
        };
        let from = held.buffer.len();
        held.buffer.extend_from_slice(packet);
        held.packets.push(from..held.buffer.len());
        if !held.bytes.add(packet.len()) && is_held {
            // No more than this call has received.
            peer.open(Way::Inward);
        }
    }

    /// Writes packets whose turn has come.
    ///
    /// # Errors
    /// When the device is broken.
    pub fn let_go(&mut self, queue: &Queue) -> std::io::Result<()> {
        let mut place = 0;
        while let Some(held) = self.held.get(place) {
            if held.peer.read(|state| state.inward) != Turn::Open {
                place += 1;
                continue;
            }
            let mut held = self.held.swap_remove(place);
            // It says that there are such packets.
            self.open = None;
            for range in held.packets {
                self.pending_bytes += range.len();
                self.merger.push(&held.buffer, range);
                if self.pending_bytes >= WRITE_BYTES || self.merger.is_full() {
                    self.write(queue, Some(&mut held.buffer))?;
                }
            }
            self.write(queue, Some(&mut held.buffer))?;
        }
        Ok(())
    }

    /// Notes authentic messages: when, how much, and where the peer is now.
    fn heard(&self, open: &Open, opened: &Opened, from: SocketAddr) {
        let now_ms = self.shared.now_ms();
        open.peer
            .note_received(now_ms, opened.bytes, opened.has_data);
        let is_first = open.session.confirm();
        if open.endpoint != Some(from) || is_first {
            open.peer.change(|state| {
                state.endpoint = Some(from);
                state.sessions.promote();
            });
        }
        if is_first {
            // If it is not taken, the next tick sees it.
            self.events.offer(Event::Confirmed);
        }
    }

    /// Writes what was joined: of what was received, or of another buffer.
    fn write(&mut self, queue: &Queue, other: Option<&mut Vec<u8>>) -> std::io::Result<()> {
        let buffer = match other {
            Some(other) => other.as_mut_slice(),
            None => self.receiver.buffer(),
        };
        for index in 0..self.merger.len() {
            let header = self.merger.complete(index, buffer).to_bytes();
            let written = self
                .writer
                .write(queue, &header, buffer, self.merger.pieces(index));
            if let Err(error) = written {
                match error.raw_os_error().map(Errno::from_raw) {
                    // The device was removed.
                    Some(Errno::EBADFD) => return Err(error),
                    // Another kernel, another idea of what such a header must say.
                    Some(Errno::EINVAL) if self.merger.is_tunnel(index) => {
                        self.merger.leave_tunnels();
                        count(&self.shared.counters.write_errors);
                    }
                    _ => count(&self.shared.counters.write_errors),
                }
            }
        }
        self.merger.clear();
        self.pending_bytes = 0;
        Ok(())
    }
}
