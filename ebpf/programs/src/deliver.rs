//! The last step of a packet: into a pod, to the host's stack, or to another node.

use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT,
    bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{
    bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_type,
};
use clustermesh_ebpf_abi::{
    DropReason, EndpointValue, NODE_DIRECT, NODE_ENCRYPTED, NODE_NARROW, NODE_PRESENT,
    NODE_WITHHELD, NodeConfig, NodeValue, PROBE_MARK, TUNNEL_MAC_SOURCE, TrafficPath, WireTraffic,
};

use crate::encap::{TUNNEL_BYTES, UDP_BYTES, encapsulate, forget_segments};
use crate::fib::{AF_INET, lookup};
use crate::frame::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame, IPV4_BYTES};
use crate::maps::NODES;
use crate::mss;
use crate::parse::{Family, PROTOCOL_UDP, Packet, Words};
use crate::verdict::{Action, count_wire};

/// `PACKET_HOST`.
const PACKET_HOST: u32 = 0;

const fn ethertype(family: Family) -> u16 {
    match family {
        Family::V4 => ETHERTYPE_IPV4,
        Family::V6 => ETHERTYPE_IPV6,
    }
}

/// Writes the Ethernet header: twelve bytes of addresses as words, and the type.
#[inline(always)]
fn write_ethernet(frame: Frame, addresses: [u32; 3], family: Family) -> Result<(), DropReason> {
    let header = frame.at::<[u32; 3]>(0).ok_or(DropReason::Malformed)?;
    let kind = frame.at::<u16>(12).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        *header = addresses;
        *kind = ethertype(family);
    }
    Ok(())
}

/// Into a pod's namespace, past the host's stack.
///
/// # Errors
/// `Malformed`.
#[inline(always)]
pub fn to_endpoint(
    frame: Frame,
    endpoint: &EndpointValue,
    family: Family,
    path: TrafficPath,
) -> Result<Action, DropReason> {
    // SAFETY: the pod's address (destination) and the host end's (source) lie next to each other, from offset 8 on.
    let addresses = unsafe { *(&raw const endpoint.pod_mac).cast::<[u32; 3]>() };
    write_ethernet(frame, addresses, family)?;
    for_this_host(frame);
    // SAFETY: takes two numbers.
    unsafe { bpf_redirect_peer(endpoint.ifindex, 0) };
    Ok(Action::Forward(path))
}

/// A frame that was sent to somebody else's MAC address would be dropped by the IP layer.
#[inline(always)]
fn for_this_host(frame: Frame) {
    if frame.packet_type() != PACKET_HOST {
        // SAFETY: the context is valid. It can only fail for types that no frame from the network has.
        unsafe { bpf_skb_change_type(frame.skb, PACKET_HOST) };
    }
}

/// Back out of the device on which the packet came in, its link addresses changed over.
///
/// # Errors
/// `Malformed`.
#[inline(always)]
pub fn back_to_pod(frame: Frame, family: Family) -> Result<(), DropReason> {
    let header = frame.at::<[u32; 3]>(0).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked the bounds.
    let [first, middle, last] = unsafe { *header };
    // Destination is `first` and the low half of `middle` (as they stand in memory), source the rest.
    let addresses = [
        (middle >> 16) | (last << 16),
        (last >> 16) | (first << 16),
        (first >> 16) | (middle << 16),
    ];
    write_ethernet(frame, addresses, family)?;
    // SAFETY: takes two numbers.
    unsafe { bpf_redirect(frame.ifindex(), 0) };
    Ok(())
}

/// To the host's stack, as if it had arrived on the host's side of its veth pair: there the
/// routes to pods point, so that reverse-path checks pass.
///
/// # Errors
/// `Malformed`.
#[inline(always)]
pub fn to_host(frame: Frame, config: &NodeConfig, family: Family) -> Result<Action, DropReason> {
    redirect_to_host(frame, config, family)?;
    Ok(Action::Forward(TrafficPath::ToHost))
}

