//! The maps of one layout: what each must look like, and typed access to them.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use aya::maps::MapData;
use clustermesh_ebpf_abi::{
    Address, BACKENDS_MAX, BackendKey, BackendValue, DROP_REASONS_MAX, DropReason, EndpointValue,
    FLOW_RING_BYTES, FRONTENDS_MAX, FrontendKey, FrontendValue, IPCACHE_ENTRIES_MAX,
    InterfaceValue, IpcacheKey, IpcacheValue, LOCAL_ENDPOINTS_MAX, NODES_MAX, NodeAddressValue,
    NodeConfig, NodeValue, SocketChoice, TCP_CHOICES_MAX, TRAFFIC_PATHS_MAX, TrafficPath,
    TrafficValue, UdpSocketChoices,
};

use crate::pins::Pins;
use crate::sys::bpf::{self, MapInfo};
use crate::sys::plain::Plain;
use crate::{ArrayTable, Error, FlowReader, Table};

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
    entries_max: u32,
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

const CONFIG: Spec = Spec::of::<u32, NodeConfig>("config", "CONFIG", Kind::Array, 1);
const NODES: Spec = Spec::of::<u32, NodeValue>("nodes", "NODES", Kind::Array, NODES_MAX);
const NODE_ADDRESSES: Spec = Spec::of::<Address, NodeAddressValue>(
    "node_addresses",
    "NODE_ADDRESSES",
    Kind::Hash,
    NODES_MAX,
);
const IPCACHE: Spec =
    Spec::of::<IpcacheKey, IpcacheValue>("ipcache", "IPCACHE", Kind::Trie, IPCACHE_ENTRIES_MAX);
const ENDPOINTS: Spec =
    Spec::of::<Address, EndpointValue>("endpoints", "ENDPOINTS", Kind::Hash, LOCAL_ENDPOINTS_MAX);
const INTERFACES: Spec =
    Spec::of::<u32, InterfaceValue>("interfaces", "INTERFACES", Kind::Hash, LOCAL_ENDPOINTS_MAX);
const FRONTENDS: Spec =
    Spec::of::<FrontendKey, FrontendValue>("frontends", "FRONTENDS", Kind::Hash, FRONTENDS_MAX);
const BACKENDS: Spec =
    Spec::of::<BackendKey, BackendValue>("backends", "BACKENDS", Kind::Hash, BACKENDS_MAX);
const DROPS: Spec = Spec::of::<u32, u64>("drops", "DROPS", Kind::PerCpuArray, DROP_REASONS_MAX);
const TRAFFIC: Spec =
    Spec::of::<u32, TrafficValue>("traffic", "TRAFFIC", Kind::PerCpuArray, TRAFFIC_PATHS_MAX);
const FLOWS: Spec = Spec::of::<(), ()>("flows", "FLOWS", Kind::Ring, FLOW_RING_BYTES);
const TCP_CHOICES: Spec =
    Spec::of::<u64, SocketChoice>("tcp_choices", "TCP_CHOICES", Kind::Hash, TCP_CHOICES_MAX);
const SOCKET_CHOICES: Spec =
    Spec::of::<u32, SocketChoice>("socket_choices", "SOCKET_CHOICES", Kind::SocketStorage, 0);
const UDP_CHOICES: Spec =
    Spec::of::<u32, UdpSocketChoices>("udp_choices", "UDP_CHOICES", Kind::SocketStorage, 0);

