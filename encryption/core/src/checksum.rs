//! The Internet checksum (RFC 1071), summed wide.

/// A one's complement sum under way, in the byte order of the machine: it does not matter for the sum, and the result
/// is stored in the same order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes; all but the last slice added must be of even length.
    #[inline]
    #[must_use]
    pub fn add_bytes(self, bytes: &[u8]) -> Self {
        // Four independent lanes of 64 bits over words of 32: no carry is lost below 16 GiB, and it vectorises.
        let mut lanes = [0_u64; 8];
        let mut blocks = bytes.chunks_exact(32);
        for block in &mut blocks {
            for (lane, four) in lanes.iter_mut().zip(block.chunks_exact(4)) {
                if let Ok(four) = four.try_into() {
                    *lane += u64::from(u32::from_ne_bytes(four));
                }
            }
        }
        let mut sum = self.0 + lanes.iter().map(|lane| lane & 0xffff_ffff).sum::<u64>();
        sum += lanes.iter().map(|lane| lane >> 32).sum::<u64>();
        let mut pairs = blocks.remainder().chunks_exact(2);
        for pair in &mut pairs {
            if let Ok(pair) = pair.try_into() {
                sum += u64::from(u16::from_ne_bytes(pair));
            }
        }
        if let [last] = pairs.remainder() {
            sum += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        Self(sum)
    }

    /// Adds a number of 16 bits.
    #[inline]
    #[must_use]
    pub fn add_u16(self, number: u16) -> Self {
        Self(self.0 + u64::from(number.to_be()))
    }

    /// The sum folded into 16 bits, not complemented; as bytes of a packet.
    #[inline]
    #[must_use]
    pub fn folded(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        #[expect(clippy::cast_possible_truncation, reason = "folded into 16 bits")]
        let folded = sum as u16;
        folded.to_ne_bytes()
    }

    /// The checksum: the complement of the sum, as bytes of a packet.
    #[inline]
    #[must_use]
    pub fn finish(self) -> [u8; 2] {
        self.folded().map(|byte| !byte)
    }
}

/// Sum of what TCP and UDP add in front of their header (RFC 9293, 3.1; RFC 8200, 8.1), without the length.
///
/// `addresses` are source and destination as they stand in the packet.
#[inline]
#[must_use]
pub fn pseudo_header(addresses: &[u8], protocol: u8) -> Sum {
    Sum::default().add_bytes(addresses).add_u16(protocol.into())
}

/// Writes the checksum of an IPv4 header into it.
#[inline]
pub fn write_ipv4(header: &mut [u8]) {
    if header.len() >= 20 {
        header[10..12].fill(0);
        let checksum = Sum::default().add_bytes(header).finish();
        header[10..12].copy_from_slice(&checksum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slowly(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap().to_be_bytes()
    }

    // The example of RFC 1071, section 3.
    #[test]
    fn the_example_of_the_rfc() {
        let sum = Sum::default().add_bytes(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.folded(), [0xdd, 0xf2]);
        assert_eq!(sum.finish(), [0x22, 0x0d]);
        assert_eq!(Sum::default().add_u16(0x1234).folded(), [0x12, 0x34]);
    }

    proptest! {
        #[test]
        fn wide_sums_equal_slow_ones(bytes in proptest::collection::vec(any::<u8>(), 0..3000), cut in 0usize..1500) {
            let cut = (cut * 2).min(bytes.len() & !1);
            let sum = Sum::default().add_bytes(&bytes[..cut]).add_bytes(&bytes[cut..]);
            prop_assert_eq!(sum.folded(), slowly(&bytes));
        }
    }
}
