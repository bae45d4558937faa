//! Fills the maps of a running agent, so that look-ups have as many entries as in a large mesh.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clustermesh_ebpf::Maps;
use clustermesh_ebpf_abi::{
    IPCACHE_ENTRIES_MAX, IPCACHE_PREFIX_BASE_BITS, IpcacheKey, IpcacheValue, SHARED_ADDRESS_SPACE,
    v4_mapped,
};

/// First of the addresses: 100.64.0.0/10 is nobody's (RFC 6598).
const FIRST_ADDRESS: u32 = u32::from_be_bytes([100, 64, 0, 0]);
const _: () = assert!(IPCACHE_ENTRIES_MAX <= 1 << 22, "the block has room");
/// Cluster of the identities: not that of any lab.
const CLUSTER_ID: u32 = 200;
/// Identities that take turns.
const IDENTITIES: u32 = 10_000;
/// First number of an identity in its cluster that is not reserved.
const FIRST_IDENTITY: u32 = 256;

/// Writes `count` addresses into the ipcache pinned below `bpffs`; its agent does not know them and
/// leaves them alone.
///
/// # Errors
/// When `bpffs` has no maps of this layout, or the map is full.
pub fn ipcache(bpffs: &Path, count: u32) -> Result<()> {
    ensure!(count < IPCACHE_ENTRIES_MAX, "{count} addresses do not fit");
    let maps = Maps::open_pinned(bpffs)?;
    let node_index = maps
        .nodes
        .entries()?
        .first()
        .map(|(index, _)| *index)
        .context("the agent knows no other node")?;
    let entries: Vec<_> = (0..count).map(|place| entry(place, node_index)).collect();
    maps.ipcache.upsert(&entries)?;
    Ok(())
}

fn entry(place: u32, node_index: u32) -> (IpcacheKey, IpcacheValue) {
    let key = IpcacheKey {
        prefix_len_bits: IPCACHE_PREFIX_BASE_BITS + 128,
        cluster_id_be: SHARED_ADDRESS_SPACE.to_be_bytes(),
        reserved: [0; 2],
        address: v4_mapped((FIRST_ADDRESS + place).to_be_bytes()),
    };
    let value = IpcacheValue {
        identity: (CLUSTER_ID << 16) + FIRST_IDENTITY + place % IDENTITIES,
        node_index,
    };
    (key, value)
}
