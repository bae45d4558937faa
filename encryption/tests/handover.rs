//! Two devices on each side, as while keys change: what goes through the new ones must not overtake what waits in the old
//! ones, on either side. A process that is stopped for a moment stands for one that has no processor.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clustermesh_encryption::process::{ProcessDevice, ProcessOptions};
use clustermesh_encryption::userspace::handover::HOLD_MS_MAX;
use clustermesh_encryption::{Device, Others};
use clustermesh_encryption_core::config::{DeviceConfig, PeerConfig};
use clustermesh_encryption_core::key::PrivateKey;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// A stop that took longer than this says nothing: packets are held no longer than [`HOLD_MS_MAX`].
const STOP_MAX: Duration = Duration::from_millis(HOLD_MS_MAX / 2);
/// For so long the old device is stopped while packets go through the new one.
const OVERTAKING: Duration = Duration::from_millis(30);
/// Attempts until a stop was short enough.
const TRIES_MAX: usize = 50;
/// Numbered datagrams before the switch, and after it.
const DATAGRAMS: u32 = 100;
const MTU: u32 = 1_420;

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Two network namespaces, two devices in each: `o` of the old keys, `n` of the new ones.
struct Machines {
    dir: TempDir,
    prefix: String,
}

/// A side's key for the old or the new device.
fn key(side: usize, is_new: bool) -> PrivateKey {
    PrivateKey::from_bytes([1 + u8::try_from(side).unwrap() + 2 * u8::from(is_new); 32])
}

fn port(is_new: bool) -> u16 {
    51_871 + u16::from(is_new)
}