/// All maps that are pinned.
pub(crate) const SPECS: [Spec; 14] = [
    CONFIG,
    NODES,
    NODE_ADDRESSES,
    IPCACHE,
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

/// Typed access to the maps of this layout. Clones are the same maps.
///
/// To change a service, write its new backends under a new list number, then the frontend, then
/// delete the old list: a connection meets the old list or the new one, never none.
#[derive(Clone, Debug)]
pub struct Maps {
    /// Nodes by index.
    pub nodes: ArrayTable<NodeValue>,
    /// Underlay address to node.
    pub node_addresses: Table<Address, NodeAddressValue>,
    /// Address prefix to identity and node.
    pub ipcache: Table<IpcacheKey, IpcacheValue>,
    /// Local endpoints by address.
    pub endpoints: Table<Address, EndpointValue>,
    /// What may be sent from an interface, by its index.
    pub interfaces: Table<u32, InterfaceValue>,
    /// Virtual addresses.
    pub frontends: Table<FrontendKey, FrontendValue>,
    /// Backend lists.
    pub backends: Table<BackendKey, BackendValue>,
    /// What TCP sockets remember of their choice, by the socket's cookie.
    pub tcp_choices: Table<u64, SocketChoice>,
    config: ArrayTable<NodeConfig>,
    drops: Arc<OwnedFd>,
    traffic: Arc<OwnedFd>,
    flows: Arc<OwnedFd>,
    possible_cpus: usize,
}

impl Maps {
    /// Opens the maps that a running or former agent pinned below `bpffs`, and no program: for whoever
    /// looks at a node's state beside its agent.
    ///
    /// # Errors
    ///
    /// [`Error::BpffsNotMounted`]; [`Error::Pin`] if a map of this layout is not there;
    /// [`Error::PinnedMapMismatch`].
    pub fn open_pinned(bpffs: &Path) -> Result<Self, Error> {
        Self::open(&Pins::below(bpffs)?)
    }

    /// Opens the pinned maps; all of them exist.
    pub(crate) fn open(pins: &Pins) -> Result<Self, Error> {
        let possible_cpus = aya::util::nr_cpus().map_err(|(path, source)| Error::Pin {
            action: "read the number of CPUs from",
            path: path.into(),
            source,
        })?;
        Ok(Self {
            nodes: array(pins, &NODES)?,
            node_addresses: table(pins, &NODE_ADDRESSES)?,
            ipcache: table(pins, &IPCACHE)?,
            endpoints: table(pins, &ENDPOINTS)?,
            interfaces: table(pins, &INTERFACES)?,
            frontends: table(pins, &FRONTENDS)?,
            backends: table(pins, &BACKENDS)?,
            tcp_choices: table(pins, &TCP_CHOICES)?,
            config: array(pins, &CONFIG)?,
            drops: Arc::new(open_checked(&pins.map(&DROPS), &DROPS)?),
            traffic: Arc::new(open_checked(&pins.map(&TRAFFIC), &TRAFFIC)?),
            flows: Arc::new(open_checked(&pins.map(&FLOWS), &FLOWS)?),
            possible_cpus,
        })
    }

    /// The node's settings; `None` until they have been written.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn config(&self) -> Result<Option<NodeConfig>, Error> {
        self.config.get(0)
    }

    /// Replaces the node's settings.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn set_config(&self, config: &NodeConfig) -> Result<(), Error> {
        self.config.upsert(&[(0, *config)])
    }

    /// Dropped packets for every reason, all CPUs together, since the maps were made.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn drops(&self) -> Result<Vec<(DropReason, u64)>, Error> {
        DropReason::ALL
            .into_iter()
            .map(|reason| {
                let counts = self.per_cpu::<u64>(&DROPS, &self.drops, reason as u32)?;
                Ok((reason, counts.iter().sum()))
            })
            .collect()
    }

    /// Packets and bytes on every path, all CPUs together, since the maps were made.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn traffic(&self) -> Result<Vec<(TrafficPath, TrafficValue)>, Error> {
        TrafficPath::ALL
            .into_iter()
            .map(|path| {
                let counts = self.per_cpu::<TrafficValue>(&TRAFFIC, &self.traffic, path as u32)?;
                let sum = counts
                    .iter()
                    .fold(TrafficValue::default(), |sum, one| TrafficValue {
                        packets: sum.packets + one.packets,
                        bytes: sum.bytes + one.bytes,
                    });
                Ok((path, sum))
            })
            .collect()
    }

    /// A reader of the node's flow records.
    ///
    /// # Errors
    ///
    /// [`Error::Flows`] if the ring cannot be mapped; [`Error::Map`] if the process is out of descriptors.
    pub fn flows(&self) -> Result<FlowReader, Error> {
        let fd = self.flows.try_clone().map_err(|e| open_error(&FLOWS, e))?;
        FlowReader::new(MapData::from_fd(fd).map_err(|error| Error::Flows(Box::new(error)))?)
    }

    fn per_cpu<V: Plain>(&self, spec: &Spec, map: &OwnedFd, index: u32) -> Result<Vec<V>, Error> {
        bpf::lookup_per_cpu(map.as_fd(), index, self.possible_cpus).map_err(|source| Error::Map {
            map: spec.name,
            action: "read",
            keys: 1,
            source,
        })
    }
}

/// The pinned map at `path`, checked.
pub(crate) fn open_checked(path: &Path, spec: &Spec) -> Result<OwnedFd, Error> {
    let fd = bpf::get_pinned(path).map_err(|source| Error::Pin {
        action: "open the pinned map",
        path: path.to_owned(),
        source,
    })?;
    let info = bpf::map_info(fd.as_fd()).map_err(|e| open_error(spec, e))?;
    spec.check(&info)?;
    Ok(fd)
}

fn open_error(spec: &Spec, source: io::Error) -> Error {
    Error::Map {
        map: spec.name,
        action: "open",
        keys: 0,
        source,
    }
}

fn table<K: Plain, V: Plain>(pins: &Pins, spec: &Spec) -> Result<Table<K, V>, Error> {
    let fd = open_checked(&pins.map(spec), spec)?;
    Ok(Table::new(fd, spec.name, spec.entries_max))
}

fn array<V: Plain>(pins: &Pins, spec: &Spec) -> Result<ArrayTable<V>, Error> {
    let fd = open_checked(&pins.map(spec), spec)?;
    Ok(ArrayTable::new(fd, spec.name, spec.entries_max))
}
