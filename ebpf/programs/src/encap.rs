//! VXLAN, written and taken off by ourselves: no tunnel device, so offloads and the neighbour table are used directly.
//!
//! The length of the inner link layer in the flags is the inner Ethernet header alone.
//! With the VXLAN header counted in, single packets pass and every offloaded one is
//! dropped on transmit. The inner MAC addresses must differ: a kernel VXLAN device at
//! the other end takes equal ones for its own frames.

use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6,
    BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::helpers::generated::{
    bpf_get_hash_recalc, bpf_skb_adjust_room, bpf_skb_change_proto, bpf_skb_ecn_set_ce,
};
use clustermesh_ebpf_abi::{DropReason, NodeConfig, TUNNEL_MAC_DESTINATION, TUNNEL_MAC_SOURCE};

use crate::features::ethernet_inside;
use crate::frame::{ETHERNET_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame, IPV4_BYTES, IPV6_BYTES};
use crate::parse::{Family, PROTOCOL_UDP, Packet, Words};

/// Bytes of a UDP header.
pub const UDP_BYTES: usize = 8;
/// Bytes of a VXLAN header.
pub const VXLAN_BYTES: usize = 8;
/// UDP, VXLAN and inner Ethernet.
pub const TUNNEL_BYTES: usize = UDP_BYTES + VXLAN_BYTES + ETHERNET_BYTES;
/// First word of a VXLAN header whose VNI is valid; nothing else may be set (RFC 7348, 5).
pub const VXLAN_FLAGS: u32 = 0x0800_0000_u32.to_be();

const TTL: u32 = 64;
const DONT_FRAGMENT: u32 = 0x4000;
/// Congestion bits of the type of service; both set = congestion experienced (RFC 3168, 5).
pub const ECN_MASK: u8 = 0b11;
/// Source ports 49152..=65535 (RFC 7348, 5).
const SOURCE_PORT_BASE: u32 = 0xc000;
const SOURCE_PORT_MASK: u32 = 0x3fff;

const GROW_FLAGS: u64 = BPF_F_ADJ_ROOM_FIXED_GSO as u64
    | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
    | ((ETHERNET_BYTES as u64) << 56);

/// UDP, VXLAN and inner Ethernet up to its type, as words in memory order.
type TunnelWords = [u32; 7];

#[inline(always)]
fn tunnel_words(
    config: &NodeConfig,
    source_port: u32,
    udp_bytes: u32,
    identity: u32,
) -> TunnelWords {
    let [d0, d1, d2, d3, d4, d5] = TUNNEL_MAC_DESTINATION;
    let [s0, s1, s2, s3, s4, s5] = TUNNEL_MAC_SOURCE;
    let port = u32::from(u16::from_be_bytes(config.tunnel_port_be));
    [
        ((source_port << 16) | port).to_be(),
        // Checksum 0: the inner one covers the payload. Over IPv6 that is for tunnels only (RFC 6935, 6936), and some
        // middleboxes drop it; the sum would cost a pass over every packet. On receive it is not looked at: both do.
        (udp_bytes << 16).to_be(),
        VXLAN_FLAGS,
        (identity << 8).to_be(),
        u32::from_ne_bytes([d0, d1, d2, d3]),
        u32::from_ne_bytes([d4, d5, s0, s1]),
        u32::from_ne_bytes([s2, s3, s4, s5]),
    ]
}

/// Puts the tunnel's headers around the packet. The outer link layer is left to the redirect.
///
/// # Errors
/// `EncapsulationFailed`.
#[inline(always)]
pub fn encapsulate(
    frame: Frame,
    config: &NodeConfig,
    packet: &Packet,
    endpoint: &Words,
    identity: u32,
) -> Result<(), DropReason> {
    let port = source_port(frame);
    if endpoint.is_mapped() {
        grow(frame, IPV4_BYTES, u64::from(BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))?;
    } else {
        grow(frame, IPV6_BYTES, u64::from(BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))?;
    }
    write_outer(frame, config, packet, endpoint, identity, port)
}

