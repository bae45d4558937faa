//! Answers to packets for pods that are gone, made out of the packet itself: RST to TCP, ICMP to the rest.
//!
//! The host's stack cannot answer: its route for the pod CIDR leads here, and an ICMP
//! error would not end an established TCP connection. What was made here leaves with
//! the identity of a remote node and the pod's own address, so the node that gets it
//! must know whose pod CIDR that is. The router's address would not do for ICMP: the
//! host refuses packets from its own address.

use aya_ebpf::bindings::{BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::generated::{bpf_skb_adjust_room, bpf_skb_change_tail};
use clustermesh_ebpf_abi::DropReason;

use crate::checksum::{fold, pseudo, sum};
use crate::frame::{ETHERNET_BYTES, Frame, IPV4_BYTES, IPV6_BYTES};
use crate::parse::{Family, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, Packet};

const TTL: u32 = 64;
const TCP_BYTES: usize = 20;
const ICMP_BYTES: usize = 8;
/// Of the refused packet's payload, an ICMP error quotes so much (RFC 792).
const QUOTED_PAYLOAD_BYTES: usize = 8;

const TCP_FIN: u32 = 1 << 16;
const TCP_SYN: u32 = 1 << 17;
const TCP_RST: u32 = 1 << 18;
const TCP_ACK: u32 = 1 << 20;
const TCP_HEADER_WORDS: u32 = 5;

/// Destination unreachable: host (RFC 792).
const ICMP_HOST_UNREACHABLE: u32 = 0x0301_0000;
/// Destination unreachable: port. To UDP, because sockets hear of no other code unless they ask.
const ICMP_PORT_UNREACHABLE: u32 = 0x0303_0000;
/// Destination unreachable: address (RFC 4443, 3.1).
const ICMPV6_ADDRESS_UNREACHABLE: u32 = 0x0103_0000;
/// Destination unreachable: port.
const ICMPV6_PORT_UNREACHABLE: u32 = 0x0104_0000;
const ICMP_ECHO: u8 = 8;
const ICMPV6_ERRORS_END: u8 = 128;

/// Turns the packet, whose IP header is at `offset`, into the answer to its sender, described in
/// `answer`. What is in front of it is left undefined, and to whoever sends it.
///
/// # Errors
/// `UnknownPod` if nothing may be answered: to a RST, an ICMP error, a later fragment, a
/// packet with IP options or too short to be quoted.
#[inline(always)]
pub fn make(
    frame: Frame,
    packet: &Packet,
    offset: usize,
    answer: &mut Packet,
) -> Result<(), DropReason> {
    if packet.later_fragment {
        return Err(DropReason::UnknownPod);
    }
    match packet.family {
        Family::V4 if packet.transport_offset as usize != offset + IPV4_BYTES => {
            Err(DropReason::UnknownPod)
        }
        Family::V4 if packet.protocol == PROTOCOL_TCP => {
            reset::<IPV4_BYTES>(frame, packet, offset, answer)
        }
        Family::V4 => unreachable_v4(frame, packet, offset, answer),
        Family::V6 if packet.protocol != PROTOCOL_TCP => {
            unreachable_v6(frame, packet, offset, answer)
        }
        Family::V6 if packet.transport_offset as usize != offset + IPV6_BYTES => {
            Err(DropReason::UnknownPod)
        }
        Family::V6 => reset::<IPV6_BYTES>(frame, packet, offset, answer),
    }
}

/// Makes the frame `bytes` long. What it holds afterwards is to be written anew, all of it.
#[inline(always)]
fn resize(frame: Frame, bytes: usize) -> Result<(), DropReason> {
    if frame.len() > bytes as u32 {
        // Takes off segmentation too. The kernel refuses it for a tunnel packet that came from
        // a neighbour on this machine, which is still marked as one; what follows does for those.
        // SAFETY: the context is valid.
        unsafe { bpf_skb_change_tail(frame.skb, bytes as u32, 0) };
    }
    let missing = (bytes as u32).wrapping_sub(frame.len()) as i32;
    if missing != 0 {
        let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
        // SAFETY: the context is valid.
        let status = unsafe { bpf_skb_adjust_room(frame.skb, missing, BPF_ADJ_ROOM_MAC, flags) };
        if status != 0 {
            return Err(DropReason::EncapsulationFailed);
        }
    }
    frame.make_linear(bytes);
    Ok(())
}

/// The answer's IP packet: source and destination changed over.
#[inline(always)]
fn reply(packet: &Packet, offset: usize, protocol: u8, payload_bytes: usize) -> Packet {
    let header_bytes = match packet.family {
        Family::V4 => IPV4_BYTES,
        Family::V6 => IPV6_BYTES,
    };
    Packet {
        family: packet.family,
        source: packet.destination,
        destination: packet.source,
        length_bytes: (header_bytes + payload_bytes) as u32,
        transport_offset: (offset + header_bytes) as u32,
        protocol,
        tos: 0,
        later_fragment: false,
    }
}

/// Writes the IP header of `packet` at `offset`.
#[inline(always)]
fn write_ip(frame: Frame, packet: &Packet, offset: usize) -> Result<(), DropReason> {
    match packet.family {
        Family::V4 => {
            let header = frame.at::<[u32; 5]>(offset).ok_or(DropReason::UnknownPod)?;
            let mut words = [
                (0x4500_0000 | packet.length_bytes).to_be(),
                0x4000_u32.to_be(),
                ((TTL << 24) | (u32::from(packet.protocol) << 16)).to_be(),
                packet.source.0[3],
                packet.destination.0[3],
            ];
            words[2] |= u32::from(!fold(sum(&words))) << 16;
            // SAFETY: `at` has checked the bounds.
            unsafe { *header = words };
        }
        Family::V6 => {
            let header = frame
                .at::<[u32; 10]>(offset)
                .ok_or(DropReason::UnknownPod)?;
            let (s, d) = (packet.source.0, packet.destination.0);
            let payload_bytes = packet.length_bytes - IPV6_BYTES as u32;
            let second = (payload_bytes << 16) | (u32::from(packet.protocol) << 8) | TTL;
            // SAFETY: `at` has checked the bounds.
            unsafe {
                *header = [
                    0x6000_0000_u32.to_be(),
                    second.to_be(),
                    s[0],
                    s[1],
                    s[2],
                    s[3],
                    d[0],
                    d[1],
                    d[2],
                    d[3],
                ];
            }
        }
    }
    Ok(())
}

/// Sum of both addresses; the constant word of mapped ones is left out.
#[inline(always)]
fn addresses(packet: &Packet) -> u64 {
    match packet.family {
        Family::V4 => u64::from(packet.source.0[3]) + u64::from(packet.destination.0[3]),
        Family::V6 => sum(&packet.source.0) + sum(&packet.destination.0),
    }
}

/// RST as of RFC 9293, 3.10.7.1.
#[inline(always)]
fn reset<const IP_BYTES: usize>(
    frame: Frame,
    packet: &Packet,
    offset: usize,
    answer: &mut Packet,
) -> Result<(), DropReason> {
    frame.make_linear(offset + IP_BYTES + TCP_BYTES);
    let header = frame
        .at::<[u32; 5]>(offset + IP_BYTES)
        .ok_or(DropReason::UnknownPod)?;
    // SAFETY: `at` has checked the bounds.
    let [ports, sequence, acknowledged, control, check] = unsafe { *header };
    let control = control.swap_bytes();
    if control & TCP_RST != 0 {
        return Err(DropReason::UnknownPod);
    }
    let segment_bytes = packet.length_bytes.wrapping_sub(IP_BYTES as u32);
    let payload_bytes = segment_bytes.wrapping_sub((control >> 28) * 4);
    let (sequence, acknowledged, flags) = if control & TCP_ACK != 0 {
        (acknowledged, 0, TCP_RST)
    } else {
        let controls = u32::from(control & TCP_SYN != 0) + u32::from(control & TCP_FIN != 0);
        let next = sequence
            .swap_bytes()
            .wrapping_add(payload_bytes)
            .wrapping_add(controls);
        (0, next.to_be(), TCP_RST | TCP_ACK)
    };
    *answer = reply(packet, offset, PROTOCOL_TCP, TCP_BYTES);
    // A local sender leaves the sum over the pseudo header for its device to complete, and the
    // kernel goes on expecting just that in the same place. A tunnel packet is cut in front, which
    // moves the place out of the way: there the whole sum is right.
    let pseudo_sum = fold(addresses(packet) + pseudo(PROTOCOL_TCP, segment_bytes));
    let left_to_device = offset == ETHERNET_BYTES && check as u16 == pseudo_sum;
    let covered = addresses(answer) + pseudo(PROTOCOL_TCP, TCP_BYTES as u32);
    let mut words = [
        ports.rotate_right(16),
        sequence,
        acknowledged,
        ((TCP_HEADER_WORDS << 28) | flags).to_be(),
        0,
    ];
    let checksum = if left_to_device {
        fold(covered)
    } else {
        !fold(covered + sum(&words))
    };
    words[4] = u32::from(checksum);

    resize(frame, offset + IP_BYTES + TCP_BYTES)?;
    write_ip(frame, answer, offset)?;
    let header = frame
        .at::<[u32; 5]>(offset + IP_BYTES)
        .ok_or(DropReason::UnknownPod)?;
    // SAFETY: `at` has checked the bounds.
    unsafe { *header = words };
    Ok(())
}

/// What an ICMP error quotes: header and the beginning of the payload.
#[inline(always)]
fn quote<const WORDS: usize>(frame: Frame, offset: usize) -> Result<[u32; WORDS], DropReason> {
    frame.make_linear(offset + WORDS * 4);
    let quoted = frame
        .at::<[u32; WORDS]>(offset)
        .ok_or(DropReason::UnknownPod)?;
    // SAFETY: `at` has checked the bounds.
    Ok(unsafe { *quoted })
}

/// Writes the ICMP header and the quotation; `pseudo_header` is 0 for IPv4.
#[inline(always)]
fn write_icmp<const WORDS: usize>(
    frame: Frame,
    offset: usize,
    kind: u32,
    quoted: &[u32; WORDS],
    pseudo_header: u64,
) -> Result<(), DropReason> {
    let header = frame.at::<[u32; 2]>(offset).ok_or(DropReason::UnknownPod)?;
    let rest = frame
        .at::<[u32; WORDS]>(offset + ICMP_BYTES)
        .ok_or(DropReason::UnknownPod)?;
    let first = kind.to_be();
    let checksum = !fold(pseudo_header + sum(quoted) + u64::from(first));
    // SAFETY: `at` has checked the bounds.
    unsafe {
        *header = [first | (u32::from(checksum) << 16), 0];
        *rest = *quoted;
    }
    Ok(())
}

/// Type of an ICMP message.
#[inline(always)]
fn icmp_type(frame: Frame, packet: &Packet) -> Result<u8, DropReason> {
    let mut kind = 0_u8;
    frame.load(packet.transport_offset, &mut kind)?;
    Ok(kind)
}

#[inline(always)]
fn unreachable_v4(
    frame: Frame,
    packet: &Packet,
    offset: usize,
    answer: &mut Packet,
) -> Result<(), DropReason> {
    const QUOTED_WORDS: usize = (IPV4_BYTES + QUOTED_PAYLOAD_BYTES) / 4;
    if packet.protocol == PROTOCOL_ICMP && icmp_type(frame, packet)? != ICMP_ECHO {
        return Err(DropReason::UnknownPod);
    }
    let kind = if packet.protocol == PROTOCOL_UDP {
        ICMP_PORT_UNREACHABLE
    } else {
        ICMP_HOST_UNREACHABLE
    };
    let quoted = quote::<QUOTED_WORDS>(frame, offset)?;
    let payload_bytes = ICMP_BYTES + QUOTED_WORDS * 4;
    *answer = reply(packet, offset, PROTOCOL_ICMP, payload_bytes);
    resize(frame, offset + IPV4_BYTES + payload_bytes)?;
    write_ip(frame, answer, offset)?;
    write_icmp(frame, offset + IPV4_BYTES, kind, &quoted, 0)
}

#[inline(always)]
fn unreachable_v6(
    frame: Frame,
    packet: &Packet,
    offset: usize,
    answer: &mut Packet,
) -> Result<(), DropReason> {
    const QUOTED_WORDS: usize = (IPV6_BYTES + QUOTED_PAYLOAD_BYTES) / 4;
    if packet.protocol == PROTOCOL_ICMPV6 && icmp_type(frame, packet)? < ICMPV6_ERRORS_END {
        return Err(DropReason::UnknownPod);
    }
    let kind = if packet.protocol == PROTOCOL_UDP {
        ICMPV6_PORT_UNREACHABLE
    } else {
        ICMPV6_ADDRESS_UNREACHABLE
    };
    let quoted = quote::<QUOTED_WORDS>(frame, offset)?;
    let payload_bytes = ICMP_BYTES + QUOTED_WORDS * 4;
    *answer = reply(packet, offset, PROTOCOL_ICMPV6, payload_bytes);
    let pseudo_header = addresses(answer) + pseudo(PROTOCOL_ICMPV6, payload_bytes as u32);
    resize(frame, offset + IPV6_BYTES + payload_bytes)?;
    write_ip(frame, answer, offset)?;
    write_icmp(frame, offset + IPV6_BYTES, kind, &quoted, pseudo_header)
}
