//! Split and merge against each other and against slow models.

use proptest::prelude::*;

use crate::checksum::{Sum, pseudo_header, write_ipv4};
use crate::merge::{Joins, Merger};
use crate::packet::{TCP, UDP};
use crate::split::{PACKET_BYTES_MAX, Split};
use crate::test_support;
use crate::vnet::{
    GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_UDP_TUNNEL_IPV4, GSO_UDP_TUNNEL_IPV6,
    NEEDS_CSUM, VNET_HEADER_BYTES, VnetHeader,
};

/// UDP, VXLAN and the inner Ethernet header.
const VXLAN_BYTES: usize = 30;

/// A super-packet as the kernel hands it to a TUN device.
#[derive(Clone, Debug)]
struct Super {
    vnet: VnetHeader,
    packet: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    /// In a tunnel, with IPv6 outside or not.
    outer: Option<bool>,
    is_v6: bool,
    is_tcp: bool,
    options: usize,
    payload: usize,
    size: u16,
    flags: u8,
    class: u8,
    sequence: u32,
    id: u16,
    port: u16,
}

fn super_packet(shape: Shape) -> Super {
    let inner = inner_super_packet(shape);
    let Some(is_v6) = shape.outer else {
        return inner;
    };
    let transport = if is_v6 { 40 } else { 20 };
    let network = transport + VXLAN_BYTES;
    let mut packet = vec![0; network];
    packet.extend(inner.packet);
    let length = u16::try_from(packet.len()).unwrap();
    if is_v6 {
        packet[0] = 0x60 | shape.class >> 4;
        packet[1] = shape.class << 4;
        packet[4..6].copy_from_slice(&(length - 40).to_be_bytes());
        (packet[6], packet[7]) = (UDP, 64);
        packet[8..40].copy_from_slice(&[0xfc; 32]);
    } else {
        (packet[0], packet[1]) = (0x45, shape.class);
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet[4..6].copy_from_slice(&shape.id.wrapping_add(77).to_be_bytes());
        (packet[6], packet[8], packet[9]) = (0x40, 64, UDP);
        packet[12..20].copy_from_slice(&[192, 168, 0, 1, 192, 168, 0, 2]);
        write_ipv4(&mut packet[..20]);
    }
    let udp_length = length - u16::try_from(transport).unwrap();
    let head = &mut packet[transport..network];
    head[..2].copy_from_slice(&50_000_u16.to_be_bytes());
    head[2..4].copy_from_slice(&8_472_u16.to_be_bytes());
    head[4..6].copy_from_slice(&udp_length.to_be_bytes());
    head[8] = 8;
    head[12..15].copy_from_slice(&[1, 0, 7]);
    head[16..28].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
    head[28..30].copy_from_slice(if shape.is_v6 { &[0x86, 0xdd] } else { &[8, 0] });
    let added = u16::try_from(network).unwrap();
    let mut vnet = inner.vnet;
    vnet.hdr_len += added;
    vnet.csum_start += added;
    if vnet.gso_type != GSO_NONE {
        vnet.gso_type |= if is_v6 {
            GSO_UDP_TUNNEL_IPV6
        } else {
            GSO_UDP_TUNNEL_IPV4
        };
        vnet.inner_network = added;
        vnet.outer_transport = u16::try_from(transport).unwrap();
    }
    Super { vnet, packet }
}

