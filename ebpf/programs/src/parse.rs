//! IP headers: bounds-checked, in one pass, with a bounded walk over IPv6 extension headers.

use clustermesh_ebpf_abi::{Address, DropReason};

use crate::frame::{Frame, IPV4_BYTES, IPV6_BYTES};

/// IPv6 extension headers that are walked.
pub const EXTENSION_HEADERS_MAX: usize = 6;

/// IP protocol numbers.
pub const PROTOCOL_ICMP: u8 = 1;
/// TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// ICMPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// "More fragments" and the offset, in memory order.
const FRAGMENT_MASK: u16 = 0x3fff_u16.to_be();
const FRAGMENT_OFFSET_MASK: u16 = 0x1fff_u16.to_be();

/// An address as four words in network order, aligned so that it is copied by words.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Words(pub [u32; 4]);

/// Third word of a mapped IPv4 address.
pub const MAPPED_WORD: u32 = 0xffff_u32.to_be();

impl Words {
    /// All zeros.
    pub const ZERO: Self = Self([0; 4]);

    /// An IPv4 address, mapped.
    #[inline(always)]
    pub const fn mapped(v4: u32) -> Self {
        Self([0, 0, MAPPED_WORD, v4])
    }

    /// The same bytes as a map key.
    #[inline(always)]
    pub fn as_key(&self) -> &Address {
        // SAFETY: same size, weaker alignment, any bytes are valid.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }

    /// Reads a field of a map value; such fields lie on 4-byte boundaries.
    #[inline(always)]
    pub fn from_value(address: &Address) -> Self {
        // SAFETY: in all value types of the ABI addresses start at a multiple of 4 in a value that is aligned to 4.
        Self(unsafe { *core::ptr::from_ref(address).cast::<[u32; 4]>() })
    }

    /// Equality by words.
    #[inline(always)]
    pub const fn equals(&self, other: &Self) -> bool {
        (self.0[0] ^ other.0[0])
            | (self.0[1] ^ other.0[1])
            | (self.0[2] ^ other.0[2])
            | (self.0[3] ^ other.0[3])
            == 0
    }

    /// True for a mapped IPv4 address.
    #[inline(always)]
    pub const fn is_mapped(&self) -> bool {
        (self.0[0] | self.0[1]) == 0 && self.0[2] == MAPPED_WORD
    }

    /// True for zeros.
    #[inline(always)]
    pub const fn is_zero(&self) -> bool {
        (self.0[0] | self.0[1] | self.0[2] | self.0[3]) == 0
    }
}

/// IP version of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What the programs need of an IP packet.
///
/// It is filled in place: returned in a `Result` or an enum, its bytes would be undefined on
/// the other branches, and the verifier refuses to see them copied there.
#[derive(Clone, Copy)]
pub struct Packet {
    /// IP version.
    pub family: Family,
    /// Source, IPv4 mapped.
    pub source: Words,
    /// Destination, IPv4 mapped.
    pub destination: Words,
    /// Bytes of the packet as its header says; as the frame has them where an offloaded packet is too long to say it.
    pub length_bytes: u32,
    /// Offset of the transport header in the frame.
    pub transport_offset: u32,
    /// Transport protocol.
    pub protocol: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// Not the first fragment: no transport header here.
    pub later_fragment: bool,
}

impl Packet {
    /// Nothing is known yet.
    pub const EMPTY: Self = Self {
        family: Family::V4,
        source: Words::ZERO,
        destination: Words::ZERO,
        length_bytes: 0,
        transport_offset: 0,
        protocol: 0,
        tos: 0,
        later_fragment: false,
    };
}

/// An IPv4 header as words in memory order.
type V4Words = [u32; 5];
/// An IPv6 header.
type V6Words = [u32; 10];

/// Byte `index` (in memory order) of a word.
#[inline(always)]
const fn byte(word: u32, index: u32) -> u8 {
    (word >> (index * 8)) as u8
}

/// Parses the IPv4 header at `offset`.
///
/// # Errors
/// `Malformed`.
#[inline(always)]
pub fn ipv4(frame: Frame, offset: usize, packet: &mut Packet) -> Result<(), DropReason> {
    let header = frame.at::<V4Words>(offset).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked the bounds.
    let [first, fragment, protocol, source, destination] = unsafe { *header };
    let held_bytes = frame.len().wrapping_sub(offset as u32);
    let version_ihl = byte(first, 0);
    let header_bytes = u32::from(version_ihl & 0xf) * 4;
    let total_bytes = u32::from(((first >> 16) as u16).swap_bytes());
    if version_ihl >> 4 != 4 || header_bytes < IPV4_BYTES as u32 {
        return Err(DropReason::Malformed);
    }
    // A total length of 0 is how the kernel marks an offloaded packet over 64 KiB.
    let unsaid = total_bytes == 0 && frame.segment_bytes() != 0;
    if total_bytes > held_bytes || (total_bytes < header_bytes && !unsaid) {
        return Err(DropReason::Malformed);
    }
    let length_bytes = if unsaid { held_bytes } else { total_bytes };
    *packet = Packet {
        family: Family::V4,
        source: Words::mapped(source),
        destination: Words::mapped(destination),
        length_bytes,
        transport_offset: offset as u32 + header_bytes,
        protocol: byte(protocol, 1),
        tos: byte(first, 1),
        later_fragment: (fragment >> 16) as u16 & FRAGMENT_OFFSET_MASK != 0,
    };
    Ok(())
}

/// True if the IPv4 header at `offset` belongs to a fragment, the first one too.
#[inline(always)]
pub const fn ipv4_is_fragment(fragment_word: u32) -> bool {
    (fragment_word >> 16) as u16 & FRAGMENT_MASK != 0
}

/// Parses the IPv6 header at `offset` and walks its extension headers.
///
/// # Errors
/// `Malformed`; `ExtensionHeaders` if there are more than are walked.
#[inline(always)]
pub fn ipv6(frame: Frame, offset: usize, packet: &mut Packet) -> Result<(), DropReason> {
    let header = frame.at::<V6Words>(offset).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked the bounds.
    let words = unsafe { *header };
    let held_bytes = frame.len().wrapping_sub(offset as u32);
    let payload_bytes = u32::from((words[1] as u16).swap_bytes());
    if byte(words[0], 0) >> 4 != 6 || payload_bytes + IPV6_BYTES as u32 > held_bytes {
        return Err(DropReason::Malformed);
    }
    let unsaid = payload_bytes == 0 && frame.segment_bytes() != 0;
    let length_bytes = if unsaid {
        held_bytes
    } else {
        payload_bytes + IPV6_BYTES as u32
    };
    let source = Words([words[2], words[3], words[4], words[5]]);
    let destination = Words([words[6], words[7], words[8], words[9]]);
    // Such addresses stand for IPv4 in every map; on the wire they have no meaning (RFC 4291, 2.5.5.2).
    if source.is_mapped() || destination.is_mapped() {
        return Err(DropReason::Malformed);
    }
    *packet = Packet {
        family: Family::V6,
        source,
        destination,
        length_bytes,
        transport_offset: (offset + IPV6_BYTES) as u32,
        protocol: byte(words[1], 2),
        tos: (byte(words[0], 0) << 4) | (byte(words[0], 1) >> 4),
        later_fragment: false,
    };
    match packet.protocol {
        PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_ICMPV6 => Ok(()),
        _ => walk_extensions(frame, packet),
    }
}

#[inline(always)]
const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        HOP_BY_HOP
            | ROUTING
            | FRAGMENT
            | AUTHENTICATION
            | DESTINATION_OPTIONS
            | MOBILITY
            | HIP
            | SHIM6
    )
}

