//! From the TUN device to the network: packets are cut, sealed next to each other in one buffer and sent by one call.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clustermesh_encryption_core::engine::Slot;
use clustermesh_encryption_core::message::{
    TAG_BYTES, TRANSPORT_HEADER_BYTES, TRANSPORT_OVERHEAD_BYTES, padded_len,
};
use clustermesh_encryption_core::packet;
use clustermesh_encryption_core::session::Session;
use clustermesh_encryption_core::split::Split;
use clustermesh_encryption_core::vnet::{VNET_HEADER_BYTES, VnetHeader};
use nix::errno::Errno;

use super::events::{Event, Events};
use super::peer::{Peer, Route};
use super::shared::{Shared, Sockets, Table, count};
use super::turn::Way;
use super::udp::{SEGMENTS_MAX, SEND_BYTES_MAX, Socket};

/// Room for one packet of the device with its header, bytes.
pub const PACKET_ROOM_BYTES: usize = VNET_HEADER_BYTES + 65_536;
/// Room for one batch: what one call sends, and one more segment.
const BATCH_ROOM_BYTES: usize = 2 * 65_536;

/// Datagrams of one size to one peer, sealed next to each other.
#[derive(Debug)]
struct Batch {
    buffer: Vec<u8>,
    len: usize,
    segment: usize,
    count: usize,
    /// A shorter datagram ends a run.
    is_closed: bool,
    tos: u8,
    has_data: bool,
    to: Option<(Arc<Peer>, SocketAddr)>,
}

impl Batch {
    /// Whether a datagram of this length can be appended.
    fn takes(&self, length: usize) -> bool {
        self.count == 0
            || (!self.is_closed
                && length <= self.segment
                && self.count < SEGMENTS_MAX
                && self.len + length <= SEND_BYTES_MAX)
    }

    /// Room for one more datagram.
    fn grow(&mut self, length: usize) -> Option<&mut [u8]> {
        let from = self.len;
        if self.count == 0 {
            self.segment = length;
        }
        self.is_closed = length < self.segment;
        self.count += 1;
        self.len += length;
        self.buffer.get_mut(from..from + length)
    }

    fn clear(&mut self) {
        self.len = 0;
        self.segment = 0;
        self.count = 0;
        self.is_closed = false;
        self.has_data = false;
    }
}

/// What one thread needs to send; keeps its memory.
#[derive(Debug)]
pub struct Outbound {
    shared: Arc<Shared>,
    events: Events,
    batch: Batch,
    /// By slot.
    routes: Vec<Option<Route>>,
    last: Option<(std::net::IpAddr, Slot)>,
    mtu: usize,
}

impl Outbound {
    /// With empty memory.
    #[must_use]
    pub fn new(shared: Arc<Shared>, events: Events) -> Self {
        Self {
            shared,
            events,
            batch: Batch {
                buffer: vec![0; BATCH_ROOM_BYTES],
                len: 0,
                segment: 0,
                count: 0,
                is_closed: false,
                tos: 0,
                has_data: false,
                to: None,
            },
            routes: Vec::new(),
            last: None,
            mtu: 0,
        }
    }

    /// Forgets what an old table said.
    pub fn reset(&mut self) {
        self.routes.clear();
        self.last = None;
        self.mtu = self.shared.mtu.load(Ordering::Relaxed);
    }

    /// Takes one packet of the device, header first; what is sealed is sent at the latest by [`Self::flush`].
    pub fn push(&mut self, table: &Table, sockets: &Sockets, packet: &[u8]) {
        let Some((_, bytes)) = packet.split_first_chunk::<VNET_HEADER_BYTES>() else {
            return count(&self.shared.counters.malformed_packets);
        };
        let Some(slot) = self.slot_of(table, bytes) else {
            return;
        };
        let Some(route) = self.route(table, slot) else {
            return count(&self.shared.counters.no_peer);
        };
        let Some((session, to)) = route.session.clone().zip(route.endpoint) else {
            let peer = Arc::clone(&route.peer);
            return self.stage(&peer, packet);
        };
        let (peer, is_held) = (Arc::clone(&route.peer), route.is_held);
        if is_held && self.hold(&peer, packet) {
            return;
        }
        if peer.has_staged.load(Ordering::Acquire) {
            // In their order: first what waited.
            self.send_staged(&peer, &session, to, sockets);
        }
        if !self.seal(&peer, &session, to, sockets, packet) {
            self.stage(&peer, packet);
        }
    }

