//! What is forwarded, and what it looks like then.

use clustermesh_ebpf_abi::{IDENTITY_REMOTE_NODE, TrafficPath};

use crate::support::packet::{
    FRAGMENT, ICMP, ICMPV6, TCP, UDP, datagram, ethernet, fix_v4, packet, tcp, tunnelled, udp,
    verified,
};

use super::fixture::*;

#[test]
fn packets_of_pods_and_host_are_put_into_the_tunnel() {
    let datapath = datapath();
    for (inner, source, target) in [
        (datagram(V4, "10.2.0.9"), "192.168.1.1", "192.168.2.1"),
        (datagram(V4, "10.3.0.9"), "fd00::1", "fd00::3"),
        (datagram(V6, "fd10:0:0:2::9"), "192.168.1.1", "192.168.2.1"),
        (datagram(V6, "fd10:0:0:3::9"), "fd00::1", "fd00::3"),
    ] {
        for program in ["from_pod", "from_host"] {
            let out = forwarded(
                &datapath,
                program,
                &ethernet(&inner),
                TrafficPath::TunnelOut,
            );
            assert_tunnelled(&out.packet, source, target, POD, &inner);
        }
    }
    let from_router = datagram("10.1.0.1", "10.2.0.9");
    let out = forwarded(
        &datapath,
        "from_host",
        &ethernet(&from_router),
        TrafficPath::TunnelOut,
    );
    assert_tunnelled(
        &out.packet,
        "192.168.1.1",
        "192.168.2.1",
        IDENTITY_REMOTE_NODE,
        &from_router,
    );
}

#[test]
fn odd_but_valid_packets_are_forwarded_by_their_addresses() {
    let datapath = datapath();
    let mut fragment = datagram(V4, "10.2.0.9");
    fragment[6..8].copy_from_slice(&[0x20, 9]);
    fix_v4(&mut fragment);
    let mut options = datagram(V4, "10.2.0.9");
    options[0] = 0x46;
    options.splice(20..20, [1, 1, 1, 0]);
    let total = (options.len() as u16).to_be_bytes();
    options[2..4].copy_from_slice(&total);
    fix_v4(&mut options);
    let icmp_error = packet(
        V4,
        "10.2.0.9",
        ICMP,
        &[&[3, 1, 0, 0, 0, 0, 0, 0], &datagram("10.2.0.9", V4)[..]].concat(),
    );
    let v6 = "fd10:0:0:2::9";
    let v6_fragment = packet(V6, v6, FRAGMENT, &[UDP, 0, 0, 9, 0, 0, 0, 1, 0xde, 0xad]);
    let v6_error = packet(
        V6,
        v6,
        ICMPV6,
        &[&[1, 3, 0, 0, 0, 0, 0, 0], &datagram(v6, V6)[..]].concat(),
    );
    for inner in [
        fragment,
        options,
        icmp_error,
        v6_fragment,
        v6_error,
        extended(V6, v6, 1),
        extended(V6, v6, 6),
    ] {
        let out = forwarded(
            &datapath,
            "from_pod",
            &ethernet(&inner),
            TrafficPath::TunnelOut,
        );
        assert_eq!(out.packet[64..], inner);
    }
    let v6_fragment = packet(
        "fd10:0:0:3::9",
        V6,
        FRAGMENT,
        &[UDP, 0, 0, 9, 0, 0, 0, 1, 0xde, 0xad],
    );
    let frame = tunnelled("fd00::3", "fd00::1", REMOTE, &v6_fragment);
    assert_eq!(
        forwarded(&datapath, "from_network", &frame, TrafficPath::TunnelIn).packet[14..],
        v6_fragment
    );
}

#[test]
fn an_offloaded_packet_may_have_datagrams_as_large_as_the_path_takes() {
    let datapath = datapath();
    for (source, target, headers) in [(V4, "10.2.0.9", 28), (V6, "fd10:0:0:2::9", 48)] {
        let full = usize::from(MTU) - headers;
        let frame = ethernet(&packet(
            source,
            target,
            UDP,
            &udp(1000, 443, &vec![7; 2 * full]),
        ));
        // The kernel does not encapsulate offloaded packets of a test run: what counts is where they do not go.
        for (segment_bytes, too_big) in [(full, 0), (full + 1, 1)] {
            let before = datapath.traffic(TrafficPath::ToHost).packets;
            let segment_bytes = u32::try_from(segment_bytes).unwrap();
            datapath.run_segments("from_pod", &frame, segment_bytes);
            let now = datapath.traffic(TrafficPath::ToHost).packets;
            assert_eq!(now, before + too_big, "{target} {segment_bytes}");
        }
    }
}

#[test]
fn padding_behind_a_short_packet_is_not_taken_for_payload() {
    let datapath = datapath();
    let inner = packet(V4, "10.2.0.9", TCP, &tcp(SYN, b""));
    let mut padded = ethernet(&inner);
    padded.resize(60, 0);
    let out = forwarded(&datapath, "from_pod", &padded, TrafficPath::TunnelOut);
    let total = 14 + 50 + inner.len();
    assert_tunnelled(
        &out.packet[..total],
        "192.168.1.1",
        "192.168.2.1",
        POD,
        &inner,
    );
}

