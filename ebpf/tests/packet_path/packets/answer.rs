//! Answers for pods that are gone.

use clustermesh_ebpf_abi::{DropReason, IDENTITY_REMOTE_NODE};

use crate::support::bpf::Datapath;
use crate::support::packet::{
    ICMP, ICMPV6, TCP, datagram, ethernet, ip, packet, tcp, tunnelled, verified,
};

use super::fixture::*;

/// The answer that leaves towards a pod of this node.
fn answered(datapath: &Datapath, frame: &[u8]) -> Vec<u8> {
    let before = datapath.drops(DropReason::UnknownPod);
    let outcome = datapath.run(
        "from_pod",
        &edited(frame.to_vec(), 0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    );
    assert_eq!(outcome.verdict, REDIRECT, "{:?}", datapath.all_drops());
    assert_eq!(datapath.drops(DropReason::UnknownPod), before + 1);
    assert_eq!(
        outcome.packet[..12],
        [7, 8, 9, 10, 11, 12, 1, 2, 3, 4, 5, 6],
        "link addresses changed over"
    );
    outcome.packet
}

#[test]
fn tcp_to_a_pod_that_is_gone_is_answered_with_rst() {
    let datapath = datapath();
    for (source, target) in [(V4, "10.1.0.77"), (V6, "fd10:0:0:1::77")] {
        // (flags, payload) to (sequence, acknowledged, flags), RFC 9293, 3.10.7.1.
        for (flags, payload, sequence, acknowledged, answer_flags) in [
            (SYN, &b""[..], 0_u32, 101_u32, RST | ACK),
            (0, b"12345", 0, 105, RST | ACK),
            (ACK, b"data", 200, 0, RST),
        ] {
            let frame = ethernet(&packet(source, target, TCP, &tcp(flags, payload)));
            let out = answered(&datapath, &frame);
            let (from, to, protocol, segment) = verified(&out[14..]);
            assert_eq!((from, to, protocol), (ip(target), ip(source), TCP));
            assert_eq!(segment[..4], [0, 80, 3, 232], "ports changed over");
            assert_eq!(segment[4..8], sequence.to_be_bytes());
            assert_eq!(segment[8..12], acknowledged.to_be_bytes());
            assert_eq!((segment.len(), segment[13]), (20, answer_flags));
        }
    }
}

#[test]
fn the_rest_to_a_pod_that_is_gone_is_answered_with_icmp() {
    let datapath = datapath();
    for (source, target, protocol, code) in [
        (V4, "10.1.0.77", ICMP, [3, 3]),
        (V6, "fd10:0:0:1::77", ICMPV6, [1, 4]),
    ] {
        let refused = datagram(source, target);
        let out = answered(&datapath, &ethernet(&refused));
        let (from, to, kind, message) = verified(&out[14..]);
        assert_eq!((from, to, kind), (ip(target), ip(source), protocol));
        assert_eq!(message[..2], code);
        assert_eq!(
            message[8..],
            refused[..message.len() - 8],
            "the refused packet is quoted"
        );
    }
    let echo = packet(V4, "10.1.0.77", ICMP, &[8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4]);
    assert_eq!(answered(&datapath, &ethernet(&echo))[34..36], [3, 1]);
}

#[test]
fn answers_go_back_through_the_tunnel_and_to_the_host() {
    let datapath = datapath();
    for (outer_source, outer_target, source, target) in [
        ("192.168.2.1", "192.168.1.1", "10.2.0.9", "10.1.0.77"),
        ("fd00::3", "fd00::1", "fd10:0:0:3::9", "fd10:0:0:1::77"),
        (
            "192.168.2.1",
            "192.168.1.1",
            "fd10:0:0:2::9",
            "fd10:0:0:1::77",
        ),
    ] {
        for payload in [
            packet(source, target, TCP, &tcp(SYN, b"")),
            datagram(source, target),
        ] {
            let out = datapath.run(
                "from_network",
                &tunnelled(outer_source, outer_target, REMOTE, &payload),
            );
            assert_eq!(out.verdict, REDIRECT, "{:?}", datapath.all_drops());
            let headers = if outer_source.contains('.') { 64 } else { 84 };
            let inner = &out.packet[headers..];
            assert_eq!(verified(inner).1, ip(source));
            assert_tunnelled(
                &out.packet,
                outer_target,
                outer_source,
                IDENTITY_REMOTE_NODE,
                inner,
            );
        }
    }
    let frame = ethernet(&packet("10.1.0.1", "10.1.0.77", TCP, &tcp(SYN, b"")));
    let out = datapath.run("from_host", &frame);
    assert_eq!(out.verdict, REDIRECT);
    assert_eq!(out.packet[..6], HOST_MAC);
    assert_eq!(verified(&out.packet[14..]).1, ip("10.1.0.1"));
}
