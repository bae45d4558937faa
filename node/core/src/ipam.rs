//! Addresses of local pods: which are given out, to whom, and which must rest.
//!
//! The caller stores [`Ipam`] durably before it uses what [`Ipam::allocate`] gave.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// Place of the router address in a pod CIDR.
pub const OFFSET_ROUTER: u32 = 1;
/// Place of the health address in a pod CIDR.
pub const OFFSET_HEALTH: u32 = 2;
/// Place of the first pod; the one before is kept for later use.
pub const OFFSET_FIRST_POD: u32 = 4;
/// An address is not given out again for so long after its release, milliseconds.
pub const REUSE_AFTER_MS: u64 = 60_000;
/// Addresses of one range that are given out, however large it is.
pub const ADDRESSES_PER_RANGE_MAX: u32 = 1 << 16;

/// What an allocation is for: the CNI attachment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// Container id.
    pub container_id: String,
    /// Interface name in the container.
    pub ifname: String,
}

/// Why an address could not be given out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// Every address of the range is in use or resting.
    #[error(
        "pod CIDR {cidr} is exhausted: {used} addresses in use, {resting} released less than {} s ago",
        REUSE_AFTER_MS / 1000
    )]
    Exhausted {
        /// The range.
        cidr: IpNetwork,
        /// Addresses given out.
        used: usize,
        /// Addresses that rest.
        resting: usize,
    },
    /// The node has no pod CIDR.
    #[error("this node has no pod CIDR yet: it gets one with its first session to the server")]
    NoRange,
}

/// Durable state of the allocator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipam {
    /// IPv4 pod CIDR of this node.
    pub cidr_v4: Option<IpNetwork>,
    /// IPv6 pod CIDR of this node.
    pub cidr_v6: Option<IpNetwork>,
    #[serde(with = "as_list")]
    allocations: BTreeMap<Attachment, Vec<IpAddr>>,
    /// Address → wall clock of its release, milliseconds since 1970.
    released: BTreeMap<IpAddr, u64>,
    next_v4: u32,
    next_v6: u32,
}

impl Ipam {
    /// Sets the ranges; allocations of earlier ranges stay until they are released.
    pub fn set_ranges(&mut self, v4: Option<IpNetwork>, v6: Option<IpNetwork>) {
        self.cidr_v4 = v4;
        self.cidr_v6 = v6;
    }

    /// The addresses of an attachment: those that it has, or new ones, one of each family.
    ///
    /// # Errors
    /// No range, or no free address in one; nothing is allocated then.
    pub fn allocate(
        &mut self,
        attachment: &Attachment,
        now_ms: u64,
    ) -> Result<Vec<IpAddr>, IpamError> {
        if let Some(held) = self.allocations.get(attachment) {
            return Ok(held.clone());
        }
        self.released.retain(|_, at| {
            // The clock was set back: how long it has rested is not known, so it rests from now on.
            *at = (*at).min(now_ms);
            now_ms - *at < REUSE_AFTER_MS
        });
        let ranges: Vec<IpNetwork> = [self.cidr_v4, self.cidr_v6].into_iter().flatten().collect();
        if ranges.is_empty() {
            return Err(IpamError::NoRange);
        }
        let mut addresses = Vec::with_capacity(ranges.len());
        for range in ranges {
            addresses.push(self.pick(range)?);
        }
        for ip in &addresses {
            let next = offset_of(*ip, self.cidr_v4, self.cidr_v6).wrapping_add(1);
            if ip.is_ipv4() {
                self.next_v4 = next;
            } else {
                self.next_v6 = next;
            }
        }
        self.allocations
            .insert(attachment.clone(), addresses.clone());
        Ok(addresses)
    }

    /// Gives an attachment's addresses back; they rest for [`REUSE_AFTER_MS`]. Gives what was released.
    pub fn release(&mut self, attachment: &Attachment, now_ms: u64) -> Vec<IpAddr> {
        let addresses = self.allocations.remove(attachment).unwrap_or_default();
        for ip in &addresses {
            self.released.insert(*ip, now_ms);
        }
        addresses
    }

    /// Who holds what.
    pub fn allocations(&self) -> impl Iterator<Item = (&Attachment, &[IpAddr])> {
        self.allocations.iter().map(|(a, ips)| (a, ips.as_slice()))
    }

