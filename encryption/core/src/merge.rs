//! Joins packets that follow each other in a flow into super-packets for the TUN device, by the rules of the kernel's
//! own receive offload (net/ipv4/tcp_offload.c, udp_offload.c); all else passes as it is.
//!
//! Nothing is copied: a super-packet is the header of its first packet and a list of pieces of the buffer in which the
//! packets lie. Packets of one flow keep their order. Checksums are not verified: like the kernel's WireGuard, a packet
//! that carries a valid tag is taken to be as it was sent.

use std::ops::Range;

use crate::checksum::{pseudo_header, write_ipv4};
use crate::packet::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, TCP, UDP};
use crate::split::PACKET_BYTES_MAX;
use crate::vnet::{DATA_VALID, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};

/// Packets that one batch can hold.
pub const BATCH_PACKETS_MAX: usize = 2_048;
/// Packets that one super-packet can hold: the device takes no more pieces at once.
pub const PIECES_MAX: usize = 256;
/// Flows that can grow at the same time; the eldest makes room.
const OPEN_FLOWS_MAX: usize = 16;

/// VXLAN (Linux's port and IANA's) and Geneve: each datagram is a packet with headers of its own, and whoever takes
/// these off wants to see every one.
const TUNNEL_PORTS: [u16; 3] = [8_472, 4_789, 6_081];

const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;
const NONE: u32 = u32::MAX;

/// Where the headers of a packet that can be joined end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Joinable {
    is_v6: bool,
    is_tcp: bool,
    transport: usize,
    header_len: usize,
    payload_len: usize,
}

/// A packet, or several that were joined.
#[derive(Clone, Debug)]
struct Group {
    /// Headers and payload of the first packet.
    first: Range<usize>,
    joinable: Option<Joinable>,
    segment_payload: usize,
    total_len: usize,
    pieces: usize,
    first_piece: u32,
    last_piece: u32,
    next_sequence: u32,
    last_id: u16,
    /// Whether IP ids go up (`Some(true)`), stay (`Some(false)`), or only one was seen.
    ids_go_up: Option<bool>,
    flags: u8,
    is_open: bool,
}

#[derive(Clone, Debug)]
struct Piece {
    range: Range<usize>,
    next: u32,
}

/// Collects one batch; keeps its memory for the next.
#[derive(Debug, Default)]
pub struct Merger {
    groups: Vec<Group>,
    pieces: Vec<Piece>,
    open: Vec<usize>,
    is_udp_joined: bool,
}

impl Merger {
    /// An empty one; `is_udp_joined`: the device takes super-packets of UDP (Linux 6.2).
    #[must_use]
    pub fn new(is_udp_joined: bool) -> Self {
        Self {
            groups: Vec::with_capacity(BATCH_PACKETS_MAX),
            pieces: Vec::with_capacity(BATCH_PACKETS_MAX),
            open: Vec::with_capacity(OPEN_FLOWS_MAX),
            is_udp_joined,
        }
    }

