//! The loader and the socket programs on a real kernel: namespaces, a cgroup and a BPF file system of their own.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure here fails the test"
)]

mod interfaces;
mod node;
mod sockets;
mod takeover;
mod verifier;
