//! What every back end must do, judged by `wg` and by packets: one suite, run on each that the machine has.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use clustermesh_encryption::kernel::{self, KernelDevice};
use clustermesh_encryption::process::{ProcessDevice, ProcessOptions, end_silent};
use clustermesh_encryption::userspace::control_socket::SOCKET_DIR;
use clustermesh_encryption::{Device, DeviceError, Origin, Others, link};
use clustermesh_encryption_core::config::{DeviceConfig, PeerConfig};
use clustermesh_encryption_core::key::{PresharedKey, PrivateKey, PublicKey};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// Opens a device of a back end, found or new.
type Open = fn(&str) -> (Box<dyn Device>, Origin);

/// A back end. Their devices have names of their own: `wg` would find one that runs in user space first.
#[derive(Clone, Copy)]
struct Kind {
    open: Open,
    letter: char,
}

const USER_SPACE: Kind = Kind {
    open: in_user_space,
    letter: 'u',
};
const KERNEL: Kind = Kind {
    open: in_the_kernel,
    letter: 'k',
};

impl Kind {
    fn open(self, name: &str) -> (Box<dyn Device>, Origin) {
        (self.open)(name)
    }

    fn name(self, letter: char) -> String {
        format!("{}{}", name(letter), self.letter)
    }
}

fn in_user_space(name: &str) -> (Box<dyn Device>, Origin) {
    let options = ProcessOptions {
        program: PathBuf::from(env!("CARGO_BIN_EXE_clustermesh-wireguard")),
        socket_dir: SOCKET_DIR.into(),
        mtu: 1_420,
        follows: None,
    };
    let (device, origin) = ProcessDevice::open(name, &options).unwrap();
    (Box::new(device), origin)
}

fn in_the_kernel(name: &str) -> (Box<dyn Device>, Origin) {
    let (device, origin) = KernelDevice::open(name).unwrap();
    (Box::new(device), origin)
}

fn run(program: &str, arguments: &str) -> String {
    let words = arguments.split(' ');
    let output = Command::new(program).args(words).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn private(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32])
}

fn public(number: u8) -> PublicKey {
    private(number).public()
}

fn peer(number: u8, prefixes: &[&str]) -> PeerConfig {
    PeerConfig {
        endpoint: Some(([192, 0, 2, number], 51_871).into()),
        allowed_ips: prefixes.iter().map(|text| text.parse().unwrap()).collect(),
        ..PeerConfig::new(public(number))
    }
}

fn config(number: u8, peers: Vec<PeerConfig>) -> DeviceConfig {
    DeviceConfig {
        private_key: Some(private(number)),
        listen_port: 51_871,
        fwmark: 0xe00,
        peers,
    }
}

/// Names of user-space devices are told apart on the whole machine.
fn name(letter: char) -> String {
    format!("wc{letter}{:x}", std::process::id())
}

/// What `wg` says is allowed for whom.
fn allowed(name: &str) -> Vec<String> {
    let text = run("wg", &format!("show {name} allowed-ips"));
    let mut lines: Vec<String> = text.lines().map(sorted_prefixes).collect();
    lines.sort();
    lines
}

fn sorted_prefixes(line: &str) -> String {
    let (key, prefixes) = line.split_once('\t').unwrap();
    let mut prefixes: Vec<&str> = prefixes.split(' ').collect();
    prefixes.sort_unstable();
    format!("{key}\t{}", prefixes.join(" "))
}

fn expected(peers: &[(u8, &str)]) -> Vec<String> {
    let line = |(number, prefixes): &(u8, &str)| format!("{}\t{prefixes}", public(*number));
    let mut lines: Vec<String> = peers.iter().map(line).collect();
    lines.sort();
    lines
}

/// Runs a test in a network namespace of its own.
fn apart(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        run("ip", "link set lo up");
        test();
    });
    thread.join().unwrap();
}