fn inner_super_packet(shape: Shape) -> Super {
    let transport = if shape.is_v6 { 40 } else { 20 };
    let header_len = transport + if shape.is_tcp { 20 + shape.options } else { 8 };
    let total = header_len + shape.payload;
    let mut packet = vec![0; total];
    let length = u16::try_from(total).unwrap();
    let protocol = if shape.is_tcp { TCP } else { UDP };
    if shape.is_v6 {
        packet[0] = 0x60 | shape.class >> 4;
        packet[1] = shape.class << 4;
        packet[4..6].copy_from_slice(&(length - 40).to_be_bytes());
        (packet[6], packet[7]) = (protocol, 64);
        packet[8..40].copy_from_slice(&[0xfd; 32]);
    } else {
        (packet[0], packet[1]) = (0x45, shape.class);
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet[4..6].copy_from_slice(&shape.id.to_be_bytes());
        (packet[6], packet[8], packet[9]) = (0x40, 64, protocol);
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        write_ipv4(&mut packet[..20]);
    }
    let addresses = if shape.is_v6 { 8..40 } else { 12..20 };
    let pseudo = pseudo_header(&packet[addresses], protocol)
        .add_u16(length - u16::try_from(transport).unwrap())
        .folded();
    let (head, body) = packet[transport..].split_at_mut(header_len - transport);
    head[..2].copy_from_slice(&shape.port.to_be_bytes());
    head[2..4].copy_from_slice(&80_u16.to_be_bytes());
    let csum_offset = if shape.is_tcp {
        head[4..8].copy_from_slice(&shape.sequence.to_be_bytes());
        head[8..12].copy_from_slice(&7_u32.to_be_bytes());
        head[12] = u8::try_from((20 + shape.options) / 4).unwrap() << 4;
        (head[13], head[14]) = (shape.flags, 9);
        head[20..].fill(1);
        head[16..18].copy_from_slice(&pseudo);
        16
    } else {
        let length = u16::try_from(8 + shape.payload).unwrap();
        head[4..6].copy_from_slice(&length.to_be_bytes());
        head[6..8].copy_from_slice(&pseudo);
        6
    };
    for (place, byte) in body.iter_mut().enumerate() {
        *byte = u8::try_from(place % 251).unwrap();
    }
    let gso_type = match (shape.payload > shape.size.into(), shape.is_tcp, shape.is_v6) {
        (false, ..) => GSO_NONE,
        (_, true, false) => GSO_TCPV4,
        (_, true, true) => GSO_TCPV6,
        (_, false, _) => GSO_UDP_L4,
    };
    let vnet = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type,
        hdr_len: u16::try_from(header_len).unwrap(),
        gso_size: if gso_type == GSO_NONE { 0 } else { shape.size },
        csum_start: u16::try_from(transport).unwrap(),
        csum_offset,
        ..VnetHeader::default()
    };
    Super { vnet, packet }
}

fn split(from: &Super) -> Vec<Vec<u8>> {
    test_support::split(from.vnet, &from.packet, PACKET_BYTES_MAX).unwrap()
}

fn merge(packets: &[Vec<u8>]) -> Vec<Super> {
    let merged = test_support::merge(packets).into_iter();
    merged
        .map(|(vnet, packet)| Super { vnet, packet })
        .collect()
}

/// Where the inner IP header of a packet is; 0 if it is in no tunnel.
fn inner_at(packet: &[u8]) -> usize {
    let (transport, protocol) = if packet[0] >> 4 == 4 {
        (20, packet[9])
    } else {
        (40, packet[6])
    };
    let is_tunnel = protocol == UDP && packet[transport + 2..transport + 4] == [0x21, 0x18];
    if is_tunnel {
        transport + VXLAN_BYTES
    } else {
        0
    }
}

/// Checks a packet's own checksums and lengths as a receiver would.
fn assert_checksums(packet: &[u8]) {
    let inner = inner_at(packet);
    if inner > 0 {
        assert_eq!(crate::packet::stated_len(packet), Some(packet.len()));
        let transport = inner - VXLAN_BYTES;
        if transport == 20 {
            let sum = Sum::default().add_bytes(&packet[..20]);
            assert_eq!(sum.folded(), [0xff, 0xff]);
        }
        let length = u16::try_from(packet.len() - transport).unwrap();
        assert_eq!(packet[transport + 4..transport + 6], length.to_be_bytes());
        assert_eq!(packet[transport + 6..transport + 8], [0, 0]);
    }
    let packet = &packet[inner..];
    assert_eq!(crate::packet::stated_len(packet), Some(packet.len()));
    let (transport, addresses) = if packet[0] >> 4 == 4 {
        assert_eq!(
            Sum::default().add_bytes(&packet[..20]).folded(),
            [0xff, 0xff]
        );
        (20, 12..20)
    } else {
        (40, 8..40)
    };
    let protocol = if transport == 20 {
        packet[9]
    } else {
        packet[6]
    };
    let length = u16::try_from(packet.len() - transport).unwrap();
    let sum = pseudo_header(&packet[addresses], protocol)
        .add_u16(length)
        .add_bytes(&packet[transport..]);
    assert_eq!(sum.folded(), [0xff, 0xff]);
}

