//! Cuts a super-packet of the TUN device into packets of MTU size: headers, lengths, IP ids, sequence numbers, flags and
//! checksums are set for each segment, as a network card does. One within a tunnel (VXLAN, Geneve) gets its outer
//! headers on every segment too.

use crate::checksum::{Sum, pseudo_header};
use crate::packet::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, TCP, UDP, half};
use crate::vnet::{
    GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_UDP_TUNNEL_IPV4, GSO_UDP_TUNNEL_IPV6,
    NEEDS_CSUM, VnetHeader,
};

/// Longest run of headers that is understood, those of a tunnel too, bytes.
pub const HEADERS_BYTES_MAX: usize = 192;
/// Longest packet that the device reads, bytes.
pub const PACKET_BYTES_MAX: usize = 65_535;

const TCP_HEADER_BYTES: usize = 20;
const UDP_HEADER_BYTES: usize = 8;
const FIN: u8 = 1;
const PSH: u8 = 8;
const CWR: u8 = 0x80;

/// Why a packet of the TUN device cannot be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SplitError {
    /// No IP packet, or shorter than its headers say.
    #[error("not a whole IP packet")]
    Malformed,
    /// Not an offload that was asked for.
    #[error("super-packets of type {gso_type:#x} are not supported")]
    UnknownOffload {
        /// As in the header of the device.
        gso_type: u8,
    },
    /// The place of the checksum is outside of the packet.
    #[error("the checksum would stand outside of the packet")]
    ChecksumOutside,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One packet; its checksum is complete, or to be completed there.
    Whole {
        checksum: Option<(usize, usize)>,
    },
    Tcp {
        first_only: u8,
    },
    Udp,
}

/// An IP header that every segment gets.
#[derive(Clone, Copy, Debug)]
struct Ip {
    at: usize,
    is_v6: bool,
    /// Of what all such IPv4 headers have in common.
    common: Sum,
}

impl Ip {
    /// The header at `at` of `headers`, behind which `end` is.
    fn read(headers: &[u8], at: usize, end: usize) -> Option<Self> {
        let header = headers.get(at..end)?;
        let mut ip = Self {
            at,
            is_v6: false,
            common: Sum::default(),
        };
        match header.first()? {
            first if first >> 4 == 4 && header.len() >= IPV4_HEADER_BYTES => {
                if header.len() != usize::from(first & 15) * 4 {
                    return None;
                }
                // Without length, id and checksum.
                ip.common = ip
                    .common
                    .add_bytes(&header[..2])
                    .add_bytes(&header[6..10])
                    .add_bytes(&header[12..]);
            }
            first if first >> 4 == 6 && header.len() >= IPV6_HEADER_BYTES => ip.is_v6 = true,
            _ => return None,
        }
        Some(ip)
    }

    /// Sets length, id and checksum for segment `index`, which has a copy of the super-packet's headers.
    #[inline]
    fn write(&self, index: usize, segment: &mut [u8]) {
        let packet = &mut segment[self.at..];
        let length = packet.len();
        if self.is_v6 {
            let payload = number(length - IPV6_HEADER_BYTES);
            packet[4..6].copy_from_slice(&payload);
        } else {
            packet[2..4].copy_from_slice(&number(length));
            let first = half(packet, 4).unwrap_or(0);
            let id = number(first + index);
            packet[4..6].copy_from_slice(&id);
            let checksum = self
                .common
                .add_u16(u16::from_be_bytes(number(length)))
                .add_u16(u16::from_be_bytes(id))
                .finish();
            packet[10..12].copy_from_slice(&checksum);
        }
    }
}

/// The headers of a tunnel.
#[derive(Clone, Copy, Debug)]
struct Outer {
    ip: Ip,
    /// Where the UDP header is. It has no checksum: such offloads are not asked for.
    transport: usize,
}

/// How one packet of the device becomes packets of the wire.
#[derive(Clone, Debug)]
pub struct Split {
    kind: Kind,
    outer: Option<Outer>,
    /// The inner one in a tunnel.
    ip: Ip,
    /// All headers of the super-packet.
    headers: [u8; HEADERS_BYTES_MAX],
    transport: usize,
    header_len: usize,
    total_len: usize,
    segment_payload: usize,
    count: usize,
    /// Of the addresses and the protocol.
    pseudo: Sum,
}

