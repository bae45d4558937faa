//! Clear text between the addresses of the mesh: what of it may be, on the way in and on the way out.
//!
//! With [`CONFIG_ENCRYPT_NODES`] three things between nodes stay as they are. WireGuard's own datagrams. Neighbour
//! discovery, without which no datagram leaves; its hop limit shows that it is the link's (RFC 4861, 11.2). And TCP
//! connections to the configured ports of servers: a node learns the keys of others, and they its own, through such a
//! connection, and neither can know what the other has learnt already, so it may never depend on them. Servers speak
//! nothing but TLS with certificates on both sides there. The port counts on the server's side only: nobody opens a
//! connection *from* it, so a program that binds itself to it does not get out in clear.

use clustermesh_ebpf_abi::{
    CONFIG_ENCRYPT_NODES, CONFIG_STRICT, DropReason, MESH_LISTED, NODE_CLEAR_REFUSED,
    NODE_ENCRYPTED, NODE_INDEX_LOCAL, NODE_PRESENT, NODE_WITHHELD, NodeConfig, NodeValue,
    TrafficPath, WireTraffic,
};

use crate::deliver::{check_key, into_wireguard};
use crate::encap::forget_segments;
use crate::frame::{ETHERNET_BYTES, Frame, IPV6_BYTES};
use crate::maps::{NODE_ADDRESSES, NODES};
use crate::mesh;
use crate::mss;
use crate::parse::{Family, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, Packet, Words};
use crate::route::{in_pod_cidr, ipcache};
use crate::verdict::{Action, Seen, count_wire};

const FRAGMENT: u8 = 44;
const TCP_FLAGS_OFFSET: u32 = 13;
const TCP_SYN: u8 = 1 << 1;
const TCP_ACK: u8 = 1 << 4;
/// Router solicitation; the first message of neighbour discovery.
const NEIGHBOUR_DISCOVERY_FIRST: u8 = 133;
/// Redirect; the last one.
const NEIGHBOUR_DISCOVERY_LAST: u8 = 137;
const HOP_LIMIT_OF_LINK: u8 = 255;

/// What a packet between nodes carries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Carried {
    /// For a port of WireGuard here.
    ToWireguard,
    /// From a port of WireGuard here.
    FromWireguard,
    /// For the tunnel's port.
    Tunnel,
    /// Part of a connection to a server.
    Control,
    /// Neighbour discovery.
    Neighbours,
    /// A fragment of UDP that is not the first one: it may be of WireGuard and bears no ports to tell.
    LaterDatagram,
    /// Anything else.
    Other,
}

/// Where a packet's transport header is.
struct Transport {
    protocol: u8,
    offset: u32,
    is_fragment: bool,
    hop_limit: u8,
}

/// True if anything here depends on encryption.
#[inline(always)]
pub fn is_guarded(config: &NodeConfig) -> bool {
    config.flags & (CONFIG_STRICT | CONFIG_ENCRYPT_NODES) != 0
        || config.wireguard_ifindexes[0] != 0
        || config.wireguard_ifindexes[1] != 0
}

/// Judges a packet from `seen.packet.source` to the host's own address that came in clear and in no tunnel.
///
/// # Errors
/// `ClearReceived`, `MeshUnknown`.
#[inline(always)]
pub fn received(
    frame: Frame,
    config: &NodeConfig,
    family: Family,
    seen: &Seen,
) -> Result<(), DropReason> {
    let carried = carried(frame, config, family);
    if matches!(carried, Carried::ToWireguard | Carried::Neighbours) {
        return Ok(());
    }
    let source = &seen.packet.source;
    let node = match place_of(source) {
        Place::Here => return Ok(()),
        Place::Node(node) => node,
        Place::Unknown => return received_from_unknown(config, source, carried),
    };
    if !is_node(source) {
        return if node.flags & NODE_CLEAR_REFUSED == 0 {
            Ok(())
        } else {
            Err(DropReason::ClearReceived)
        };
    }
    // The stack joins fragments whatever way they came, so a later one in clear could complete what was encrypted.
    // Those of UDP from a node are taken all the same, for the networks that cut WireGuard's datagrams.
    if config.flags & CONFIG_ENCRYPT_NODES == 0 || carried == Carried::LaterDatagram {
        return Ok(());
    }
    if node.flags & NODE_CLEAR_REFUSED != 0 && carried != Carried::Control {
        return Err(DropReason::ClearReceived);
    }
    count_wire(WireTraffic::ClearIn, payload_bytes(frame));
    Ok(())
}

