//! Flow records: what a program saw and decided, written to a ring buffer while somebody listens.

use crate::Address;

/// Bytes of the ring buffer.
pub const FLOW_RING_BYTES: u32 = 1 << 20;

/// [`FlowRecord::hook`]: pod's interface, packet from the pod.
pub const HOOK_FROM_POD: u8 = 1;
/// [`FlowRecord::hook`]: the pair between host and pods, packet from the host.
pub const HOOK_FROM_HOST: u8 = 2;
/// [`FlowRecord::hook`]: underlay device, packet from the network.
pub const HOOK_FROM_NETWORK: u8 = 3;
/// [`FlowRecord::hook`]: WireGuard device, packet from a peer.
pub const HOOK_FROM_WIREGUARD: u8 = 4;
/// [`FlowRecord::hook`]: underlay device, packet that leaves.
pub const HOOK_TO_NETWORK: u8 = 5;

/// [`FlowRecord::verdict`]: delivered or forwarded on `path`.
pub const VERDICT_FORWARDED: u8 = 0;
/// [`FlowRecord::verdict`]: dropped for `reason`.
pub const VERDICT_DROPPED: u8 = 1;

/// One packet as one program saw it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// `bpf_ktime_get_ns`.
    pub time_ns: u64,
    /// Inner source, mapped.
    pub source: Address,
    /// Inner destination, mapped.
    pub destination: Address,
    /// Identity that the program took for the sender.
    pub source_identity: u32,
    /// [`crate::TrafficPath`] or [`crate::DropReason`], by `verdict`.
    pub path_or_reason: u32,
    /// Bytes of the inner IP packet.
    pub length_bytes: u32,
    /// Inner source port (0 where there is none), big-endian.
    pub source_port_be: [u8; 2],
    /// Inner destination port (0 where there is none), big-endian.
    pub destination_port_be: [u8; 2],
    /// Inner IP protocol.
    pub protocol: u8,
    /// `HOOK_*`.
    pub hook: u8,
    /// `VERDICT_*`.
    pub verdict: u8,
    /// Zero.
    pub reserved: u8,
    /// Zero.
    pub reserved2: u32,
}

const _: () = assert!(size_of::<FlowRecord>() == 64);