impl Split {
    /// Plans the cut of a packet of `total_len` bytes; `head` is its beginning, all headers at least.
    ///
    /// # Errors
    /// When the packet cannot be sent on.
    pub fn plan(vnet: VnetHeader, head: &[u8], total_len: usize) -> Result<Self, SplitError> {
        if total_len > PACKET_BYTES_MAX || head.len() > total_len {
            return Err(SplitError::Malformed);
        }
        let gso_type = vnet.gso_type & !GSO_ECN;
        let is_ecn = vnet.gso_type & GSO_ECN != 0;
        let tunnel = gso_type & (GSO_UDP_TUNNEL_IPV4 | GSO_UDP_TUNNEL_IPV6);
        let network = if tunnel == 0 {
            0
        } else {
            usize::from(vnet.inner_network)
        };
        let left = head.len().saturating_sub(network);
        let is_v6 = match head.get(network).map(|first| first >> 4) {
            Some(4) if left >= IPV4_HEADER_BYTES => false,
            Some(6) if left >= IPV6_HEADER_BYTES => true,
            _ => return Err(SplitError::Malformed),
        };
        let mut plan = Self {
            kind: Kind::Whole { checksum: None },
            outer: None,
            ip: Ip {
                at: network,
                is_v6,
                common: Sum::default(),
            },
            headers: [0; HEADERS_BYTES_MAX],
            transport: 0,
            header_len: 0,
            total_len,
            segment_payload: total_len,
            count: 1,
            pseudo: Sum::default(),
        };
        let (start, offset) = (usize::from(vnet.csum_start), usize::from(vnet.csum_offset));
        let header_len = match (gso_type & !tunnel, is_v6) {
            (GSO_NONE, _) if tunnel == 0 => {
                if vnet.flags & NEEDS_CSUM != 0 {
                    if start + offset + 2 > total_len {
                        return Err(SplitError::ChecksumOutside);
                    }
                    plan.kind = Kind::Whole {
                        checksum: Some((start, start + offset)),
                    };
                }
                return Ok(plan);
            }
            (GSO_TCPV4, false) | (GSO_TCPV6, true) => {
                let words = head.get(start + 12).ok_or(SplitError::Malformed)? >> 4;
                let length = usize::from(words) * 4;
                if length < TCP_HEADER_BYTES {
                    return Err(SplitError::Malformed);
                }
                plan.kind = Kind::Tcp {
                    first_only: if is_ecn { CWR } else { 0 },
                };
                start + length
            }
            (GSO_UDP_L4, _) => {
                plan.kind = Kind::Udp;
                start + UDP_HEADER_BYTES
            }
            _ => {
                let gso_type = vnet.gso_type;
                return Err(SplitError::UnknownOffload { gso_type });
            }
        };
        let payload = total_len
            .checked_sub(header_len)
            .ok_or(SplitError::Malformed)?;
        let size = usize::from(vnet.gso_size);
        let headers = head.get(..header_len).ok_or(SplitError::Malformed)?;
        let room = plan
            .headers
            .get_mut(..header_len)
            .ok_or(SplitError::Malformed)?;
        if size == 0 {
            return Err(SplitError::Malformed);
        }
        plan.ip = Ip::read(headers, network, start).ok_or(SplitError::Malformed)?;
        if tunnel != 0 {
            let outer = read_outer(headers, vnet.outer_transport.into(), network);
            plan.outer = Some(outer.ok_or(SplitError::Malformed)?);
        }
        room.copy_from_slice(headers);
        plan.transport = start;
        plan.header_len = header_len;
        plan.segment_payload = size;
        plan.count = payload.div_ceil(size).max(1);
        let protocol = if plan.kind == Kind::Udp { UDP } else { TCP };
        let addresses = if is_v6 { 8..40 } else { 12..20 };
        plan.pseudo = pseudo_header(&headers[network..][addresses], protocol);
        Ok(plan)
    }

    /// How many packets there will be; at least one.
    #[must_use]
    #[inline]
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Bytes of headers before each payload; 0 of a packet that is not cut.
    #[must_use]
    #[inline]
    pub const fn header_len(&self) -> usize {
        self.header_len
    }

    /// Length of segment `index`, bytes.
    #[must_use]
    #[inline]
    pub fn segment_len(&self, index: usize) -> usize {
        self.header_len + self.payload_range(index).len()
    }

    /// Where the payload of segment `index` lies in the super-packet.
    #[must_use]
    #[inline]
    pub fn payload_range(&self, index: usize) -> std::ops::Range<usize> {
        let from = (self.header_len + index * self.segment_payload).min(self.total_len);
        from..(from + self.segment_payload).min(self.total_len)
    }