fn changes_by_difference_and_is_found_again(kind: Kind) {
    let name = kind.name('d');
    let (device, origin) = kind.open(&name);
    assert_eq!(origin, Origin::Started);
    assert!(device.status().unwrap().peers.is_empty());
    let mut second = peer(2, &["10.0.2.0/24", "fd00:2::/64"]);
    second.preshared_key = PresharedKey::from_bytes([7; 32]);
    second.persistent_keepalive_seconds = Some(25);
    let wanted = config(1, vec![second.clone(), peer(3, &["10.0.3.0/24"])]);
    assert_eq!(device.configure(&wanted, Others::Removed).unwrap(), 5);
    assert_eq!(device.configure(&wanted, Others::Removed).unwrap(), 0);
    let shown = run("wg", &format!("show {name} dump"));
    let own = public(1).to_string();
    for word in ["51871", "0xe00", "192.0.2.2:51871", "25", &own] {
        assert!(shown.contains(word), "{word} in {shown}");
    }
    let status = device.status().unwrap();
    let found = (status.public_key, status.listen_port);
    assert_eq!(found, (Some(public(1)), 51_871));
    // Who lets go of it does not end it.
    drop(device);
    let (device, origin) = kind.open(&name);
    assert_eq!(origin, Origin::Adopted);
    assert_eq!(device.configure(&wanted, Others::Removed).unwrap(), 0);
    // One prefix goes, one moves, one peer comes.
    second.allowed_ips.remove(&"10.0.2.0/24".parse().unwrap());
    second.allowed_ips.insert("10.0.3.0/24".parse().unwrap());
    let wanted = config(1, vec![second, peer(3, &[]), peer(4, &["10.0.4.0/24"])]);
    device.configure(&wanted, Others::Removed).unwrap();
    let second = (2, "10.0.3.0/24 fd00:2::/64");
    let after = [second, (3, "(none)"), (4, "10.0.4.0/24")];
    assert_eq!(allowed(&name), expected(&after));
    // While not all is known nobody goes; what another has now moves all the same.
    let partial = config(1, vec![peer(5, &["10.0.4.0/24"])]);
    device.configure(&partial, Others::Kept).unwrap();
    let after = [second, (3, "(none)"), (4, "(none)"), (5, "10.0.4.0/24")];
    assert_eq!(allowed(&name), expected(&after));
    device.configure(&partial, Others::Removed).unwrap();
    assert_eq!(allowed(&name), expected(&[(5, "10.0.4.0/24")]));
    // What contradicts itself changes nothing.
    let twice = config(1, vec![peer(6, &[]), peer(6, &[])]);
    assert!(device.configure(&twice, Others::Removed).is_err());
    assert_eq!(allowed(&name), expected(&[(5, "10.0.4.0/24")]));
    device.remove().unwrap();
    assert!(!link::exists(&name));
    let (device, origin) = kind.open(&name);
    assert_eq!(origin, Origin::Started);
    assert!(device.status().unwrap().peers.is_empty());
    device.remove().unwrap();
}

fn takes_a_thousand_prefixes_of_one_peer(kind: Kind) {
    let name = kind.name('m');
    let (device, _) = kind.open(&name);
    let prefixes: Vec<String> = (0..1_000)
        .map(|i| format!("10.{}.{}.0/24", i / 250, i % 250))
        .collect();
    let texts: Vec<&str> = prefixes.iter().map(String::as_str).collect();
    let all = config(1, vec![peer(2, &texts), peer(3, &[])]);
    let half = config(1, vec![peer(2, &[]), peer(3, &texts[..500])]);
    for wanted in [all, half] {
        device.configure(&wanted, Others::Removed).unwrap();
        assert_eq!(device.configure(&wanted, Others::Removed).unwrap(), 0);
    }
    device.remove().unwrap();
}