/// Source port of the tunnel packet: from the flow inside, so it is taken before the headers change.
#[inline(always)]
pub fn source_port(frame: Frame) -> u32 {
    // SAFETY: the context is valid.
    let hash = unsafe { bpf_get_hash_recalc(frame.skb) };
    SOURCE_PORT_BASE | ((hash ^ (hash >> 16)) & SOURCE_PORT_MASK)
}

/// Writes the tunnel's headers into the room before `packet`.
///
/// # Errors
/// `EncapsulationFailed`.
#[inline(always)]
pub fn write_outer(
    frame: Frame,
    config: &NodeConfig,
    packet: &Packet,
    endpoint: &Words,
    identity: u32,
    source_port: u32,
) -> Result<(), DropReason> {
    let udp_bytes = packet.length_bytes + TUNNEL_BYTES as u32;
    let tunnel = tunnel_words(config, source_port, udp_bytes, identity);
    let inner_type = match packet.family {
        Family::V4 => ETHERTYPE_IPV4,
        Family::V6 => ETHERTYPE_IPV6,
    };
    // Congestion marks are carried outside (RFC 6040, 4.1).
    let tos = packet.tos & ECN_MASK;
    if endpoint.is_mapped() {
        write(
            frame,
            ETHERTYPE_IPV4,
            outer_v4(config, endpoint, udp_bytes, tos),
            tunnel,
            inner_type,
        )
    } else {
        write(
            frame,
            ETHERTYPE_IPV6,
            outer_v6(config, endpoint, udp_bytes, tos),
            tunnel,
            inner_type,
        )
    }
}

#[inline(always)]
fn grow(frame: Frame, ip_bytes: usize, family_flag: u64) -> Result<(), DropReason> {
    let bytes = (ip_bytes + TUNNEL_BYTES) as i32;
    let mut flags = GROW_FLAGS | family_flag;
    // Without it segmentation in software works as well, devices do not take part in it.
    if ethernet_inside() {
        flags |= u64::from(BPF_F_ADJ_ROOM_ENCAP_L2_ETH);
    }
    // SAFETY: the context is valid.
    let status = unsafe { bpf_skb_adjust_room(frame.skb, bytes, BPF_ADJ_ROOM_MAC, flags) };
    if status == 0 {
        Ok(())
    } else {
        Err(DropReason::EncapsulationFailed)
    }
}

#[inline(always)]
fn outer_v4(config: &NodeConfig, endpoint: &Words, udp_bytes: u32, tos: u8) -> [u32; 5] {
    let source = Words::from_value(&config.underlay_v4).0[3];
    let destination = endpoint.0[3];
    // Offloaded packets over 64 KiB: the length is set for each segment later.
    let total = (udp_bytes + IPV4_BYTES as u32) & 0xffff;
    let first = 0x4500_0000 | (u32::from(tos) << 16) | total;
    let third = (TTL << 24) | (PROTOCOL_UDP as u32) << 16;
    let (from, to) = (source.swap_bytes(), destination.swap_bytes());
    let sum = halves(first) + DONT_FRAGMENT + halves(third) + halves(from) + halves(to);
    let sum = halves(sum);
    let checksum = !halves(sum) & 0xffff;
    [
        first.to_be(),
        DONT_FRAGMENT.to_be(),
        (third | checksum).to_be(),
        source,
        destination,
    ]
}

/// Sum of both halves of a word.
#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word >> 16) + (word & 0xffff)
}

