//! Clear text that comes in or would leave though it is to be encrypted, and what may stay in clear.

mod leaving;
mod narrow;
mod unknown;

use clustermesh_ebpf_abi::{
    CONFIG_DIRECT, CONFIG_ENCRYPT_NODES, CONFIG_STRICT, DropReason, IDENTITY_REMOTE_NODE,
    NODE_CLEAR_REFUSED, NODE_DIRECT, NODE_ENCRYPTED, NODE_PRESENT, NODE_WITHHELD, NodeConfig,
    NodeValue, TrafficPath, WireTraffic,
};

use crate::support::bpf::{Datapath, addr};
use crate::support::packet::{
    FRAGMENT, ICMP, ICMPV6, TCP, UDP, datagram, ethernet, fix_v4, framed, packet, tcp, tunnelled,
    udp,
};

use super::fixture::*;

const MARK: u32 = 0xca6c;
const WIREGUARD_PORT: u16 = 51871;
const SECOND_PORT: u16 = 51872;
const SERVER_PORT: u16 = 80;
const OWN: &str = "192.168.1.1";
const OWN_V6: &str = "fd00::1";
/// The nodes that encrypt: 2 with IPv4 outside, 3 with IPv6, 5 with direct routing. 7 does not, 8 has no key yet.
const NODES: [(u32, &str); 5] = [
    (2, "192.168.2.1"),
    (3, "fd00::3"),
    (5, "192.168.5.1"),
    (7, "192.168.7.1"),
    (8, "192.168.8.1"),
];

fn encrypting(flags: u32) -> Datapath {
    let datapath = datapath();
    configure(&datapath, flags, MARK);
    let both = NODE_PRESENT | NODE_ENCRYPTED | NODE_CLEAR_REFUSED;
    for (index, end) in NODES {
        let flags = match index {
            5 => both | NODE_DIRECT,
            7 => NODE_PRESENT,
            8 => NODE_PRESENT | NODE_WITHHELD | NODE_CLEAR_REFUSED,
            _ => both,
        };
        let value: NodeValue = node(end, 2, flags);
        datapath.set_node(index, &value);
        datapath.set_ipcache(addr(&format!("10.{index}.0.0")), 112, REMOTE, index);
        datapath.set_ipcache(addr(&format!("fd10:0:0:{index}::")), 64, REMOTE, index);
        datapath.set_ipcache(addr(end), 128, IDENTITY_REMOTE_NODE, index);
    }
    datapath
}

fn configure(datapath: &Datapath, flags: u32, wireguard_mark: u32) {
    datapath.set_config(&NodeConfig {
        flags,
        wireguard_ifindexes: [LOOPBACK, 0],
        wireguard_mark,
        wireguard_ports_be: [WIREGUARD_PORT.to_be_bytes(), SECOND_PORT.to_be_bytes()],
        control_ports_be: [SERVER_PORT.to_be_bytes(), [0; 2], [0; 2], [0; 2]],
        ..config()
    });
}

/// Runs a packet; it must be dropped for that reason, or have that verdict without any drop.
fn check(
    datapath: &Datapath,
    program: &str,
    what: &str,
    frame: &[u8],
    wanted: Result<i32, DropReason>,
) {
    let before = datapath.all_drops();
    let outcome = datapath.run(program, frame);
    let now = datapath.all_drops();
    match wanted {
        Ok(verdict) => {
            assert_eq!(outcome.verdict, verdict, "{what}: {before:?} → {now:?}");
            assert_eq!(before, now, "{what}");
        }
        Err(reason) => {
            let count = before.iter().find(|(name, _)| *name == reason.name());
            let count = count.map_or(0, |(_, count)| *count);
            assert_eq!(outcome.verdict, DROP, "{what}");
            assert_eq!(
                datapath.drops(reason),
                count + 1,
                "{what}: {before:?} → {now:?}"
            );
        }
    }
}

fn fragment_v4(mut ip_packet: Vec<u8>, field: u16) -> Vec<u8> {
    ip_packet[6..8].copy_from_slice(&field.to_be_bytes());
    fix_v4(&mut ip_packet);
    ethernet(&ip_packet)
}

fn fragment_v6(source: &str, target: &str, next: u8, field: u16, payload: &[u8]) -> Vec<u8> {
    let field = field.to_be_bytes();
    let head = [next, 0, field[0], field[1], 0, 0, 0, 1];
    ethernet(&packet(
        source,
        target,
        FRAGMENT,
        &[&head, payload].concat(),
    ))
}

fn discovery(source: &str, target: &str, kind: u8, hop_limit: u8) -> Vec<u8> {
    let mut message = packet(source, target, ICMPV6, &[&[kind][..], &[0; 23]].concat());
    message[7] = hop_limit;
    ethernet(&message)
}

