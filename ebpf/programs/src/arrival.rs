//! What comes from other machines, in clear or out of WireGuard: checked before anything is believed of it.

use clustermesh_ebpf_abi::{
    CONFIG_DIRECT, DropReason, ENDPOINT_HOST, IDENTITY_HOST, IDENTITY_REMOTE_NODE, IDENTITY_WORLD,
    IdentitySplit, NODE_CLEAR_REFUSED, NODE_DIRECT, NODE_INDEX_LOCAL, NodeConfig, NodeValue,
    RESERVED_IDENTITY_MAX, TrafficPath, WireTraffic,
};

use crate::answer;
use crate::clear;
use crate::deliver::{check_key, route_outer, send, to_endpoint, to_host};
use crate::encap::{
    ECN_MASK, TUNNEL_BYTES, UDP_BYTES, VXLAN_FLAGS, decapsulate, source_port, write_outer,
};
use crate::fib;
use crate::frame::{
    ETHERNET_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame, IPV4_BYTES, IPV6_BYTES,
};
use crate::maps::{NODE_ADDRESSES, NODES};
use crate::mesh;
use crate::parse::{self, Family, PROTOCOL_UDP, Packet, Words};
use crate::route::{endpoint, in_pod_cidr, ipcache};
use crate::verdict::{Action, Seen, count_wire};

/// Longest IP header of the outside without options, UDP and all inside up to the inner IP header.
const TUNNEL_FRAME_BYTES: usize = ETHERNET_BYTES + IPV6_BYTES + TUNNEL_BYTES + IPV6_BYTES;

/// Where the type stands in an Ethernet header.
const ETHERTYPE_OFFSET: u32 = 12;

/// How packets came to this machine. A constant at every entry point, so that each program holds its own half only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// As anybody on the way could read and write them.
    Clear,
    /// Out of WireGuard, which has checked that the peer may use the (outer) source.
    Encrypted,
}

impl Wire {
    /// Counts a packet from another node that was taken.
    #[inline(always)]
    fn count(self, bytes: u32) {
        match self {
            Self::Clear => count_wire(WireTraffic::ClearIn, bytes),
            Self::Encrypted => count_wire(WireTraffic::EncryptedIn, bytes),
        }
    }

    /// Refuses what came in clear from a node that is to encrypt.
    ///
    /// # Errors
    /// `ClearReceived`.
    #[inline(always)]
    fn check(self, node: &NodeValue) -> Result<(), DropReason> {
        if self == Self::Clear && node.flags & NODE_CLEAR_REFUSED != 0 {
            return Err(DropReason::ClearReceived);
        }
        Ok(())
    }
}

/// What the outer headers say.
struct Outer {
    family: Family,
    source: Words,
    congested: bool,
}

/// What a frame from the underlay is.
enum Kind {
    /// For our end of the tunnel.
    Tunnel,
    /// For a pod address of ours, not in a tunnel.
    Direct,
    /// For the host's address, not in a tunnel.
    Host,
    /// The host's own business.
    Other,
}

/// Handles a frame with an Ethernet header from the underlay or from a WireGuard device.
///
/// # Errors
/// Why it is dropped.
#[inline(always)]
pub fn handle(
    frame: Frame,
    config: &NodeConfig,
    wire: Wire,
    seen: &mut Seen,
) -> Result<Action, DropReason> {
    let mut outer = Outer {
        family: Family::V4,
        source: Words::ZERO,
        congested: false,
    };
    match kind(frame, config, &mut outer, &mut seen.packet)? {
        Kind::Tunnel => tunnel(frame, config, wire, &outer, seen),
        Kind::Direct => direct(frame, config, wire, seen),
        Kind::Host => to_stack(frame, config, wire, &outer, seen),
        Kind::Other => match wire {
            Wire::Clear => Ok(Action::Pass),
            Wire::Encrypted => to_other_address(frame, seen),
        },
    }
}

