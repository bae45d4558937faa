//! What each map of this layout must look like.

use clustermesh_ebpf_abi::{
    Address, BACKENDS_MAX, BackendKey, BackendValue, DROP_REASONS_MAX, EndpointValue,
    FLOW_RING_BYTES, FRONTENDS_MAX, FrontendKey, FrontendValue, IPCACHE_ENTRIES_MAX,
    InterfaceValue, IpcacheKey, IpcacheValue, LOCAL_ENDPOINTS_MAX, MESH_PREFIXES_MAX, MeshKey,
    MeshValue, NODES_MAX, NodeAddressValue, NodeConfig, NodeValue, SocketChoice, TCP_CHOICES_MAX,
    TRAFFIC_PATHS_MAX, TrafficValue, UdpSocketChoices,
};

use crate::Error;
use crate::sys::bpf::MapInfo;

/// `enum bpf_map_type`, the ones in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Hash = 1,
    Array = 2,
    PerCpuArray = 6,
    Trie = 11,
    SocketStorage = 24,
    Ring = 27,
}

/// What a map must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    /// Name in pins and errors.
    pub(crate) name: &'static str,
    /// Name in the object.
    pub(crate) symbol: &'static str,
    kind: Kind,
    key_size_bytes: usize,
    value_size_bytes: usize,
    /// Room, in entries; of the ring, bytes.
    pub(crate) entries_max: u32,
}

impl Spec {
    const fn of<K, V>(
        name: &'static str,
        symbol: &'static str,
        kind: Kind,
        entries_max: u32,
    ) -> Self {
        Self {
            name,
            symbol,
            kind,
            key_size_bytes: size_of::<K>(),
            value_size_bytes: size_of::<V>(),
            entries_max,
        }
    }

    /// True for what sockets remember: it outlives a change of the layout if it looks the same.
    pub(crate) fn belongs_to_sockets(&self) -> bool {
        self.kind == Kind::SocketStorage || self.symbol == TCP_CHOICES.symbol
    }

    pub(crate) fn matches(&self, info: &MapInfo) -> bool {
        info.map_type == self.kind as u32
            && info.key_size_bytes as usize == self.key_size_bytes
            && info.value_size_bytes as usize == self.value_size_bytes
            && info.entries_max == self.entries_max
    }

    /// Checks a pinned map.
    pub(crate) fn check(&self, info: &MapInfo) -> Result<(), Error> {
        if self.matches(info) {
            return Ok(());
        }
        let describe = |kind, key, value, entries| {
            format!("type {kind}, keys of {key} B, values of {value} B, {entries} entries")
        };
        Err(Error::PinnedMapMismatch {
            map: self.name,
            expected: describe(
                self.kind as u32,
                self.key_size_bytes,
                self.value_size_bytes,
                self.entries_max,
            ),
            found: describe(
                info.map_type,
                info.key_size_bytes as usize,
                info.value_size_bytes as usize,
                info.entries_max,
            ),
        })
    }
}

pub(crate) const CONFIG: Spec = Spec::of::<u32, NodeConfig>("config", "CONFIG", Kind::Array, 1);
pub(crate) const NODES: Spec = Spec::of::<u32, NodeValue>("nodes", "NODES", Kind::Array, NODES_MAX);
pub(crate) const NODE_ADDRESSES: Spec = Spec::of::<Address, NodeAddressValue>(
    "node_addresses",
    "NODE_ADDRESSES",
    Kind::Hash,
    NODES_MAX,
);
pub(crate) const IPCACHE: Spec =
    Spec::of::<IpcacheKey, IpcacheValue>("ipcache", "IPCACHE", Kind::Trie, IPCACHE_ENTRIES_MAX);
pub(crate) const MESH: Spec =
    Spec::of::<MeshKey, MeshValue>("mesh", "MESH", Kind::Trie, MESH_PREFIXES_MAX);
pub(crate) const ENDPOINTS: Spec =
    Spec::of::<Address, EndpointValue>("endpoints", "ENDPOINTS", Kind::Hash, LOCAL_ENDPOINTS_MAX);
pub(crate) const INTERFACES: Spec =
    Spec::of::<u32, InterfaceValue>("interfaces", "INTERFACES", Kind::Hash, LOCAL_ENDPOINTS_MAX);
pub(crate) const FRONTENDS: Spec =
    Spec::of::<FrontendKey, FrontendValue>("frontends", "FRONTENDS", Kind::Hash, FRONTENDS_MAX);
pub(crate) const BACKENDS: Spec =
    Spec::of::<BackendKey, BackendValue>("backends", "BACKENDS", Kind::Hash, BACKENDS_MAX);
pub(crate) const DROPS: Spec =
    Spec::of::<u32, u64>("drops", "DROPS", Kind::PerCpuArray, DROP_REASONS_MAX);
pub(crate) const TRAFFIC: Spec =
    Spec::of::<u32, TrafficValue>("traffic", "TRAFFIC", Kind::PerCpuArray, TRAFFIC_PATHS_MAX);
pub(crate) const FLOWS: Spec = Spec::of::<(), ()>("flows", "FLOWS", Kind::Ring, FLOW_RING_BYTES);
pub(crate) const TCP_CHOICES: Spec =
    Spec::of::<u64, SocketChoice>("tcp_choices", "TCP_CHOICES", Kind::Hash, TCP_CHOICES_MAX);
pub(crate) const SOCKET_CHOICES: Spec =
    Spec::of::<u32, SocketChoice>("socket_choices", "SOCKET_CHOICES", Kind::SocketStorage, 0);
pub(crate) const UDP_CHOICES: Spec =
    Spec::of::<u32, UdpSocketChoices>("udp_choices", "UDP_CHOICES", Kind::SocketStorage, 0);

/// All maps that are pinned.
pub(crate) const SPECS: [Spec; 15] = [
    CONFIG,
    NODES,
    NODE_ADDRESSES,
    IPCACHE,
    MESH,
    ENDPOINTS,
    INTERFACES,
    FRONTENDS,
    BACKENDS,
    DROPS,
    TRAFFIC,
    FLOWS,
    TCP_CHOICES,
    SOCKET_CHOICES,
    UDP_CHOICES,
];
