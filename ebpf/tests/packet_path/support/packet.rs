//! Frames made and read byte by byte.

use std::net::IpAddr;

use clustermesh_ebpf_abi::{TUNNEL_MAC_DESTINATION, TUNNEL_MAC_SOURCE};

/// ICMP.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// IPv6 fragment header.
pub const FRAGMENT: u8 = 44;
/// ICMPv6.
pub const ICMPV6: u8 = 58;
/// IPv6 destination options.
pub const OPTIONS: u8 = 60;

/// An address literal.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Ethernet without addresses (those of the loopback device), around an IP packet.
pub fn ethernet(ip_packet: &[u8]) -> Vec<u8> {
    let kind: u16 = if ip_packet[0] >> 4 == 4 {
        0x0800
    } else {
        0x86dd
    };
    framed(kind, ip_packet)
}

/// Ethernet with a type of choice.
pub fn framed(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Sum of RFC 1071, not inverted.
fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |total, pair| {
        total + (u32::from(pair[0]) << 8) + u32::from(pair.get(1).copied().unwrap_or(0))
    })
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Sum of the pseudo header.
fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u32 {
    let start = sum(&octets(source), 0) + sum(&octets(destination), 0);
    start + u32::from(protocol) + length as u32
}

/// An IP packet of the addresses' family.
pub fn packet(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (ip(source), ip(destination)) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let mut packet = vec![0x45, 0];
            packet.extend((20 + payload.len() as u16).to_be_bytes());
            packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend(s.octets());
            packet.extend(d.octets());
            fix_v4(&mut packet);
            packet.extend(payload);
            packet
        }
        (s, d) => {
            let (IpAddr::V6(s), IpAddr::V6(d)) = (s, d) else {
                panic!("{s} and {d} are of two families")
            };
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend((payload.len() as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(s.octets());
            packet.extend(d.octets());
            packet.extend(payload);
            packet
        }
    }
}

/// Sets the checksum of the IPv4 header in front.
pub fn fix_v4(packet: &mut [u8]) {
    let bytes = usize::from(packet[0] & 0xf) * 4;
    packet[10..12].fill(0);
    let checksum = !fold(sum(&packet[..bytes], 0));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Sets the checksum of the transport header at `at`, whose field is `field` bytes in.
pub fn fix_transport(packet: &mut [u8], at: usize, field: usize) {
    let octets = if at == 20 { 12..20 } else { 8..40 };
    let protocol = if at == 20 { packet[9] } else { packet[6] };
    packet[at + field..at + field + 2].fill(0);
    let start = sum(&packet[octets], 0) + u32::from(protocol) + (packet.len() - at) as u32;
    let checksum = !fold(sum(&packet[at..], start));
    packet[at + field..at + field + 2].copy_from_slice(&checksum.to_be_bytes());
}

/// UDP without checksum.
pub fn udp(source_port: u16, destination_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(source_port.to_be_bytes());
    datagram.extend(destination_port.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

/// A TCP header with flags and a payload; ports 1000 and 80, sequence 100, acknowledged 200.
pub fn tcp(flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(1000_u16.to_be_bytes());
    segment.extend(80_u16.to_be_bytes());
    segment.extend(100_u32.to_be_bytes());
    segment.extend(200_u32.to_be_bytes());
    segment.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    segment
}

/// A small UDP packet.
pub fn datagram(source: &str, destination: &str) -> Vec<u8> {
    packet(source, destination, UDP, &udp(1000, 53, b"hello"))
}

/// VXLAN with flags of choice around an inner frame.
pub fn vxlan_with(flags: u32, vni: u32, inner: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend(flags.to_be_bytes());
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(inner);
    payload
}

/// The inner frame as our nodes write it.
pub fn inner_frame(ip_packet: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(ip_packet);
    frame[..6].copy_from_slice(&TUNNEL_MAC_DESTINATION);
    frame[6..12].copy_from_slice(&TUNNEL_MAC_SOURCE);
    frame
}

/// A tunnel packet.
pub fn tunnelled(source: &str, destination: &str, vni: u32, inner: &[u8]) -> Vec<u8> {
    let payload = vxlan_with(0x0800_0000, vni, &inner_frame(inner));
    ethernet(&packet(
        source,
        destination,
        UDP,
        &udp(50000, 8472, &payload),
    ))
}

/// Checks the transport checksum of an IP packet (and the header's, for IPv4); returns protocol and payload.
pub fn verified(packet: &[u8]) -> (IpAddr, IpAddr, u8, Vec<u8>) {
    let (source, destination, protocol, payload): (IpAddr, IpAddr, u8, &[u8]) = if packet[0] >> 4
        == 4
    {
        assert_eq!(fold(sum(&packet[..20], 0)), 0xffff, "IPv4 header checksum");
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        assert_eq!(total, packet.len(), "IPv4 total length");
        let address = |at: usize| -> [u8; 4] { packet[at..at + 4].try_into().expect("four bytes") };
        (
            address(12).into(),
            address(16).into(),
            packet[9],
            &packet[20..],
        )
    } else {
        let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
        assert_eq!(length + 40, packet.len(), "IPv6 payload length");
        let address =
            |at: usize| -> [u8; 16] { packet[at..at + 16].try_into().expect("sixteen bytes") };
        (
            address(8).into(),
            address(24).into(),
            packet[6],
            &packet[40..],
        )
    };
    let start = if protocol == ICMP {
        0
    } else {
        pseudo(source, destination, protocol, payload.len())
    };
    if protocol != UDP {
        assert_eq!(fold(sum(payload, start)), 0xffff, "transport checksum");
    }
    (source, destination, protocol, payload.to_vec())
}
