//! The programs as the kernel has them: loaded, fed with maps, run on single packets.
#![expect(unsafe_code, reason = "bpf(2) takes raw pointers")]

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use aya::maps::Map;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use clustermesh_ebpf::Features;
use clustermesh_ebpf_abi::{
    Address, DropReason, EndpointValue, IPCACHE_PREFIX_BASE_BITS, InterfaceValue, IpcacheKey,
    IpcacheValue, MeshKey, MeshValue, NodeAddressValue, NodeConfig, NodeValue, TrafficPath,
    TrafficValue, WireTraffic, v4_mapped,
};

const OBJECT: &[u8] = include_bytes!(env!("CLUSTERMESH_BPF_OBJECT"));
/// Programs on packets.
pub const PROGRAMS: [&str; 5] = [
    "from_pod",
    "from_host",
    "from_network",
    "from_wireguard",
    "to_network",
];

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
/// Room for what a program makes of a packet.
const PACKET_BYTES_MAX: usize = 4096;
/// `struct __sk_buff`: words, and the places of `mark` and `gso_size`.
const SKB_CONTEXT_WORDS: usize = 48;
const SKB_MARK_WORD: usize = 2;
const SKB_GSO_SIZE_WORD: usize = 44;

/// Bytes of a value of the ABI.
pub fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the ABI's types have no implicit padding; the slice lives as long as the value.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn value_of<T: Copy>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: enough bytes, and the ABI's types are plain integers.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

/// An address as the maps have it.
pub fn mapped(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => v4_mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// A literal as the maps have it.
pub fn addr(text: &str) -> Address {
    mapped(text.parse().expect("an address"))
}

/// Fails loudly without the rights that every test here needs.
pub fn require_root() {
    // SAFETY: takes nothing.
    let user = unsafe { libc::geteuid() };
    assert!(
        user == 0,
        "these tests load kernel programs: run them as root"
    );
}

/// What a program made of one packet.
pub struct Outcome {
    /// `TC_ACT_*`.
    pub verdict: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
}

/// The verifier gives up with EAGAIN when a signal comes; so many times it is asked again, as libbpf does.
const LOAD_ATTEMPTS_MAX: usize = 5;

fn load(program: &mut SchedClassifier) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS_MAX {
        match program.load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(libc::EAGAIN) => {}
            done => return done,
        }
    }
    program.load()
}

/// One load of all packet programs with maps of their own.
pub struct Datapath {
    /// The object.
    pub ebpf: Ebpf,
}

impl Datapath {
    /// Loads the object and the packet programs.
    pub fn load() -> Self {
        require_root();
        let mut aligned = vec![0_u64; OBJECT.len().div_ceil(8)];
        // SAFETY: the buffer is at least as long as the object.
        let object = unsafe {
            std::ptr::copy_nonoverlapping(
                OBJECT.as_ptr(),
                aligned.as_mut_ptr().cast(),
                OBJECT.len(),
            );
            std::slice::from_raw_parts(aligned.as_ptr().cast::<u8>(), OBJECT.len())
        };
        let constants = Features::probe().constants();
        let mut loader = EbpfLoader::new();
        for (name, value) in &constants {
            loader.override_global(name, value, true);
        }
        let mut ebpf = loader.load(object).expect("the object loads");
        for name in PROGRAMS {
            let program: &mut SchedClassifier = ebpf
                .program_mut(name)
                .expect(name)
                .try_into()
                .expect("a tc program");
            load(program).unwrap_or_else(|error| panic!("{name}: {error:#?}"));
        }
        Self { ebpf }
    }

    fn map_fd(&self, name: &str) -> RawFd {
        match self.ebpf.map(name).expect(name) {
            Map::Array(data)
            | Map::HashMap(data)
            | Map::LpmTrie(data)
            | Map::PerCpuArray(data)
            | Map::RingBuf(data) => data.fd().as_fd().as_raw_fd(),
            other => panic!("{name}: {other:?}"),
        }
    }

    fn update<K: Copy, V: Copy>(&self, map: &str, key: &K, value: &V) {
        let mut attributes = MapAttributes::new(
            self.map_fd(map),
            bytes_of(key),
            bytes_of(value).as_ptr() as u64,
        );
        call(BPF_MAP_UPDATE_ELEM, &mut attributes)
            .unwrap_or_else(|error| panic!("update of {map}: {error}"));
    }

    /// The node's settings.
    pub fn set_config(&self, config: &NodeConfig) {
        self.update("CONFIG", &0_u32, config);
    }

    /// A local endpoint.
    pub fn set_endpoint(&self, address: Address, value: &EndpointValue) {
        self.update("ENDPOINTS", &address, value);
    }

    /// What an interface may send.
    pub fn set_interface(&self, ifindex: u32, value: &InterfaceValue) {
        self.update("INTERFACES", &ifindex, value);
    }

    /// Who has a prefix.
    pub fn set_ipcache(&self, address: Address, bits: u32, identity: u32, node_index: u32) {
        let key = IpcacheKey {
            prefix_len_bits: IPCACHE_PREFIX_BASE_BITS + bits,
            cluster_id_be: [0; 2],
            reserved: [0; 2],
            address,
        };
        self.update(
            "IPCACHE",
            &key,
            &IpcacheValue {
                identity,
                node_index,
            },
        );
    }