    /// Super-packets so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Whether the batch must be written before more is added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.groups.len() >= BATCH_PACKETS_MAX || self.pieces.len() >= BATCH_PACKETS_MAX
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.pieces.clear();
        self.open.clear();
    }

    /// Adds the packet that lies at `range` of `buffer`; its length is what its IP header states.
    pub fn push(&mut self, buffer: &[u8], range: Range<usize>) {
        let Some(packet) = buffer.get(range.clone()) else {
            return;
        };
        let Some((shape, is_data)) = shape_of(packet, self.is_udp_joined) else {
            // A fragment, perhaps, of a flow that waits.
            self.close_all();
            self.begin(packet, range, None);
            return;
        };
        if let Some(at) = self.open_flow(buffer, packet, shape) {
            let place = self.open[at];
            if is_data && self.join(place, packet, &range, shape, buffer) {
                if !self.groups[place].is_open {
                    self.open.remove(at);
                }
                return;
            }
            // What cannot be joined, an acknowledgement for instance, must not overtake what waits of its flow.
            self.groups[place].is_open = false;
            self.open.remove(at);
        }
        self.begin(packet, range, is_data.then_some(shape));
    }

    fn close_all(&mut self) {
        for place in self.open.drain(..) {
            self.groups[place].is_open = false;
        }
    }

    /// The flow's place among those that grow.
    fn open_flow(&self, buffer: &[u8], packet: &[u8], shape: Joinable) -> Option<usize> {
        self.open.iter().position(|place| {
            let group = &self.groups[*place];
            let first = buffer.get(group.first.clone()).unwrap_or_default();
            group.joinable.is_some_and(|other| {
                other.is_v6 == shape.is_v6
                    && other.is_tcp == shape.is_tcp
                    && is_same_flow(first, packet, shape)
            })
        })
    }

    fn begin(&mut self, packet: &[u8], range: Range<usize>, joinable: Option<Joinable>) {
        let mut group = Group {
            first: range,
            joinable,
            segment_payload: 0,
            total_len: packet.len(),
            pieces: 1,
            first_piece: NONE,
            last_piece: NONE,
            next_sequence: 0,
            last_id: 0,
            ids_go_up: None,
            flags: 0,
            is_open: false,
        };
        if let Some(shape) = joinable {
            group.segment_payload = shape.payload_len;
            group.last_id = u16_at(packet, 4);
            let mut may_grow = true;
            if shape.is_tcp {
                let flags = packet[shape.transport + 13];
                group.flags = flags;
                group.next_sequence =
                    u32_at(packet, shape.transport + 4).wrapping_add(length32(shape.payload_len));
                may_grow = flags & (FIN | PSH) == 0;
            }
            if may_grow {
                if self.open.len() == OPEN_FLOWS_MAX {
                    let eldest = self.open.remove(0);
                    self.groups[eldest].is_open = false;
                }
                group.is_open = true;
                self.open.push(self.groups.len());
            }
        }
        self.groups.push(group);
    }

    /// Appends a packet to the group of its flow; false if the rules forbid it.
    fn join(
        &mut self,
        place: usize,
        packet: &[u8],
        range: &Range<usize>,
        shape: Joinable,
        buffer: &[u8],
    ) -> bool {
        let group = &mut self.groups[place];
        let first = buffer.get(group.first.clone()).unwrap_or_default();
        if group.joinable.map(|shape| shape.header_len) != Some(shape.header_len)
            || shape.payload_len > group.segment_payload
            || group.total_len + shape.payload_len > PACKET_BYTES_MAX
            || group.pieces >= PIECES_MAX
            || !is_same_ip(first, packet, shape)
        {
            return false;
        }
        let id = u16_at(packet, 4);
        let ids_go_up = if shape.is_v6 {
            None
        } else {
            let goes_up = match id.wrapping_sub(group.last_id) {
                1 => true,
                // Only where nothing may cut the packet, equal ids mean nothing (RFC 6864).
                0 if packet[6] & 0x40 != 0 => false,
                _ => return false,
            };
            if group.ids_go_up.is_some_and(|before| before != goes_up) {
                return false;
            }
            Some(goes_up)
        };
        let mut is_last = shape.payload_len < group.segment_payload;
        if shape.is_tcp {
            let (old, new) = (&first[shape.transport..], &packet[shape.transport..]);
            let flags = new[13];
            let is_alike = u32_at(new, 4) == group.next_sequence
                && old[8..12] == new[8..12]
                && (flags ^ group.flags) & !(FIN | PSH) == 0
                && flags & CWR == 0
                && old[14..16] == new[14..16]
                && old[20..shape.header_len - shape.transport]
                    == new[20..shape.header_len - shape.transport];
            if !is_alike {
                return false;
            }
            group.flags |= flags & (FIN | PSH);
            group.next_sequence = group
                .next_sequence
                .wrapping_add(length32(shape.payload_len));
            is_last |= flags & (FIN | PSH) != 0;
        }
        group.last_id = id;
        group.ids_go_up = ids_go_up;
        group.total_len += shape.payload_len;
        group.pieces += 1;
        group.is_open = !is_last;
        let piece = length32(self.pieces.len());
        if group.last_piece == NONE {
            group.first_piece = piece;
        } else if let Some(last) = self.pieces.get_mut(group.last_piece as usize) {
            last.next = piece;
        }
        group.last_piece = piece;
        self.pieces.push(Piece {
            range: range.start + shape.header_len..range.end,
            next: NONE,
        });
        true
    }

    /// Completes the headers of super-packet `index` in `buffer` and says what to write before it.
    pub fn complete(&self, index: usize, buffer: &mut [u8]) -> VnetHeader {
        let valid = VnetHeader {
            flags: DATA_VALID,
            ..VnetHeader::default()
        };
        let Some(group) = self.groups.get(index) else {
            return valid;
        };
        let (Some(shape), Some(packet)) = (group.joinable, buffer.get_mut(group.first.clone()))
        else {
            return valid;
        };
        if group.pieces == 1 {
            return valid;
        }
        let total = length16(group.total_len);
        if shape.is_v6 {
            let payload = length16(group.total_len - IPV6_HEADER_BYTES);
            packet[4..6].copy_from_slice(&payload.to_be_bytes());
        } else {
            packet[2..4].copy_from_slice(&total.to_be_bytes());
            write_ipv4(&mut packet[..shape.transport]);
        }
        let addresses = if shape.is_v6 { 8..40 } else { 12..20 };
        let protocol = if shape.is_tcp { TCP } else { UDP };
        let length = length16(group.total_len - shape.transport);
        let pseudo = pseudo_header(&packet[addresses], protocol)
            .add_u16(length)
            .folded();
        let transport = &mut packet[shape.transport..];
        let csum_offset = if shape.is_tcp {
            transport[13] = group.flags;
            16
        } else {
            transport[4..6].copy_from_slice(&length.to_be_bytes());
            6
        };
        transport[csum_offset..csum_offset + 2].copy_from_slice(&pseudo);
        VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: match (shape.is_tcp, shape.is_v6) {
                (true, false) => GSO_TCPV4,
                (true, true) => GSO_TCPV6,
                (false, _) => GSO_UDP_L4,
            },
            hdr_len: length16(shape.header_len),
            gso_size: length16(group.segment_payload),
            csum_start: length16(shape.transport),
            csum_offset: length16(csum_offset),
        }
    }

    /// The pieces of super-packet `index`, in order: the whole first packet, then the payloads of the others.
    pub fn pieces(&self, index: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let group = self.groups.get(index);
        let mut next = group.map_or(NONE, |group| group.first_piece);
        let others = std::iter::from_fn(move || {
            let piece = self.pieces.get(next as usize)?;
            next = piece.next;
            Some(piece.range.clone())
        });
        group
            .map(|group| group.first.clone())
            .into_iter()
            .chain(others)
    }
}