fn segment(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut segment = tcp(flags, b"");
    segment[..2].copy_from_slice(&from.to_be_bytes());
    segment[2..4].copy_from_slice(&to.to_be_bytes());
    segment
}

#[test]
fn clear_text_of_pods_is_refused_from_nodes_that_encrypt() {
    for flags in [0, CONFIG_STRICT, CONFIG_ENCRYPT_NODES] {
        let datapath = encrypting(flags | CONFIG_DIRECT);
        let refused = Err(DropReason::ClearReceived);
        for (what, frame) in [
            (
                "tunnel",
                tunnelled("192.168.2.1", OWN, REMOTE, &datagram("10.2.0.9", V4)),
            ),
            (
                "tunnel, IPv6 inside",
                tunnelled("192.168.2.1", OWN, REMOTE, &datagram("fd10:0:0:2::9", V6)),
            ),
            (
                "tunnel, IPv6 outside",
                tunnelled("fd00::3", OWN_V6, REMOTE, &datagram("10.3.0.9", V4)),
            ),
            (
                "tunnel, IPv6",
                tunnelled("fd00::3", OWN_V6, REMOTE, &datagram("fd10:0:0:3::9", V6)),
            ),
            (
                "tunnel, forged as well",
                tunnelled("192.168.2.1", OWN, POD, &datagram("10.2.0.9", V4)),
            ),
            (
                "tunnel of a node without key",
                tunnelled("192.168.8.1", OWN, REMOTE, &datagram("10.8.0.9", V4)),
            ),
            (
                "tunnel to a pod that is gone",
                tunnelled(
                    "192.168.2.1",
                    OWN,
                    REMOTE,
                    &datagram("10.2.0.9", "10.1.0.77"),
                ),
            ),
            ("routed", ethernet(&datagram("10.5.0.9", V4))),
            ("routed, IPv6", ethernet(&datagram("fd10:0:0:5::9", V6))),
            (
                "routed fragment",
                fragment_v4(datagram("10.5.0.9", V4), 0x2000),
            ),
            (
                "routed later fragment",
                fragment_v4(datagram("10.5.0.9", V4), 9),
            ),
            (
                "routed IPv6 fragment",
                fragment_v6("fd10:0:0:5::9", V6, UDP, 8, &[0; 8]),
            ),
            (
                "routed, from a node of the tunnel",
                ethernet(&datagram("10.2.0.9", V4)),
            ),
            ("a pod to the host", ethernet(&datagram("10.5.0.9", OWN))),
            (
                "a pod to the host, IPv6",
                ethernet(&datagram("fd10:0:0:5::9", OWN_V6)),
            ),
            (
                "later fragment of a pod to the host",
                fragment_v4(datagram("10.5.0.9", OWN), 9),
            ),
            (
                "later IPv6 fragment of a pod to the host",
                fragment_v6("fd10:0:0:5::9", OWN_V6, UDP, 8, &[0; 8]),
            ),
            (
                "a pod to a server",
                ethernet(&packet(
                    "10.5.0.9",
                    OWN,
                    TCP,
                    &segment(1000, SERVER_PORT, SYN),
                )),
            ),
        ] {
            check(&datapath, "from_network", what, &frame, refused);
        }
        let plain = tunnelled("192.168.7.1", OWN, REMOTE, &datagram("10.7.0.9", V4));
        forwarded(&datapath, "from_network", &plain, TrafficPath::TunnelIn);
        assert_eq!(datapath.wire(WireTraffic::ClearIn).packets, 1);
    }
}

