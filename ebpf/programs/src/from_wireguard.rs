//! Hook: ingress of WireGuard devices, whose packets have no link header.
//!
//! WireGuard has opened the packet and checked that its peer may send from the source: for a tunnel packet that is the
//! node's address. Whose pods live there and which identities they have is checked here, as in clear.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use clustermesh_ebpf_abi::{DropReason, HOOK_FROM_WIREGUARD};

use crate::arrival::{self, Wire};
use crate::frame::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame};
use crate::verdict::{Action, Seen, conclude, config};

/// Entry point.
#[classifier]
pub fn from_wireguard(context: TcContext) -> i32 {
    let mut seen = Seen::EMPTY;
    let outcome = handle(Frame::of(&context), &mut seen);
    conclude(HOOK_FROM_WIREGUARD, &seen, outcome)
}

#[inline(always)]
fn handle(frame: Frame, seen: &mut Seen) -> Result<Action, DropReason> {
    let Ok(config) = config() else {
        return Ok(Action::Pass);
    };
    let ethertype = frame.protocol();
    if ethertype != ETHERTYPE_IPV4 && ethertype != ETHERTYPE_IPV6 {
        return Err(DropReason::UnknownEthertype);
    }
    // With it a packet looks like one of the underlay: what follows is the same. The kernel takes it off again where
    // the packet goes up its stack.
    frame.add_ethernet()?;
    let field = frame.at::<u16>(12).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked the bounds.
    unsafe { *field = ethertype };
    arrival::handle(frame, config, Wire::Encrypted, seen)
}
