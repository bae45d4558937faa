//! The mesh's prefixes: what may not leave or come in clear in strict mode, also where the ipcache names nobody.

use crate::Address;

/// Entries of the map.
pub const MESH_PREFIXES_MAX: u32 = 1 << 17;

/// [`MeshValue::flags`]: pods live there.
pub const MESH_PODS: u32 = 1 << 0;
/// [`MeshValue::flags`]: the address of a node itself. What the host sends there is judged with
/// [`crate::CONFIG_ENCRYPT_NODES`] only; what pods send, always.
pub const MESH_NODES: u32 = 1 << 1;
/// [`MeshValue::flags`]: the operator has listed it, whoever lives there.
pub const MESH_LISTED: u32 = 1 << 2;

/// Key of the longest-prefix-match trie, as the kernel wants it: bits, then data.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MeshKey {
    /// Bits of `address` that count.
    pub prefix_len_bits: u32,
    /// Mapped address.
    pub address: Address,
}

/// What lives there.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MeshValue {
    /// `MESH_*` bits; 0: an exception from a shorter prefix.
    pub flags: u32,
}

const _: () = assert!(size_of::<MeshKey>() == 20 && size_of::<MeshValue>() == 4);