#[test]
fn tunnel_packets_are_unpacked_for_pods_and_host() {
    let datapath = datapath();
    for (outer_source, outer_target, source, target) in [
        ("192.168.2.1", "192.168.1.1", "10.2.0.9", V4),
        ("192.168.2.1", "192.168.1.1", "fd10:0:0:2::9", V6),
        ("fd00::3", "fd00::1", "10.3.0.9", V4),
        ("fd00::3", "fd00::1", "fd10:0:0:3::9", V6),
    ] {
        for identity in [REMOTE, IDENTITY_REMOTE_NODE] {
            let inner = datagram(source, target);
            let frame = tunnelled(outer_source, outer_target, identity, &inner);
            let out = forwarded(&datapath, "from_network", &frame, TrafficPath::TunnelIn);
            let expected = [&POD_MAC[..], &END_MAC[..], &ethernet(&inner)[12..]].concat();
            assert_eq!(out.packet, expected);
        }
    }
    for target in ["10.1.0.1", "192.168.1.1"] {
        let inner = datagram("10.2.0.9", target);
        let frame = tunnelled("192.168.2.1", "192.168.1.1", REMOTE, &inner);
        let out = forwarded(&datapath, "from_network", &frame, TrafficPath::ToHost);
        assert_eq!(out.packet[..6], HOST_MAC);
        assert_eq!(out.packet[14..], inner);
    }
}

#[test]
fn a_tunnel_packet_is_taken_with_and_without_an_outer_checksum() {
    let datapath = datapath();
    for (source, target, inner_source, ip_bytes) in [
        ("192.168.2.1", "192.168.1.1", "10.2.0.9", 20),
        ("fd00::3", "fd00::1", "10.3.0.9", 40),
    ] {
        let inner = datagram(inner_source, V4);
        let without = tunnelled(source, target, REMOTE, &inner);
        let checksum_at = 14 + ip_bytes + 6;
        let with = edited(without.clone(), checksum_at, &[0x12, 0x34]);
        for frame in [without, with] {
            let out = forwarded(&datapath, "from_network", &frame, TrafficPath::TunnelIn);
            assert_eq!(out.packet[14..], inner[..]);
        }
    }
}

#[test]
fn a_congestion_mark_travels_through_the_tunnel() {
    let datapath = datapath();
    let mut inner = datagram(V4, "10.2.0.9");
    inner[1] = 2;
    fix_v4(&mut inner);
    let out = forwarded(
        &datapath,
        "from_pod",
        &ethernet(&inner),
        TrafficPath::TunnelOut,
    );
    assert_eq!(out.packet[15], 2, "capability is shown outside");

    let mut inner = datagram("10.2.0.9", V4);
    inner[1] = 2;
    fix_v4(&mut inner);
    let mut frame = tunnelled("192.168.2.1", "192.168.1.1", REMOTE, &inner);
    frame[15] = 3;
    fix_v4(&mut frame[14..]);
    let out = forwarded(&datapath, "from_network", &frame, TrafficPath::TunnelIn);
    assert_eq!(out.packet[15] & 3, 3, "the mark reaches the inside");
    verified(&out.packet[14..]);

    let mut inner_v6 = datagram("fd10:0:0:3::9", V6);
    inner_v6[1] |= 0x20;
    let mut frame = tunnelled("fd00::3", "fd00::1", REMOTE, &inner_v6);
    frame[15] |= 0x30;
    let out = forwarded(&datapath, "from_network", &frame, TrafficPath::TunnelIn);
    assert_eq!(out.packet[15] & 0x30, 0x30);
}

#[test]
fn pods_of_one_node_and_the_world_are_reached() {
    let datapath = datapath();
    for (source, target) in [(V4, V4), (V6, V6)] {
        let inner = datagram(source, target);
        let out = forwarded(&datapath, "from_pod", &ethernet(&inner), TrafficPath::Local);
        assert_eq!(
            out.packet,
            [&POD_MAC[..], &END_MAC[..], &ethernet(&inner)[12..]].concat()
        );
    }
    for (source, target) in [
        (V4, "10.1.0.1"),
        (V4, "1.1.1.1"),
        (V6, "fd10:0:0:1::1"),
        (V6, "2001:db8::1"),
    ] {
        let out = forwarded(
            &datapath,
            "from_pod",
            &ethernet(&datagram(source, target)),
            TrafficPath::ToHost,
        );
        assert_eq!(out.packet[..6], HOST_MAC);
    }
}

#[test]
fn a_pods_packet_over_the_paths_mtu_goes_to_the_kernel_which_answers() {
    let datapath = datapath();
    let frame = ethernet(&packet(V4, "10.2.0.9", UDP, &udp(1, 2, &[0; 1400])));
    forwarded(&datapath, "from_pod", &frame, TrafficPath::ToHost);
    // Node 5 takes IPv4 as it is and IPv6 through the tunnel, whose headers must fit too.
    let target = "fd10:0:0:5::9";
    let sized = |bytes: usize| {
        let payload = vec![0; bytes - 48];
        ethernet(&packet(V6, target, UDP, &udp(1, 2, &payload)))
    };
    let most = usize::from(MTU) - 50;
    forwarded(&datapath, "from_pod", &sized(most), TrafficPath::TunnelOut);
    forwarded(&datapath, "from_pod", &sized(most + 1), TrafficPath::ToHost);
}

#[test]
fn direct_routed_packets_are_taken_from_the_nodes_that_agreed() {
    let datapath = datapath();
    for (source, target) in [("10.5.0.9", V4), ("fd10:0:0:5::9", V6)] {
        let inner = datagram(source, target);
        let out = forwarded(
            &datapath,
            "from_network",
            &ethernet(&inner),
            TrafficPath::DirectIn,
        );
        assert_eq!(
            out.packet,
            [&POD_MAC[..], &END_MAC[..], &ethernet(&inner)[12..]].concat()
        );
    }
    forwarded(
        &datapath,
        "from_network",
        &ethernet(&datagram("10.5.0.9", "10.1.0.1")),
        TrafficPath::ToHost,
    );
}