    /// Copies the payload of segment `index` out of the super-packet and completes the segment.
    ///
    /// # Errors
    /// When `segment` or `packet` is too short.
    pub fn copy(&self, index: usize, packet: &[u8], segment: &mut [u8]) -> Result<(), SplitError> {
        let payload = packet
            .get(self.payload_range(index))
            .ok_or(SplitError::Malformed)?;
        segment
            .get_mut(self.header_len..)
            .filter(|room| room.len() == payload.len())
            .ok_or(SplitError::Malformed)?
            .copy_from_slice(payload);
        self.complete(index, segment)
    }

    /// Completes segment `index`, whose payload is in its place: writes headers and checksums.
    ///
    /// # Errors
    /// When `segment` is not of the segment's length.
    #[inline]
    pub fn complete(&self, index: usize, segment: &mut [u8]) -> Result<(), SplitError> {
        if segment.len() != self.segment_len(index) {
            return Err(SplitError::Malformed);
        }
        match self.kind {
            Kind::Whole { checksum: None } => Ok(()),
            Kind::Whole {
                checksum: Some((start, at)),
            } => complete_checksum(segment, start, at),
            Kind::Tcp { first_only } => {
                self.write_headers(index, segment);
                self.write_tcp(index, first_only, segment);
                Ok(())
            }
            Kind::Udp => {
                self.write_headers(index, segment);
                self.write_udp(segment);
                Ok(())
            }
        }
    }

    fn write_headers(&self, index: usize, segment: &mut [u8]) {
        segment[..self.header_len].copy_from_slice(&self.headers[..self.header_len]);
        if let Some(outer) = &self.outer {
            outer.ip.write(index, segment);
            let length = number(segment.len() - outer.transport);
            segment[outer.transport + 4..outer.transport + 6].copy_from_slice(&length);
        }
        self.ip.write(index, segment);
    }

    fn write_tcp(&self, index: usize, first_only: u8, segment: &mut [u8]) {
        let tcp = &mut segment[self.transport..];
        let mut sequence = [0; 4];
        sequence.copy_from_slice(&tcp[4..8]);
        #[expect(clippy::cast_possible_truncation, reason = "below 64 KiB")]
        let offset = (index * self.segment_payload) as u32;
        let sequence = u32::from_be_bytes(sequence).wrapping_add(offset);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        if index + 1 < self.count {
            tcp[13] &= !(FIN | PSH);
        }
        if index > 0 {
            tcp[13] &= !first_only;
        }
        tcp[16..18].fill(0);
        let length = u16::from_be_bytes(number(tcp.len()));
        let checksum = self.pseudo.add_u16(length).add_bytes(tcp).finish();
        tcp[16..18].copy_from_slice(&checksum);
    }

    fn write_udp(&self, segment: &mut [u8]) {
        let udp = &mut segment[self.transport..];
        let length = number(udp.len());
        udp[4..6].copy_from_slice(&length);
        udp[6..8].fill(0);
        let length = u16::from_be_bytes(length);
        let checksum = self.pseudo.add_u16(length).add_bytes(udp).finish();
        udp[6..8].copy_from_slice(&not_zero(checksum));
    }
}

/// The headers of a tunnel, whose UDP header is at `transport` and whose inner IP header at `network`.
fn read_outer(headers: &[u8], transport: usize, network: usize) -> Option<Outer> {
    let ip = Ip::read(headers, 0, transport)?;
    let udp = headers.get(transport..network)?;
    let has_checksum = udp.get(6..8)? != [0, 0];
    (!has_checksum && headers_protocol(headers, &ip)? == UDP).then_some(Outer { ip, transport })
}

fn headers_protocol(headers: &[u8], ip: &Ip) -> Option<u8> {
    headers.get(if ip.is_v6 { 6 } else { 9 }).copied()
}

/// Completes the checksum of a packet whose field holds the sum of the pseudo header.
fn complete_checksum(packet: &mut [u8], start: usize, at: usize) -> Result<(), SplitError> {
    let covered = packet.get(start..).ok_or(SplitError::ChecksumOutside)?;
    let checksum = Sum::default().add_bytes(covered).finish();
    let field = packet
        .get_mut(at..at + 2)
        .ok_or(SplitError::ChecksumOutside)?;
    // TCP does not mind either form of zero; for UDP zero means "none".
    field.copy_from_slice(&not_zero(checksum));
    Ok(())
}

#[inline]
const fn not_zero(checksum: [u8; 2]) -> [u8; 2] {
    match checksum {
        [0, 0] => [0xff, 0xff],
        other => other,
    }
}

/// Two bytes of a header; what is beyond 16 bits wraps around, as IP ids do.
#[inline]
fn number(number: usize) -> [u8; 2] {
    #[expect(clippy::cast_possible_truncation, reason = "lengths are below 64 KiB")]
    let number = number as u16;
    number.to_be_bytes()
}