#[test]
fn clear_text_of_nodes_is_refused_where_nodes_encrypt_but_for_what_encryption_needs() {
    let datapath = encrypting(CONFIG_ENCRYPT_NODES);
    let (four, six) = ("192.168.2.1", "fd00::3");
    let pass = Ok(PASS);
    let refused = Err(DropReason::ClearReceived);
    let to_port = |port: u16| udp(1000, port, b"hello");
    for (what, frame, wanted) in [
        ("UDP", ethernet(&datagram(four, OWN)), refused),
        ("UDP over IPv6", ethernet(&datagram(six, OWN_V6)), refused),
        (
            "ICMP",
            ethernet(&packet(four, OWN, ICMP, &[8; 16])),
            refused,
        ),
        (
            "ICMPv6",
            ethernet(&packet(six, OWN_V6, ICMPV6, &[128; 16])),
            refused,
        ),
        (
            "TCP",
            ethernet(&packet(four, OWN, TCP, &segment(1000, 22, SYN))),
            refused,
        ),
        (
            "first fragment",
            fragment_v4(datagram(four, OWN), 0x2000),
            refused,
        ),
        (
            "first IPv6 fragment",
            fragment_v6(six, OWN_V6, UDP, 1, &to_port(53)),
            refused,
        ),
        ("IPv6 options", ethernet(&extended(six, OWN_V6, 1)), refused),
        (
            "another protocol",
            ethernet(&packet(four, OWN, 47, &[0; 20])),
            refused,
        ),
        (
            "cut short",
            framed(0x0800, &packet(four, OWN, UDP, &[])),
            refused,
        ),
        (
            "a withheld node",
            ethernet(&datagram("192.168.8.1", OWN)),
            refused,
        ),
        (
            "WireGuard",
            ethernet(&packet(four, OWN, UDP, &to_port(WIREGUARD_PORT))),
            pass,
        ),
        (
            "the second device",
            ethernet(&packet(six, OWN_V6, UDP, &to_port(SECOND_PORT))),
            pass,
        ),
        (
            "WireGuard in fragments",
            fragment_v4(packet(four, OWN, UDP, &to_port(WIREGUARD_PORT)), 0x2000),
            pass,
        ),
        (
            "WireGuard in IPv6 fragments",
            fragment_v6(six, OWN_V6, UDP, 1, &to_port(WIREGUARD_PORT)),
            pass,
        ),
        // They may be of WireGuard.
        (
            "later fragment of UDP",
            fragment_v4(datagram(four, OWN), 9),
            pass,
        ),
        (
            "later IPv6 fragment of UDP",
            fragment_v6(six, OWN_V6, UDP, 8, &[0; 8]),
            pass,
        ),
        (
            "later fragment of TCP",
            fragment_v4(packet(four, OWN, TCP, &segment(1000, 22, ACK)), 9),
            refused,
        ),
        (
            "later fragment of TCP with a server's port where the first one has it",
            fragment_v4(
                packet(four, OWN, TCP, &segment(1000, SERVER_PORT, ACK)),
                0x2009,
            ),
            refused,
        ),
        (
            "later fragment of ICMP",
            fragment_v4(packet(four, OWN, ICMP, &[8; 16]), 9),
            refused,
        ),
        (
            "later IPv6 fragment of TCP",
            fragment_v6(six, OWN_V6, TCP, 8, &segment(1000, 22, ACK)),
            refused,
        ),
        (
            "later fragment of TCP from a node that does not encrypt",
            fragment_v4(packet("192.168.7.1", OWN, TCP, &segment(1000, 22, ACK)), 9),
            pass,
        ),
        (
            "later fragment of a stranger's TCP",
            fragment_v4(packet("1.1.1.1", OWN, TCP, &segment(1000, 22, ACK)), 9),
            pass,
        ),
        (
            "to a server",
            ethernet(&packet(four, OWN, TCP, &segment(1000, SERVER_PORT, SYN))),
            pass,
        ),
        (
            "to a server over IPv6",
            ethernet(&packet(six, OWN_V6, TCP, &segment(1000, SERVER_PORT, ACK))),
            pass,
        ),
        (
            "from a server",
            ethernet(&packet(
                four,
                OWN,
                TCP,
                &segment(SERVER_PORT, 1000, SYN | ACK),
            )),
            pass,
        ),
        (
            "opened from a server's port",
            ethernet(&packet(four, OWN, TCP, &segment(SERVER_PORT, 1000, SYN))),
            refused,
        ),
        (
            "UDP to a server's port",
            ethernet(&packet(four, OWN, UDP, &to_port(SERVER_PORT))),
            refused,
        ),
        (
            "to a server in fragments",
            fragment_v4(
                packet(four, OWN, TCP, &segment(1, SERVER_PORT, SYN)),
                0x2000,
            ),
            refused,
        ),
        (
            "port 0",
            ethernet(&packet(four, OWN, TCP, &segment(1000, 0, SYN))),
            refused,
        ),
        (
            "neighbour solicitation",
            discovery(six, OWN_V6, 135, 255),
            pass,
        ),
        (
            "neighbour advertisement",
            discovery(six, OWN_V6, 136, 255),
            pass,
        ),
        (
            "neighbour discovery from afar",
            discovery(six, OWN_V6, 136, 254),
            refused,
        ),
        (
            "a node that does not encrypt",
            ethernet(&datagram("192.168.7.1", OWN)),
            pass,
        ),
        ("a stranger", ethernet(&datagram("1.1.1.1", OWN)), pass),
        ("ourselves", ethernet(&datagram(OWN, OWN)), pass),
        ("through us", ethernet(&datagram(four, "2.2.2.2")), pass),
        ("ARP", framed(0x0806, &[0; 28]), pass),
    ] {
        check(&datapath, "from_network", what, &frame, wanted);
    }
    let datapath = encrypting(CONFIG_STRICT);
    check(
        &datapath,
        "from_network",
        "nodes in clear",
        &ethernet(&datagram(four, OWN)),
        pass,
    );
}