    /// Keeps a packet whose turn has not come; false: it has, or there is no more room, and what was held goes before it.
    fn hold(&self, peer: &Arc<Peer>, packet: &[u8]) -> bool {
        // Locked for all of it: who lets packets go must not miss this one.
        let mut staged = peer.staged.lock();
        let Some(handover) = &self.shared.handover else {
            return false;
        };
        if !self.shared.holds(peer, Way::Outward) {
            return false;
        }
        let is_held = staged.hold(packet, &handover.held_bytes);
        if is_held {
            peer.has_staged.store(true, Ordering::Release);
        } else {
            peer.open(Way::Outward);
        }
        is_held
    }

    fn slot_of(&mut self, table: &Table, packet: &[u8]) -> Option<Slot> {
        let Some(destination) = packet::destination(packet) else {
            count(&self.shared.counters.malformed_packets);
            return None;
        };
        if let Some((last, slot)) = self.last
            && last == destination
        {
            return Some(slot);
        }
        let Some(slot) = table.allowed_ips.lookup(destination) else {
            count(&self.shared.counters.no_peer);
            return None;
        };
        self.last = Some((destination, slot));
        Some(slot)
    }

    fn route(&mut self, table: &Table, slot: Slot) -> Option<&Route> {
        let place = slot as usize;
        if self.routes.len() <= place {
            self.routes.resize(place + 1, None);
        }
        let route = self.routes.get_mut(place)?;
        if !route.as_ref().is_some_and(Route::is_fresh) {
            *route = Some(Route::new(table.peer(slot)?));
        }
        route.as_ref()
    }

    /// Keeps a packet until there is a session, and asks for one.
    fn stage(&mut self, peer: &Arc<Peer>, packet: &[u8]) {
        let dropped = {
            let mut staged = peer.staged.lock();
            let dropped = staged.push(packet);
            peer.has_staged.store(true, Ordering::Release);
            dropped
        };
        for counter in [&self.shared.counters.staged_dropped, &peer.errors] {
            counter.fetch_add(dropped, Ordering::Relaxed);
        }
        if !peer.is_handshake_wanted.swap(true, Ordering::AcqRel)
            && !self.events.offer(Event::Wanted(peer.slot))
        {
            // The next packet asks again.
            peer.is_handshake_wanted.store(false, Ordering::Release);
        }
    }

    /// Seals and sends what waited; gives whether anything did.
    pub fn send_staged(
        &mut self,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
        to: SocketAddr,
        sockets: &Sockets,
    ) -> bool {
        // Locked for all of it: others that send to this peer must not come between.
        let mut staged = peer.staged.lock();
        let had_any = !staged.is_empty();
        while let Some(packet) = staged.pop() {
            self.seal(peer, session, to, sockets, &packet);
        }
        staged.end_hold();
        // Before others are told that nothing waits: what they send comes after it.
        self.flush(sockets);
        peer.has_staged.store(false, Ordering::Release);
        had_any
    }

    /// Sends an empty message.
    pub fn keepalive(
        &mut self,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
        to: SocketAddr,
        sockets: &Sockets,
    ) {
        self.flush(sockets);
        let Ok(counter) = session.reserve(1) else {
            return;
        };
        self.turn_to(peer, to, 0);
        let sealed = self
            .batch
            .grow(TRANSPORT_OVERHEAD_BYTES)
            .is_some_and(|room| session.seal(counter, room).is_ok());
        if sealed {
            self.flush(sockets);
        } else {
            self.batch.clear();
        }
    }

