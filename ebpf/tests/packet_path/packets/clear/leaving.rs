//! What leaves: dropped, redirected into WireGuard, or let go.

use clustermesh_ebpf_abi::{
    CONFIG_ENCRYPT_NODES, CONFIG_STRICT, DropReason, TrafficPath, WireTraffic,
};

use crate::support::packet::{
    ICMP, TCP, UDP, datagram, ethernet, fix_transport, framed, packet, tunnelled, udp, verified,
};

use super::super::fixture::*;
use super::*;

#[test]
fn to_a_node_without_key_nothing_is_sent() {
    let datapath = encrypting(CONFIG_ENCRYPT_NODES);
    let waits = Err(DropReason::AwaitingKey);
    for program in ["from_pod", "from_host"] {
        check(
            &datapath,
            program,
            program,
            &ethernet(&datagram(V4, "10.8.0.9")),
            waits,
        );
        check(
            &datapath,
            program,
            program,
            &ethernet(&datagram(V6, "fd10:0:0:8::9")),
            waits,
        );
        // Nor is the sender told of a size that the path does not take.
        let large = ethernet(&packet(V4, "10.8.0.9", UDP, &udp(1, 2, &[0; 1400])));
        check(&datapath, program, program, &large, waits);
    }
    check(
        &datapath,
        "to_network",
        "the host",
        &ethernet(&datagram(OWN, "192.168.8.1")),
        waits,
    );
    let connection = ethernet(&packet(
        OWN,
        "192.168.8.1",
        TCP,
        &segment(1000, SERVER_PORT, SYN),
    ));
    check(&datapath, "to_network", "a server", &connection, Ok(PASS));
    assert_eq!(datapath.wire(WireTraffic::EncryptedOut).packets, 0);
}

#[test]
fn nothing_of_the_mesh_leaves_in_clear_in_strict_mode() {
    let datapath = encrypting(CONFIG_STRICT);
    let (pass, refused) = (Ok(PASS), Err(DropReason::ClearWouldLeave));
    for (what, frame, wanted) in [
        ("a pod", ethernet(&datagram(V4, "10.2.0.9")), refused),
        (
            "a pod, IPv6",
            ethernet(&datagram(V6, "fd10:0:0:2::9")),
            refused,
        ),
        (
            "the host to a pod",
            ethernet(&datagram(OWN, "10.2.0.9")),
            refused,
        ),
        (
            "another address of the host to a pod",
            ethernet(&datagram("198.51.100.7", "10.3.0.9")),
            refused,
        ),
        (
            "to a pod of a node without key",
            ethernet(&datagram(V4, "10.8.0.9")),
            refused,
        ),
        (
            "fragment",
            fragment_v4(datagram(V4, "10.2.0.9"), 0x2000),
            refused,
        ),
        (
            "later fragment",
            fragment_v4(datagram(V4, "10.2.0.9"), 9),
            refused,
        ),
        (
            "IPv6 fragment",
            fragment_v6(V6, "fd10:0:0:2::9", UDP, 1, &[0; 8]),
            refused,
        ),
        (
            "later IPv6 fragment",
            fragment_v6(V6, "fd10:0:0:3::9", UDP, 8, &[0; 8]),
            refused,
        ),
        (
            "too many extension headers",
            ethernet(&extended(V6, "fd10:0:0:2::9", 7)),
            refused,
        ),
        (
            "to a server's port of a pod",
            ethernet(&packet(
                V4,
                "10.2.0.9",
                TCP,
                &segment(1000, SERVER_PORT, SYN),
            )),
            refused,
        ),
        (
            "tunnel",
            tunnelled(OWN, "192.168.2.1", POD, &datagram(V4, "10.2.0.9")),
            refused,
        ),
        (
            "tunnel, IPv6",
            tunnelled(OWN_V6, "fd00::3", POD, &datagram(V6, "fd10:0:0:3::9")),
            refused,
        ),
        (
            "first fragment of a tunnel",
            fragment_v4(
                tunnelled(OWN, "192.168.2.1", POD, &datagram(V4, "10.2.0.9"))[14..].to_vec(),
                0x2000,
            ),
            refused,
        ),
        (
            "the host to the node",
            ethernet(&datagram(OWN, "192.168.2.1")),
            pass,
        ),
        (
            "to a node that does not encrypt",
            ethernet(&datagram(V4, "10.7.0.9")),
            pass,
        ),
        ("to the world", ethernet(&datagram(OWN, "1.1.1.1")), pass),
        ("to ourselves", ethernet(&datagram("1.1.1.1", OWN)), pass),
        ("ARP", framed(0x0806, &[0; 28]), pass),
    ] {
        check(&datapath, "to_network", what, &frame, wanted);
    }
    let frame = ethernet(&datagram(V4, "10.2.0.9"));
    let marked = datapath.run_marked("to_network", &frame, 0, MARK);
    assert_eq!(marked.verdict, PASS, "WireGuard's own");
    configure(&datapath, 0, MARK);
    check(&datapath, "to_network", "not strict", &frame, pass);
}

