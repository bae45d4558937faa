//! Tunnel packets that lie, sent from a node's own address.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::net::UdpSocket;

/// Sends `count` VXLAN packets with the given identity and inner addresses to a tunnel end.
///
/// They leave from the address `from` through `device`. The inner packet is a UDP datagram of no length, which nobody
/// answers.
///
/// # Errors
/// When the packets cannot be sent.
pub async fn forge(
    from: Ipv4Addr,
    device: &str,
    to: SocketAddr,
    identity: u32,
    inner_source: Ipv4Addr,
    inner_destination: Ipv4Addr,
    count: u32,
) -> Result<()> {
    let socket = UdpSocket::bind((from, 0)).await?;
    socket.bind_device(Some(device.as_bytes()))?;
    let packet = vxlan_packet(identity, inner_source, inner_destination);
    for _ in 0..count {
        socket.send_to(&packet, to).await?;
    }
    Ok(())
}

/// VXLAN header (RFC 7348, 5), Ethernet, IPv4 and UDP headers.
fn vxlan_packet(identity: u32, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x08, 0, 0, 0];
    packet.extend_from_slice(&(identity << 8).to_be_bytes());
    packet.extend_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00]);
    let mut ip = vec![0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0];
    ip.extend_from_slice(&source.octets());
    ip.extend_from_slice(&destination.octets());
    let checksum = ip_checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&checksum);
    packet.extend_from_slice(&ip);
    packet.extend_from_slice(&[0x30, 0x39, 0x30, 0x39, 0, 8, 0, 0]);
    packet
}

/// Checksum of an IPv4 header (RFC 791, 3.1).
fn ip_checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forged_packet_has_the_identity_in_its_vni_and_a_valid_inner_header() {
        let packet = vxlan_packet(
            0x01_0203,
            Ipv4Addr::new(10, 1, 0, 4),
            Ipv4Addr::new(10, 2, 0, 4),
        );
        assert_eq!(packet[..8], [0x08, 0, 0, 0, 1, 2, 3, 0]);
        assert_eq!(ip_checksum(&packet[22..42]), 0);
        assert_eq!(packet.len(), 8 + 14 + 28);
    }
}