/// Out of WireGuard, for an address that is neither a pod's nor the tunnel's end: one of the host's others, or nothing
/// of ours. The host's routes know; what it would hand on is refused, or a peer could use it as a router.
#[inline(always)]
fn to_other_address(frame: Frame, seen: &mut Seen) -> Result<Action, DropReason> {
    let mut ethertype = 0_u16;
    frame.load(ETHERTYPE_OFFSET, &mut ethertype)?;
    let packet = &mut seen.packet;
    if ethertype == ETHERTYPE_IPV4 {
        let mut ends = [0_u32; 2];
        frame.load(ETHERNET_BYTES as u32 + 12, &mut ends)?;
        packet.source = Words::mapped(ends[0]);
        packet.destination = Words::mapped(ends[1]);
    } else {
        let mut ends = [0_u32; 8];
        frame.load(ETHERNET_BYTES as u32 + 8, &mut ends)?;
        packet.family = Family::V6;
        packet.source = Words([ends[0], ends[1], ends[2], ends[3]]);
        packet.destination = Words([ends[4], ends[5], ends[6], ends[7]]);
    }
    if fib::would_forward(frame, &seen.packet) {
        return Err(DropReason::NotForHere);
    }
    clear::count_opened(frame);
    Ok(Action::Pass)
}

/// A packet for the host itself. Only where something is encrypted, its sender is looked at.
#[inline(always)]
fn to_stack(
    frame: Frame,
    config: &NodeConfig,
    wire: Wire,
    outer: &Outer,
    seen: &mut Seen,
) -> Result<Action, DropReason> {
    if wire == Wire::Clear {
        if !clear::is_guarded(config) {
            return Ok(Action::Pass);
        }
        seen.packet.family = outer.family;
        seen.packet.source = outer.source;
        return clear::received(frame, config, outer.family, seen).map(|()| Action::Pass);
    }
    clear::count_opened(frame);
    Ok(Action::Pass)
}

#[inline(always)]
fn kind(
    frame: Frame,
    config: &NodeConfig,
    outer: &mut Outer,
    packet: &mut Packet,
) -> Result<Kind, DropReason> {
    frame.make_linear(ETHERNET_BYTES + IPV6_BYTES + UDP_BYTES);
    let Some(ethertype) = frame.at::<u16>(12) else {
        return Ok(Kind::Other);
    };
    // SAFETY: `at` has checked the bounds.
    match unsafe { *ethertype } {
        ETHERTYPE_IPV4 => kind_v4(frame, config, outer, packet),
        ETHERTYPE_IPV6 => kind_v6(frame, config, outer, packet),
        _ => Ok(Kind::Other),
    }
}

#[inline(always)]
fn kind_v4(
    frame: Frame,
    config: &NodeConfig,
    outer: &mut Outer,
    packet: &mut Packet,
) -> Result<Kind, DropReason> {
    let Some(header) = frame.at::<[u32; 5]>(ETHERNET_BYTES) else {
        return Ok(Kind::Other);
    };
    // SAFETY: `at` has checked the bounds.
    let [first, fragment, protocol, source, destination] = unsafe { *header };
    if destination == Words::from_value(&config.underlay_v4).0[3] && destination != 0 {
        *outer = Outer {
            family: Family::V4,
            source: Words::mapped(source),
            congested: (first >> 8) as u8 & ECN_MASK == ECN_MASK,
        };
        if (protocol >> 8) as u8 != PROTOCOL_UDP {
            return Ok(Kind::Host);
        }
        let header_bytes = (first & 0xf) as usize * 4;
        let options = header_bytes != IPV4_BYTES;
        let parts = parse::ipv4_is_fragment(fragment);
        if !options && !parts {
            let length = u32::from(((first >> 16) as u16).swap_bytes());
            let available = length.wrapping_sub(IPV4_BYTES as u32);
            if !udp(frame, config, ETHERNET_BYTES + IPV4_BYTES, available)? {
                return Ok(Kind::Host);
            }
            return Ok(Kind::Tunnel);
        }
        return odd_v4(frame, config, fragment, header_bytes);
    }
    if in_pod_cidr(config, Family::V4, &Words::mapped(destination)) {
        return parse::ipv4(frame, ETHERNET_BYTES, packet).map(|()| Kind::Direct);
    }
    Ok(Kind::Other)
}

/// A UDP packet to us with IP options or in fragments: never a tunnel packet of a node.
/// Later fragments have no port; without the first one, which is refused, they make no tunnel packet.
#[inline(always)]
fn odd_v4(
    frame: Frame,
    config: &NodeConfig,
    fragment: u32,
    header_bytes: usize,
) -> Result<Kind, DropReason> {
    if (fragment >> 16) as u16 & 0x1fff_u16.to_be() != 0 {
        return Ok(Kind::Host);
    }
    let mut ports = [0_u8; 4];
    if frame
        .load((ETHERNET_BYTES + header_bytes) as u32, &mut ports)
        .is_err()
    {
        return Ok(Kind::Host);
    }
    if [ports[2], ports[3]] == config.tunnel_port_be {
        Err(DropReason::TunnelMalformed)
    } else {
        Ok(Kind::Host)
    }
}