fn shapes() -> impl Strategy<Value = Shape> {
    let header = (
        (any::<Option<bool>>(), any::<bool>()),
        any::<bool>(),
        0usize..4,
        1usize..60_000,
        8u16..1500,
    );
    let fields = (
        prop_oneof![Just(0x10u8), Just(0x18), Just(0x11), Just(0x19)],
        any::<u8>(),
        any::<u32>(),
        any::<u16>(),
        any::<u16>(),
    );
    (header, fields).prop_map(
        |(((outer, is_v6), is_tcp, words, payload, size), (flags, class, sequence, id, port))| {
            Shape {
                // Only TCP is joined there.
                outer: outer.filter(|_| is_tcp),
                is_v6,
                is_tcp,
                options: words * 4,
                payload: payload.min(usize::from(size) * 100),
                size,
                flags,
                class,
                sequence,
                id,
                port,
            }
        },
    )
}

#[test]
fn segments_have_their_own_lengths_ids_sequences_and_flags() {
    let whole = super_packet(Shape {
        outer: None,
        is_v6: false,
        is_tcp: true,
        options: 12,
        payload: 2_500,
        size: 1_000,
        flags: 0x19 | 0x80,
        class: 2,
        sequence: u32::MAX - 999,
        id: 0xffff,
        port: 5,
    });
    let mut whole = whole;
    whole.vnet.gso_type |= GSO_ECN;
    let segments = split(&whole);
    let lengths: Vec<usize> = segments.iter().map(Vec::len).collect();
    assert_eq!(lengths, [1_052, 1_052, 552]);
    let ids: Vec<&[u8]> = segments.iter().map(|segment| &segment[4..6]).collect();
    assert_eq!(ids, [[0xff, 0xff], [0, 0], [0, 1]]);
    let sequences: Vec<&[u8]> = segments.iter().map(|segment| &segment[24..28]).collect();
    assert_eq!(
        sequences,
        [
            &(u32::MAX - 999).to_be_bytes()[..],
            &[0; 4],
            &[0, 0, 3, 0xe8]
        ]
    );
    // CWR on the first only, FIN and PSH on the last only.
    let flags: Vec<u8> = segments.iter().map(|segment| segment[33]).collect();
    assert_eq!(flags, [0x90, 0x10, 0x19]);
    segments
        .iter()
        .for_each(|segment| assert_checksums(segment));
}

#[test]
fn acknowledgements_and_other_flows_do_not_break_a_run_but_those_of_its_own_flow_do() {
    let data = Shape {
        outer: None,
        is_v6: false,
        is_tcp: true,
        options: 0,
        payload: 4_000,
        size: 1_000,
        flags: 0x10,
        class: 0,
        sequence: 1,
        id: 1,
        port: 1,
    };
    let mut packets = split(&super_packet(data));
    let ack = |port| {
        let pure = Shape {
            payload: 0,
            port,
            ..data
        };
        split(&super_packet(pure)).remove(0)
    };
    packets.insert(2, ack(9));
    let joined: Vec<usize> = merge(&packets).iter().map(|one| one.packet.len()).collect();
    assert_eq!(joined, [4_040, 40]);
    packets.insert(2, ack(1));
    let joined: Vec<usize> = merge(&packets).iter().map(|one| one.packet.len()).collect();
    assert_eq!(joined, [2_040, 40, 40, 2_040]);
}

