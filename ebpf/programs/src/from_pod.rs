//! Hook: ingress of the host end of a pod's veth pair, that is, what the pod sends.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use clustermesh_ebpf_abi::{DropReason, HOOK_FROM_POD, InterfaceValue};

use crate::answer;
use crate::deliver::{back_to_pod, to_host};
use crate::frame::{ETHERNET_BYTES, Frame};
use crate::maps::INTERFACES;
use crate::mesh;
use crate::own_device::{self, Inside};
use crate::parse::{self, Family, Packet, Words};
use crate::route::{Next, forward};
use crate::verdict::{Action, Seen, conclude, config};

/// Entry point.
#[classifier]
pub fn from_pod(context: TcContext) -> i32 {
    let mut seen = Seen::EMPTY;
    let outcome = handle(Frame::of(&context), &mut seen);
    conclude(HOOK_FROM_POD, &seen, outcome)
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
    let interface = INTERFACES
        .get_ptr(frame.ifindex())
        // SAFETY: the entry may be replaced while it is read, which no packet can provoke.
        .map(|value| unsafe { &*value })
        .ok_or(DropReason::SourceNotOwn)?;
    seen.identity = interface.identity;
    if !may_send(interface, &seen.packet) {
        return Err(DropReason::SourceNotOwn);
    }
    match forward(frame, config, &seen.packet, interface.identity)? {
        Next::Done(action) => Ok(action),
        // The kernel routes to the world.
        Next::Elsewhere => {
            mesh::refuse(config, &seen.packet.destination)?;
            to_host(frame, config, seen.packet.family)
        }
        // And it tells the sender of a packet that is too big.
        Next::Host | Next::TooBig => to_host(frame, config, seen.packet.family),
        Next::UnknownPod => {
            let mut reply = Packet::EMPTY;
            answer::make(frame, &seen.packet, ETHERNET_BYTES, &mut reply)?;
            back_to_pod(frame, seen.packet.family)?;
            Ok(Action::Answer(DropReason::UnknownPod))
        }
    }
}

/// True if the source is the pod's own address of that family.
#[inline(always)]
fn may_send(interface: &InterfaceValue, packet: &Packet) -> bool {
    let own = match packet.family {
        Family::V4 => Words::from_value(&interface.address_v4),
        Family::V6 => Words::from_value(&interface.address_v6),
    };
    own.equals(&packet.source)
}
