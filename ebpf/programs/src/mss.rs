//! Segments that fit: TCP connections are told of smaller packets when they begin. Those of the host that go through
//! WireGuard, and those of pods to nodes to which the path takes less than the devices.
//!
//! The host sends by a route of the underlay, whose packets may be larger. WireGuard would carry them, each in two
//! pieces of the underlay. What is written into SYN is what the other side keeps to; it does the same for ours.

use aya_ebpf::helpers::generated::{bpf_l4_csum_replace, bpf_skb_store_bytes};
use clustermesh_ebpf_abi::{NODE_DIRECT, NodeValue};

use crate::encap::TUNNEL_BYTES;
use crate::frame::{ETHERNET_BYTES, Frame, IPV4_BYTES, IPV6_BYTES};
use crate::parse::{Family, PROTOCOL_TCP, Packet, Words};

const TCP_BYTES: u32 = 20;
const TCP_FLAGS_OFFSET: u32 = 13;
const TCP_CHECKSUM_OFFSET: u32 = 16;
const TCP_SYN: u8 = 1 << 1;
/// "More fragments" and the offset of an IPv4 header.
const FRAGMENT_MASK: u16 = 0x3fff;
/// Options of a SYN are walked so far; Linux and the BSDs put the segment size first.
const OPTIONS_MAX: usize = 8;
const OPTION_END: u8 = 0;
const OPTION_NOTHING: u8 = 1;
const OPTION_SEGMENT_SIZE: u8 = 2;
const SEGMENT_SIZE_BYTES: u8 = 4;
/// Both fields have two bytes.
const FIELD_BYTES: u64 = 2;

/// Lowers the largest segment that a SYN names to what fits into WireGuard's packets towards `node`.
#[inline(always)]
pub fn clamp(frame: Frame, packet: &Packet, node: &NodeValue) {
    let path_bytes = u32::from(node.path_mtu_bytes);
    if path_bytes != 0
        && let Some(transport) = transport(frame, packet)
    {
        lower(frame, packet, transport, device_bytes(node, path_bytes));
    }
}

/// The same for a packet of a pod, which `mtu_bytes` is the most for.
#[inline(always)]
pub fn clamp_inside(frame: Frame, packet: &Packet, mtu_bytes: u32) {
    if mtu_bytes != 0 && packet.protocol == PROTOCOL_TCP && !packet.later_fragment {
        lower(frame, packet, packet.transport_offset, mtu_bytes);
    }
}

#[inline(always)]
fn lower(frame: Frame, packet: &Packet, transport: u32, mtu_bytes: u32) {
    if !is_syn(frame, transport) {
        return;
    }
    let ip_bytes = match packet.family {
        Family::V4 => IPV4_BYTES,
        Family::V6 => IPV6_BYTES,
    };
    let most = mtu_bytes.saturating_sub(ip_bytes as u32 + TCP_BYTES) as u16;
    let Some(place) = segment_size(frame, transport) else {
        return;
    };
    let mut named = [0_u8; 2];
    if frame.load(place, &mut named).is_err() || u16::from_be_bytes(named) <= most {
        return;
    }
    let (from, to) = (u16::from_ne_bytes(named), most.to_be());
    // SAFETY: the context is valid, and so is the pointer to two bytes. A SYN that cannot be changed goes as it is.
    unsafe {
        let checksum = transport + TCP_CHECKSUM_OFFSET;
        if bpf_l4_csum_replace(frame.skb, checksum, from.into(), to.into(), FIELD_BYTES) == 0 {
            bpf_skb_store_bytes(
                frame.skb,
                place,
                core::ptr::from_ref(&to).cast(),
                FIELD_BYTES as u32,
                0,
            );
        }
    }
}

/// Largest packet of the WireGuard device. What is said of a node leaves room for a tunnel, unless it is routed to.
#[inline(always)]
fn device_bytes(node: &NodeValue, path_bytes: u32) -> u32 {
    if node.flags & NODE_DIRECT != 0 {
        return path_bytes;
    }
    let outer = if Words::from_value(&node.endpoint).is_mapped() {
        IPV4_BYTES
    } else {
        IPV6_BYTES
    };
    path_bytes + (outer + TUNNEL_BYTES) as u32
}

/// Where the TCP header is, if there is one.
#[inline(always)]
fn transport(frame: Frame, packet: &Packet) -> Option<u32> {
    const IP: u32 = ETHERNET_BYTES as u32;
    match packet.family {
        Family::V4 => {
            let mut head = [0_u8; 10];
            frame.load(IP, &mut head).ok()?;
            let is_part = u16::from_be_bytes([head[6], head[7]]) & FRAGMENT_MASK != 0;
            (head[9] == PROTOCOL_TCP && !is_part).then_some(IP + u32::from(head[0] & 0xf) * 4)
        }
        Family::V6 => {
            let mut next = 0_u8;
            frame.load(IP + 6, &mut next).ok()?;
            (next == PROTOCOL_TCP).then_some(IP + IPV6_BYTES as u32)
        }
    }
}

#[inline(always)]
fn is_syn(frame: Frame, transport: u32) -> bool {
    let mut flags = 0_u8;
    frame.load(transport + TCP_FLAGS_OFFSET, &mut flags).is_ok() && flags & TCP_SYN != 0
}

/// Where the option stands, past its kind and length. The packet's end bounds the walk where the header's does not.
#[inline(always)]
fn segment_size(frame: Frame, transport: u32) -> Option<u32> {
    let mut place = transport + TCP_BYTES;
    for _ in 0..OPTIONS_MAX {
        let mut option = [0_u8; 2];
        frame.load(place, &mut option).ok()?;
        let [kind, bytes] = option;
        match kind {
            OPTION_END => return None,
            OPTION_NOTHING => place += 1,
            OPTION_SEGMENT_SIZE if bytes == SEGMENT_SIZE_BYTES => return Some(place + 2),
            _ if bytes < 2 => return None,
            _ => place += u32::from(bytes),
        }
    }
    None
}
