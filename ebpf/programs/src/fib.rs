//! What the host's routes say of a packet.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NOT_FWDED, bpf_fib_lookup,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup as fib_lookup;

use crate::frame::Frame;
use crate::parse::{Family, Packet, Words};

/// `AF_INET`.
pub const AF_INET: u32 = 2;
/// `AF_INET6`.
const AF_INET6: u32 = 10;

/// Asks the host's routes: what the kernel says, and what it has found.
#[inline(always)]
pub fn lookup(
    frame: Frame,
    ifindex: u32,
    family: Family,
    source: Option<&Words>,
    destination: &Words,
    flags: u32,
) -> (i64, bpf_fib_lookup) {
    // SAFETY: plain integers, for which zeros are valid.
    let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    query.ifindex = ifindex;
    match family {
        Family::V4 => {
            query.family = AF_INET as u8;
            if let Some(source) = source {
                query.__bindgen_anon_3.ipv4_src = source.0[3];
            }
            query.__bindgen_anon_4.ipv4_dst = destination.0[3];
        }
        Family::V6 => {
            query.family = AF_INET6 as u8;
            if let Some(source) = source {
                query.__bindgen_anon_3.ipv6_src = source.0;
            }
            query.__bindgen_anon_4.ipv6_dst = destination.0;
        }
    }
    let size = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: the query is as large as is said.
    let status = unsafe { fib_lookup(frame.skb.cast(), &raw mut query, size, flags) };
    (status, query)
}

/// True if the host would hand the packet on to somebody else: its destination is none of the host's own addresses.
#[inline(always)]
pub fn would_forward(frame: Frame, packet: &Packet) -> bool {
    let (source, destination) = (Some(&packet.source), &packet.destination);
    let (status, _) = lookup(
        frame,
        frame.ifindex(),
        packet.family,
        source,
        destination,
        0,
    );
    status != i64::from(BPF_FIB_LKUP_RET_NOT_FWDED)
        && status != i64::from(BPF_FIB_LKUP_RET_FWD_DISABLED)
}
