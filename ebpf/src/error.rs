//! What can go wrong, each with the object's name and, where there is one, the remedy.

use std::io;
use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No BPF file system where pins are to live.
    #[error(
        "no BPF file system is mounted at {path}: mount one with `mount -t bpf bpf {path}`, or name another place"
    )]
    BpffsNotMounted {
        /// The folder that was looked at.
        path: PathBuf,
    },
    /// A pinned map of this layout version is not what this build expects.
    #[error(
        "the pinned map {map} has {found}, but this build expects {expected}: remove the pins with `clustermesh-node uninstall`"
    )]
    PinnedMapMismatch {
        /// Name of the map.
        map: &'static str,
        /// Type, sizes, entries.
        expected: String,
        /// Type, sizes, entries.
        found: String,
    },
    /// A call for a pin or its folder failed.
    #[error("cannot {action} {path}: {source}")]
    Pin {
        /// What was tried.
        action: &'static str,
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused the programs, and is older than any that takes them.
    #[error(
        "this kernel ({release}) is too old: bpf_redirect_peer and bpf_redirect_neigh need 5.10 or newer ({cause})"
    )]
    KernelTooOld {
        /// Release of the running kernel.
        release: String,
        /// What it refused.
        cause: Box<Error>,
    },
    /// The object with the kernel programs and maps was refused.
    #[error("cannot load the kernel programs: {0}")]
    Load(#[from] Box<aya::EbpfError>),
    /// A program is missing in the object, or the verifier refused it.
    #[error("cannot load the kernel program {program}: {cause}")]
    Program {
        /// Name of the program.
        program: &'static str,
        /// The verifier's last words.
        cause: String,
    },
    /// A map holds as many entries as it may.
    #[error("the map {map} is full: it holds {capacity} entries at most")]
    MapFull {
        /// Name of the map.
        map: &'static str,
        /// Its size.
        capacity: u32,
    },
    /// A call on a map failed.
    #[error("cannot {action} {keys} keys of the map {map}: {source}")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// Keys in the call.
        keys: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The flow ring cannot be mapped.
    #[error("cannot open the ring of flow records: {0}")]
    Flows(#[from] Box<aya::maps::MapError>),
    /// The interface is not, or no longer, in this network namespace.
    #[error("there is no interface with index {ifindex} in this network namespace")]
    InterfaceGone {
        /// Its index.
        ifindex: u32,
    },
    /// A program could not be attached to an interface, or detached from it.
    #[error("cannot {action} {program} at interface {ifindex}: {cause}")]
    Interface {
        /// What was tried.
        action: &'static str,
        /// Name of the program.
        program: &'static str,
        /// Index of the interface.
        ifindex: u32,
        /// What the kernel said.
        cause: String,
    },
    /// A program could not be attached to the cgroup.
    #[error("cannot {action} {program} at cgroup {path}: {source}")]
    Cgroup {
        /// What was tried.
        action: &'static str,
        /// Name of the program.
        program: &'static str,
        /// The cgroup's folder; it must be in a cgroup2 hierarchy.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}
