//! What WireGuard opened: that a peer is who it is does not make true what it says.

use clustermesh_ebpf_abi::{
    CONFIG_DIRECT, DropReason, IDENTITY_HOST, IDENTITY_REMOTE_NODE, WireTraffic,
};

use crate::support::net::{Namespaces, ip, sysctl};
use crate::support::node::{Node, pod_identity, router};
use crate::support::packet::{
    FRAGMENT, UDP, datagram, fix_v4, inner_frame, packet, tunnelled, udp, vxlan_with,
};
use crate::support::wireguard::{Offloads, Wireguard};

/// Node 1 that knows node 2 (tunnel, IPv4 outside), 3 (tunnel, IPv6 outside) and 5 (direct), all encrypted.
fn node() -> (Namespaces, Node, Wireguard) {
    let mut namespaces = Namespaces::new();
    let router = router(&mut namespaces);
    let mut node = Node::new(&mut namespaces, &router, 1);
    let wireguard = node.add_wireguard(Offloads::None, CONFIG_DIRECT);
    node.learn_encrypted(2, false, false);
    node.learn_encrypted(3, true, false);
    node.learn_encrypted(5, false, true);
    (
        namespaces,
        node,
        wireguard.expect("a device without offloads"),
    )
}

const OURS: &str = "10.1.0.4";
const OURS_V6: &str = "fd10:0:0:1::4";
const END: &str = "192.168.1.1";
const END_V6: &str = "fd00:0:0:1::1";

fn tunnel(source: &str, vni: u32, inner: &[u8]) -> Vec<u8> {
    let target = if source.contains(':') { END_V6 } else { END };
    tunnelled(source, target, vni, inner)[14..].to_vec()
}

#[test]
fn what_a_peer_may_not_say_is_dropped_and_counted() {
    use DropReason::*;
    let (_namespaces, node, wireguard) = node();
    let inner = datagram("10.2.0.4", OURS);
    let inner_v6 = datagram("fd10:0:0:3::4", OURS_V6);
    let (two, three) = ("192.168.2.1", "fd00:0:0:3::1");
    let with = |source: &str, target: &str| tunnel(two, pod_identity(2), &datagram(source, target));
    let mut first_part = tunnel(two, pod_identity(2), &inner);
    first_part[6] = 0x20;
    fix_v4(&mut first_part);
    let mut v6_part = vec![UDP, 0, 0, 1, 0, 0, 0, 9];
    v6_part.extend(&tunnel(three, pod_identity(3), &inner_v6)[40..]);
    let flagged = vxlan_with(0x0c00_0000, pod_identity(2), &inner_frame(&inner));
    for (what, sent, reason) in [
        (
            "identity of our cluster",
            tunnel(two, pod_identity(1), &inner),
            TunnelForgedIdentity,
        ),
        (
            "identity of a third cluster",
            tunnel(two, pod_identity(3), &inner),
            TunnelForgedIdentity,
        ),
        (
            "identity of the host",
            tunnel(two, IDENTITY_HOST, &inner),
            TunnelForgedIdentity,
        ),
        (
            "identity of a third cluster, IPv6",
            tunnel(three, pod_identity(2), &inner_v6),
            TunnelForgedIdentity,
        ),
        (
            "source on another node",
            with("10.3.0.4", OURS),
            TunnelForgedSource,
        ),
        (
            "source on another node, IPv6",
            tunnel(three, pod_identity(3), &datagram("fd10:0:0:2::4", OURS_V6)),
            TunnelForgedSource,
        ),
        ("source of our own", with(OURS, OURS), TunnelForgedSource),
        (
            "source of nobody",
            with("8.8.8.8", OURS),
            TunnelForgedSource,
        ),
        (
            "target elsewhere",
            with("10.2.0.4", "10.3.0.4"),
            TunnelNotHere,
        ),
        (
            "a node that we do not know",
            tunnel("192.168.9.1", pod_identity(2), &inner),
            TunnelFromUnknownNode,
        ),
        (
            "first fragment of a tunnel packet",
            first_part,
            TunnelMalformed,
        ),
        (
            "first IPv6 fragment of a tunnel packet",
            packet(three, END_V6, FRAGMENT, &v6_part),
            TunnelMalformed,
        ),
        (
            "flags",
            packet(two, END, UDP, &udp(50000, 8472, &flagged)),
            TunnelMalformed,
        ),
        (
            "routed, from a node of the tunnel",
            datagram("10.2.0.4", OURS),
            DirectForgedSource,
        ),
        (
            "routed, from ourselves",
            datagram(OURS, OURS),
            DirectForgedSource,
        ),
        // In clear, with direct routing, that one is taken: the world is not behind a peer.
        (
            "routed, from the world",
            datagram("8.8.8.8", OURS),
            DirectForgedSource,
        ),
        (
            "routed, from the world, IPv6",
            datagram("2001:db8::1", OURS_V6),
            DirectForgedSource,
        ),
        (
            "routed, cut short",
            datagram("10.5.0.4", OURS)[..22].to_vec(),
            Malformed,
        ),
    ] {
        let before = node.datapath.drops(reason);
        wireguard.receive(&sent);
        assert_eq!(
            node.datapath.drops(reason),
            before + 1,
            "{what}: {:?}",
            node.datapath.all_drops()
        );
    }
    assert_eq!(wireguard.waiting(), None, "nothing is answered");
}

