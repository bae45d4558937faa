//! Addresses of the mesh of which no record says who has them: strict mode lets nothing go to or come from them in clear.
//!
//! Asked only where the ipcache has no answer, so that packets of known nodes pay nothing for it.

use aya_ebpf::maps::lpm_trie::Key;
use clustermesh_ebpf_abi::{Address, CONFIG_STRICT, DropReason, MESH_PODS, NodeConfig};

use crate::maps::MESH;
use crate::parse::Words;

/// A `MeshKey`, written by words.
#[repr(C)]
struct PrefixKey {
    prefix_len_bits: u32,
    address: [u32; 4],
}

/// What lives at an address that the ipcache does not know: `MESH_*` bits, 0 = nothing of the mesh or no strict mode.
#[inline(always)]
pub fn unknown(config: &NodeConfig, address: &Words) -> u32 {
    if config.flags & CONFIG_STRICT == 0 {
        return 0;
    }
    let key = PrefixKey {
        prefix_len_bits: 128,
        address: address.0,
    };
    // SAFETY: same size and layout, weaker alignment.
    let key: &Key<Address> = unsafe { &*core::ptr::from_ref(&key).cast() };
    MESH.get(key).map_or(0, |value| value.flags)
}

/// True for an address at which there should be a pod.
#[inline(always)]
pub const fn is_pods(flags: u32) -> bool {
    flags & MESH_PODS != 0
}

/// Refuses what goes between a pod and such an address.
///
/// # Errors
/// `MeshUnknown`.
#[inline(always)]
pub fn refuse(config: &NodeConfig, address: &Words) -> Result<(), DropReason> {
    if unknown(config, address) == 0 {
        Ok(())
    } else {
        Err(DropReason::MeshUnknown)
    }
}
