//! Hook: ingress of underlay devices.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use clustermesh_ebpf_abi::{DropReason, HOOK_FROM_NETWORK};

use crate::arrival::{self, Wire};
use crate::frame::{ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, Frame};
use crate::verdict::{Action, Seen, conclude, config};

/// Entry point.
#[classifier]
pub fn from_network(context: TcContext) -> i32 {
    let mut seen = Seen::EMPTY;
    let outcome = handle(Frame::of(&context), &mut seen);
    conclude(HOOK_FROM_NETWORK, &seen, outcome)
}

#[inline(always)]
fn handle(frame: Frame, seen: &mut Seen) -> Result<Action, DropReason> {
    // A frame of a VLAN belongs to a VLAN device, where a program of its own looks at it. One whose tag holds but a
    // priority is the host's, as if it had none.
    if frame.has_vlan_tag() && frame.vlan_id() != 0 {
        return Ok(Action::Pass);
    }
    let Ok(config) = config() else {
        // The host must be reachable before its agent has started.
        return Ok(Action::Pass);
    };
    // The kernel takes off a second tag too, but only after this: what is behind it cannot be judged here.
    if frame.has_vlan_tag() && matches!(frame.protocol(), ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN) {
        return Err(DropReason::VlanTagged);
    }
    arrival::handle(frame, config, Wire::Clear, seen)
}
