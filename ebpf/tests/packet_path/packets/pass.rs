//! What is passed to the stack or ignored in silence.

use crate::support::packet::{ICMPV6, TCP, datagram, ethernet, framed, packet, tcp, tunnelled};

use super::fixture::*;

#[test]
fn link_scoped_packets_and_arp_go_nowhere_in_silence() {
    let datapath = datapath();
    for (what, frame, verdict) in [
        ("ARP", framed(0x0806, &[0; 28]), PASS),
        (
            "duplicate detection",
            ethernet(&packet("::", "ff02::1:ff00:4", ICMPV6, &[135; 24])),
            DROP,
        ),
        (
            "router solicitation",
            ethernet(&packet("fe80::1", "ff02::2", ICMPV6, &[133; 16])),
            DROP,
        ),
        (
            "neighbour solicitation",
            ethernet(&packet("fe80::1", "fd10:0:0:1::1", ICMPV6, &[135; 24])),
            DROP,
        ),
        (
            "IPv4 multicast",
            ethernet(&datagram(V4, "224.0.0.251")),
            DROP,
        ),
        (
            "IPv4 broadcast",
            ethernet(&datagram("0.0.0.0", "255.255.255.255")),
            DROP,
        ),
    ] {
        for program in ["from_pod", "from_host"] {
            assert_eq!(
                datapath.run(program, &frame).verdict,
                verdict,
                "{what} {program}"
            );
        }
    }
    assert_eq!(datapath.all_drops(), []);
}

#[test]
fn what_is_the_hosts_own_passes_the_underlay_untouched() {
    let datapath = datapath();
    let tunnel = tunnelled(
        "192.168.2.1",
        "192.168.1.1",
        REMOTE,
        &datagram("10.2.0.9", V4),
    );
    for (what, frame) in [
        ("too short", vec![0; 14]),
        ("ARP", framed(0x0806, &[0; 28])),
        ("802.1Q", framed(0x8100, &tunnel[12..])),
        ("to the host", ethernet(&datagram("1.1.1.1", "192.168.1.1"))),
        (
            "TCP to the host",
            ethernet(&packet("1.1.1.1", "192.168.1.1", TCP, &tcp(SYN, b""))),
        ),
        (
            "tunnel port of another address",
            tunnelled(
                "192.168.2.1",
                "192.168.1.2",
                REMOTE,
                &datagram("10.2.0.9", V4),
            ),
        ),
        (
            "IPv6 to the host",
            ethernet(&datagram("2001:db8::1", "fd00::1")),
        ),
        (
            "through the host",
            ethernet(&datagram("1.1.1.1", "2.2.2.2")),
        ),
        (
            "later fragment to the host",
            edited(tunnel.clone(), 20, &[0, 9]),
        ),
        (
            "IPv6 options to the host",
            ethernet(&extended("fd00::3", "fd00::1", 2)),
        ),
        (
            "neighbour solicitation",
            ethernet(&packet("fe80::1", "ff02::1", ICMPV6, &[135; 24])),
        ),
    ] {
        let outcome = datapath.run("from_network", &frame);
        assert_eq!(outcome.verdict, PASS, "{what}");
        assert_eq!(outcome.packet, frame, "{what}");
    }
    assert_eq!(datapath.all_drops(), []);
}
