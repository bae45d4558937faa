//! What the lab needs of the machine, checked before anything is made.

use std::path::Path;

/// The oldest kernel on which everything but tcx works: redirecting to a neighbour and into a pod came with it.
const KERNEL_MIN: (u32, u32) = (5, 10);

/// What root of a container often lacks, by its number in `linux/capability.h`.
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

/// What is missing, each with its remedy; empty when the lab can run.
#[must_use]
pub fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root: namespaces and kernel programs need it (run with sudo)".to_owned());
    } else {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        missing.extend(privileges(
            &read("/proc/self/status"),
            &read("/proc/self/uid_map"),
        ));
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

/// What root lacks here, by its `status` and `uid_map` (proc(5), user_namespaces(7)).
fn privileges(status: &str, uid_map: &str) -> Option<String> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    let lacking: Vec<&str> = CAPABILITIES
        .into_iter()
        .filter(|(number, _)| effective & (1 << number) == 0)
        .map(|(_, name)| name)
        .collect();
    if !lacking.is_empty() {
        let lacking = lacking.join(" and ");
        return Some(format!(
            "{lacking}: this root has them not (a container must be privileged)"
        ));
    }
    let all_users = u32::MAX.to_string();
    let is_mapped = !uid_map.is_empty() && uid_map.split_whitespace().nth(2) != Some(&all_users);
    is_mapped.then(|| "root of the machine: this is one of a user namespace only".to_owned())
}

fn kernel_version() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.trim().parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_that_may_not_everything_is_told_what_it_lacks() {
        let everybody = "         0          0 4294967295\n";
        let with = |effective: &str| format!("Name:\tx\nCapEff:\t{effective}\n");
        assert_eq!(privileges(&with("000001ffffffffff"), everybody), None);
        let container = privileges(&with("00000000a80425fb"), everybody).unwrap();
        assert!(
            container.contains("CAP_NET_ADMIN and CAP_SYS_ADMIN"),
            "{container}"
        );
        let mapped = privileges(&with("000001ffffffffff"), "0 1000 1\n").unwrap();
        assert!(mapped.contains("user namespace"), "{mapped}");
    }
}