    /// Addresses of an attachment.
    #[must_use]
    pub fn addresses(&self, attachment: &Attachment) -> Option<&[IpAddr]> {
        self.allocations.get(attachment).map(Vec::as_slice)
    }

    /// The node's router addresses.
    #[must_use]
    pub fn routers(&self) -> Vec<IpAddr> {
        self.fixed(OFFSET_ROUTER)
    }

    /// The node's health addresses.
    #[must_use]
    pub fn health(&self) -> Vec<IpAddr> {
        self.fixed(OFFSET_HEALTH)
    }

    fn fixed(&self, offset: u32) -> Vec<IpAddr> {
        [self.cidr_v4, self.cidr_v6]
            .into_iter()
            .flatten()
            .filter_map(|range| nth(range, offset))
            .collect()
    }

    /// The next free address after the one that was given out last, so that reuse is as late as possible.
    fn pick(&self, range: IpNetwork) -> Result<IpAddr, IpamError> {
        let in_use: std::collections::HashSet<IpAddr> =
            self.allocations.values().flatten().copied().collect();
        let end = usable_end(range);
        let span = end.saturating_sub(OFFSET_FIRST_POD);
        let next = if range.is_ipv4() {
            self.next_v4
        } else {
            self.next_v6
        };
        let start = next.max(OFFSET_FIRST_POD) - OFFSET_FIRST_POD;
        for step in 0..span {
            let offset = OFFSET_FIRST_POD + start.wrapping_add(step) % span;
            let free = |ip: &IpAddr| !in_use.contains(ip) && !self.released.contains_key(ip);
            if let Some(ip) = nth(range, offset).filter(free) {
                return Ok(ip);
            }
        }
        Err(IpamError::Exhausted {
            cidr: range,
            used: in_use.iter().filter(|ip| range.contains(**ip)).count(),
            resting: self
                .released
                .keys()
                .filter(|ip| range.contains(**ip))
                .count(),
        })
    }
}

/// The first offset that is not given out: the IPv4 broadcast address, or the limit.
fn usable_end(range: IpNetwork) -> u32 {
    let (bits, reserved) = match range {
        IpNetwork::V4(v4) => (32 - u32::from(v4.prefix()), 1),
        IpNetwork::V6(v6) => (128 - u32::from(v6.prefix()), 0),
    };
    1u32.checked_shl(bits)
        .map_or(ADDRESSES_PER_RANGE_MAX, |size| {
            (size - reserved).min(ADDRESSES_PER_RANGE_MAX)
        })
}

fn nth(range: IpNetwork, offset: u32) -> Option<IpAddr> {
    let ip = match range {
        IpNetwork::V4(v4) => {
            IpAddr::V4(Ipv4Addr::from(u32::from(v4.network()).checked_add(offset)?))
        }
        IpNetwork::V6(v6) => IpAddr::V6(Ipv6Addr::from(
            u128::from(v6.network()).checked_add(u128::from(offset))?,
        )),
    };
    range.contains(ip).then_some(ip)
}

fn offset_of(ip: IpAddr, v4: Option<IpNetwork>, v6: Option<IpNetwork>) -> u32 {
    match (ip, v4, v6) {
        (IpAddr::V4(ip), Some(IpNetwork::V4(range)), _) => {
            u32::from(ip).wrapping_sub(u32::from(range.network()))
        }
        (IpAddr::V6(ip), _, Some(IpNetwork::V6(range))) => {
            let offset = u128::from(ip).wrapping_sub(u128::from(range.network()));
            u32::try_from(offset).unwrap_or_default()
        }
        _ => 0,
    }
}

/// JSON objects have textual keys only: the map is written as a list.
mod as_list {
    use super::{Attachment, BTreeMap, Deserialize, IpAddr, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Entry {
        #[serde(flatten)]
        attachment: Attachment,
        addresses: Vec<IpAddr>,
    }

    pub(super) fn serialize<S: serde::Serializer>(
        map: &BTreeMap<Attachment, Vec<IpAddr>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map.iter().map(|(attachment, addresses)| Entry {
            attachment: attachment.clone(),
            addresses: addresses.clone(),
        }))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<Attachment, Vec<IpAddr>>, D::Error> {
        let entries = Vec::<Entry>::deserialize(deserializer)?;
        Ok(entries
            .into_iter()
            .map(|entry| (entry.attachment, entry.addresses))
            .collect())
    }
}

#[cfg(test)]
mod tests;