/// As [`to_host`], without counting it as traffic.
///
/// # Errors
/// `Malformed`.
#[inline(always)]
pub fn redirect_to_host(
    frame: Frame,
    config: &NodeConfig,
    family: Family,
) -> Result<(), DropReason> {
    let [h0, h1, h2, h3, h4, h5] = config.host_mac;
    let [s0, s1, s2, s3, s4, s5] = TUNNEL_MAC_SOURCE;
    let addresses = [
        u32::from_ne_bytes([h0, h1, h2, h3]),
        u32::from_ne_bytes([h4, h5, s0, s1]),
        u32::from_ne_bytes([s2, s3, s4, s5]),
    ];
    write_ethernet(frame, addresses, family)?;
    // SAFETY: takes two numbers.
    unsafe { bpf_redirect(config.host_ifindex, u64::from(BPF_F_INGRESS)) };
    Ok(())
}

/// Where a packet for another node may go.
pub enum ToNode {
    /// It was sent.
    Sent(Action),
    /// It is larger than the path takes.
    TooBig,
}

/// Towards the node at `node_index`, through the tunnel or routed directly.
///
/// # Errors
/// `NodeWithdrawn`, `AwaitingKey`, `NoUnderlayFamily`, `NoRoute`, `EncapsulationFailed`.
#[inline(always)]
pub fn to_node(
    frame: Frame,
    config: &NodeConfig,
    packet: &Packet,
    node_index: u32,
    identity: u32,
) -> Result<ToNode, DropReason> {
    let node = NODES.get(node_index).ok_or(DropReason::NodeWithdrawn)?;
    if node.flags & NODE_PRESENT == 0 {
        return Err(DropReason::NodeWithdrawn);
    }
    // Before the size: to a node that cannot be sent to, nothing is too big.
    check_key(node)?;
    let mut mtu_bytes = u32::from(node.path_mtu_bytes);
    if node.flags & NODE_DIRECT != 0 && !is_direct(node, packet.family) {
        // What is said of a node with direct routing leaves no room for a tunnel.
        mtu_bytes = mtu_bytes.saturating_sub((IPV4_BYTES + TUNNEL_BYTES) as u32);
    }
    if exceeds(frame, packet, mtu_bytes) && frame.mark() != PROBE_MARK {
        return Ok(ToNode::TooBig);
    }
    if node.flags & NODE_NARROW != 0 {
        mss::clamp_inside(frame, packet, mtu_bytes);
    }
    send(frame, config, packet, node, identity).map(ToNode::Sent)
}

/// Nothing goes to a node whose key is awaited.
///
/// # Errors
/// `AwaitingKey`.
#[inline(always)]
pub fn check_key(node: &NodeValue) -> Result<(), DropReason> {
    if node.flags & NODE_WITHHELD == 0 {
        Ok(())
    } else {
        Err(DropReason::AwaitingKey)
    }
}

/// Sends to a node that is known to be there.
///
/// # Errors
/// `AwaitingKey`, `NoUnderlayFamily`, `NoRoute`, `EncapsulationFailed`.
#[inline(always)]
pub fn send(
    frame: Frame,
    config: &NodeConfig,
    packet: &Packet,
    node: &NodeValue,
    identity: u32,
) -> Result<Action, DropReason> {
    let endpoint = Words::from_value(&node.endpoint);
    check_key(node)?;
    if node.egress_ifindex == 0 {
        return Err(DropReason::NoRoute);
    }
    if is_direct(node, packet.family) {
        if node.flags & NODE_ENCRYPTED == 0 {
            direct(frame, node, &endpoint)?;
        } else {
            forget_segments(frame);
            into_wireguard(node);
        }
        count_sent(node, packet.length_bytes);
        return Ok(Action::Forward(TrafficPath::DirectOut));
    }
    let own = if endpoint.is_mapped() {
        &config.underlay_v4
    } else {
        &config.underlay_v6
    };
    if endpoint.is_zero() || Words::from_value(own).is_zero() {
        return Err(DropReason::NoUnderlayFamily);
    }
    encapsulate(frame, config, packet, &endpoint, identity)?;
    route_outer(node);
    count_sent(node, packet.length_bytes);
    Ok(Action::Forward(TrafficPath::TunnelOut))
}

