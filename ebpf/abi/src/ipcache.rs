//! ipcache: address prefix → security identity and the node behind which it lives.

use crate::Address;

/// Entries of the ipcache, all clusters together.
pub const IPCACHE_ENTRIES_MAX: u32 = 1 << 20;

/// `cluster_id` of addresses that are unique in the whole mesh.
pub const SHARED_ADDRESS_SPACE: u16 = 0;

/// Bits of an [`IpcacheKey`] before the address.
pub const IPCACHE_PREFIX_BASE_BITS: u32 = 32;

/// Key of the longest-prefix-match trie, as the kernel wants it: bits, then data.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpcacheKey {
    /// [`IPCACHE_PREFIX_BASE_BITS`] plus the bits of `address` that count.
    pub prefix_len_bits: u32,
    /// The cluster whose address space this is, or [`SHARED_ADDRESS_SPACE`]; big-endian.
    pub cluster_id_be: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
    /// Mapped address.
    pub address: Address,
}

/// Who has the address, and where.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpcacheValue {
    /// Security identity.
    pub identity: u32,
    /// Index into the node map; [`crate::NODE_INDEX_LOCAL`] for this node.
    pub node_index: u32,
}

const _: () = assert!(size_of::<IpcacheKey>() == 24 && size_of::<IpcacheValue>() == 8);
