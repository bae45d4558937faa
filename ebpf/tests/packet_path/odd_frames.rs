//! Frames that no stack would send, sent by a pod.

use clustermesh_ebpf_abi::DropReason;

use crate::support::net::Namespaces;
use crate::support::node::{Node, router};
use crate::support::packet::{datagram, ethernet, framed};
use crate::support::raw::send;

#[test]
fn odd_frames_of_a_pod_are_dropped_and_counted() {
    let mut namespaces = Namespaces::new();
    let router = router(&mut namespaces);
    let node = Node::new(&mut namespaces, &router, 1);
    let v4 = ethernet(&datagram("10.1.0.4", "10.1.0.1"));
    let v6 = ethernet(&datagram("fd10:0:0:1::4", "fd10:0:0:1::1"));
    let tagged = [&[0, 5][..], &v4[12..]].concat();
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
            framed(0x8100, &tagged),
            DropReason::VlanTagged,
        ),
        (
            "another pod's source",
            ethernet(&datagram("10.1.0.5", "10.1.0.1")),
            DropReason::SourceNotOwn,
        ),
    ] {
        let before = node.datapath.drops(reason);
        // The receiving side runs before a send over veth returns to its sender, or right after on
        // this CPU; the counter is read until it shows.
        send(&node.pod, "eth0", &frame);
        let seen = (0..1000).any(|_| {
            std::thread::yield_now();
            node.datapath.drops(reason) == before + 1
        });
        assert!(seen, "{what}: {:?}", node.datapath.all_drops());
    }
}