/// Judges a packet that leaves by the underlay and is none of WireGuard's. Its addresses are in `seen.packet`.
///
/// # Errors
/// `ClearWouldLeave`, `AwaitingKey`, `MeshUnknown`.
#[inline(always)]
pub fn leaving(frame: Frame, config: &NodeConfig, seen: &Seen) -> Result<Action, DropReason> {
    let packet = &seen.packet;
    let node = match place_of(&packet.destination) {
        Place::Here => return Ok(Action::Pass),
        Place::Node(node) => node,
        Place::Unknown => return leaving_to_unknown(frame, config, packet),
    };
    let nodes_too = config.flags & CONFIG_ENCRYPT_NODES != 0;
    if !is_node(&packet.destination) {
        return if must_encrypt(node) && is_strict(config, frame, packet) {
            Err(DropReason::ClearWouldLeave)
        } else {
            Ok(Action::Pass)
        };
    }
    if !must_encrypt(node) {
        if nodes_too {
            count_wire(WireTraffic::ClearOut, payload_bytes(frame));
        }
        return Ok(Action::Pass);
    }
    match carried(frame, config, packet.family) {
        // Ours go out through WireGuard: this one is somebody else's, and holds what may not be seen.
        Carried::Tunnel if is_strict(config, frame, packet) => {
            return Err(DropReason::ClearWouldLeave);
        }
        Carried::Neighbours => return Ok(Action::Pass),
        Carried::FromWireguard if config.wireguard_mark == 0 => return Ok(Action::Pass),
        Carried::Control if nodes_too => {
            count_wire(WireTraffic::ClearOut, payload_bytes(frame));
            return Ok(Action::Pass);
        }
        _ if !nodes_too => return Ok(Action::Pass),
        _ => {}
    }
    // The other end takes from us what comes from this address.
    if packet.source.equals(&underlay(config, packet.family)) {
        check_key(node)?;
        mss::clamp(frame, packet, node);
        forget_segments(frame);
        into_wireguard(node);
        count_wire(WireTraffic::EncryptedOut, payload_bytes(frame));
        return Ok(Action::Forward(TrafficPath::NodeOut));
    }
    if is_strict(config, frame, packet) {
        return Err(DropReason::ClearWouldLeave);
    }
    Ok(Action::Pass)
}

/// Counts a packet that WireGuard opened for the host itself.
#[inline(always)]
pub fn count_opened(frame: Frame) {
    count_wire(WireTraffic::EncryptedIn, payload_bytes(frame));
}

