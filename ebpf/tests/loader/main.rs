//! The loader and the socket programs on a real kernel: namespaces, a cgroup and a BPF file system of their own.

mod interfaces;
mod node;
mod sockets;
mod takeover;
