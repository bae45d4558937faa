//! All maps of all programs. Keys and values are those of `clustermesh-ebpf-abi`.
//!
//! Hash maps take memory per entry (`BPF_F_NO_PREALLOC`): their limits are far above
//! what a usual node holds. The kernel uses the memory of a deleted entry again at once
//! all the same: whoever reads two entries that belong together checks that they do.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf};
use clustermesh_ebpf_abi::{
    Address, BACKENDS_MAX, BackendKey, BackendValue, DROP_REASONS_MAX, EndpointValue,
    FLOW_RING_BYTES, FRONTENDS_MAX, FrontendKey, FrontendValue, IPCACHE_ENTRIES_MAX,
    InterfaceValue, IpcacheValue, LOCAL_ENDPOINTS_MAX, MESH_PREFIXES_MAX, MeshValue, NODES_MAX,
    NodeAddressValue, NodeConfig, NodeValue, SocketChoice, TCP_CHOICES_MAX, TRAFFIC_PATHS_MAX,
    TrafficValue, UdpSocketChoices,
};

/// An `IpcacheKey` without the prefix length, as the trie's key type wants it:
/// cluster id, zero, address. `Address` has no alignment, so there is no padding.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcacheData {
    /// See `IpcacheKey::cluster_id_be`.
    pub cluster_id_be: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
    /// Mapped address.
    pub address: Address,
}

/// The node's settings; one entry, zeros until user space has written it.
#[map]
pub static CONFIG: Array<NodeConfig> = Array::with_max_entries(1, 0);

/// Local endpoints by address.
#[map]
pub static ENDPOINTS: HashMap<Address, EndpointValue> =
    HashMap::with_max_entries(LOCAL_ENDPOINTS_MAX, BPF_F_NO_PREALLOC);

/// What may be sent from an interface, by its index.
#[map]
pub static INTERFACES: HashMap<u32, InterfaceValue> =
    HashMap::with_max_entries(LOCAL_ENDPOINTS_MAX, BPF_F_NO_PREALLOC);

/// Address prefix to identity and node; the key in user space is `IpcacheKey`.
#[map]
pub static IPCACHE: LpmTrie<IpcacheData, IpcacheValue> =
    LpmTrie::with_max_entries(IPCACHE_ENTRIES_MAX, BPF_F_NO_PREALLOC);

/// Prefixes of the mesh; the key in user space is `MeshKey`.
#[map]
pub static MESH: LpmTrie<Address, MeshValue> =
    LpmTrie::with_max_entries(MESH_PREFIXES_MAX, BPF_F_NO_PREALLOC);

/// Nodes by index.
#[map]
pub static NODES: Array<NodeValue> = Array::with_max_entries(NODES_MAX, 0);

/// Underlay address to node.
#[map]
pub static NODE_ADDRESSES: HashMap<Address, NodeAddressValue> =
    HashMap::with_max_entries(NODES_MAX, BPF_F_NO_PREALLOC);

/// Drop counters by `DropReason`.
#[map]
pub static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(DROP_REASONS_MAX, 0);

/// Traffic counters by `TrafficPath`.
#[map]
pub static TRAFFIC: PerCpuArray<TrafficValue> = PerCpuArray::with_max_entries(TRAFFIC_PATHS_MAX, 0);

/// Flow records, while somebody listens.
#[map]
pub static FLOWS: RingBuf = RingBuf::with_byte_size(FLOW_RING_BYTES, 0);

/// Virtual addresses.
#[map]
pub static FRONTENDS: HashMap<FrontendKey, FrontendValue> =
    HashMap::with_max_entries(FRONTENDS_MAX, BPF_F_NO_PREALLOC);

/// Backend lists.
#[map]
pub static BACKENDS: HashMap<BackendKey, BackendValue> =
    HashMap::with_max_entries(BACKENDS_MAX, BPF_F_NO_PREALLOC);

/// What a connected TCP socket remembers, by its cookie.
#[map]
pub static TCP_CHOICES: HashMap<u64, SocketChoice> =
    HashMap::with_max_entries(TCP_CHOICES_MAX, BPF_F_NO_PREALLOC);

/// What a connected UDP socket remembers.
#[btf_map]
pub static SOCKET_CHOICES: SkStorage<SocketChoice> = SkStorage::new();

/// What an unconnected UDP socket remembers.
#[btf_map]
pub static UDP_CHOICES: SkStorage<UdpSocketChoices> = SkStorage::new();