fn keeps_a_live_session_while_others_change(kind: Kind) {
    let (other, name, other_name) = (OtherMachine::new(), kind.name('a'), kind.name('b'));
    let wire = format!(
        "link add wire0 type veth peer name wire0 netns {}",
        other.pid()
    );
    run("ip", &wire);
    run("ip", "addr add 192.0.2.1/24 dev wire0");
    run("ip", "link set wire0 up");
    let device = up(kind, &name, "10.9.0.1/24");
    let wanted = config(1, vec![peer(2, &["10.9.0.2/32"])]);
    device.configure(&wanted, Others::Removed).unwrap();
    let there = other_name.clone();
    other.run(move || {
        run("ip", "addr add 192.0.2.2/24 dev wire0");
        run("ip", "link set wire0 up");
        let wanted = config(2, vec![peer(1, &["10.9.0.1/32"])]);
        let device = up(kind, &there, "10.9.0.2/24");
        device.configure(&wanted, Others::Removed).unwrap();
    });
    let begun = Instant::now();
    while !ping(1) {
        assert!(begun.elapsed() < PATIENCE, "no answer through the tunnel");
    }
    let of_peer = || {
        let status = device.status().unwrap();
        let found = status.peers.iter().find(|(key, _)| *key == public(2));
        found.unwrap().1
    };
    let before = of_peer();
    assert!(before.last_handshake.is_some() && before.rx_bytes > 0 && before.tx_bytes > 0);
    assert_eq!(before.endpoint, Some(([192, 0, 2, 2], 51_871).into()));
    for round in 0..10_u8 {
        let more = format!("10.8.{round}.0/24");
        let live = peer(2, &["10.9.0.2/32", &more]);
        let wanted = config(1, vec![live, peer(20 + round, &["10.7.0.0/24"])]);
        device.configure(&wanted, Others::Removed).unwrap();
        assert!(ping(2), "round {round}");
    }
    let after = of_peer();
    assert_eq!(after.last_handshake, before.last_handshake, "one session");
    assert!(after.rx_bytes > before.rx_bytes && after.tx_bytes > before.tx_bytes);
    device.remove().unwrap();
    other.run(move || kind.open(&other_name).0.remove().unwrap());
}

fn up(kind: Kind, name: &str, address: &str) -> Box<dyn Device> {
    let (device, _) = kind.open(name);
    run("ip", &format!("addr add {address} dev {name}"));
    run("ip", &format!("link set {name} up"));
    device
}

fn ping(count: u32) -> bool {
    let arguments = format!("-n -c {count} -i 0.05 -W 2 10.9.0.2");
    let output = Command::new("ping").args(arguments.split(' ')).output();
    output.unwrap().status.success()
}

/// A process that holds a network namespace.
struct OtherMachine(Child);

impl OtherMachine {
    fn new() -> Self {
        let command = ["--net", "sleep", "600"];
        let holder = Command::new("unshare").args(command).spawn().unwrap();
        let (begun, path) = (Instant::now(), format!("/proc/{}/comm", holder.id()));
        // It is that program only when it is there.
        while std::fs::read_to_string(&path).unwrap_or_default().trim() != "sleep" {
            assert!(begun.elapsed() < PATIENCE, "no namespace");
            std::thread::yield_now();
        }
        Self(holder)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn run(&self, work: impl FnOnce() + Send + 'static) {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        let thread = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work();
        });
        thread.join().unwrap();
    }
}

impl Drop for OtherMachine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Says so past the harness, which hides what passing tests print.
fn kernel_is_there(test: &str) -> bool {
    match kernel::probe() {
        Ok(()) => true,
        Err(error) => {
            let mut stderr = std::io::stderr();
            writeln!(
                stderr,
                "NOT RUN: {test}: this kernel has no WireGuard ({error})"
            )
            .unwrap();
            false
        }
    }
}

#[test]
fn user_space_changes_by_difference_and_is_found_again() {
    apart(|| changes_by_difference_and_is_found_again(USER_SPACE));
}

#[test]
fn user_space_takes_a_thousand_prefixes_of_one_peer() {
    apart(|| takes_a_thousand_prefixes_of_one_peer(USER_SPACE));
}

#[test]
fn user_space_keeps_a_live_session_while_others_change() {
    apart(|| keeps_a_live_session_while_others_change(USER_SPACE));
}

fn socket_of(name: &str) -> PathBuf {
    Path::new(SOCKET_DIR).join(format!("{name}.sock"))
}

/// The process that serves the device.
fn process_of(name: &str) -> Pid {
    let stream = UnixStream::connect(socket_of(name)).unwrap();
    Pid::from_raw(getsockopt(&stream, PeerCredentials).unwrap().pid())
}

