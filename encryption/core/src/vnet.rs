//! The header before each packet of a TUN device with offloads (`virtio_net_hdr_v1_hash_tunnel`, virtio 1.4, 5.1.6).

/// Bytes of the header. Kernels that know no tunnels (before 6.17) use the first ten.
pub const VNET_HEADER_BYTES: usize = 24;

/// The checksum from [`VnetHeader::csum_start`] on is still to be completed.
pub const NEEDS_CSUM: u8 = 1;
/// The checksum was checked.
pub const DATA_VALID: u8 = 2;

/// An ordinary packet.
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// UDP datagrams of one size.
pub const GSO_UDP_L4: u8 = 5;
/// Flag beside a kind: it is within UDP over IPv4.
pub const GSO_UDP_TUNNEL_IPV4: u8 = 0x20;
/// Flag beside a kind: it is within UDP over IPv6.
pub const GSO_UDP_TUNNEL_IPV6: u8 = 0x40;
/// Flag beside a TCP kind: CWR is for the first segment only (RFC 3168, 6.1.2).
pub const GSO_ECN: u8 = 0x80;

/// What the kernel says, or is told, about a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// Kind of super-packet.
    pub gso_type: u8,
    /// Bytes of all headers; a hint.
    pub hdr_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub csum_start: u16,
    /// Where it is stored, from there.
    pub csum_offset: u16,
    /// Where the outer UDP header of a tunnel is.
    pub outer_transport: u16,
    /// Where the inner IP header of a tunnel is; the checksum's is the inner transport header then.
    pub inner_network: u16,
}

impl VnetHeader {
    /// From the bytes of the device, which are in the machine's order but for those of the tunnel, least byte first.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; VNET_HEADER_BYTES]) -> Self {
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: half(2),
            gso_size: half(4),
            csum_start: half(6),
            csum_offset: half(8),
            outer_transport: u16::from_le_bytes([bytes[20], bytes[21]]),
            inner_network: u16::from_le_bytes([bytes[22], bytes[23]]),
        }
    }

    /// The bytes for the device.
    #[must_use]
    pub fn to_bytes(self) -> [u8; VNET_HEADER_BYTES] {
        let mut bytes = [0; VNET_HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        bytes[20..22].copy_from_slice(&self.outer_transport.to_le_bytes());
        bytes[22..24].copy_from_slice(&self.inner_network.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_read_back() {
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV6,
            hdr_len: 72,
            gso_size: 1340,
            csum_start: 40,
            csum_offset: 16,
            outer_transport: 20,
            inner_network: 50,
        };
        assert_eq!(VnetHeader::from_bytes(&header.to_bytes()), header);
    }
}
