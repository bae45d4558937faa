//! Frames that no stack would send, sent by a pod or on the underlay.

use std::net::UdpSocket;
use std::time::Duration;

use clustermesh_ebpf_abi::{CONFIG_ENCRYPT_NODES, CONFIG_STRICT, DropReason, TrafficPath};

use crate::support::net::{Namespaces, device, inside};
use crate::support::node::{Node, pod_identity, router};
use crate::support::packet::{datagram, ethernet, tunnelled};
use crate::support::raw::send;

/// Longest wait for a packet that must come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends a frame that the node must drop for that reason.
fn dropped(node: &Node, namespace: &str, link: &str, what: &str, frame: &[u8], reason: DropReason) {
    let before = node.datapath.drops(reason);
    // The receiving side runs before a send over veth returns to its sender, or right after on this CPU; the counter
    // is read until it shows.
    send(namespace, link, frame);
    let seen = (0..1000).any(|_| {
        std::thread::yield_now();
        node.datapath.drops(reason) == before + 1
    });
    assert!(seen, "{what}: {:?}", node.datapath.all_drops());
}

/// The same frame with a tag in front of its EtherType.
fn tagged(kind: u16, control: u16, frame: &[u8]) -> Vec<u8> {
    let tag = [kind.to_be_bytes(), control.to_be_bytes()].concat();
    [&frame[..12], &tag, &frame[12..]].concat()
}

#[test]
fn odd_frames_of_a_pod_are_dropped_and_counted() {
    let mut namespaces = Namespaces::new();
    let router = router(&mut namespaces);
    let node = Node::new(&mut namespaces, &router, 1);
    let v4 = ethernet(&datagram("10.1.0.4", "10.1.0.1"));
    let v6 = ethernet(&datagram("fd10:0:0:1::4", "fd10:0:0:1::1"));
    for (what, frame, reason) in [
        (
            "IPv4 header cut short",
            v4[..30].to_vec(),
            DropReason::Malformed,
        ),
        (
            "no IPv4 header at all",
            v4[..15].to_vec(),
            DropReason::Malformed,
        ),
        (
            "IPv6 header cut short",
            v6[..50].to_vec(),
            DropReason::Malformed,
        ),
        (
            "802.1Q, which the kernel takes off before",
            tagged(0x8100, 5, &v4),
            DropReason::VlanTagged,
        ),
        (
            "another pod's source",
            ethernet(&datagram("10.1.0.5", "10.1.0.1")),
            DropReason::SourceNotOwn,
        ),
    ] {
        dropped(&node, &node.pod, "eth0", what, &frame, reason);
    }
}

#[test]
fn a_tag_without_a_vlan_hides_nothing_on_the_underlay() {
    use DropReason::*;
    let mut namespaces = Namespaces::new();
    let router = router(&mut namespaces);
    let node = Node::new(&mut namespaces, &router, 1);
    node.configure(CONFIG_STRICT | CONFIG_ENCRYPT_NODES);
    node.learn(2, false, false);
    node.learn(3, false, false);
    node.withhold(3);
    let (_, mac) = device(&node.host, "eth0");
    let to_node = |mut frame: Vec<u8>| {
        frame[..6].copy_from_slice(&mac);
        frame
    };
    let (own, pod) = ("192.168.1.1", "10.1.0.4");
    let from = |n: u8, source: &str| {
        let end = format!("192.168.{n}.1");
        to_node(tunnelled(
            &end,
            own,
            pod_identity(n),
            &datagram(source, pod),
        ))
    };
    let forged = from(2, "10.3.0.4");
    let clear = from(3, "10.3.0.4");
    let clear_host = to_node(ethernet(&datagram("192.168.3.1", own)));
    let routed = to_node(ethernet(&datagram("10.2.0.4", pod)));

    // Of a VLAN that has no device here: nobody's.
    send(&router, "to1", &tagged(0x8100, 5, &forged));
    let refused = [
        ("clear text", tagged(0x8100, 0, &clear), ClearReceived),
        (
            "clear text to the host",
            tagged(0x8100, 0, &clear_host),
            ClearReceived,
        ),
        (
            "with a priority",
            tagged(0x8100, 0xf000, &clear_host),
            ClearReceived,
        ),
        ("802.1ad", tagged(0x88a8, 0, &clear_host), ClearReceived),
        (
            "forged in a tunnel",
            tagged(0x8100, 0, &forged),
            TunnelForgedSource,
        ),
        (
            "forged without one",
            tagged(0x8100, 0, &routed),
            DirectForgedSource,
        ),
        (
            "twice",
            tagged(0x8100, 0, &tagged(0x8100, 0, &clear)),
            VlanTagged,
        ),
        (
            "a VLAN behind it",
            tagged(0x88a8, 0, &tagged(0x8100, 5, &clear)),
            VlanTagged,
        ),
    ];
    for (what, frame, reason) in &refused {
        dropped(&node, &router, "to1", what, frame, *reason);
    }
    let all: u64 = node.datapath.all_drops().iter().map(|(_, n)| n).sum();
    assert_eq!(all, refused.len() as u64, "nothing of the VLAN");

    let socket = inside(&node.pod, || UdpSocket::bind((pod, 53))).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    send(&router, "to1", &tagged(0x8100, 0, &from(2, "10.2.0.4")));
    let mut room = [0; 16];
    let (bytes, peer) = socket.recv_from(&mut room).expect("it reaches the pod");
    assert_eq!(
        (&room[..bytes], peer.ip()),
        (&b"hello"[..], [10, 2, 0, 4].into())
    );
    assert_eq!(node.datapath.traffic(TrafficPath::TunnelIn).packets, 1);
}