    fn turn_to(&mut self, peer: &Arc<Peer>, to: SocketAddr, tos: u8) {
        self.batch.tos = tos;
        let is_same = self
            .batch
            .to
            .as_ref()
            .is_some_and(|(old, place)| Arc::ptr_eq(old, peer) && *place == to);
        if !is_same {
            self.batch.to = Some((Arc::clone(peer), to));
        }
    }

    /// Seals a packet into the batch; false: the session has sent as much as it may.
    fn seal(
        &mut self,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
        to: SocketAddr,
        sockets: &Sockets,
        packet: &[u8],
    ) -> bool {
        let plan = packet
            .split_first_chunk::<VNET_HEADER_BYTES>()
            .and_then(|(header, packet)| {
                let vnet = VnetHeader::from_bytes(header);
                Some((packet, Split::plan(vnet, packet, packet.len()).ok()?))
            });
        let Some((packet, plan)) = plan else {
            count(&self.shared.counters.malformed_packets);
            return true;
        };
        let tos = packet::outer_ecn(packet::ecn(packet));
        let is_other = self.batch.tos != tos
            || self
                .batch
                .to
                .as_ref()
                .is_none_or(|(old, place)| !Arc::ptr_eq(old, peer) || *place != to);
        if is_other {
            self.flush(sockets);
            self.turn_to(peer, to, tos);
        }
        let segments = plan.count();
        let Ok(first) = session.reserve(segments as u64) else {
            return false;
        };
        for (index, counter) in (0..segments).zip(first..) {
            let length = plan.segment_len(index);
            let datagram = padded_len(length, self.mtu) + TRANSPORT_OVERHEAD_BYTES;
            if !self.batch.takes(datagram) {
                self.flush(sockets);
            }
            let sealed = self.batch.grow(datagram).is_some_and(|room| {
                let (segment, padding) = room[TRANSPORT_HEADER_BYTES..].split_at_mut(length);
                // The tag overwrites the last of it.
                let padded = padding.len() - TAG_BYTES;
                padding[..padded].fill(0);
                plan.copy(index, packet, segment).is_ok() && session.seal(counter, room).is_ok()
            });
            if !sealed {
                self.batch.clear();
                count(&self.shared.counters.malformed_packets);
                return true;
            }
            self.batch.has_data = true;
        }
        if segments > 1 {
            self.flush(sockets);
        }
        true
    }

    /// Sends what was sealed.
    pub fn flush(&mut self, sockets: &Sockets) {
        if self.batch.count == 0 {
            return;
        }
        if let Some((peer, to)) = &self.batch.to {
            let now_ms = self.shared.now_ms();
            peer.note_sent(now_ms, self.batch.len, self.batch.has_data);
            let datagrams = self.batch.buffer.get(..self.batch.len).unwrap_or_default();
            let socket = sockets.towards(*to);
            let sent = socket.map_or(Err(Errno::EAFNOSUPPORT), |socket| {
                send(
                    &self.shared,
                    socket,
                    peer,
                    *to,
                    self.batch.tos,
                    datagrams,
                    self.batch.segment,
                )
            });
            if sent.is_err() {
                count(&self.shared.counters.send_errors);
                count(&peer.errors);
            }
        }
        self.batch.clear();
    }
}

/// Sends a run by one call, or one by one where the path does not take it.
fn send(
    shared: &Shared,
    socket: &Socket,
    peer: &Peer,
    to: SocketAddr,
    tos: u8,
    datagrams: &[u8],
    segment: usize,
) -> Result<(), Errno> {
    let is_run = segment < datagrams.len();
    let is_refused = segment >= peer.refused_segment.load(Ordering::Relaxed);
    if !is_run || !is_refused {
        match socket.send(to, tos, datagrams, segment) {
            // Longer than the first link takes, or the link has no checksum offload: the kernel cuts only what fits.
            Err(Errno::EMSGSIZE | Errno::EIO | Errno::EINVAL) if is_run => {
                peer.refused_segment.fetch_min(segment, Ordering::Relaxed);
            }
            result => return result,
        }
    }
    count(&shared.counters.unsegmented_sends);
    datagrams
        .chunks(segment)
        .try_for_each(|datagram| socket.send(to, tos, datagram, datagram.len()))
}