#[test]
fn datagrams_of_a_tunnel_within_are_left_alone() {
    let packets = |port: u16| {
        let mut packets = split(&super_packet(Shape {
            outer: None,
            is_v6: false,
            is_tcp: false,
            options: 0,
            payload: 4_000,
            size: 1_000,
            flags: 0,
            class: 0,
            sequence: 0,
            id: 1,
            port: 1,
        }));
        for packet in &mut packets {
            packet[22..24].copy_from_slice(&port.to_be_bytes());
        }
        packets
    };
    assert_eq!(merge(&packets(8_471)).len(), 1);
    assert_eq!(merge(&packets(8_472)).len(), 4);
}

#[test]
fn datagrams_within_a_tunnel_are_split_and_left_alone_on_the_way_back() {
    for (outer, is_v6) in [(false, false), (false, true), (true, false), (true, true)] {
        let whole = super_packet(Shape {
            outer: Some(outer),
            is_v6,
            is_tcp: false,
            options: 0,
            payload: 2_500,
            size: 1_000,
            flags: 0,
            class: 2,
            sequence: 0,
            id: 0xffff,
            port: 9,
        });
        let segments = split(&whole);
        assert_eq!(segments.len(), 3);
        segments.iter().for_each(|one| assert_checksums(one));
        let merged: Vec<Vec<u8>> = merge(&segments).into_iter().map(|m| m.packet).collect();
        assert_eq!(merged, segments);
    }
}

#[test]
fn other_tunnels_and_other_marks_within_are_not_joined() {
    let shape = Shape {
        outer: Some(false),
        is_v6: false,
        is_tcp: true,
        options: 12,
        payload: 3_000,
        size: 1_000,
        flags: 0x10,
        class: 0,
        sequence: 1,
        id: 1,
        port: 1,
    };
    let packets = split(&super_packet(shape));
    assert_eq!(merge(&packets).len(), 1);
    // Outside: type of service, addresses, source port, checksum, flags, identifier, link addresses; inside: type of
    // service, options of TCP.
    for place in [1, 12, 20, 26, 28, 33, 41, 51, 50 + 20 + 21] {
        let mut changed = packets.clone();
        changed[1][place] ^= 0x40;
        assert_eq!(merge(&changed).len(), 3, "byte {place}");
    }
    let mut merger = Merger::new(Joins {
        udp: true,
        tunnels: true,
    });
    merger.leave_tunnels();
    let buffer = packets.concat();
    let mut at = 0;
    for packet in &packets {
        merger.push(&buffer, at..at + packet.len());
        at += packet.len();
    }
    assert_eq!(merger.len(), 3, "the device takes none");
    assert!(!merger.is_tunnel(0));
}

