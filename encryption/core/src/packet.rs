//! What the device reads of an IP packet: addresses, length, ECN, and where its TCP or UDP header is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of an IPv4 header without options.
pub const IPV4_HEADER_BYTES: usize = 20;
/// Bytes of an IPv6 header.
pub const IPV6_HEADER_BYTES: usize = 40;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// The two bits of ECN in TOS and traffic class (RFC 3168).
pub const ECN_MASK: u8 = 3;
/// Congestion was experienced.
pub const ECN_CE: u8 = 3;
/// The sender understands ECN: ECT(0).
pub const ECN_ECT0: u8 = 2;

/// IP version of a packet, by its first byte.
#[must_use]
#[inline]
pub fn version(packet: &[u8]) -> Option<u8> {
    packet.first().map(|first| first >> 4)
}

/// Where a packet goes.
#[must_use]
#[inline]
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 16, 24)
}

/// Where a packet says it comes from.
#[must_use]
#[inline]
pub fn source(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 12, 8)
}

#[inline]
fn address(packet: &[u8], at_v4: usize, at_v6: usize) -> Option<IpAddr> {
    match version(packet)? {
        4 if packet.len() >= IPV4_HEADER_BYTES => {
            let four: [u8; 4] = packet.get(at_v4..at_v4 + 4)?.try_into().ok()?;
            Some(Ipv4Addr::from(four).into())
        }
        6 if packet.len() >= IPV6_HEADER_BYTES => {
            let sixteen: [u8; 16] = packet.get(at_v6..at_v6 + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(sixteen).into())
        }
        _ => None,
    }
}

/// Length that the packet itself states, if `packet` holds so much: what follows is padding.
#[must_use]
#[inline]
pub fn stated_len(packet: &[u8]) -> Option<usize> {
    let (stated, least) = match version(packet)? {
        4 => (half(packet, 2)?, IPV4_HEADER_BYTES),
        6 => (half(packet, 4)? + IPV6_HEADER_BYTES, IPV6_HEADER_BYTES),
        _ => return None,
    };
    (stated >= least && stated <= packet.len()).then_some(stated)
}

/// The big-endian number of 16 bits at `offset`.
#[inline]
pub(crate) fn half(packet: &[u8], offset: usize) -> Option<usize> {
    let two = packet.get(offset..offset + 2)?;
    Some(usize::from(u16::from_be_bytes([two[0], two[1]])))
}

/// The two bits of ECN; 0 of what is no IP packet.
#[must_use]
#[inline]
pub fn ecn(packet: &[u8]) -> u8 {
    match packet {
        [first, second, ..] if first >> 4 == 4 => second & ECN_MASK,
        [first, second, ..] if first >> 4 == 6 => (second >> 4) & ECN_MASK,
        _ => 0,
    }
}

/// ECN of the outer header for an inner one (RFC 6040, 4.1, normal mode).
#[must_use]
#[inline]
pub const fn outer_ecn(inner: u8) -> u8 {
    inner & ECN_MASK
}

/// Takes congestion that the outer header reports over into a packet (RFC 6040, 4.2); false: the packet must be dropped,
/// because its sender would not understand.
#[must_use]
#[inline]
pub fn take_over_ecn(packet: &mut [u8], outer: u8) -> bool {
    if outer & ECN_MASK != ECN_CE {
        return true;
    }
    match (ecn(packet), version(packet)) {
        (ECN_CE, _) => true,
        (0, _) => false,
        (_, Some(4)) if packet.len() >= IPV4_HEADER_BYTES => {
            packet[1] |= ECN_CE;
            let length = usize::from(packet[0] & 15) * 4;
            if let Some(header) = packet.get_mut(..length) {
                crate::checksum::write_ipv4(header);
            }
            true
        }
        (_, Some(6)) => {
            packet[1] |= ECN_CE << 4;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn congestion_outside_reaches_those_who_understand_it() {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        assert!(!take_over_ecn(&mut packet, ECN_CE));
        assert!(take_over_ecn(&mut packet, ECN_ECT0));
        packet[1] = 0xb8 | ECN_ECT0;
        assert!(take_over_ecn(&mut packet, ECN_CE));
        assert_eq!((packet[1], ecn(&packet)), (0xbb, ECN_CE));
        assert_eq!(
            crate::checksum::Sum::default().add_bytes(&packet).folded(),
            [0xff, 0xff]
        );
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[1] = ECN_ECT0 << 4;
        assert!(take_over_ecn(&mut packet, ECN_CE));
        assert_eq!(ecn(&packet), ECN_CE);
    }

    #[test]
    fn padding_is_told_from_the_packet() {
        let mut packet = vec![0; 48];
        packet[0] = 0x45;
        packet[3] = 33;
        assert_eq!(stated_len(&packet), Some(33));
        packet[3] = 49;
        assert_eq!(stated_len(&packet), None);
        packet[0] = 0x60;
        packet[5] = 8;
        assert_eq!(stated_len(&packet), Some(48));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..80), outer: u8) {
            let mut bytes = bytes;
            let _ = (source(&bytes), destination(&bytes), ecn(&bytes));
            prop_assert!(stated_len(&bytes).is_none_or(|length| length <= bytes.len()));
            let _ = take_over_ecn(&mut bytes, outer);
        }
    }
}
