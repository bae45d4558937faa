//! What the lab needs of the machine, checked before anything is made.

use std::path::Path;

/// The oldest kernel on which everything but tcx works: redirecting to a neighbour and into a pod came with it.
const KERNEL_MIN: (u32, u32) = (5, 10);

/// What is missing, each with its remedy; empty when the lab can run.
#[must_use]
pub fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root: namespaces and kernel programs need it (run with sudo)".to_owned());
    }
    let kernel = kernel_version();
    // docs/kernels.md says what is there on which kernel.
    if kernel < KERNEL_MIN {
        missing.push(format!(
            "kernel {}.{} or newer (this is {}.{}); 6.6 for tcx",
            KERNEL_MIN.0, KERNEL_MIN.1, kernel.0, kernel.1
        ));
    }
    if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun (modprobe tun)".to_owned());
    }
    if super::host::cgroup2_root().is_err() {
        missing.push("cgroup2: mount -t cgroup2 none /sys/fs/cgroup/unified".to_owned());
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.ends_with("\tbpf")) {
        missing.push("the bpf file system (CONFIG_BPF_SYSCALL)".to_owned());
    }
    for (program, package) in [
        ("ip", "iproute2"),
        ("ping", "iputils-ping"),
        ("nsenter", "util-linux"),
        ("ethtool", "ethtool"),
    ] {
        missing.extend(self::program(program, package));
    }
    missing
}

/// A program with its package, if it is missing.
#[must_use]
pub fn program(program: &str, package: &str) -> Option<String> {
    (!on_path(program)).then(|| format!("program {program} (package {package}; make setup)"))
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    })
}

fn kernel_version() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.trim().parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