#[test]
fn a_peer_may_not_use_the_node_as_a_router() {
    let (_namespaces, node, wireguard) = node();
    for (setting, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/wg0/rp_filter", "0"),
        ("net/ipv4/conf/all/rp_filter", "0"),
    ] {
        sysctl(&node.host, setting, value);
    }
    // Addresses of the host that are not the tunnel's ends: they are this node's all the same.
    let host = &node.host;
    ip(&format!("-n {host} link set lo up"));
    ip(&format!("-n {host} addr add 203.0.113.5/32 dev lo"));
    ip(&format!("-n {host} addr add 192.168.1.9/24 dev eth0"));
    ip(&format!("-n {host} addr add 2001:db8::5/128 dev lo"));
    let taken = || node.datapath.wire(WireTraffic::EncryptedIn).packets;
    let refused = || node.datapath.drops(DropReason::NotForHere);
    let (two, three) = ("192.168.2.1", "fd00:0:0:3::1");
    for (source, target) in [
        // By the default route, to a neighbour, to another node, to a pod of another node.
        (two, "8.8.8.8"),
        (two, "192.168.1.254"),
        (two, "192.168.5.1"),
        (two, "10.5.0.4"),
        // What a NAT in front of the node would translate.
        (two, "198.51.100.7"),
        (three, "2001:db8:1::1"),
        (three, "fd00:0:0:1::fe"),
        (three, "fd10:0:0:5::4"),
    ] {
        let before = (taken(), refused());
        wireguard.receive(&datagram(source, target));
        assert_eq!(
            (taken(), refused()),
            (before.0, before.1 + 1),
            "{target}: {:?}",
            node.datapath.all_drops()
        );
    }
    for (source, target) in [
        (two, END),
        (two, "192.168.1.9"),
        (two, "203.0.113.5"),
        (three, END_V6),
        (three, "2001:db8::5"),
    ] {
        let before = (taken(), refused());
        wireguard.receive(&datagram(source, target));
        assert_eq!(
            (taken(), refused()),
            (before.0 + 1, before.1),
            "{target}: {:?}",
            node.datapath.all_drops()
        );
    }
}

#[test]
fn a_pod_that_is_gone_is_answered_for_through_wireguard() {
    let (_namespaces, node, wireguard) = node();
    for (source, vni, inner) in [
        ("192.168.2.1", 2, datagram("10.2.0.4", "10.1.0.77")),
        (
            "192.168.2.1",
            2,
            datagram("fd10:0:0:2::4", "fd10:0:0:1::77"),
        ),
        ("fd00:0:0:3::1", 3, datagram("10.3.0.4", "10.1.0.77")),
        (
            "fd00:0:0:3::1",
            3,
            datagram("fd10:0:0:3::4", "fd10:0:0:1::77"),
        ),
    ] {
        wireguard.receive(&tunnel(source, pod_identity(vni), &inner));
        let answer = wireguard.sent();
        let (ip_bytes, at) = if answer[0] >> 4 == 4 {
            (20, 12)
        } else {
            (40, 8)
        };
        assert_eq!(answer[0] >> 4 == 4, !source.contains(':'), "{source}");
        let udp = &answer[ip_bytes..];
        assert_eq!(udp[2..4], 8472_u16.to_be_bytes());
        assert_eq!(udp[12..15], IDENTITY_REMOTE_NODE.to_be_bytes()[1..]);
        // From our end of the tunnel.
        let own = answer[at..at + 4].to_vec();
        assert!(own == [192, 168, 1, 1] || own == [0xfd, 0, 0, 0], "{own:?}");
        let protocol = if inner[0] >> 4 == 4 {
            udp[30 + 9]
        } else {
            udp[30 + 6]
        };
        assert!(protocol == 1 || protocol == 58, "ICMP: {protocol}");
    }
    for inner in [
        datagram("10.5.0.4", "10.1.0.77"),
        datagram("fd10:0:0:5::4", "fd10:0:0:1::77"),
    ] {
        wireguard.receive(&inner);
        let answer = wireguard.sent();
        assert_eq!(answer[0] >> 4, inner[0] >> 4);
        // From the pod's address, back to where it came from.
        if inner[0] >> 4 == 4 {
            assert_eq!(
                answer[9..20],
                [&[1], &answer[10..12], &inner[16..20], &inner[12..16]].concat()
            );
        } else {
            assert_eq!(answer[6], 58);
            assert_eq!(answer[8..40], [&inner[24..40], &inner[8..24]].concat());
        }
    }
    assert_eq!(node.datapath.drops(DropReason::UnknownPod), 6);
}