#[inline(always)]
fn kind_v6(
    frame: Frame,
    config: &NodeConfig,
    outer: &mut Outer,
    packet: &mut Packet,
) -> Result<Kind, DropReason> {
    let Some(header) = frame.at::<[u32; 10]>(ETHERNET_BYTES) else {
        return Ok(Kind::Other);
    };
    // SAFETY: `at` has checked the bounds.
    let words = unsafe { *header };
    let source = Words([words[2], words[3], words[4], words[5]]);
    let destination = Words([words[6], words[7], words[8], words[9]]);
    if destination.equals(&Words::from_value(&config.underlay_v6)) && !destination.is_zero() {
        *outer = Outer {
            family: Family::V6,
            source,
            congested: (words[0] >> 12) as u8 & ECN_MASK == ECN_MASK,
        };
        let protocol = (words[1] >> 16) as u8;
        if protocol == PROTOCOL_UDP {
            let length = u32::from((words[1] as u16).swap_bytes());
            if !udp(frame, config, ETHERNET_BYTES + IPV6_BYTES, length)? {
                return Ok(Kind::Host);
            }
            return Ok(Kind::Tunnel);
        }
        return odd_v6(frame, config, protocol);
    }
    if in_pod_cidr(config, Family::V6, &destination) {
        return parse::ipv6(frame, ETHERNET_BYTES, packet).map(|()| Kind::Direct);
    }
    Ok(Kind::Other)
}

/// As [`odd_v4`], for a packet that begins with a fragment header. Behind other extension
/// headers nothing of ours is looked for: the host has no socket on that port.
#[inline(always)]
fn odd_v6(frame: Frame, config: &NodeConfig, protocol: u8) -> Result<Kind, DropReason> {
    const FRAGMENT: u8 = 44;
    let mut head = [0_u8; 12];
    if protocol != FRAGMENT
        || frame
            .load((ETHERNET_BYTES + IPV6_BYTES) as u32, &mut head)
            .is_err()
    {
        return Ok(Kind::Host);
    }
    let first = u16::from_be_bytes([head[2], head[3]]) & 0xfff8 == 0;
    if head[0] == PROTOCOL_UDP && first && [head[10], head[11]] == config.tunnel_port_be {
        return Err(DropReason::TunnelMalformed);
    }
    Ok(Kind::Host)
}

/// True if the UDP header at `offset` is for the tunnel; `available` are the bytes that the IP header promises.
#[inline(always)]
fn udp(
    frame: Frame,
    config: &NodeConfig,
    offset: usize,
    available: u32,
) -> Result<bool, DropReason> {
    let Some(header) = frame.at::<[u16; 4]>(offset) else {
        return Ok(false);
    };
    // SAFETY: `at` has checked the bounds.
    let [_, port, length, _] = unsafe { *header };
    if port != u16::from_ne_bytes(config.tunnel_port_be) {
        return Ok(false);
    }
    // The lengths of an offloaded packet over 64 KiB are not to be had.
    if frame.segment_bytes() == 0 {
        let length = u32::from(length.swap_bytes());
        let held = frame.len().wrapping_sub(offset as u32);
        if length > available || length < (TUNNEL_BYTES + IPV4_BYTES) as u32 || available > held {
            return Err(DropReason::TunnelMalformed);
        }
    }
    Ok(true)
}

#[inline(always)]
fn tunnel(
    frame: Frame,
    config: &NodeConfig,
    wire: Wire,
    outer: &Outer,
    seen: &mut Seen,
) -> Result<Action, DropReason> {
    frame.make_linear(TUNNEL_FRAME_BYTES);
    match outer.family {
        Family::V4 => inside(
            frame,
            config,
            wire,
            outer,
            seen,
            ETHERNET_BYTES + IPV4_BYTES,
        ),
        Family::V6 => inside(
            frame,
            config,
            wire,
            outer,
            seen,
            ETHERNET_BYTES + IPV6_BYTES,
        ),
    }
}

