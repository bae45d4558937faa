//! Node map: one entry moves or withdraws a node.

use crate::Address;

/// Entries of the node map.
pub const NODES_MAX: u32 = 1 << 16;

/// Index that stands for the node itself; its slot is never filled.
pub const NODE_INDEX_LOCAL: u32 = 0;

/// [`NodeValue::flags`]: the slot is in use and traffic may be sent there.
pub const NODE_PRESENT: u16 = 1 << 0;
/// [`NodeValue::flags`]: traffic to the node goes by direct routing, not through the tunnel, and is
/// accepted from it that way. IPv6 packets to a node with an IPv4 endpoint use the tunnel all the same, unless they
/// are encrypted.
pub const NODE_DIRECT: u16 = 1 << 1;
/// [`NodeValue::flags`]: packets to the node leave through a WireGuard device, which
/// [`NodeValue::egress_ifindex`] then is: one without link addresses (`ARPHRD_NONE`).
pub const NODE_ENCRYPTED: u16 = 1 << 2;
/// [`NodeValue::flags`]: packets from the node's pods (from the node itself too with [`crate::CONFIG_ENCRYPT_NODES`])
/// are taken from a WireGuard device only.
pub const NODE_CLEAR_REFUSED: u16 = 1 << 3;
/// [`NodeValue::flags`]: packets to the node must be encrypted, but no key is there yet: they are dropped.
pub const NODE_WITHHELD: u16 = 1 << 4;

/// [`NodeValue::flags`]: [`NodeValue::path_mtu_bytes`] was measured to be less than what the devices take: TCP connections
/// of pods are told when they begin.
pub const NODE_NARROW: u16 = 1 << 5;

/// A node, by its index (array map).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeValue {
    /// Tunnel end on the underlay, mapped.
    pub endpoint: Address,
    /// Cluster of the node.
    pub cluster_id: u16,
    /// `NODE_*` bits.
    pub flags: u16,
    /// Largest inner packet that the path takes, bytes; 0 = not known.
    pub path_mtu_bytes: u16,
    /// Zero.
    pub reserved: u16,
    /// Device towards the node: of the underlay, or of WireGuard with [`NODE_ENCRYPTED`].
    pub egress_ifindex: u32,
    /// Zero.
    pub reserved2: u32,
    /// Present only in the layout that upgrade tests use.
    #[cfg(feature = "layout-next")]
    pub next_layout: u64,
}

/// Value of the map from an underlay address (mapped) to the node that sends from it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeAddressValue {
    /// Index into the node map.
    pub node_index: u32,
}

#[cfg(not(feature = "layout-next"))]
const _: () = assert!(size_of::<NodeValue>() == 32);
#[cfg(feature = "layout-next")]
const _: () = assert!(size_of::<NodeValue>() == 40);
const _: () = assert!(size_of::<NodeAddressValue>() == 4);
