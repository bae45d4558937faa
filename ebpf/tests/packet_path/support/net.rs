//! Namespaces of a test: made with a prefix of its own, removed at the end.

use std::fs::File;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Namespaces that go when this goes.
pub struct Namespaces {
    prefix: String,
    names: Vec<String>,
}

impl Namespaces {
    /// None yet.
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            prefix: format!("cmt{}-{number}-", std::process::id()),
            names: Vec::new(),
        }
    }

    /// Makes one; its loopback is up.
    pub fn add(&mut self, name: &str) -> String {
        let full = format!("{}{name}", self.prefix);
        ip(&format!("netns add {full}"));
        self.names.push(full.clone());
        ip(&format!("-n {full} link set lo up"));
        // Duplicate detection would keep link-local addresses unusable for a second or two.
        sysctl(&full, "net/ipv6/conf/default/accept_dad", "0");
        full
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            // A failed test must not fail again while it cleans up.
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

/// Runs `ip` with the words of `arguments`.
pub fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("ip runs");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A command in a namespace. `ip netns exec` would hide bpffs and cgroups.
pub fn command(namespace: &str, program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{namespace}"))
        .arg(program)
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// Runs a command in a namespace to its end.
pub fn run(namespace: &str, program: &str, arguments: &[&str]) -> Output {
    command(namespace, program, arguments)
        .output()
        .expect("nsenter runs")
}

/// As [`run`], and it must succeed.
pub fn check(namespace: &str, program: &str, arguments: &[&str]) -> String {
    let output = run(namespace, program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?} in {namespace}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a closure in a namespace, on a thread of its own: the namespace belongs to the thread.
pub fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let handle = scope.spawn(|| {
            let file = File::open(format!("/run/netns/{namespace}")).expect("the namespace exists");
            setns(file, CloneFlags::CLONE_NEWNET).expect("setns");
            work()
        });
        match handle.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Sets a sysctl in a namespace.
pub fn sysctl(namespace: &str, path: &str, value: &str) {
    inside(namespace, || {
        // `/proc/sys/net` shows the namespace of the thread that opens it.
        let file = format!("/proc/sys/{path}");
        std::fs::write(&file, value).unwrap_or_else(|error| panic!("{file}: {error}"));
    });
}

/// Index of a device.
pub fn device_index(namespace: &str, name: &str) -> u32 {
    inside(namespace, || nix::net::if_::if_nametoindex(name)).expect("an index")
}

/// Index and MAC address of a device.
pub fn device(namespace: &str, name: &str) -> (u32, [u8; 6]) {
    let text = check(namespace, "ip", &["-o", "link", "show", "dev", name]);
    let index = device_index(namespace, name);
    let mac = text
        .split("link/ether ")
        .nth(1)
        .and_then(|t| t.split(' ').next())
        .expect("a MAC address");
    let mut bytes = [0; 6];
    for (byte, part) in bytes.iter_mut().zip(mac.split(':')) {
        *byte = u8::from_str_radix(part, 16).expect("hexadecimal");
    }
    (index, bytes)
}