/// Checks, then delivers what is inside. `udp_offset` is a constant at every call.
#[inline(always)]
fn inside(
    frame: Frame,
    config: &NodeConfig,
    wire: Wire,
    outer: &Outer,
    seen: &mut Seen,
    udp_offset: usize,
) -> Result<Action, DropReason> {
    let node_index = NODE_ADDRESSES
        .get_ptr(outer.source.as_key())
        // SAFETY: one number, read at once.
        .map(|value| unsafe { (*value).node_index })
        .ok_or(DropReason::TunnelFromUnknownNode)?;
    let node = NODES
        .get(node_index)
        .ok_or(DropReason::TunnelFromUnknownNode)?;
    wire.check(node)?;
    let header = frame
        .at::<[u32; 2]>(udp_offset + UDP_BYTES)
        .ok_or(DropReason::TunnelMalformed)?;
    // SAFETY: `at` has checked the bounds.
    let [flags, vni] = unsafe { *header };
    let vni = vni.swap_bytes();
    if flags != VXLAN_FLAGS || vni & 0xff != 0 {
        return Err(DropReason::TunnelMalformed);
    }
    seen.identity = vni >> 8;
    if !inner_packet(frame, udp_offset + TUNNEL_BYTES, &mut seen.packet)? {
        return Ok(Action::Ignore);
    }
    // A VXLAN device of the kernel floods what its own link chatters.
    if parse::is_link_scoped(&seen.packet) {
        return Ok(Action::Ignore);
    }
    seen.read_ports(config, frame);
    let packet = &seen.packet;
    // Our ends mark only what can be marked inside too.
    if outer.congested && packet.tos & ECN_MASK == 0 {
        return Err(DropReason::TunnelMalformed);
    }
    if !identity_allowed(config, node, vni >> 8) {
        return Err(DropReason::TunnelForgedIdentity);
    }
    match ipcache(&packet.source) {
        Some(value) if value.node_index == node_index && node_index != NODE_INDEX_LOCAL => {}
        Some(_) | None => return Err(DropReason::TunnelForgedSource),
    }
    wire.count(packet.length_bytes);
    deliver(
        frame,
        config,
        outer,
        packet,
        node,
        udp_offset + TUNNEL_BYTES,
    )
}

/// Parses the inner IP packet at `offset`; false if it is ARP, which flooding devices send and nobody here asks for.
#[inline(always)]
fn inner_packet(frame: Frame, offset: usize, packet: &mut Packet) -> Result<bool, DropReason> {
    let ethertype = frame
        .at::<u16>(offset - 2)
        .ok_or(DropReason::TunnelMalformed)?;
    // SAFETY: `at` has checked the bounds.
    match unsafe { *ethertype } {
        ETHERTYPE_IPV4 => parse::ipv4(frame, offset, packet).map(|()| true),
        ETHERTYPE_IPV6 => parse::ipv6(frame, offset, packet).map(|()| true),
        ETHERTYPE_ARP => Ok(false),
        _ => Err(DropReason::UnknownEthertype),
    }
}

/// True if a node may send with that identity: one of its cluster, or a reserved one that is not the host's.
#[inline(always)]
fn identity_allowed(config: &NodeConfig, node: &NodeValue, identity: u32) -> bool {
    if identity <= RESERVED_IDENTITY_MAX {
        return identity != IDENTITY_HOST && identity != 0;
    }
    let Some(split) = IdentitySplit::from_local_bits(config.identity_local_bits) else {
        return false;
    };
    node.cluster_id != 0 && split.cluster_of(identity) == u32::from(node.cluster_id)
}

#[inline(always)]
fn deliver(
    frame: Frame,
    config: &NodeConfig,
    outer: &Outer,
    packet: &Packet,
    node: &NodeValue,
    inner_offset: usize,
) -> Result<Action, DropReason> {
    match endpoint(&packet.destination) {
        Some(endpoint) => {
            decapsulate(frame, outer.family, packet.family, outer.congested)?;
            if endpoint.flags & ENDPOINT_HOST != 0 {
                return to_host(frame, config, packet.family);
            }
            to_endpoint(frame, endpoint, packet.family, TrafficPath::TunnelIn)
        }
        None if in_pod_cidr(config, packet.family, &packet.destination) => {
            answer_through_tunnel(frame, config, outer, packet, node, inner_offset)
        }
        None if is_underlay(config, packet) => {
            decapsulate(frame, outer.family, packet.family, outer.congested)?;
            to_host(frame, config, packet.family)
        }
        None => Err(DropReason::TunnelNotHere),
    }
}

