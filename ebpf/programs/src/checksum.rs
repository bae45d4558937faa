//! The Internet checksum (RFC 1071) over words in memory order: it does not depend on byte order.

/// Sum of words.
#[inline(always)]
pub fn sum<const N: usize>(words: &[u32; N]) -> u64 {
    let mut total = 0;
    let mut index = 0;
    while index < N {
        total += u64::from(words[index]);
        index += 1;
    }
    total
}

/// Protocol and length of a pseudo header (RFC 9293, 3.1; RFC 8200, 8.1).
#[inline(always)]
pub fn pseudo(protocol: u8, length_bytes: u32) -> u64 {
    u64::from(u32::from(protocol).to_be()) + u64::from(length_bytes.to_be())
}

/// Folds a sum to 16 bits, as they stand in memory.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}