/// Where the headers of a TCP or UDP packet end, and whether it is one that the kernel would join, too.
fn shape_of(packet: &[u8], is_udp_joined: bool) -> Option<(Joinable, bool)> {
    let (is_v6, transport, protocol) = match packet.first()? {
        0x45 if packet.len() >= IPV4_HEADER_BYTES => {
            // No fragments.
            if packet[6] & 0x3f != 0 || packet[7] != 0 {
                return None;
            }
            (false, IPV4_HEADER_BYTES, packet[9])
        }
        first if first >> 4 == 6 && packet.len() >= IPV6_HEADER_BYTES => {
            (true, IPV6_HEADER_BYTES, packet[6])
        }
        _ => return None,
    };
    let header = packet.get(transport..)?;
    let is_tcp = match protocol {
        TCP => true,
        UDP => false,
        _ => return None,
    };
    let (length, is_data) = if is_tcp {
        let length = usize::from(header.get(12)? >> 4) * 4;
        // Plain data: ACK, perhaps with PSH, FIN, ECE.
        let is_data = header.get(13)? & !(FIN | PSH | 0x40) == ACK;
        if length < 20 {
            return None;
        }
        (length, is_data)
    } else {
        let [.., length_high, length_low, sum_high, sum_low] = header.get(..8)? else {
            return None;
        };
        let stated = usize::from(u16::from_be_bytes([*length_high, *length_low]));
        let is_whole = stated == header.len() && (*sum_high, *sum_low) != (0, 0);
        let is_tunnel = TUNNEL_PORTS.contains(&u16_at(header, 2));
        (8, is_whole && is_udp_joined && !is_tunnel)
    };
    let payload_len = header.len().checked_sub(length)?;
    let shape = Joinable {
        is_v6,
        is_tcp,
        transport,
        header_len: transport + length,
        payload_len,
    };
    Some((shape, is_data && payload_len > 0))
}

/// Same addresses and ports.
fn is_same_flow(first: &[u8], packet: &[u8], shape: Joinable) -> bool {
    let addresses = if shape.is_v6 { 8..40 } else { 12..20 };
    let ports = shape.transport..shape.transport + 4;
    first.get(addresses.clone()) == packet.get(addresses)
        && first.get(ports.clone()) == packet.get(ports)
}

/// Same traffic class, hop limit, flow label and "don't fragment".
fn is_same_ip(first: &[u8], packet: &[u8], shape: Joinable) -> bool {
    if shape.is_v6 {
        first[..4] == packet[..4] && first[7] == packet[7]
    } else {
        first[1] == packet[1] && first[8] == packet[8] && first[6] == packet[6]
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    crate::packet::half(bytes, at).map_or(0, length16)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "lengths in a packet are below 64 KiB"
)]
const fn length16(length: usize) -> u16 {
    length as u16
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "lengths and places in a batch are below 4 GiB"
)]
const fn length32(length: usize) -> u32 {
    length as u32
}