#[inline(always)]
fn is_underlay(config: &NodeConfig, packet: &Packet) -> bool {
    let own = match packet.family {
        Family::V4 => Words::from_value(&config.underlay_v4),
        Family::V6 => Words::from_value(&config.underlay_v6),
    };
    !packet.destination.is_zero() && packet.destination.equals(&own)
}

/// A packet for a pod of ours outside the tunnel: from a node with which direct routing is agreed, or, where pods
/// are routed, from an address that is nobody's in the mesh.
#[inline(always)]
fn direct(
    frame: Frame,
    config: &NodeConfig,
    wire: Wire,
    seen: &mut Seen,
) -> Result<Action, DropReason> {
    seen.read_ports(config, frame);
    let packet = &seen.packet;
    let Some(source) = ipcache(&packet.source) else {
        return match wire {
            Wire::Clear => from_world(frame, config, seen),
            // Peers send for the mesh only.
            Wire::Encrypted => Err(DropReason::DirectForgedSource),
        };
    };
    seen.identity = source.identity;
    if source.node_index == NODE_INDEX_LOCAL {
        return Err(DropReason::DirectForgedSource);
    }
    let node = NODES
        .get(source.node_index)
        .ok_or(DropReason::DirectForgedSource)?;
    wire.check(node)?;
    if node.flags & NODE_DIRECT == 0 {
        return Err(DropReason::DirectForgedSource);
    }
    wire.count(packet.length_bytes);
    match endpoint(&packet.destination) {
        Some(endpoint) if endpoint.flags & ENDPOINT_HOST != 0 => {
            to_host(frame, config, packet.family)
        }
        Some(endpoint) => to_endpoint(frame, endpoint, packet.family, TrafficPath::DirectIn),
        None => answer_directly(frame, config, packet, node),
    }
}

/// What comes from outside the mesh has the identity of the world, whatever it is.
#[inline(always)]
fn from_world(frame: Frame, config: &NodeConfig, seen: &mut Seen) -> Result<Action, DropReason> {
    let packet = &seen.packet;
    if config.flags & CONFIG_DIRECT == 0 || !parse::is_global(packet.family, &packet.source) {
        return Err(DropReason::DirectForgedSource);
    }
    let own = match packet.family {
        Family::V4 => Words::from_value(&config.underlay_v4),
        Family::V6 => Words::from_value(&config.underlay_v6),
    };
    // Ours come from here, not from the network. The host's stack, which checks that, does not see the packet.
    if packet.source.equals(&own) || in_pod_cidr(config, packet.family, &packet.source) {
        return Err(DropReason::DirectForgedSource);
    }
    mesh::refuse(config, &packet.source)?;
    seen.identity = IDENTITY_WORLD;
    match endpoint(&packet.destination) {
        Some(endpoint) if endpoint.flags & ENDPOINT_HOST != 0 => Ok(Action::Pass),
        Some(endpoint) => to_endpoint(frame, endpoint, packet.family, TrafficPath::DirectIn),
        None => Err(DropReason::UnknownPod),
    }
}

/// Refuses a packet for a pod that is gone; the answer goes back as it came.
#[inline(always)]
fn answer_directly(
    frame: Frame,
    config: &NodeConfig,
    packet: &Packet,
    node: &NodeValue,
) -> Result<Action, DropReason> {
    let mut reply = Packet::EMPTY;
    answer::make(frame, packet, ETHERNET_BYTES, &mut reply)?;
    send(frame, config, &reply, node, IDENTITY_REMOTE_NODE)?;
    Ok(Action::Answer(DropReason::UnknownPod))
}

/// As [`answer_directly`], in the tunnel packet itself: one that was unpacked cannot always be
/// packed again, because the kernel does not forget that it came out of a tunnel.
#[inline(always)]
fn answer_through_tunnel(
    frame: Frame,
    config: &NodeConfig,
    outer: &Outer,
    packet: &Packet,
    node: &NodeValue,
    inner_offset: usize,
) -> Result<Action, DropReason> {
    check_key(node)?;
    if node.egress_ifindex == 0 {
        return Err(DropReason::NoRoute);
    }
    let port = source_port(frame);
    let mut reply = Packet::EMPTY;
    answer::make(frame, packet, inner_offset, &mut reply)?;
    write_outer(
        frame,
        config,
        &reply,
        &outer.source,
        IDENTITY_REMOTE_NODE,
        port,
    )?;
    route_outer(node);
    Ok(Action::Answer(DropReason::UnknownPod))
}