    /// A prefix of the mesh.
    pub fn set_mesh(&self, address: Address, prefix_len_bits: u32, flags: u32) {
        let key = MeshKey {
            prefix_len_bits,
            address,
        };
        self.update("MESH", &key, &MeshValue { flags });
    }

    /// A node and the address from which it sends.
    pub fn set_node(&self, index: u32, node: &NodeValue) {
        self.update("NODES", &index, node);
        self.set_node_address(node.endpoint, index);
    }

    /// An address from which a node sends.
    pub fn set_node_address(&self, address: Address, node_index: u32) {
        self.update("NODE_ADDRESSES", &address, &NodeAddressValue { node_index });
    }

    fn lookup_per_cpu(&self, map: &str, index: u32, slot_bytes: usize) -> Vec<u8> {
        let cpus = aya::util::nr_cpus().expect("number of CPUs");
        let mut values = vec![0_u8; cpus * slot_bytes];
        let key = index.to_ne_bytes();
        let mut attributes = MapAttributes::new(self.map_fd(map), &key, values.as_mut_ptr() as u64);
        call(BPF_MAP_LOOKUP_ELEM, &mut attributes)
            .unwrap_or_else(|error| panic!("look-up in {map}: {error}"));
        values
    }

    /// Packets dropped for a reason.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.lookup_per_cpu("DROPS", reason as u32, 8)
            .chunks(8)
            .map(value_of::<u64>)
            .sum()
    }

    /// Packets dropped for any reason, by name, without those that are zero.
    pub fn all_drops(&self) -> Vec<(&'static str, u64)> {
        DropReason::ALL
            .into_iter()
            .map(|r| (r.name(), self.drops(r)))
            .filter(|(_, n)| *n != 0)
            .collect()
    }

    /// Traffic on a path.
    pub fn traffic(&self, path: TrafficPath) -> TrafficValue {
        self.traffic_in(path as u32)
    }

    /// Traffic by what it was on the wire.
    pub fn wire(&self, kind: WireTraffic) -> TrafficValue {
        self.traffic_in(kind as u32)
    }

    fn traffic_in(&self, slot: u32) -> TrafficValue {
        let values = self.lookup_per_cpu("TRAFFIC", slot, size_of::<TrafficValue>());
        values
            .chunks(size_of::<TrafficValue>())
            .map(value_of::<TrafficValue>)
            .fold(TrafficValue::default(), |sum, one| TrafficValue {
                packets: sum.packets + one.packets,
                bytes: sum.bytes + one.bytes,
            })
    }

    /// Runs a program on a packet as if it came in on the loopback device (index 1).
    pub fn run(&self, program: &str, packet: &[u8]) -> Outcome {
        self.run_segments(program, packet, 0)
    }

    /// As [`Self::run`], for an offloaded packet with segments of that size, 0 = an ordinary one.
    pub fn run_segments(&self, program: &str, packet: &[u8], segment_bytes: u32) -> Outcome {
        self.run_marked(program, packet, segment_bytes, 0)
    }

    /// As [`Self::run_segments`], for a packet of a socket with that mark.
    pub fn run_marked(
        &self,
        program: &str,
        packet: &[u8],
        segment_bytes: u32,
        mark: u32,
    ) -> Outcome {
        let program: &SchedClassifier = self
            .ebpf
            .program(program)
            .expect(program)
            .try_into()
            .expect("a tc program");
        let mut output = vec![0_u8; PACKET_BYTES_MAX];
        let mut context = [0_u32; SKB_CONTEXT_WORDS];
        context[SKB_GSO_SIZE_WORD] = segment_bytes;
        context[SKB_MARK_WORD] = mark;
        let mut attributes = TestRunAttributes {
            program_fd: program.fd().expect("loaded").as_fd().as_raw_fd() as u32,
            data_size_in: packet.len() as u32,
            data_size_out: output.len() as u32,
            data_in: packet.as_ptr() as u64,
            data_out: output.as_mut_ptr() as u64,
            context_size_in: size_of_val(&context) as u32,
            context_in: context.as_ptr() as u64,
            repeat: 1,
            ..TestRunAttributes::default()
        };
        call(BPF_PROG_TEST_RUN, &mut attributes).unwrap_or_else(|error| {
            panic!("the kernel does not run the program on {packet:x?}: {error}")
        });
        output.truncate(attributes.data_size_out as usize);
        Outcome {
            verdict: attributes.verdict as i32,
            packet: output,
        }
    }
}

#[repr(C)]
struct MapAttributes {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl MapAttributes {
    fn new(map_fd: RawFd, key: &[u8], value: u64) -> Self {
        Self {
            map_fd: map_fd as u32,
            padding: 0,
            key: key.as_ptr() as u64,
            value,
            flags: 0,
        }
    }
}

#[repr(C)]
#[derive(Default)]
struct TestRunAttributes {
    program_fd: u32,
    verdict: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

fn call<T>(command: libc::c_long, attributes: &mut T) -> std::io::Result<()> {
    // SAFETY: the attributes have the layout of the command and name buffers that outlive the call.
    let status = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>() as libc::c_ulong,
        )
    };
    if status < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}
