//! Which peer a packet goes to and may come from: the longest prefix decides (the paper, 2, cryptokey routing).

use std::collections::HashMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

/// Prefixes that one device can hold.
pub const PREFIXES_MAX: usize = 1 << 20;

/// A prefix as a number and its length; IPv4 and IPv6 apart.
type Masked = (bool, u8, u128);

/// A table of prefixes; a lookup asks once per length in use.
#[derive(Clone, Debug)]
pub struct AllowedIps<T> {
    entries: HashMap<Masked, T>,
    lengths_v4: Vec<u8>,
    lengths_v6: Vec<u8>,
}

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            lengths_v4: Vec::new(),
            lengths_v6: Vec::new(),
        }
    }
}

impl<T: Copy> AllowedIps<T> {
    /// A table of these; of equal prefixes the last one counts.
    #[must_use]
    pub fn new(entries: impl IntoIterator<Item = (IpNetwork, T)>) -> Self {
        let entries: HashMap<Masked, T> = entries
            .into_iter()
            .map(|(prefix, owner)| (key(prefix.ip(), prefix.prefix()), owner))
            .collect();
        let lengths = |is_v6| {
            let mut lengths: Vec<u8> = entries
                .keys()
                .filter(|key| key.0 == is_v6)
                .map(|key| key.1)
                .collect();
            lengths.sort_unstable_by(|left, right| right.cmp(left));
            lengths.dedup();
            lengths
        };
        Self {
            lengths_v4: lengths(false),
            lengths_v6: lengths(true),
            entries,
        }
    }

    /// Who has the longest prefix that holds this address.
    #[must_use]
    #[inline]
    pub fn lookup(&self, address: IpAddr) -> Option<T> {
        let lengths = match address {
            IpAddr::V4(_) => &self.lengths_v4,
            IpAddr::V6(_) => &self.lengths_v6,
        };
        lengths
            .iter()
            .find_map(|length| self.entries.get(&key(address, *length)).copied())
    }

    /// Number of prefixes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[inline]
fn key(address: IpAddr, length: u8) -> Masked {
    let (is_v6, bits, width) = match address {
        IpAddr::V4(address) => (false, u128::from(address.to_bits()), 32),
        IpAddr::V6(address) => (true, address.to_bits(), 128),
    };
    let host = width - u32::from(length).min(width);
    let masked = bits.checked_shr(host).unwrap_or(0);
    (is_v6, length, masked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_longest_prefix_decides() {
        let prefix = |text: &str| text.parse::<IpNetwork>().unwrap();
        let table = AllowedIps::new([
            (prefix("0.0.0.0/0"), 1),
            (prefix("10.0.0.0/8"), 2),
            (prefix("10.1.2.3/32"), 3),
            (prefix("fd00::/64"), 4),
        ]);
        let lookup = |text: &str| table.lookup(text.parse().unwrap());
        assert_eq!(lookup("192.0.2.1"), Some(1));
        assert_eq!(lookup("10.9.9.9"), Some(2));
        assert_eq!(lookup("10.1.2.3"), Some(3));
        assert_eq!(lookup("fd00::1"), Some(4));
        assert_eq!(lookup("fd01::1"), None);
    }

    proptest! {
        #[test]
        fn a_lookup_finds_what_a_search_through_all_finds(
            prefixes in proptest::collection::vec((any::<bool>(), any::<u128>(), 0u8..=128), 0..40),
            near in any::<prop::sample::Index>(),
            flip in 0u32..128,
        ) {
            let prefixes: Vec<(IpNetwork, usize)> = prefixes.into_iter().enumerate().filter_map(|(owner, (is_v6, bits, length))| {
                let network = if is_v6 {
                    IpNetwork::new(IpAddr::V6(bits.into()), length).ok()?
                } else {
                    IpNetwork::new(IpAddr::V4(u32::try_from(bits >> 96).ok()?.into()), length % 33).ok()?
                };
                Some((network, owner))
            }).collect();
            prop_assume!(!prefixes.is_empty());
            let table = AllowedIps::new(prefixes.iter().copied());
            let address = match prefixes[near.index(prefixes.len())].0.ip() {
                IpAddr::V4(address) => IpAddr::V4((address.to_bits() ^ 1 << (flip % 32)).into()),
                IpAddr::V6(address) => IpAddr::V6((address.to_bits() ^ 1 << flip).into()),
            };
            let longest = prefixes.iter().rev().filter(|(prefix, _)| prefix.contains(address)).max_by(|left, right| {
                left.0.prefix().cmp(&right.0.prefix()).then(left.1.cmp(&right.1))
            });
            prop_assert_eq!(table.lookup(address), longest.map(|found| found.1));
        }
    }
}
