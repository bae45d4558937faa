//! Two network namespaces that are joined by a wire.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use clustermesh_encryption::process::ProcessDevice;
use clustermesh_encryption::{Device, Others};
use clustermesh_encryption_core::config::{DeviceConfig, PeerConfig};
use clustermesh_encryption_core::key::PrivateKey;
use nix::sched::{CloneFlags, setns};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The two, by side; side 0 is 192.0.2.1 on the wire and 10.9.0.1 in the tunnel, side 1 has 2 at the end.
pub struct Machines {
    /// What the names of devices begin with, which are told apart on the whole machine.
    pub prefix: String,
}

impl Machines {
    pub fn new(test: char) -> Self {
        let machines = Self {
            prefix: format!("h{test}{:x}", std::process::id()),
        };
        for side in [0, 1] {
            run("ip", &format!("netns add {}", machines.netns(side)));
        }
        let (first, second) = (machines.netns(0), machines.netns(1));
        let wire = format!("link add wire0 netns {first} type veth peer name wire0 netns {second}");
        run("ip", &wire);
        for side in [0, 1] {
            let own = side + 1;
            machines.ip(side, "link set lo up");
            machines.ip(side, &format!("addr add 192.0.2.{own}/24 dev wire0"));
            machines.ip(side, "link set wire0 up");
            machines.ip(side, &format!("addr add 10.9.0.{own}/32 dev lo"));
        }
        machines
    }

    fn netns(&self, side: usize) -> String {
        format!("{}{side}", self.prefix)
    }

    pub fn ip(&self, side: usize, arguments: &str) {
        run("ip", &format!("-n {} {arguments}", self.netns(side)));
    }

    /// Does something in a side's namespace.
    pub fn within<T: Send>(&self, side: usize, act: impl FnOnce() -> T + Send) -> T {
        let path = Path::new("/var/run/netns").join(self.netns(side));
        let namespace = std::fs::File::open(path).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                act()
            });
            thread.join().unwrap()
        })
    }

    /// Sets a device up, whose packets come in whatever the routes say.
    pub fn set_up(&self, side: usize, name: &str) {
        self.ip(side, &format!("link set {name} up"));
        let (netns, setting) = (
            self.netns(side),
            format!("net.ipv4.conf.{name}.rp_filter=0"),
        );
        run("ip", &format!("netns exec {netns} sysctl -q -w {setting}"));
    }

    /// Sends packets to the other side's address in the tunnel through this device.
    pub fn route(&self, side: usize, name: &str) {
        let (own, other) = (side + 1, 2 - side);
        let route = format!("route replace 10.9.0.{other}/32 dev {name} src 10.9.0.{own}");
        self.ip(side, &route);
    }

    /// A side's socket in the tunnel.
    pub fn socket(&self, side: usize) -> UdpSocket {
        let address = SocketAddr::from(([10, 9, 0, u8::try_from(side + 1).unwrap()], 7_777));
        let socket = self.within(side, || UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Removes a device, and with it who runs it.
    pub fn remove(&self, side: usize, name: &str) {
        let gone = ["-n", &self.netns(side), "link", "del", name];
        let _ = Command::new("ip").args(gone).status();
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for side in [0, 1] {
            let netns = self.netns(side);
            let _ = Command::new("ip").args(["netns", "del", &netns]).status();
        }
    }
}

/// Makes one device of either side peers, and waits until both have shaken hands.
pub fn shake_hands(devices: &[ProcessDevice; 2], port: u16, key: impl Fn(usize) -> PrivateKey) {
    for (side, device) in devices.iter().enumerate() {
        let other = u8::try_from(2 - side).unwrap();
        let peer = PeerConfig {
            endpoint: Some(SocketAddr::from(([192, 0, 2, other], port))),
            allowed_ips: [format!("10.9.0.{other}/32").parse().unwrap()].into(),
            persistent_keepalive_seconds: Some(1),
            ..PeerConfig::new(key(1 - side).public())
        };
        let config = DeviceConfig {
            private_key: Some(key(side)),
            listen_port: port,
            fwmark: 0,
            peers: vec![peer],
        };
        device.configure(&config, Others::Removed).unwrap();
    }
    for device in devices {
        let begun = Instant::now();
        while device.status().unwrap().peers[0].1.last_handshake.is_none() {
            assert!(begun.elapsed() < PATIENCE, "no handshake");
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}