#[inline(always)]
fn walk_extensions(frame: Frame, packet: &mut Packet) -> Result<(), DropReason> {
    for _ in 0..EXTENSION_HEADERS_MAX {
        if !is_extension(packet.protocol) {
            return Ok(());
        }
        // Next header, length, and for a fragment header its offset.
        let mut head = [0_u8; 4];
        frame.load(packet.transport_offset, &mut head)?;
        let bytes = match packet.protocol {
            FRAGMENT => {
                packet.later_fragment = u16::from_be_bytes([head[2], head[3]]) & 0xfff8 != 0;
                8
            }
            AUTHENTICATION => (u32::from(head[1]) + 2) * 4,
            _ => (u32::from(head[1]) + 1) * 8,
        };
        packet.protocol = head[0];
        packet.transport_offset += bytes;
        // What follows the header of a later fragment is payload.
        if packet.later_fragment {
            return Ok(());
        }
    }
    if is_extension(packet.protocol) {
        Err(DropReason::ExtensionHeaders)
    } else {
        Ok(())
    }
}

/// True for packets that live on one link only and are never forwarded: IPv6 multicast,
/// link-local and unspecified sources (neighbour discovery, duplicate detection, router
/// solicitation); IPv4 multicast and broadcast.
#[inline(always)]
pub const fn is_link_scoped(packet: &Packet) -> bool {
    match packet.family {
        Family::V4 => byte(packet.destination.0[3], 0) >= 224,
        Family::V6 => {
            byte(packet.destination.0[0], 0) == 0xff
                || (packet.source.0[0] & 0xffc0_0000_u32.to_be()) == 0xfe80_0000_u32.to_be()
                || packet.source.is_zero()
        }
    }
}

/// True if a packet from another machine may have this source: not "this network", loopback, multicast or beyond
/// (RFC 6890).
#[inline(always)]
pub const fn is_global(family: Family, source: &Words) -> bool {
    match family {
        Family::V4 => {
            let first = byte(source.0[3], 0);
            first != 0 && first != 127 && first < 224
        }
        Family::V6 => {
            let loopback =
                (source.0[0] | source.0[1] | source.0[2]) == 0 && source.0[3] == 1_u32.to_be();
            !loopback
                && !source.is_zero()
                && byte(source.0[0], 0) != 0xff
                && (source.0[0] & 0xffc0_0000_u32.to_be()) != 0xfe80_0000_u32.to_be()
        }
    }
}

/// True if `address` lies in `network` of `bits` bits; `bits` 0 matches nothing. IPv4 mapped.
#[inline(always)]
pub fn in_network(address: &Words, network: &Words, bits: u8) -> bool {
    if bits == 0 {
        return false;
    }
    let high = [pair(address, 0), pair(network, 0)];
    let low = [pair(address, 2), pair(network, 2)];
    let bits = u64::from(bits);
    if bits <= 64 {
        return (high[0] ^ high[1]) >> ((64 - bits) & 63) == 0;
    }
    high[0] == high[1] && (low[0] ^ low[1]) >> ((128 - bits) & 63) == 0
}

/// Two words from `index` on as one number in host order.
#[inline(always)]
const fn pair(address: &Words, index: usize) -> u64 {
    ((address.0[index].swap_bytes() as u64) << 32) | address.0[index + 1].swap_bytes() as u64
}
