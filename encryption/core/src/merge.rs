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
use crate::vnet::{
    DATA_VALID, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_UDP_TUNNEL_IPV4, GSO_UDP_TUNNEL_IPV6,
    NEEDS_CSUM, VnetHeader,
};

/// Packets that one batch can hold.
pub const BATCH_PACKETS_MAX: usize = 2_048;
/// Packets that one super-packet can hold: the device takes no more pieces at once.
pub const PIECES_MAX: usize = 256;
/// Flows that can grow at the same time; the eldest makes room.
const OPEN_FLOWS_MAX: usize = 16;

/// VXLAN (Linux's port and IANA's) and Geneve: each datagram is a packet with headers of its own, and whoever takes
/// these off wants to see every one.
const TUNNEL_PORTS: [u16; 3] = [8_472, 4_789, 6_081];
/// Those of them that carry VXLAN.
const VXLAN_PORTS: [u16; 2] = [8_472, 4_789];
/// First byte of a VXLAN header whose identifier is valid (RFC 7348, 5).
const VXLAN_VALID: u8 = 8;
const UDP_HEADER_BYTES: usize = 8;
/// UDP, VXLAN and the inner Ethernet header.
const VXLAN_BYTES: usize = UDP_HEADER_BYTES + 8 + ETHERNET_BYTES;
const ETHERNET_BYTES: usize = 14;

/// What the device takes in one piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Joins {
    /// Datagrams of UDP (Linux 6.2).
    pub udp: bool,
    /// TCP in VXLAN (Linux 6.17).
    pub tunnels: bool,
}

const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;
const NONE: u32 = u32::MAX;

/// Where the headers of a packet that can be joined end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Joinable {
    /// Of a tunnel: whether its addresses are IPv6, and where its UDP header is.
    outer: Option<(bool, usize)>,
    /// Where the IP header is: in a tunnel, the inner one.
    network: usize,
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
    joins: Joins,
}

impl Merger {
    /// An empty one for a device that takes these.
    #[must_use]
    pub fn new(joins: Joins) -> Self {
        Self {
            groups: Vec::with_capacity(BATCH_PACKETS_MAX),
            pieces: Vec::with_capacity(BATCH_PACKETS_MAX),
            open: Vec::with_capacity(OPEN_FLOWS_MAX),
            joins,
        }
    }