#[test]
fn a_stopped_device_is_silent_until_it_goes_on_or_is_replaced() {
    apart(|| {
        let name = name('h');
        let (device, _) = in_user_space(&name);
        let wanted = config(1, vec![peer(2, &["10.0.2.0/24"])]);
        device.configure(&wanted, Others::Removed).unwrap();
        let process = process_of(&name);
        kill(process, Signal::SIGSTOP).unwrap();
        let begun = Instant::now();
        for result in [
            device.status().map(drop),
            device.configure(&wanted, Others::Removed).map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(matches!(error, DeviceError::Silent { .. }), "{error}");
        }
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        kill(process, Signal::SIGCONT).unwrap();
        assert_eq!(device.status().unwrap().peers.len(), 1);
        // One that does not come back is replaced.
        kill(process, Signal::SIGSTOP).unwrap();
        end_silent(&name, Path::new(SOCKET_DIR)).unwrap();
        let (device, origin) = in_user_space(&name);
        assert_eq!(origin, Origin::Started);
        assert_ne!(process_of(&name), process);
        device.configure(&wanted, Others::Removed).unwrap();
        device.remove().unwrap();
    });
}

#[test]
fn garbage_on_the_control_socket_changes_nothing() {
    apart(|| {
        let name = name('g');
        let (device, _) = in_user_space(&name);
        let wanted = config(1, vec![peer(2, &["10.0.2.0/24"])]);
        device.configure(&wanted, Others::Removed).unwrap();
        let long = "a".repeat(1 << 20);
        for garbage in [
            "",
            "\n",
            "\n\n",
            "get=2\n\n",
            "set=1\nprivate_key=00\n\n",
            "set=1\nreplace_peers=true\nnonsense=1\n\n",
            "set=1\npublic_key=\n\n",
            "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            &long,
        ] {
            let mut stream = UnixStream::connect(socket_of(&name)).unwrap();
            // It may hang up first.
            let _ = stream.write_all(garbage.as_bytes());
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            let answer = String::from_utf8(answer).unwrap();
            assert!(!answer.contains("errno=0"), "{garbage:?}: {answer}");
        }
        let mut stream = UnixStream::connect(socket_of(&name)).unwrap();
        let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let _ = stream.write_all(&bytes);
        drop(stream);
        assert_eq!(device.configure(&wanted, Others::Removed).unwrap(), 0);
        assert_eq!(allowed(&name), expected(&[(2, "10.0.2.0/24")]));
        device.remove().unwrap();
    });
}

#[test]
fn another_user_gets_no_answer_though_the_file_lets_him_in() {
    apart(|| {
        let name = name('u');
        let (device, _) = in_user_space(&name);
        let socket = socket_of(&name);
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
        let ask = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
                   try:\n s.sendall(b'get=1\\n\\n')\n print(s.recv(9))\nexcept OSError: print('hung up')";
        let ask_as = |user: u32| {
            let mut command = Command::new("python3");
            command.args(["-c", ask]).arg(&socket).uid(user);
            let output = command.output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{error}");
            String::from_utf8(output.stdout).unwrap()
        };
        assert!(ask_as(0).contains("counter.n"));
        let answer = ask_as(65_534);
        assert!(["b''", "hung up"].contains(&answer.trim()), "{answer}");
        device.remove().unwrap();
    });
}

#[test]
fn no_secret_travels_when_only_the_status_is_asked_for() {
    apart(|| {
        let name = name('s');
        let (device, _) = in_user_space(&name);
        device
            .configure(&config(1, Vec::new()), Others::Removed)
            .unwrap();
        let mut stream = UnixStream::connect(socket_of(&name)).unwrap();
        stream.write_all(b"get=status\n\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(
            answer.contains("own_public_key=") && answer.ends_with("errno=0\n\n"),
            "{answer}"
        );
        assert!(!answer.contains("private_key"), "{answer}");
        assert_eq!(device.status().unwrap().public_key, Some(public(1)));
        device.remove().unwrap();
    });
}

#[test]
fn the_kernel_passes_the_same_suite() {
    apart(|| {
        if kernel_is_there("the suite on the kernel's device") {
            changes_by_difference_and_is_found_again(KERNEL);
            takes_a_thousand_prefixes_of_one_peer(KERNEL);
            keeps_a_live_session_while_others_change(KERNEL);
        }
    });
}
