//! A node of its own for every test, gone when the test is over however it ends.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clustermesh_ebpf::abi::{
    Address, BackendKey, BackendValue, FrontendKey, FrontendValue, v4_mapped,
};
use clustermesh_ebpf::{AttachMode, Datapath, Maps, Options, Takeover};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// Longest wait for an answer.
pub const PATIENCE: Duration = Duration::from_secs(10);
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// A socket belongs to the cgroup of its process, so tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// A network and mount namespace, a BPF file system and a cgroup. The thread is inside all of them.
pub struct Node {
    bpffs: TempDir,
    cgroup: PathBuf,
    former_cgroup: PathBuf,
    /// The host's veth pair; `cm_net` is the side with a program.
    pub cm_net: u32,
    _turn: MutexGuard<'static, ()>,
}

/// Runs `test` in a node of its own.
pub fn in_node(test: impl FnOnce(&Node) + Send) {
    std::thread::scope(|scope| {
        let outcome = scope.spawn(|| test(&Node::new())).join();
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

impl Node {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .expect("namespaces of our own: run these tests as root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let bpffs = TempDir::new().unwrap();
        mount(
            Some("bpf"),
            bpffs.path(),
            Some("bpf"),
            MsFlags::empty(),
            none,
        )
        .unwrap();

        let root = cgroup_root();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let cgroup = root.join(format!("clustermesh-test-{}", std::process::id()));
        fs::create_dir(&cgroup).expect("a cgroup of our own");
        enter(&cgroup);

        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        ip("link set lo up");
        ip("link add cm_host type veth peer name cm_net");
        ip("link set cm_host up");
        ip("link set cm_net up");
        Self {
            former_cgroup: root.join(own.unwrap_or_default()),
            cm_net: ifindex("cm_net"),
            bpffs,
            cgroup,
            _turn: turn,
        }
    }

    pub fn bpffs(&self) -> &Path {
        self.bpffs.path()
    }

    pub fn pins(&self) -> PathBuf {
        self.bpffs().join("clustermesh")
    }

    pub fn options(&self) -> Options {
        self.options_with(AttachMode::detect())
    }

    pub fn options_with(&self, attach_mode: AttachMode) -> Options {
        Options {
            bpffs: self.bpffs().to_owned(),
            attach_mode,
            cgroup: Some(self.cgroup.clone()),
        }
    }

    pub fn open(&self) -> (Datapath, Takeover) {
        Datapath::open(&self.options()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Opened for the first time, and active.
    pub fn active(&self) -> Datapath {
        let (mut datapath, takeover) = self.open();
        assert_eq!(takeover, Takeover::Fresh);
        datapath.activate(self.cm_net, &[]).unwrap();
        datapath
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // With the cgroup the programs at it go, even where a test left them.
        enter(&self.former_cgroup);
        let removed = fs::remove_dir(&self.cgroup);
        if !std::thread::panicking() {
            removed.expect("the cgroup can be removed");
        }
        let _ = nix::mount::umount2(self.bpffs.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    root.expect("a cgroup2 file system")
}

fn enter(cgroup: &Path) {
    let file = fs::OpenOptions::new()
        .write(true)
        .open(cgroup.join("cgroup.procs"));
    file.and_then(|mut file| write!(file, "{}", std::process::id()))
        .unwrap_or_else(|error| panic!("cannot enter {}: {error}", cgroup.display()));
}

/// Runs `ip` with these words in the thread's namespace.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
}

pub fn ifindex(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}

pub fn mapped(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => v4_mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

pub fn frontend_key(virtual_address: SocketAddr, protocol: u8) -> FrontendKey {
    FrontendKey {
        address: mapped(virtual_address.ip()),
        port_be: virtual_address.port().to_be_bytes(),
        protocol,
        reserved: 0,
    }
}

/// Writes a list of backends under a new number, then lets the frontend name it.
pub fn set_service(
    maps: &Maps,
    virtual_address: &str,
    protocol: u8,
    list_id: u32,
    backends: &[SocketAddr],
) {
    let key = frontend_key(virtual_address.parse().unwrap(), protocol);
    let mut sorted: Vec<_> = backends
        .iter()
        .map(|backend| (mapped(backend.ip()), backend.port().to_be_bytes()))
        .collect();
    sorted.sort_unstable();
    let list: Vec<_> = (0..)
        .zip(sorted)
        .map(|(slot, (address, port_be))| {
            let value = BackendValue {
                frontend_tag: key.tag(),
                address,
                port_be,
                cluster_id: 1,
            };
            (BackendKey { list_id, slot }, value)
        })
        .collect();
    maps.backends.upsert(&list).unwrap();
    let value = FrontendValue {
        list_id,
        backend_count: u16::try_from(list.len()).unwrap(),
        flags: 0,
    };
    maps.frontends.upsert(&[(key, value)]).unwrap();
}

pub fn delete_list(maps: &Maps, list_id: u32, len: u32) {
    let keys: Vec<_> = (0..len).map(|slot| BackendKey { list_id, slot }).collect();
    maps.backends.delete(&keys).unwrap();
}

/// Accepts connections at `address` (port 0 = any) as long as the process lives, and closes them with a greeting.
pub fn tcp_server(address: &str) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let local = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let _ = connection.and_then(|mut c| c.write_all(local.to_string().as_bytes()));
        }
    });
    local
}

/// Answers every datagram with its own address.
pub fn udp_server(address: &str) -> SocketAddr {
    let socket = UdpSocket::bind(address).unwrap();
    let local = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, client)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(local.to_string().as_bytes(), client);
        }
    });
    local
}