impl Machines {
    fn new(test: char) -> Self {
        let machines = Self {
            dir: tempfile::tempdir().unwrap(),
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

    fn ip(&self, side: usize, arguments: &str) {
        run("ip", &format!("-n {} {arguments}", self.netns(side)));
    }

    fn name(&self, side: usize, is_new: bool) -> String {
        format!("{}{side}{}", self.prefix, if is_new { 'n' } else { 'o' })
    }

    /// Does something in a side's namespace.
    fn within<T: Send>(&self, side: usize, act: impl FnOnce() -> T + Send) -> T {
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

    fn device(&self, side: usize, is_new: bool) -> ProcessDevice {
        let options = ProcessOptions {
            program: PathBuf::from(env!("CARGO_BIN_EXE_clustermesh-wireguard")),
            socket_dir: self.dir.path().to_owned(),
            mtu: MTU,
            follows: Some(self.name(side, !is_new)),
        };
        let name = self.name(side, is_new);
        let (device, _) = self.within(side, || ProcessDevice::open(&name, &options).unwrap());
        self.ip(side, &format!("link set {name} up"));
        // Packets come in by both, whatever the routes say.
        let setting = format!("net.ipv4.conf.{name}.rp_filter=0");
        run(
            "ip",
            &format!("netns exec {} sysctl -q -w {setting}", self.netns(side)),
        );
        device
    }

    /// Starts both devices of both sides, which shake hands.
    fn start(&self) {
        for is_new in [false, true] {
            let devices = [0, 1].map(|side| self.device(side, is_new));
            for (side, device) in devices.iter().enumerate() {
                let other = 1 - side;
                let peer = PeerConfig {
                    endpoint: Some(SocketAddr::from((
                        [192, 0, 2, u8::try_from(other + 1).unwrap()],
                        port(is_new),
                    ))),
                    allowed_ips: [format!("10.9.0.{}/32", other + 1).parse().unwrap()].into(),
                    persistent_keepalive_seconds: Some(1),
                    ..PeerConfig::new(key(other, is_new).public())
                };
                let config = DeviceConfig {
                    private_key: Some(key(side, is_new)),
                    listen_port: port(is_new),
                    fwmark: 0,
                    peers: vec![peer],
                };
                device.configure(&config, Others::Removed).unwrap();
            }
            for device in &devices {
                let begun = Instant::now();
                while device.status().unwrap().peers[0].1.last_handshake.is_none() {
                    assert!(begun.elapsed() < PATIENCE, "no handshake");
                    std::thread::park_timeout(Duration::from_millis(10));
                }
            }
        }
    }

    /// Sends the other side's packets to one of the two devices.
    fn route(&self, is_new: bool) {
        for side in [0, 1] {
            let (other, name) = (2 - side, self.name(side, is_new));
            self.ip(
                side,
                &format!(
                    "route replace 10.9.0.{other}/32 dev {name} src 10.9.0.{}",
                    side + 1
                ),
            );
        }
    }

    fn pid(&self, side: usize, is_new: bool) -> Pid {
        let name = self.name(side, is_new);
        let found = run(
            "pgrep",
            &format!("-f clustermesh-wireguard.{name}.--socket-dir"),
        );
        Pid::from_raw(found.trim().parse().unwrap())
    }

    fn socket(&self, side: usize) -> UdpSocket {
        let address = SocketAddr::from(([10, 9, 0, u8::try_from(side + 1).unwrap()], 7_777));
        let socket = self.within(side, || UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for side in [0, 1] {
            let netns = self.netns(side);
            for is_new in [false, true] {
                // The process ends with it, or it would hold the namespace.
                let name = self.name(side, is_new);
                let gone = ["-n", &netns, "link", "del", &name];
                let _ = Command::new("ip").args(gone).status();
            }
            let _ = Command::new("ip").args(["netns", "del", &netns]).status();
        }
    }
}

/// Sends numbered datagrams from side 0, the second half after the switch to the new devices, while the old device of
/// `stopped` is stopped from before the first to `resume_after` the last one. Gives the numbers as they came, and for how
/// long packets had to wait.
fn switch(test: char, stopped: usize, resume_after: Duration) -> (Vec<u32>, Duration) {
    let machines = Machines::new(test);
    machines.start();
    machines.route(false);
    let (sender, receiver) = (machines.socket(0), machines.socket(1));
    let send = |numbers: std::ops::Range<u32>| {
        for number in numbers {
            sender
                .send_to(&number.to_be_bytes(), "10.9.0.2:7777")
                .unwrap();
        }
    };
    let receive = || {
        let mut room = [0; 4];
        receiver.recv(&mut room).unwrap();
        u32::from_be_bytes(room)
    };
    // The way is there, and both ends know each other's addresses.
    send(u32::MAX - 1..u32::MAX);
    assert_eq!(receive(), u32::MAX - 1);
    let process = machines.pid(stopped, false);
    kill(process, Signal::SIGSTOP).unwrap();
    send(0..DATAGRAMS);
    machines.route(true);
    let begun = Instant::now();
    send(DATAGRAMS..2 * DATAGRAMS);
    let seen = if resume_after.is_zero() {
        // Time for one that overtakes to be here.
        receiver.set_read_timeout(Some(OVERTAKING)).unwrap();
        let _ = receiver.peek(&mut [0; 4]);
        kill(process, Signal::SIGCONT).unwrap();
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        begun.elapsed()
    } else {
        // Those that need not wait for the stopped one come while it is stopped.
        let first = receive();
        assert_eq!(first, DATAGRAMS, "the old device is stopped");
        let waited = begun.elapsed();
        kill(process, Signal::SIGCONT).unwrap();
        let mut rest: Vec<u32> = (1..2 * DATAGRAMS).map(|_| receive()).collect();
        rest.insert(0, first);
        return (rest, waited);
    };
    let numbers = (0..2 * DATAGRAMS).map(|_| receive()).collect();
    (numbers, seen)
}

/// The numbers of a switch whose stop was short.
fn short_switch(test: char, stopped: usize) -> Vec<u32> {
    for _ in 0..TRIES_MAX {
        let (numbers, stop) = switch(test, stopped, Duration::ZERO);
        if stop < STOP_MAX {
            return numbers;
        }
    }
    panic!("this machine stops for longer than {STOP_MAX:?} each time");
}

fn in_order() -> Vec<u32> {
    (0..2 * DATAGRAMS).collect()
}

#[test]
fn packets_do_not_overtake_those_that_wait_in_the_senders_old_device() {
    assert_eq!(short_switch('s', 0), in_order());
}

#[test]
fn packets_do_not_overtake_those_that_wait_in_the_receivers_old_device() {
    assert_eq!(short_switch('r', 1), in_order());
}

#[test]
fn an_old_device_that_hangs_is_not_waited_for_and_nothing_is_lost() {
    let (mut numbers, waited) = switch('h', 0, PATIENCE);
    let least = Duration::from_millis(HOLD_MS_MAX) * 9 / 10;
    assert!(waited >= least, "held for {waited:?} only");
    numbers.sort_unstable();
    assert_eq!(numbers, in_order());
}
