//! Typed access to the maps of one layout.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use aya::maps::MapData;
use clustermesh_ebpf_abi::{
    Address, BackendKey, BackendValue, DropReason, EndpointValue, FrontendKey, FrontendValue,
    InterfaceValue, IpcacheKey, IpcacheValue, MeshKey, MeshValue, NodeAddressValue, NodeConfig,
    NodeValue, SocketChoice, TrafficPath, TrafficValue, WireTraffic,
};

use crate::layout::{
    BACKENDS, CONFIG, DROPS, ENDPOINTS, FLOWS, FRONTENDS, INTERFACES, IPCACHE, MESH,
    NODE_ADDRESSES, NODES, Spec, TCP_CHOICES, TRAFFIC,
};
use crate::pins::Pins;
use crate::sys::bpf;
use crate::sys::plain::Plain;
use crate::{ArrayTable, Error, FlowReader, Table};

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
    /// Prefixes of the mesh.
    pub mesh: Table<MeshKey, MeshValue>,
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
            mesh: table(pins, &MESH)?,
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
            .map(|path| Ok((path, self.traffic_sum(path as u32)?)))
            .collect()
    }

    /// Packets and bytes that went over the wire encrypted and in clear, all CPUs together, since the maps were made.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn wire_traffic(&self) -> Result<Vec<(WireTraffic, TrafficValue)>, Error> {
        WireTraffic::ALL
            .into_iter()
            .map(|kind| Ok((kind, self.traffic_sum(kind as u32)?)))
            .collect()
    }

    fn traffic_sum(&self, slot: u32) -> Result<TrafficValue, Error> {
        let counts = self.per_cpu::<TrafficValue>(&TRAFFIC, &self.traffic, slot)?;
        Ok(counts
            .iter()
            .fold(TrafficValue::default(), |sum, one| TrafficValue {
                packets: sum.packets + one.packets,
                bytes: sum.bytes + one.bytes,
            }))
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