#[test]
fn the_hosts_own_packets_to_nodes_go_into_wireguard() {
    let datapath = encrypting(CONFIG_ENCRYPT_NODES | CONFIG_STRICT);
    let four = "192.168.2.1";
    let sent = [
        ("UDP", ethernet(&datagram(OWN, four))),
        ("UDP over IPv6", ethernet(&datagram(OWN_V6, "fd00::3"))),
        ("ICMP", ethernet(&packet(OWN, four, ICMP, &[8; 16]))),
        ("fragment", fragment_v4(datagram(OWN, four), 0x2000)),
        ("later fragment", fragment_v4(datagram(OWN, four), 9)),
        (
            "IPv6 fragment",
            fragment_v6(OWN_V6, "fd00::3", UDP, 8, &[0; 8]),
        ),
        ("IPv6 options", ethernet(&extended(OWN_V6, "fd00::3", 7))),
        (
            "opened from a server's port",
            ethernet(&packet(OWN, four, TCP, &segment(SERVER_PORT, 1000, SYN))),
        ),
        (
            "UDP to a server's port",
            ethernet(&packet(OWN, four, UDP, &udp(1, SERVER_PORT, b""))),
        ),
        (
            "from WireGuard's port without its mark",
            ethernet(&packet(OWN, four, UDP, &udp(WIREGUARD_PORT, 1, b""))),
        ),
        (
            "to a WireGuard port without its mark",
            ethernet(&packet(OWN, four, UDP, &udp(1, WIREGUARD_PORT, b""))),
        ),
    ];
    for (what, frame) in &sent {
        let out = forwarded(&datapath, "to_network", frame, TrafficPath::NodeOut);
        assert_eq!(out.packet, *frame, "{what}");
    }
    assert_eq!(
        datapath.wire(WireTraffic::EncryptedOut).packets,
        sent.len() as u64
    );
    let pass = Ok(PASS);
    for (what, frame) in [
        (
            "to a server",
            ethernet(&packet(OWN, four, TCP, &segment(1000, SERVER_PORT, SYN))),
        ),
        (
            "from a server",
            ethernet(&packet(
                OWN,
                four,
                TCP,
                &segment(SERVER_PORT, 1000, SYN | ACK),
            )),
        ),
        (
            "neighbour advertisement",
            discovery(OWN_V6, "fd00::3", 136, 255),
        ),
        (
            "neighbour solicitation of another address",
            discovery("fe80::1", "fd00::3", 135, 255),
        ),
        (
            "a node that does not encrypt",
            ethernet(&datagram(OWN, "192.168.7.1")),
        ),
    ] {
        check(&datapath, "to_network", what, &frame, pass);
    }
    let other = ethernet(&datagram("198.51.100.7", four));
    check(
        &datapath,
        "to_network",
        "another address",
        &other,
        Err(DropReason::ClearWouldLeave),
    );
    configure(&datapath, CONFIG_ENCRYPT_NODES, MARK);
    check(
        &datapath,
        "to_network",
        "another address, not strict",
        &other,
        pass,
    );
    // Without a mark WireGuard's own are known by their port: nobody else can have it.
    configure(&datapath, CONFIG_ENCRYPT_NODES, 0);
    let from_port = ethernet(&packet(OWN, four, UDP, &udp(WIREGUARD_PORT, 9, b"")));
    check(&datapath, "to_network", "no mark", &from_port, pass);
}

/// A SYN of the host with these options, its checksum right.
pub(super) fn syn(source: &str, target: &str, options: &[u8]) -> Vec<u8> {
    let mut segment = segment(1000, 22, SYN);
    segment[12] = (((20 + options.len()) / 4) << 4) as u8;
    segment.extend(options);
    let mut message = packet(source, target, TCP, &segment);
    let at = message.len() - segment.len();
    fix_transport(&mut message, at, 16);
    ethernet(&message)
}

#[test]
fn the_hosts_connections_through_wireguard_are_told_of_its_smaller_packets() {
    let datapath = encrypting(CONFIG_ENCRYPT_NODES);
    let mtu = usize::from(MTU);
    let (four, six) = ((OWN, "192.168.2.1"), (OWN_V6, "fd00::3"));
    // What pods may send leaves room for the tunnel; the host's own packets need none.
    let (most_v4, most_v6) = (mtu + 50 - 40, mtu + 70 - 60);
    let option = |bytes: usize| {
        let bytes = (bytes as u16).to_be_bytes();
        [2, 4, bytes[0], bytes[1]]
    };
    for ((source, target), named, then) in [
        (four, 1460, most_v4),
        (four, most_v4, most_v4),
        (four, 536, 536),
        (six, 1440, most_v6),
        ((OWN, "192.168.5.1"), 1460, mtu - 40),
    ] {
        for before in [
            &[][..],
            &[1, 1, 4, 2],
            &[3, 3, 7, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1],
        ] {
            let frame = syn(source, target, &[before, &option(named)].concat());
            let out = forwarded(&datapath, "to_network", &frame, TrafficPath::NodeOut);
            let expected = syn(source, target, &[before, &option(then)].concat());
            assert_eq!(out.packet, expected, "{target} {named}");
            verified(&out.packet[14..]);
        }
    }
    for options in [
        &[][..],
        &[0, 0, 0, 0],
        &[3, 0, 7, 1],
        &[2, 3, 7, 1],
        &[1, 1, 1, 1],
        &[2, 4, 5],
    ] {
        let frame = syn(four.0, four.1, options);
        let out = forwarded(&datapath, "to_network", &frame, TrafficPath::NodeOut);
        assert_eq!(out.packet, frame, "{options:x?}");
    }
    let mut data = syn(four.0, four.1, &option(1460));
    data[14 + 20 + 13] = ACK;
    let out = forwarded(&datapath, "to_network", &data, TrafficPath::NodeOut);
    assert_eq!(out.packet, data, "no SYN");
}
