//! The contents of the kernel maps as plain values: what is wanted and what is there have the same type.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use clustermesh_ebpf_abi::{
    Address, BackendKey, BackendValue, FrontendKey, FrontendValue, IPCACHE_PREFIX_BASE_BITS,
    IpcacheKey, IpcacheValue, NODE_PRESENT, NodeAddressValue, NodeValue, SHARED_ADDRESS_SPACE,
    V4_MAPPED_BITS, v4_mapped,
};
use ipnetwork::IpNetwork;

/// The number that stands for "no list": a frontend with it refuses connections.
pub const LIST_ID_NONE: u32 = 0;

/// The maps that follow from records, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Node map; only slots in use.
    pub nodes: HashMap<u32, NodeValue>,
    /// Underlay address → node.
    pub node_addresses: HashMap<Address, NodeAddressValue>,
    /// Address prefix → identity and node.
    pub ipcache: HashMap<IpcacheKey, IpcacheValue>,
    /// Virtual address and port → list.
    pub frontends: HashMap<FrontendKey, FrontendValue>,
    /// Complete backend lists by number.
    pub lists: HashMap<u32, Box<[BackendValue]>>,
    /// Backend entries that belong to no complete list (left by a crash between writes).
    pub loose_backends: HashSet<BackendKey>,
}

impl Tables {
    /// The tables that these map entries make; a list with a gap in its slots is taken as loose entries.
    #[must_use]
    pub fn from_entries(
        nodes: impl IntoIterator<Item = (u32, NodeValue)>,
        node_addresses: impl IntoIterator<Item = (Address, NodeAddressValue)>,
        ipcache: impl IntoIterator<Item = (IpcacheKey, IpcacheValue)>,
        frontends: impl IntoIterator<Item = (FrontendKey, FrontendValue)>,
        backends: impl IntoIterator<Item = (BackendKey, BackendValue)>,
    ) -> Self {
        let mut by_list: HashMap<u32, BTreeMap<u32, BackendValue>> = HashMap::new();
        for (key, value) in backends {
            by_list
                .entry(key.list_id)
                .or_default()
                .insert(key.slot, value);
        }
        let mut lists = HashMap::new();
        let mut loose_backends = HashSet::new();
        for (list_id, slots) in by_list {
            let complete = list_id != LIST_ID_NONE
                && slots
                    .keys()
                    .enumerate()
                    .all(|(i, slot)| u32::try_from(i) == Ok(*slot));
            if complete {
                lists.insert(list_id, slots.into_values().collect());
            } else {
                loose_backends.extend(slots.into_keys().map(|slot| BackendKey { list_id, slot }));
            }
        }
        Self {
            nodes: nodes
                .into_iter()
                .filter(|(_, node)| node.flags & NODE_PRESENT != 0)
                .collect(),
            node_addresses: node_addresses.into_iter().collect(),
            ipcache: ipcache.into_iter().collect(),
            frontends: frontends.into_iter().collect(),
            lists,
            loose_backends,
        }
    }

    /// True if nothing is in any map.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
            && self.node_addresses.is_empty()
            && self.ipcache.is_empty()
            && self.frontends.is_empty()
            && self.lists.is_empty()
    }

    /// The list that a frontend uses; empty for one without backends, `None` where the frontend or its list is missing.
    #[must_use]
    pub fn list_of(&self, frontend: &FrontendKey) -> Option<(u32, &[BackendValue])> {
        let value = self.frontends.get(frontend)?;
        if value.backend_count == 0 {
            return Some((value.list_id, &[]));
        }
        let list = self.lists.get(&value.list_id)?;
        (list.len() == usize::from(value.backend_count)).then_some((value.list_id, &**list))
    }
}

/// An address in the form of the maps.
#[must_use]
pub fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => v4_mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The textual form of a map address: IPv4 where it is mapped.
#[must_use]
pub fn ip(address: &Address) -> IpAddr {
    std::net::Ipv6Addr::from(*address).to_canonical()
}

/// The ipcache key of a prefix.
#[must_use]
pub fn ipcache_key(prefix: IpNetwork) -> IpcacheKey {
    let bits = match prefix {
        IpNetwork::V4(v4) => V4_MAPPED_BITS + u32::from(v4.prefix()),
        IpNetwork::V6(v6) => u32::from(v6.prefix()),
    };
    IpcacheKey {
        prefix_len_bits: IPCACHE_PREFIX_BASE_BITS + bits,
        cluster_id_be: SHARED_ADDRESS_SPACE.to_be_bytes(),
        reserved: [0; 2],
        address: address(prefix.network()),
    }
}

/// The ipcache key of a single address.
#[must_use]
pub fn host_key(ip: IpAddr) -> IpcacheKey {
    IpcacheKey {
        prefix_len_bits: IPCACHE_PREFIX_BASE_BITS + 128,
        cluster_id_be: SHARED_ADDRESS_SPACE.to_be_bytes(),
        reserved: [0; 2],
        address: address(ip),
    }
}
