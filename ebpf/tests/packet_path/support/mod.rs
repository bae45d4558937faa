//! What the tests of the kernel programs share.

pub mod bpf;
pub mod net;
pub mod node;
pub mod packet;
pub mod raw;
pub mod tcp;
pub mod wireguard;