proptest! {
    #[test]
    fn what_is_split_merges_to_what_it_was(shape in shapes()) {
        let whole = super_packet(shape);
        let segments = split(&whole);
        segments.iter().for_each(|segment| assert_checksums(segment));
        let merged = merge(&segments);
        if segments.len() == 1 {
            prop_assert_eq!(&merged[0].packet, &segments[0]);
        } else {
            prop_assert_eq!(merged.len(), 1);
            prop_assert_eq!(&merged[0].packet, &whole.packet);
            let mut vnet = whole.vnet;
            if vnet.outer_transport > 0 {
                // As the kernel wants it from a device without link header.
                vnet.outer_transport += 14;
            }
            prop_assert_eq!(merged[0].vnet, vnet);
        }
    }

    #[test]
    fn merged_flows_split_to_the_same_packets_in_each_flows_order(
        shapes in proptest::collection::vec((shapes(), 0u16..3), 1..6),
        order in proptest::collection::vec(any::<prop::sample::Index>(), 0..300),
        drop in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
    ) {
        let mut queues: Vec<std::collections::VecDeque<Vec<u8>>> = shapes
            .iter()
            .map(|(shape, port)| {
                let shape = Shape { port: *port, payload: shape.payload.min(9_000), ..*shape };
                split(&super_packet(shape)).into()
            })
            .collect();
        let mut packets = Vec::new();
        for index in order {
            let queue = index.index(queues.len());
            packets.extend(queues[queue].pop_front());
        }
        for index in drop {
            if !packets.is_empty() {
                packets.remove(index.index(packets.len()));
            }
        }
        let again: Vec<Vec<u8>> = merge(&packets).iter().flat_map(|merged| {
            let mut merged = merged.clone();
            if merged.vnet.outer_transport > 0 {
                merged.vnet.outer_transport -= 14;
            }
            if merged.vnet.gso_type == GSO_NONE { vec![merged.packet] } else { split(&merged) }
        }).collect();
        // Flags FIN and PSH move to the end of a run, which is where they were; nothing else may differ.
        let flow = |packet: &[u8]| {
            let is_tunnel = inner_at(packet) > 0;
            let (outer, packet) = (packet[0] >> 4, &packet[inner_at(packet)..]);
            let at = if packet[0] >> 4 == 4 { 20 } else { 40 };
            (is_tunnel, outer, at, packet[at..at + 2].to_vec(), packet[if at == 20 { 9 } else { 6 }])
        };
        let mut flows: Vec<_> = packets.iter().map(|packet| flow(packet)).collect();
        flows.sort();
        flows.dedup();
        for one in flows {
            let of = |all: &[Vec<u8>]| -> Vec<Vec<u8>> {
                all.iter().filter(|packet| flow(packet) == one).cloned().collect()
            };
            prop_assert_eq!(of(&again), of(&packets));
        }
        prop_assert_eq!(again.len(), packets.len());
    }

    #[test]
    fn any_bytes_are_split_or_refused(
        vnet in any::<[u8; VNET_HEADER_BYTES]>(),
        first in any::<u8>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        kind in prop_oneof![0u8..6, 0x20u8..0x26, 0x40u8..0x46],
    ) {
        let mut header = VnetHeader::from_bytes(&vnet);
        header.gso_type = kind;
        header.csum_start %= 160;
        header.inner_network %= 120;
        header.outer_transport %= 80;
        let mut bytes = bytes;
        if let Some(byte) = bytes.first_mut() {
            *byte = if first % 2 == 0 { 0x45 } else { 0x60 };
        }
        if let Ok(plan) = Split::plan(header, &bytes, bytes.len()) {
            prop_assert!(plan.count() <= PACKET_BYTES_MAX);
            for index in 0..plan.count() {
                let mut segment = vec![0; plan.segment_len(index)];
                let _ = plan.copy(index, &bytes, &mut segment);
            }
        }
    }

    #[test]
    fn any_bytes_are_merged_or_passed(
        packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..90), 0..20),
        looks in proptest::collection::vec((any::<bool>(), any::<bool>(), 5u8..9), 20),
    ) {
        let packets: Vec<Vec<u8>> = packets
            .into_iter()
            .zip(looks)
            .map(|(mut packet, (is_v6, is_tcp, words))| {
                let protocol = if is_tcp { TCP } else { UDP };
                // Few addresses, so that flows meet.
                for byte in packet.iter_mut().skip(8).take(40) {
                    *byte &= 1;
                }
                if let Some(first) = packet.first_mut() {
                    *first = if is_v6 { 0x60 } else { 0x45 };
                }
                let at = if is_v6 { 40 } else { 20 };
                for (place, byte) in [(if is_v6 { 6 } else { 9 }, protocol), (at + 12, words << 4), (at + 13, 0x10)] {
                    if let Some(old) = packet.get_mut(place) {
                        *old = byte;
                    }
                }
                packet
            })
            .collect();
        let merged = merge(&packets);
        prop_assert!(merged.len() <= packets.len());
    }
}