    /// From now on tunnels are left alone: the device refused one.
    pub fn leave_tunnels(&mut self) {
        self.joins.tunnels = false;
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
        let Some((shape, is_data)) = shape_of(packet, self.joins) else {
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
                    && other.outer == shape.outer
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
            group.last_id = u16_at(packet, shape.network + 4);
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
        let id = u16_at(packet, shape.network + 4);
        let ids_go_up = if shape.is_v6 {
            None
        } else {
            let goes_up = match id.wrapping_sub(group.last_id) {
                1 => true,
                // Only where nothing may cut the packet, equal ids mean nothing (RFC 6864).
                0 if packet[shape.network + 6] & 0x40 != 0 => false,
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
        let mut gso_type = match (shape.is_tcp, shape.is_v6) {
            (true, false) => GSO_TCPV4,
            (true, true) => GSO_TCPV6,
            (false, _) => GSO_UDP_L4,
        };
        let mut outer_transport = 0;
        if let Some((is_v6, transport)) = shape.outer {
            write_ip(&mut packet[..transport], is_v6, group.total_len);
            let length = length16(group.total_len - transport);
            packet[transport + 4..transport + 6].copy_from_slice(&length.to_be_bytes());
            gso_type |= if is_v6 {
                GSO_UDP_TUNNEL_IPV6
            } else {
                GSO_UDP_TUNNEL_IPV4
            };
            // The kernel refuses a smaller number than it would be behind an Ethernet header, though this device has
            // none (6.17 to 6.18 at least). It is a hint: who goes on with the packet looks for himself.
            outer_transport = length16(transport + ETHERNET_BYTES);
        }
        let length = group.total_len - shape.network;
        let header = shape.network..shape.transport;
        write_ip(&mut packet[header], shape.is_v6, length);
        let addresses = if shape.is_v6 { 8..40 } else { 12..20 };
        let protocol = if shape.is_tcp { TCP } else { UDP };
        let length = length16(group.total_len - shape.transport);
        let pseudo = pseudo_header(&packet[shape.network..][addresses], protocol)
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
            gso_type,
            hdr_len: length16(shape.header_len),
            gso_size: length16(group.segment_payload),
            csum_start: length16(shape.transport),
            csum_offset: length16(csum_offset),
            outer_transport,
            inner_network: length16(shape.network),
        }
    }

    /// Whether super-packet `index` is one in a tunnel.
    #[must_use]
    pub fn is_tunnel(&self, index: usize) -> bool {
        let group = self.groups.get(index);
        group.is_some_and(|group| {
            group.pieces > 1 && group.joinable.is_some_and(|shape| shape.outer.is_some())
        })
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

/// Sets length and checksum of an IP header whose packet is `length` bytes long.
fn write_ip(header: &mut [u8], is_v6: bool, length: usize) {
    if is_v6 {
        let payload = length16(length - IPV6_HEADER_BYTES);
        header[4..6].copy_from_slice(&payload.to_be_bytes());
    } else {
        header[2..4].copy_from_slice(&length16(length).to_be_bytes());
        write_ipv4(header);
    }
}

/// Where the IP header at `network` ends, whether it is IPv6, and what comes then; nothing of fragments.
fn network_of(packet: &[u8], network: usize) -> Option<(bool, usize, u8)> {
    let packet = packet.get(network..)?;
    match packet.first()? {
        0x45 if packet.len() >= IPV4_HEADER_BYTES => {
            if packet[6] & 0x3f != 0 || packet[7] != 0 {
                return None;
            }
            Some((false, network + IPV4_HEADER_BYTES, packet[9]))
        }
        first if first >> 4 == 6 && packet.len() >= IPV6_HEADER_BYTES => {
            Some((true, network + IPV6_HEADER_BYTES, packet[6]))
        }
        _ => None,
    }
}

/// Where the headers of a TCP or UDP packet end, and whether it is one that the kernel would join, too.
fn shape_of(packet: &[u8], joins: Joins) -> Option<(Joinable, bool)> {
    let (is_v6, transport, protocol) = network_of(packet, 0)?;
    if protocol == UDP
        && joins.tunnels
        && let Some(network) = vxlan_inner(packet, transport)
    {
        let (inner_is_v6, inner_transport, inner_protocol) = network_of(packet, network)?;
        // What its own header does not hold would be lost.
        let is_whole = network + crate::packet::stated_len(&packet[network..])? == packet.len();
        if inner_protocol == TCP && is_whole {
            let outer = Some((is_v6, transport));
            return tcp_shape(packet, outer, network, inner_is_v6, inner_transport);
        }
    }
    match protocol {
        TCP => tcp_shape(packet, None, 0, is_v6, transport),
        UDP => udp_shape(packet, is_v6, transport, joins),
        _ => None,
    }
}

/// Where the inner IP header of a VXLAN datagram is whose UDP header is at `transport`.
fn vxlan_inner(packet: &[u8], transport: usize) -> Option<usize> {
    let header = packet.get(transport..transport + VXLAN_BYTES)?;
    let is_whole = usize::from(u16_at(header, 4)) == packet.len() - transport;
    let has_checksum = u16_at(header, 6) != 0;
    let is_vxlan = VXLAN_PORTS.contains(&u16_at(header, 2)) && header[8] == VXLAN_VALID;
    let is_ip = match u16_at(header, VXLAN_BYTES - 2) {
        0x0800 => 4,
        0x86dd => 6,
        _ => return None,
    } == packet.get(transport + VXLAN_BYTES)? >> 4;
    (is_whole && !has_checksum && is_vxlan && is_ip).then_some(transport + VXLAN_BYTES)
}

fn tcp_shape(
    packet: &[u8],
    outer: Option<(bool, usize)>,
    network: usize,
    is_v6: bool,
    transport: usize,
) -> Option<(Joinable, bool)> {
    let header = packet.get(transport..)?;
    let length = usize::from(header.get(12)? >> 4) * 4;
    // Plain data: ACK, perhaps with PSH, FIN, ECE.
    let is_data = header.get(13)? & !(FIN | PSH | 0x40) == ACK;
    if length < 20 {
        return None;
    }
    let payload_len = header.len().checked_sub(length)?;
    let shape = Joinable {
        outer,
        network,
        is_v6,
        is_tcp: true,
        transport,
        header_len: transport + length,
        payload_len,
    };
    Some((shape, is_data && payload_len > 0))
}

fn udp_shape(
    packet: &[u8],
    is_v6: bool,
    transport: usize,
    joins: Joins,
) -> Option<(Joinable, bool)> {
    let header = packet.get(transport..)?;
    let [.., length_high, length_low, sum_high, sum_low] = header.get(..UDP_HEADER_BYTES)? else {
        return None;
    };
    let stated = usize::from(u16::from_be_bytes([*length_high, *length_low]));
    let is_whole = stated == header.len() && (*sum_high, *sum_low) != (0, 0);
    let is_tunnel = TUNNEL_PORTS.contains(&u16_at(header, 2));
    let payload_len = header.len() - UDP_HEADER_BYTES;
    let shape = Joinable {
        outer: None,
        network: 0,
        is_v6,
        is_tcp: false,
        transport,
        header_len: transport + UDP_HEADER_BYTES,
        payload_len,
    };
    let is_data = is_whole && joins.udp && !is_tunnel;
    Some((shape, is_data && payload_len > 0))
}

/// Same addresses and ports, outside and inside.
fn is_same_flow(first: &[u8], packet: &[u8], shape: Joinable) -> bool {
    let same = |range: Range<usize>| first.get(range.clone()) == packet.get(range);
    let is_same_outside = shape.outer.is_none_or(|(is_v6, transport)| {
        let addresses = if is_v6 { 8..40 } else { 12..20 };
        // All of the tunnel's header, its identifier too, and of the inner link layer.
        same(addresses)
            && same(transport..transport + 4)
            && same(transport + UDP_HEADER_BYTES..shape.network)
    });
    let (from, to) = if shape.is_v6 { (8, 40) } else { (12, 20) };
    is_same_outside
        && same(shape.network + from..shape.network + to)
        && same(shape.transport..shape.transport + 4)
}

/// Same traffic class, hop limit, flow label and "don't fragment", outside and inside.
fn is_same_ip(first: &[u8], packet: &[u8], shape: Joinable) -> bool {
    let is_same = |is_v6: bool, at: usize| {
        let (first, packet) = (&first[at..], &packet[at..]);
        if is_v6 {
            first[..4] == packet[..4] && first[7] == packet[7]
        } else {
            first[1] == packet[1] && first[8] == packet[8] && first[6] == packet[6]
        }
    };
    is_same(shape.is_v6, shape.network) && shape.outer.is_none_or(|(is_v6, _)| is_same(is_v6, 0))
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
