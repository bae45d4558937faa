//! Arithmetic on addresses and CIDRs of either family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use clustermesh_api::manifest::IpFamily as Family;
use ipnetwork::IpNetwork;

/// Both families, in the order in which addresses are listed.
pub const FAMILIES: [Family; 2] = [Family::IPv4, Family::IPv6];

/// Bits of an address of this family.
#[must_use]
pub fn family_bits(family: Family) -> u8 {
    match family {
        Family::IPv4 => 32,
        Family::IPv6 => 128,
    }
}

/// The address of this family with this number; `None` beyond the family's range.
#[must_use]
pub fn from_number(family: Family, number: u128) -> Option<IpAddr> {
    match family {
        Family::IPv4 => u32::try_from(number)
            .ok()
            .map(|n| IpAddr::V4(Ipv4Addr::from_bits(n))),
        Family::IPv6 => Some(IpAddr::V6(Ipv6Addr::from_bits(number))),
    }
}

/// The address as a number of its family.
#[must_use]
pub fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// First and last address of a CIDR as numbers.
#[must_use]
pub fn bounds(cidr: IpNetwork) -> (u128, u128) {
    let first = number(cidr.network());
    let host_bits = u32::from(family_bits(Family::of(cidr.ip())) - cidr.prefix());
    let size_less_one = 1_u128
        .checked_shl(host_bits)
        .map_or(u128::MAX, |size| size - 1);
    (first, first | size_less_one)
}

/// Whether two CIDRs share an address.
#[must_use]
pub fn overlaps(a: IpNetwork, b: IpNetwork) -> bool {
    if Family::of(a.ip()) != Family::of(b.ip()) {
        return false;
    }
    let (a_first, a_last) = bounds(a);
    let (b_first, b_last) = bounds(b);
    a_first <= b_last && b_first <= a_last
}

/// Whether `outer` holds every address of `inner`.
#[must_use]
pub fn covers(outer: IpNetwork, inner: IpNetwork) -> bool {
    Family::of(outer.ip()) == Family::of(inner.ip())
        && outer.prefix() <= inner.prefix()
        && outer.contains(inner.network())
}

/// The CIDR without host bits; two spellings of one range become equal.
#[must_use]
pub fn canonical(cidr: IpNetwork) -> IpNetwork {
    // The prefix is valid because it comes from a valid network.
    IpNetwork::new(cidr.network(), cidr.prefix()).unwrap_or(cidr)
}

/// Address number `index` of a CIDR (0 = the network address); `None` outside it.
#[must_use]
pub fn nth(cidr: IpNetwork, index: u128) -> Option<IpAddr> {
    let (first, last) = bounds(cidr);
    let wanted = first.checked_add(index)?;
    (wanted <= last)
        .then(|| from_number(Family::of(cidr.ip()), wanted))
        .flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cidr(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    #[test]
    fn bounds_cover_whole_families() {
        assert_eq!(bounds(cidr("0.0.0.0/0")), (0, u128::from(u32::MAX)));
        assert_eq!(bounds(cidr("::/0")), (0, u128::MAX));
        assert_eq!(bounds(cidr("10.1.2.3/32")).0, bounds(cidr("10.1.2.3/32")).1);
    }

    #[test]
    fn families_never_overlap() {
        assert!(!overlaps(cidr("0.0.0.0/0"), cidr("::/0")));
        assert!(!covers(cidr("0.0.0.0/0"), cidr("::/96")));
    }

    #[test]
    fn nth_stays_inside() {
        assert_eq!(
            nth(cidr("10.1.0.0/24"), 1),
            Some("10.1.0.1".parse().unwrap())
        );
        assert_eq!(nth(cidr("10.1.0.0/24"), 256), None);
        assert_eq!(nth(cidr("fd01::/64"), 2), Some("fd01::2".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn overlap_is_symmetric_and_matches_contains(a: u32, pa in 0_u8..=32, b: u32, pb in 0_u8..=32) {
            let a = IpNetwork::new(Ipv4Addr::from_bits(a).into(), pa).unwrap();
            let b = IpNetwork::new(Ipv4Addr::from_bits(b).into(), pb).unwrap();
            prop_assert_eq!(overlaps(a, b), overlaps(b, a));
            prop_assert_eq!(overlaps(a, b), a.contains(b.network()) || b.contains(a.network()));
            if covers(a, b) {
                prop_assert!(overlaps(a, b));
            }
        }
    }
}
