//! Hook: ingress of `cm_net`, that is, what the host routes into `cm_host` for pods.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use clustermesh_ebpf_abi::{DropReason, ENDPOINT_HOST, HOOK_FROM_HOST, IDENTITY_REMOTE_NODE};

use crate::answer;
use crate::deliver::{redirect_to_host, to_host};
use crate::frame::{ETHERNET_BYTES, Frame};
use crate::own_device::{self, Inside};
use crate::parse::{self, Packet};
use crate::route::{Next, endpoint, forward};
use crate::verdict::{Action, Seen, conclude, config};

/// Entry point.
#[classifier]
pub fn from_host(context: TcContext) -> i32 {
    let mut seen = Seen::EMPTY;
    let outcome = handle(Frame::of(&context), &mut seen);
    conclude(HOOK_FROM_HOST, &seen, outcome)
}

#[inline(always)]
fn handle(frame: Frame, seen: &mut Seen) -> Result<Action, DropReason> {
    let config = config()?;
    if own_device::read(frame, &mut seen.packet)? == Inside::Arp {
        return Ok(Action::Pass);
    }
    if parse::is_link_scoped(&seen.packet) {
        return Ok(Action::Ignore);
    }
    seen.read_ports(config, frame);
    // A pod's packet comes this way when the kernel had to cut it to size: it keeps the pod's identity.
    seen.identity = match endpoint(&seen.packet.source) {
        Some(endpoint) if endpoint.flags & ENDPOINT_HOST == 0 => endpoint.identity,
        Some(_) | None => IDENTITY_REMOTE_NODE,
    };
    match forward(frame, config, &seen.packet, seen.identity)? {
        Next::Done(action) => Ok(action),
        Next::Host => to_host(frame, config, seen.packet.family),
        // Back to the stack would be round and round.
        Next::Elsewhere => Err(DropReason::NoRoute),
        Next::TooBig => Err(DropReason::TooBig),
        Next::UnknownPod => {
            let mut reply = Packet::EMPTY;
            answer::make(frame, &seen.packet, ETHERNET_BYTES, &mut reply)?;
            redirect_to_host(frame, config, seen.packet.family)?;
            Ok(Action::Answer(DropReason::UnknownPod))
        }
    }
}
