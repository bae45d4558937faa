//! Answers to packets for pods that are gone, made out of the packet itself: RST to TCP, ICMP to the rest.

use clustermesh_ebpf_abi::{DropReason, NodeConfig};

use crate::frame::Frame;
use crate::parse::Packet;

/// Turns the packet into the answer to its sender.
///
/// # Errors
/// `UnknownPod` if nothing may be answered.
#[inline(always)]
pub fn make(_frame: Frame, _config: &NodeConfig, _packet: &Packet) -> Result<Packet, DropReason> {
    Err(DropReason::UnknownPod)
}

/// Sends the answer out of the device on which the packet came in.
///
/// # Errors
/// `Malformed`.
#[inline(always)]
pub fn back_through(_frame: Frame, _reply: Packet) -> Result<i32, DropReason> {
    Err(DropReason::UnknownPod)
}