#[inline(always)]
fn count_sent(node: &NodeValue, bytes: u32) {
    if node.flags & NODE_ENCRYPTED == 0 {
        count_wire(WireTraffic::ClearOut, bytes);
    } else {
        count_wire(WireTraffic::EncryptedOut, bytes);
    }
}

/// True if packets of that family are routed to the node as they are. The kernel sends IPv4 to an IPv6 next
/// hop, but not the other way round: those packets take the tunnel. A WireGuard device asks for no next hop.
#[inline(always)]
fn is_direct(node: &NodeValue, family: Family) -> bool {
    node.flags & NODE_DIRECT != 0
        && (family == Family::V4
            || node.flags & NODE_ENCRYPTED != 0
            || !Words::from_value(&node.endpoint).is_mapped())
}

/// Sends a tunnel packet by its outer header.
#[inline(always)]
pub fn route_outer(node: &NodeValue) {
    if node.flags & NODE_ENCRYPTED != 0 {
        into_wireguard(node);
        return;
    }
    // SAFETY: without parameters the kernel asks its routes.
    unsafe { bpf_redirect_neigh(node.egress_ifindex, core::ptr::null_mut(), 0, 0) };
}

/// Sends the IP packet through the node's WireGuard device. The kernel takes the link header off: the device has none.
#[inline(always)]
pub fn into_wireguard(node: &NodeValue) {
    // SAFETY: takes two numbers.
    unsafe { bpf_redirect(node.egress_ifindex, 0) };
}

#[inline(always)]
fn exceeds(frame: Frame, packet: &Packet, mtu_bytes: u32) -> bool {
    if mtu_bytes == 0 || packet.length_bytes <= mtu_bytes {
        return false;
    }
    let segment = frame.segment_bytes();
    let headers = packet
        .transport_offset
        .wrapping_sub(crate::frame::ETHERNET_BYTES as u32);
    // TCP's header without options: the sender has taken those off the segment already.
    let transport = if packet.protocol == PROTOCOL_UDP {
        UDP_BYTES as u32
    } else {
        20
    };
    segment == 0 || segment + headers + transport > mtu_bytes
}

/// Routes the packet as it is: next hop by the node's address, because the host's own route for pods leads back here.
#[inline(always)]
fn direct(frame: Frame, node: &NodeValue, endpoint: &Words) -> Result<(), DropReason> {
    let family = if endpoint.is_mapped() {
        Family::V4
    } else {
        Family::V6
    };
    let (status, query) = lookup(
        frame,
        node.egress_ifindex,
        family,
        None,
        endpoint,
        BPF_FIB_LOOKUP_OUTPUT,
    );
    // The route is known also where its neighbour is not yet; the redirect asks for that one. The flag
    // that leaves the neighbour out is newer than the kernels that this is to run on.
    if status != i64::from(BPF_FIB_LKUP_RET_SUCCESS)
        && status != i64::from(BPF_FIB_LKUP_RET_NO_NEIGH)
    {
        return Err(DropReason::NoRoute);
    }
    // SAFETY: plain integers, for which zeros are valid.
    let mut next_hop: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    next_hop.nh_family = u32::from(query.family);
    // SAFETY: the kernel has written the address of that family; the other bytes are zeros or ours.
    unsafe {
        if next_hop.nh_family == AF_INET {
            next_hop.__bindgen_anon_1.ipv4_nh = query.__bindgen_anon_4.ipv4_dst;
        } else {
            next_hop.__bindgen_anon_1.ipv6_nh = query.__bindgen_anon_4.ipv6_dst;
        }
    }
    // SAFETY: the parameters are as large as is said.
    unsafe {
        bpf_redirect_neigh(
            query.ifindex,
            &raw mut next_hop,
            size_of::<bpf_redir_neigh>() as i32,
            0,
        )
    };
    Ok(())
}