/// Who has an address.
enum Place {
    /// This node, or a pod of its.
    Here,
    /// Another node that has it, or on which it lives.
    Node(&'static NodeValue),
    /// No record says it.
    Unknown,
}

#[inline(always)]
fn place_of(address: &Words) -> Place {
    let Some(value) = ipcache(address) else {
        return Place::Unknown;
    };
    if value.node_index == NODE_INDEX_LOCAL {
        return Place::Here;
    }
    match NODES.get(value.node_index) {
        Some(node) if node.flags & NODE_PRESENT != 0 => Place::Node(node),
        Some(_) | None => Place::Unknown,
    }
}

/// A packet to the host in clear from an address of which nobody says who has it.
#[inline(always)]
fn received_from_unknown(
    config: &NodeConfig,
    source: &Words,
    carried: Carried,
) -> Result<(), DropReason> {
    let mesh = mesh::unknown(config, source);
    if mesh == 0 || (!mesh::is_pods(mesh) && !judges_nodes(config, mesh)) {
        return Ok(());
    }
    // A node that is not known yet, or a server: see above, what of theirs stays in clear.
    if !mesh::is_pods(mesh) && matches!(carried, Carried::Control | Carried::LaterDatagram) {
        return Ok(());
    }
    Err(DropReason::MeshUnknown)
}

/// A packet that would leave in clear to such an address.
#[inline(always)]
fn leaving_to_unknown(
    frame: Frame,
    config: &NodeConfig,
    packet: &Packet,
) -> Result<Action, DropReason> {
    let mesh = mesh::unknown(config, &packet.destination);
    if mesh == 0 || !is_strict(config, frame, packet) {
        return Ok(Action::Pass);
    }
    if mesh::is_pods(mesh) {
        return Err(DropReason::MeshUnknown);
    }
    let from_pod = in_pod_cidr(config, packet.family, &packet.source);
    if !from_pod && !judges_nodes(config, mesh) {
        return Ok(Action::Pass);
    }
    match carried(frame, config, packet.family) {
        Carried::Neighbours => Ok(Action::Pass),
        Carried::FromWireguard if config.wireguard_mark == 0 => Ok(Action::Pass),
        Carried::Control if frame.came_in_on() == 0 && !from_pod => Ok(Action::Pass),
        _ => Err(DropReason::MeshUnknown),
    }
}

/// Whether what hosts say to an address that is no pod's is judged.
#[inline(always)]
const fn judges_nodes(config: &NodeConfig, mesh: u32) -> bool {
    mesh & MESH_LISTED != 0 || config.flags & CONFIG_ENCRYPT_NODES != 0
}

/// True for an address of a node itself; routers, health addresses and pods have no part in node to node.
#[inline(always)]
fn is_node(address: &Words) -> bool {
    NODE_ADDRESSES.get_ptr(address.as_key()).is_some()
}

#[inline(always)]
const fn must_encrypt(node: &NodeValue) -> bool {
    node.flags & (NODE_ENCRYPTED | NODE_WITHHELD) != 0
}

/// True in strict mode, if the packet is of the mesh: of the host, from a pod or from any other mesh address. What is
/// only routed through this machine from elsewhere is not.
#[inline(always)]
fn is_strict(config: &NodeConfig, frame: Frame, packet: &Packet) -> bool {
    if config.flags & CONFIG_STRICT == 0 {
        return false;
    }
    // Under whatever address it leaves: the host's rules may have translated it.
    let came_in_on = frame.came_in_on();
    came_in_on == 0
        || came_in_on == config.host_ifindex
        || packet.source.equals(&underlay(config, packet.family))
        || in_pod_cidr(config, packet.family, &packet.source)
        || ipcache(&packet.source).is_some()
}

#[inline(always)]
fn underlay(config: &NodeConfig, family: Family) -> Words {
    match family {
        Family::V4 => Words::from_value(&config.underlay_v4),
        Family::V6 => Words::from_value(&config.underlay_v6),
    }
}

#[inline(always)]
fn payload_bytes(frame: Frame) -> u32 {
    frame.len().wrapping_sub(ETHERNET_BYTES as u32)
}

#[inline(always)]
fn carried(frame: Frame, config: &NodeConfig, family: Family) -> Carried {
    let mut transport = Transport {
        protocol: 0,
        offset: 0,
        is_fragment: false,
        hop_limit: 0,
    };
    let found = match family {
        Family::V4 => transport_v4(frame, &mut transport),
        Family::V6 => transport_v6(frame, &mut transport),
    };
    match found {
        Found::Transport => {}
        Found::LaterFragment if transport.protocol == PROTOCOL_UDP => {
            return Carried::LaterDatagram;
        }
        Found::LaterFragment | Found::Nothing => return Carried::Other,
    }
    match transport.protocol {
        PROTOCOL_UDP => datagram(frame, config, &transport),
        PROTOCOL_TCP if !transport.is_fragment => segment(frame, config, &transport),
        PROTOCOL_ICMPV6 if family == Family::V6 && !transport.is_fragment => {
            neighbours(frame, &transport)
        }
        _ => Carried::Other,
    }
}

enum Found {
    Transport,
    /// Its protocol is known.
    LaterFragment,
    Nothing,
}

#[inline(always)]
fn transport_v4(frame: Frame, transport: &mut Transport) -> Found {
    let mut head = [0_u8; 10];
    if frame.load(ETHERNET_BYTES as u32, &mut head).is_err() {
        return Found::Nothing;
    }
    let parts = u16::from_be_bytes([head[6], head[7]]);
    *transport = Transport {
        protocol: head[9],
        offset: ETHERNET_BYTES as u32 + u32::from(head[0] & 0xf) * 4,
        is_fragment: parts & 0x2000 != 0,
        hop_limit: head[8],
    };
    if parts & 0x1fff != 0 {
        return Found::LaterFragment;
    }
    Found::Transport
}

/// Extension headers other than a fragment header are not walked: nothing that may stay in clear has them.
#[inline(always)]
fn transport_v6(frame: Frame, transport: &mut Transport) -> Found {
    const OFFSET: u32 = (ETHERNET_BYTES + IPV6_BYTES) as u32;
    let mut next_and_limit = [0_u8; 2];
    if frame
        .load(ETHERNET_BYTES as u32 + 6, &mut next_and_limit)
        .is_err()
    {
        return Found::Nothing;
    }
    let [next, hop_limit] = next_and_limit;
    *transport = Transport {
        protocol: next,
        offset: OFFSET,
        is_fragment: false,
        hop_limit,
    };
    if next != FRAGMENT {
        return Found::Transport;
    }
    let mut head = [0_u8; 4];
    if frame.load(OFFSET, &mut head).is_err() {
        return Found::Nothing;
    }
    transport.protocol = head[0];
    transport.offset = OFFSET + 8;
    transport.is_fragment = true;
    if u16::from_be_bytes([head[2], head[3]]) & 0xfff8 != 0 {
        return Found::LaterFragment;
    }
    Found::Transport
}

/// Without a branch for each port: the verifier would walk what follows once for every way through them.
#[inline(always)]
fn is_one_of<const N: usize>(port: [u8; 2], ports: &[[u8; 2]; N]) -> bool {
    let port = u32::from(u16::from_ne_bytes(port));
    let mut found = 0;
    for one in ports {
        // Only of 0 the top bit is set when 1 is taken away.
        found |= (port ^ u32::from(u16::from_ne_bytes(*one))).wrapping_sub(1);
    }
    // 0 stands for none.
    found >> 31 != 0 && port != 0
}

#[inline(always)]
fn datagram(frame: Frame, config: &NodeConfig, transport: &Transport) -> Carried {
    let mut ports = [0_u8; 4];
    if frame.load(transport.offset, &mut ports).is_err() {
        return Carried::Other;
    }
    let (source, destination) = ([ports[0], ports[1]], [ports[2], ports[3]]);
    if is_one_of(destination, &config.wireguard_ports_be) {
        Carried::ToWireguard
    } else if is_one_of(source, &config.wireguard_ports_be) {
        Carried::FromWireguard
    } else if destination == config.tunnel_port_be {
        Carried::Tunnel
    } else {
        Carried::Other
    }
}

#[inline(always)]
fn segment(frame: Frame, config: &NodeConfig, transport: &Transport) -> Carried {
    let mut ports = [0_u8; 4];
    let mut flags = 0_u8;
    if frame.load(transport.offset, &mut ports).is_err()
        || frame
            .load(transport.offset + TCP_FLAGS_OFFSET, &mut flags)
            .is_err()
    {
        return Carried::Other;
    }
    let opens = flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
    let to_server = is_one_of([ports[2], ports[3]], &config.control_ports_be);
    let from_server = is_one_of([ports[0], ports[1]], &config.control_ports_be) && !opens;
    if to_server || from_server {
        Carried::Control
    } else {
        Carried::Other
    }
}

#[inline(always)]
fn neighbours(frame: Frame, transport: &Transport) -> Carried {
    let mut kind = 0_u8;
    if transport.hop_limit == HOP_LIMIT_OF_LINK
        && frame.load(transport.offset, &mut kind).is_ok()
        && (NEIGHBOUR_DISCOVERY_FIRST..=NEIGHBOUR_DISCOVERY_LAST).contains(&kind)
    {
        Carried::Neighbours
    } else {
        Carried::Other
    }
}