#[inline(always)]
fn outer_v6(config: &NodeConfig, endpoint: &Words, udp_bytes: u32, tos: u8) -> [u32; 10] {
    let source = Words::from_value(&config.underlay_v6).0;
    let destination = endpoint.0;
    let payload = udp_bytes & 0xffff;
    [
        (0x6000_0000 | (u32::from(tos) << 20)).to_be(),
        ((payload << 16) | (u32::from(PROTOCOL_UDP) << 8) | TTL).to_be(),
        source[0],
        source[1],
        source[2],
        source[3],
        destination[0],
        destination[1],
        destination[2],
        destination[3],
    ]
}

#[repr(C, packed)]
struct OuterHeaders<Ip> {
    ethertype: u16,
    ip: Ip,
    tunnel: TunnelWords,
    inner_type: u16,
}

#[inline(always)]
fn write<Ip>(
    frame: Frame,
    ethertype: u16,
    ip: Ip,
    tunnel: TunnelWords,
    inner_type: u16,
) -> Result<(), DropReason> {
    let start = frame
        .at::<OuterHeaders<Ip>>(ETHERNET_BYTES - 2)
        .ok_or(DropReason::EncapsulationFailed)?;
    // SAFETY: `at` has checked the bounds. Each part is stored by words: as one packed value it would go by bytes.
    unsafe {
        (&raw mut (*start).ethertype).write(ethertype);
        *(&raw mut (*start).ip).cast::<Ip>() = ip;
        *(&raw mut (*start).tunnel).cast::<TunnelWords>() = tunnel;
        (&raw mut (*start).inner_type).write(inner_type);
    }
    Ok(())
}

/// Takes the tunnel's headers off; what stays in front is one Ethernet header, not yet right.
/// A congestion mark of the outside (`congested`) goes to the inside (RFC 6040, 4.2).
///
/// # Errors
/// `EncapsulationFailed`.
#[inline(always)]
pub fn decapsulate(
    frame: Frame,
    outer: Family,
    inner: Family,
    congested: bool,
) -> Result<(), DropReason> {
    if outer != inner {
        change_family(frame, inner)?;
    }
    // A change of family has put a header of the inner one in the outer one's place.
    let ip_bytes = match inner {
        Family::V4 => IPV4_BYTES,
        Family::V6 => IPV6_BYTES,
    };
    let bytes = (ip_bytes + TUNNEL_BYTES) as i32;
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    // SAFETY: the context is valid.
    let status = unsafe { bpf_skb_adjust_room(frame.skb, -bytes, BPF_ADJ_ROOM_MAC, flags) };
    if status != 0 {
        return Err(DropReason::EncapsulationFailed);
    }
    if congested {
        // SAFETY: the context is valid. It fails only for packets that cannot be marked, refused before.
        unsafe { bpf_skb_ecn_set_ce(frame.skb) };
    }
    Ok(())
}

/// Makes the kernel count an offloaded packet's segments anew where it needs their number.
///
/// A WireGuard device says how many segments it takes at best; the kernel cuts a packet with more, which costs far more
/// than it helps. Those who send by routes keep to that number; who sends through a redirect never heard of it.
#[inline(always)]
pub fn forget_segments(frame: Frame) {
    if frame.segment_bytes() != 0 {
        let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
        // SAFETY: the context is valid. Where the kernel does not do it, the packet is as good, only slower.
        unsafe { bpf_skb_adjust_room(frame.skb, 0, BPF_ADJ_ROOM_MAC, flags) };
    }
}

/// Makes the kernel note another IP version for the packet, and with it the room for its header.
/// Flags of the shrinking call do both at once, but kernels before 6.3 do not know them.
#[inline(always)]
fn change_family(frame: Frame, to: Family) -> Result<(), DropReason> {
    let ethertype = match to {
        Family::V4 => ETHERTYPE_IPV4,
        Family::V6 => ETHERTYPE_IPV6,
    };
    // SAFETY: the context is valid.
    let status = unsafe { bpf_skb_change_proto(frame.skb, ethertype, 0) };
    if status == 0 {
        Ok(())
    } else {
        Err(DropReason::EncapsulationFailed)
    }
}
