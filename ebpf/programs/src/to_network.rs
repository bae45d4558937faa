//! Hook: egress of underlay devices. Nothing leaves in clear that is to be encrypted.
//!
//! Packets of pods are encrypted before they get here. What is met here is the host's own traffic, which goes into
//! WireGuard if nodes are encrypted too, and whatever took a way that it should not: strict mode drops it.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use clustermesh_ebpf_abi::{
    CONFIG_ENCRYPT_NODES, CONFIG_STRICT, DropReason, HOOK_TO_NETWORK, NodeConfig,
};

use crate::clear;
use crate::frame::{ETHERNET_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame, IPV4_BYTES, IPV6_BYTES};
use crate::parse::{Family, Packet, Words};
use crate::verdict::{Action, Seen, conclude, config};

/// Entry point.
#[classifier]
pub fn to_network(context: TcContext) -> i32 {
    let mut seen = Seen::EMPTY;
    let outcome = handle(Frame::of(&context), &mut seen);
    conclude(HOOK_TO_NETWORK, &seen, outcome)
}

#[inline(always)]
fn handle(frame: Frame, seen: &mut Seen) -> Result<Action, DropReason> {
    let Ok(config) = config() else {
        return Ok(Action::Pass);
    };
    // A tagged frame has passed here untagged, at its VLAN device.
    if config.flags & (CONFIG_STRICT | CONFIG_ENCRYPT_NODES) == 0
        || is_wireguards(frame, config)
        || frame.has_vlan_tag()
        || !addresses(frame, &mut seen.packet)
    {
        return Ok(Action::Pass);
    }
    clear::leaving(frame, config, seen)
}

#[inline(always)]
fn is_wireguards(frame: Frame, config: &NodeConfig) -> bool {
    config.wireguard_mark != 0 && frame.mark() == config.wireguard_mark
}

/// Reads who sends to whom; false if it is no IP packet. More is not needed of what the host's own stack made, and a
/// packet with odd headers must not get past for them.
#[inline(always)]
fn addresses(frame: Frame, packet: &mut Packet) -> bool {
    frame.make_linear(ETHERNET_BYTES + IPV6_BYTES);
    let Some(ethertype) = frame.at::<u16>(12) else {
        return false;
    };
    // SAFETY: `at` has checked the bounds.
    let (family, source, destination) = match unsafe { *ethertype } {
        ETHERTYPE_IPV4 => {
            let Some(words) = frame.at::<[u32; IPV4_BYTES / 4]>(ETHERNET_BYTES) else {
                return false;
            };
            // SAFETY: `at` has checked the bounds.
            let [_, _, _, source, destination] = unsafe { *words };
            (
                Family::V4,
                Words::mapped(source),
                Words::mapped(destination),
            )
        }
        ETHERTYPE_IPV6 => {
            let Some(words) = frame.at::<[u32; IPV6_BYTES / 4]>(ETHERNET_BYTES) else {
                return false;
            };
            // SAFETY: `at` has checked the bounds.
            let w = unsafe { *words };
            (
                Family::V6,
                Words([w[2], w[3], w[4], w[5]]),
                Words([w[6], w[7], w[8], w[9]]),
            )
        }
        _ => return false,
    };
    *packet = Packet {
        family,
        source,
        destination,
        length_bytes: frame.len().wrapping_sub(ETHERNET_BYTES as u32),
        ..Packet::EMPTY
    };
    true
}
