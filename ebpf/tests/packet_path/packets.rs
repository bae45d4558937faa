//! Every program on single packets: what is dropped and why, what is passed, and what comes out.
//!
//! Frames with less than an IP header are sent for real, see `odd_frames`: the kernel refuses them here.

use aya::maps::RingBuf;
use clustermesh_ebpf_abi::{
    Address, CONFIG_FLOWS, DropReason, ENDPOINT_HOST, EndpointValue, FlowRecord, HOOK_FROM_NETWORK,
    IDENTITY_HOST, IDENTITY_REMOTE_NODE, InterfaceValue, NODE_DIRECT, NODE_PRESENT, NodeConfig,
    NodeValue, TUNNEL_PORT, TrafficPath, VERDICT_DROPPED, VERDICT_FORWARDED,
};

use crate::support::bpf::{Datapath, Outcome, addr};
use crate::support::packet::{
    FRAGMENT, ICMP, ICMPV6, OPTIONS, TCP, UDP, datagram, ethernet, fix_v4, framed, inner_frame, ip,
    packet, tcp, tunnelled, udp, verified, vxlan_with,
};

const PASS: i32 = 0;
const DROP: i32 = 2;
const REDIRECT: i32 = 7;

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

const POD: u32 = (1 << 16) | 5;
const REMOTE: u32 = (2 << 16) | 9;
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x41];
const END_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x42];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x43];
/// The device on which test packets come in.
const LOOPBACK: u32 = 1;
const MTU: u16 = 1400;

fn config() -> NodeConfig {
    NodeConfig {
        underlay_v4: addr("192.168.1.1"),
        underlay_v6: addr("fd00::1"),
        pod_cidr_v4: addr("10.1.0.0"),
        pod_cidr_v6: addr("fd10:0:0:1::"),
        pod_cidr_v4_bits: 120,
        pod_cidr_v6_bits: 64,
        identity_local_bits: 16,
        reserved: 0,
        cluster_id: 1,
        tunnel_port_be: TUNNEL_PORT.to_be_bytes(),
        host_ifindex: LOOPBACK,
        flags: 0,
        host_mac: HOST_MAC,
        reserved2: [0; 2],
    }
}

fn node(endpoint: &str, cluster_id: u16, flags: u16) -> NodeValue {
    NodeValue {
        endpoint: addr(endpoint),
        cluster_id,
        flags,
        path_mtu_bytes: MTU,
        reserved: 0,
        egress_ifindex: LOOPBACK,
        reserved2: 0,
        #[cfg(feature = "layout-next")]
        next_layout: 0,
    }
}

/// Node 1 of cluster 1, pod 10.1.0.4. Elsewhere: 10.2/16 behind IPv4, 10.3/16 behind IPv6 outside,
/// 10.4/16 withdrawn, 10.5/16 direct, 10.6/16 without a device; IPv6 in the same way below fd10:.
fn datapath() -> Datapath {
    let datapath = Datapath::load();
    datapath.set_config(&config());
    let pod = EndpointValue {
        ifindex: LOOPBACK,
        identity: POD,
        pod_mac: POD_MAC,
        host_mac: END_MAC,
        flags: 0,
    };
    let router = EndpointValue {
        flags: ENDPOINT_HOST,
        ..pod
    };
    for (address, value) in [
        ("10.1.0.4", pod),
        ("fd10:0:0:1::4", pod),
        ("10.1.0.1", router),
        ("fd10:0:0:1::1", router),
    ] {
        datapath.set_endpoint(addr(address), &value);
    }
    let interface = InterfaceValue {
        address_v4: addr("10.1.0.4"),
        address_v6: addr("fd10:0:0:1::4"),
        identity: POD,
        reserved: 0,
    };
    datapath.set_interface(LOOPBACK, &interface);
    let present = NODE_PRESENT;
    let nodes = [
        (2, node("192.168.2.1", 2, present)),
        (3, node("fd00::3", 2, present)),
        (4, node("192.168.4.1", 2, 0)),
        (5, node("192.168.5.1", 2, present | NODE_DIRECT)),
        (
            6,
            NodeValue {
                egress_ifindex: 0,
                ..node("192.168.6.1", 2, present)
            },
        ),
    ];
    for (index, value) in nodes {
        datapath.set_node(index, &value);
        datapath.set_ipcache(addr(&format!("10.{index}.0.0")), 112, REMOTE, index);
        datapath.set_ipcache(addr(&format!("fd10:0:0:{index}::")), 64, REMOTE, index);
    }
    datapath
}

/// A named packet for a program, and why it must be dropped.
struct Bad {
    what: &'static str,
    program: &'static str,
    frame: Vec<u8>,
    segment_bytes: u32,
    reason: DropReason,
}

fn bad(what: &'static str, program: &'static str, frame: Vec<u8>, reason: DropReason) -> Bad {
    Bad {
        what,
        program,
        frame,
        segment_bytes: 0,
        reason,
    }
}

fn edited(mut frame: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    frame
}

/// IPv6 destination options, `count` times, then UDP.
fn extended(source: &str, destination: &str, count: usize) -> Vec<u8> {
    let mut payload = Vec::new();
    for index in 0..count {
        let next = if index + 1 == count { UDP } else { OPTIONS };
        payload.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    }
    payload.extend(udp(1000, 53, b"hello"));
    packet(
        source,
        destination,
        if count == 0 { UDP } else { OPTIONS },
        &payload,
    )
}

const V4: &str = "10.1.0.4";
const V6: &str = "fd10:0:0:1::4";

fn bad_from_pods() -> Vec<Bad> {
    use DropReason::*;
    let good = || ethernet(&datagram(V4, "10.2.0.9"));
    let good_v6 = || ethernet(&datagram(V6, "fd10:0:0:2::9"));
    let large = ethernet(&packet("10.1.0.1", "10.2.0.9", UDP, &udp(1, 2, &[0; 1400])));
    vec![
        bad(
            "IPv4 header length 16",
            "from_pod",
            edited(good(), 14, &[0x44]),
            Malformed,
        ),
        bad(
            "IPv4 version 5",
            "from_pod",
            edited(good(), 14, &[0x55]),
            Malformed,
        ),
        bad(
            "IPv4 total length beyond the frame",
            "from_pod",
            edited(good(), 16, &[0x10, 0]),
            Malformed,
        ),
        bad(
            "IPv4 total length below the header",
            "from_pod",
            edited(good(), 16, &[0, 19]),
            Malformed,
        ),
        bad(
            "IPv6 payload length beyond the frame",
            "from_pod",
            edited(good_v6(), 18, &[0x10, 0]),
            Malformed,
        ),
        bad(
            "IPv6 with a mapped IPv4 source",
            "from_pod",
            ethernet(&datagram("::ffff:10.1.0.4", V6)),
            Malformed,
        ),
        bad(
            "IPv6 with a mapped IPv4 target",
            "from_pod",
            ethernet(&datagram(V6, "::ffff:10.2.0.9")),
            Malformed,
        ),
        bad(
            "IPv6 options cut short",
            "from_pod",
            ethernet(&packet(V6, V6, OPTIONS, &[17])),
            Malformed,
        ),
        bad(
            "802.1Q in the frame",
            "from_pod",
            framed(0x8100, &good()[12..]),
            VlanTagged,
        ),
        bad(
            "802.1ad in the frame",
            "from_host",
            framed(0x88a8, &good()[12..]),
            VlanTagged,
        ),
        bad(
            "an unknown EtherType",
            "from_pod",
            framed(0x88cc, &[0; 60]),
            UnknownEthertype,
        ),
        bad(
            "another IPv4 source",
            "from_pod",
            ethernet(&datagram("10.1.0.5", "10.2.0.9")),
            SourceNotOwn,
        ),
        bad(
            "no IPv4 source",
            "from_pod",
            ethernet(&datagram("0.0.0.0", "10.2.0.9")),
            SourceNotOwn,
        ),
        bad(
            "another IPv6 source",
            "from_pod",
            ethernet(&datagram("fd10:0:0:1::5", V6)),
            SourceNotOwn,
        ),
        bad(
            "a withdrawn node",
            "from_pod",
            ethernet(&datagram(V4, "10.4.0.9")),
            NodeWithdrawn,
        ),
        bad(
            "a withdrawn node, IPv6",
            "from_host",
            ethernet(&datagram(V6, "fd10:0:0:4::9")),
            NodeWithdrawn,
        ),
        bad(
            "a node without a device",
            "from_pod",
            ethernet(&datagram(V4, "10.6.0.9")),
            NoRoute,
        ),
        bad(
            "the host to an address of nobody",
            "from_host",
            ethernet(&datagram("10.1.0.1", "1.1.1.1")),
            NoRoute,
        ),
        bad(
            "the host's packet over the path's MTU",
            "from_host",
            large,
            TooBig,
        ),
        bad(
            "seven extension headers",
            "from_pod",
            ethernet(&extended(V6, "fd10:0:0:2::9", 7)),
            ExtensionHeaders,
        ),
        bad(
            "seven extension headers",
            "from_host",
            ethernet(&extended(V6, "fd10:0:0:2::9", 7)),
            ExtensionHeaders,
        ),
        Bad {
            what: "offload of an unknown kind",
            program: "from_pod",
            frame: good(),
            segment_bytes: 100,
            reason: EncapsulationFailed,
        },
        bad(
            "ICMP error for a pod that is gone",
            "from_pod",
            ethernet(&packet(V4, "10.1.0.77", ICMP, &[3; 36])),
            UnknownPod,
        ),
        bad(
            "ICMPv6 error for a pod that is gone",
            "from_pod",
            ethernet(&packet(V6, "fd10:0:0:1::77", ICMPV6, &[1; 48])),
            UnknownPod,
        ),
        bad(
            "RST for a pod that is gone",
            "from_pod",
            ethernet(&packet(V4, "10.1.0.77", TCP, &tcp(RST, b""))),
            UnknownPod,
        ),
    ]
}

fn bad_from_network() -> Vec<Bad> {
    use DropReason::*;
    let inner = datagram("10.2.0.9", V4);
    let inner_v6 = datagram("fd10:0:0:3::9", V6);
    let good = || tunnelled("192.168.2.1", "192.168.1.1", REMOTE, &inner);
    let good_v6 = || tunnelled("fd00::3", "fd00::1", REMOTE, &inner_v6);
    let with = |source: &str, target: &str| {
        tunnelled(
            "192.168.2.1",
            "192.168.1.1",
            REMOTE,
            &datagram(source, target),
        )
    };
    let mut options = good();
    options[14] = 0x46;
    options.splice(34..34, [1, 1, 1, 0]);
    let total = (options.len() - 14) as u16;
    let options = edited(options, 16, &total.to_be_bytes());
    let first_fragment = {
        let mut payload = vec![UDP, 0, 0, 1, 0, 0, 0, 9];
        payload.extend(&good_v6()[54..]);
        ethernet(&packet("fd00::3", "fd00::1", FRAGMENT, &payload))
    };
    let marked = |mut frame: Vec<u8>| {
        frame[15] |= 3;
        fix_v4(&mut frame[14..]);
        frame
    };
    let flags = |flags: u32| {
        let payload = vxlan_with(flags, REMOTE, &inner_frame(&inner));
        ethernet(&packet(
            "192.168.2.1",
            "192.168.1.1",
            UDP,
            &udp(50000, 8472, &payload),
        ))
    };
    let mut lldp = good();
    lldp[62..64].copy_from_slice(&[0x88, 0xcc]);
    let n = "from_network";
    vec![
        bad(
            "unknown outer source",
            n,
            tunnelled("192.168.9.1", "192.168.1.1", REMOTE, &inner),
            TunnelFromUnknownNode,
        ),
        bad(
            "unknown outer IPv6 source",
            n,
            tunnelled("fd00::9", "fd00::1", REMOTE, &inner_v6),
            TunnelFromUnknownNode,
        ),
        bad(
            "identity of the host",
            n,
            tunnelled("192.168.2.1", "192.168.1.1", IDENTITY_HOST, &inner),
            TunnelForgedIdentity,
        ),
        bad(
            "identity 0",
            n,
            tunnelled("192.168.2.1", "192.168.1.1", 0, &inner),
            TunnelForgedIdentity,
        ),
        bad(
            "identity of our cluster",
            n,
            tunnelled("192.168.2.1", "192.168.1.1", POD, &inner),
            TunnelForgedIdentity,
        ),
        bad(
            "identity of a third cluster",
            n,
            tunnelled("fd00::3", "fd00::1", 3 << 16, &inner_v6),
            TunnelForgedIdentity,
        ),
        bad(
            "identity of cluster 0",
            n,
            tunnelled("192.168.2.1", "192.168.1.1", 300, &inner),
            TunnelForgedIdentity,
        ),
        bad(
            "inner source of another node",
            n,
            with("10.3.0.9", V4),
            TunnelForgedSource,
        ),
        bad(
            "inner source of our own",
            n,
            with("10.1.0.4", V4),
            TunnelForgedSource,
        ),
        bad(
            "inner source of nobody",
            n,
            with("8.8.8.8", V4),
            TunnelForgedSource,
        ),
        bad(
            "inner IPv6 source of another node",
            n,
            tunnelled("fd00::3", "fd00::1", REMOTE, &datagram("fd10:0:0:2::9", V6)),
            TunnelForgedSource,
        ),
        bad(
            "inner target elsewhere",
            n,
            with("10.2.0.9", "10.3.0.1"),
            TunnelNotHere,
        ),
        bad(
            "inner IPv6 target elsewhere",
            n,
            tunnelled(
                "fd00::3",
                "fd00::1",
                REMOTE,
                &datagram("fd10:0:0:3::9", "fd10:0:0:2::9"),
            ),
            TunnelNotHere,
        ),
        bad("no valid VNI", n, flags(0), TunnelMalformed),
        bad(
            "another flag beside",
            n,
            flags(0x0c00_0000),
            TunnelMalformed,
        ),
        bad(
            "a reserved bit beside",
            n,
            flags(0x0800_0001),
            TunnelMalformed,
        ),
        bad(
            "reserved byte behind the VNI",
            n,
            edited(good(), 49, &[1]),
            TunnelMalformed,
        ),
        bad(
            "UDP length beyond the packet",
            n,
            edited(good(), 38, &[0xff, 0]),
            TunnelMalformed,
        ),
        bad(
            "UDP length too small for a tunnel",
            n,
            edited(good(), 38, &[0, 40]),
            TunnelMalformed,
        ),
        bad(
            "outer IP length beyond the frame",
            n,
            edited(good(), 16, &[0x0f, 0]),
            TunnelMalformed,
        ),
        bad(
            "cut inside the VXLAN header",
            n,
            good()[..46].to_vec(),
            TunnelMalformed,
        ),
        bad(
            "first fragment",
            n,
            edited(good(), 20, &[0x20, 0]),
            TunnelMalformed,
        ),
        bad("first IPv6 fragment", n, first_fragment, TunnelMalformed),
        bad("outer IP options", n, options, TunnelMalformed),
        bad(
            "congestion mark that the inside cannot have",
            n,
            marked(good()),
            TunnelMalformed,
        ),
        bad("inner EtherType unknown", n, lldp, UnknownEthertype),
        bad(
            "inner header malformed",
            n,
            edited(good(), 64, &[0x44]),
            Malformed,
        ),
        bad(
            "inner mapped source",
            n,
            tunnelled(
                "192.168.2.1",
                "192.168.1.1",
                REMOTE,
                &datagram("::ffff:10.2.0.9", V6),
            ),
            Malformed,
        ),
        bad(
            "inner extension headers",
            n,
            tunnelled(
                "fd00::3",
                "fd00::1",
                REMOTE,
                &extended("fd10:0:0:3::9", V6, 7),
            ),
            ExtensionHeaders,
        ),
        bad(
            "plain, from nobody",
            n,
            ethernet(&datagram("8.8.8.8", V4)),
            DirectForgedSource,
        ),
        bad(
            "plain, from a pod of ours",
            n,
            ethernet(&datagram(V4, V4)),
            DirectForgedSource,
        ),
        bad(
            "plain, from a node of the tunnel",
            n,
            ethernet(&datagram("10.2.0.9", V4)),
            DirectForgedSource,
        ),
        bad(
            "plain, IPv6 from nobody",
            n,
            ethernet(&datagram("2001:db8::1", V6)),
            DirectForgedSource,
        ),
        bad(
            "plain, later fragment for a pod that is gone",
            n,
            edited(ethernet(&datagram("10.5.0.9", "10.1.0.77")), 20, &[0, 9]),
            UnknownPod,
        ),
    ]
}

#[test]
fn bad_packets_are_dropped_and_counted_each_for_its_reason() {
    let datapath = datapath();
    let cases: Vec<Bad> = bad_from_pods()
        .into_iter()
        .chain(bad_from_network())
        .collect();
    for case in &cases {
        let before = datapath.drops(case.reason);
        let outcome = datapath.run_segments(case.program, &case.frame, case.segment_bytes);
        assert_eq!(outcome.verdict, DROP, "{} ({})", case.what, case.program);
        let now = datapath.all_drops();
        assert_eq!(
            datapath.drops(case.reason),
            before + 1,
            "{}: not {}, {now:?}",
            case.what,
            case.reason.name()
        );
    }
    // The two that need another configuration have tests of their own.
    let elsewhere = [DropReason::NotConfigured, DropReason::NoUnderlayFamily];
    for reason in DropReason::ALL {
        let covered = elsewhere.contains(&reason) || cases.iter().any(|case| case.reason == reason);
        assert!(covered, "no packet is dropped for {}", reason.name());
    }
}

#[test]
fn without_configuration_pods_get_nothing_and_the_underlay_stays_open() {
    let datapath = Datapath::load();
    for program in ["from_pod", "from_host"] {
        assert_eq!(
            datapath
                .run(program, &ethernet(&datagram(V4, "10.2.0.9")))
                .verdict,
            DROP
        );
    }
    let tunnel = tunnelled(
        "192.168.2.1",
        "192.168.1.1",
        REMOTE,
        &datagram("10.2.0.9", V4),
    );
    assert_eq!(datapath.run("from_network", &tunnel).verdict, PASS);
    assert_eq!(datapath.all_drops(), [("not-configured", 2)]);
}

#[test]
fn a_node_of_a_family_that_we_lack_cannot_be_reached() {
    let datapath = datapath();
    datapath.set_config(&NodeConfig {
        underlay_v6: [0; 16],
        ..config()
    });
    assert_eq!(
        datapath
            .run("from_pod", &ethernet(&datagram(V4, "10.3.0.9")))
            .verdict,
        DROP
    );
    datapath.set_config(&NodeConfig {
        underlay_v4: [0; 16],
        ..config()
    });
    assert_eq!(
        datapath
            .run("from_pod", &ethernet(&datagram(V6, "fd10:0:0:2::9")))
            .verdict,
        DROP
    );
    assert_eq!(datapath.all_drops(), [("no-underlay-family", 2)]);
}

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

fn forwarded(datapath: &Datapath, program: &str, frame: &[u8], path: TrafficPath) -> Outcome {
    let before = datapath.traffic(path);
    let outcome = datapath.run(program, frame);
    assert_eq!(
        outcome.verdict,
        REDIRECT,
        "{program}: {:?}",
        datapath.all_drops()
    );
    assert_eq!(
        datapath.traffic(path).packets,
        before.packets + 1,
        "{program} is counted as {}",
        path.name()
    );
    outcome
}

/// What a program must have put around `inner`.
fn assert_tunnelled(outer: &[u8], source: &str, target: &str, vni: u32, inner: &[u8]) {
    let (from, to, protocol, datagram) = verified(&outer[14..]);
    assert_eq!((from, to, protocol), (ip(source), ip(target), UDP));
    assert!(
        u16::from_be_bytes([datagram[0], datagram[1]]) >= 49152,
        "source port"
    );
    assert_eq!(datagram[2..4], TUNNEL_PORT.to_be_bytes());
    assert_eq!(
        usize::from(u16::from_be_bytes([datagram[4], datagram[5]])),
        datagram.len(),
        "UDP length"
    );
    assert_eq!(datagram[6..8], [0, 0], "UDP checksum");
    assert_eq!(
        datagram[8..],
        vxlan_with(0x0800_0000, vni, &inner_frame(inner))
    );
    if outer[14] >> 4 == 4 {
        assert_eq!(outer[12..14], [8, 0]);
        assert_eq!(outer[20..23], [0x40, 0, 64], "not to be fragmented, TTL");
    } else {
        assert_eq!(outer[12..14], [0x86, 0xdd]);
        assert_eq!(outer[21], 64, "hop limit");
    }
}

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

fn record(ring: &mut RingBuf<aya::maps::MapData>) -> Option<[u8; size_of::<FlowRecord>()]> {
    ring.next()
        .map(|item| item[..].try_into().expect("a record"))
}

#[test]
fn flow_records_say_who_sent_what_and_are_written_only_on_demand() {
    let mut datapath = datapath();
    let map = datapath.ebpf.take_map("FLOWS").expect("FLOWS");
    let mut ring = RingBuf::try_from(map).expect("a ring buffer");
    let frame = tunnelled(
        "192.168.2.1",
        "192.168.1.1",
        REMOTE,
        &datagram("10.2.0.9", V4),
    );
    datapath.run("from_network", &frame);
    assert!(record(&mut ring).is_none(), "nobody asked");

    datapath.set_config(&NodeConfig {
        flags: CONFIG_FLOWS,
        ..config()
    });
    datapath.run("from_network", &frame);
    let forged = tunnelled("192.168.2.1", "192.168.1.1", POD, &datagram("10.2.0.9", V4));
    datapath.run("from_network", &forged);
    for (identity, verdict, what) in [
        (REMOTE, VERDICT_FORWARDED, TrafficPath::TunnelIn as u32),
        (
            POD,
            VERDICT_DROPPED,
            DropReason::TunnelForgedIdentity as u32,
        ),
    ] {
        let bytes = record(&mut ring).expect("a record");
        let field = |at: usize| -> u32 {
            u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
        };
        let address =
            |at: usize| -> Address { bytes[at..at + 16].try_into().expect("sixteen bytes") };
        assert!(u64::from_ne_bytes(bytes[..8].try_into().expect("eight bytes")) > 0);
        assert_eq!((address(8), address(24)), (addr("10.2.0.9"), addr(V4)));
        assert_eq!((field(40), field(44), field(48)), (identity, what, 33));
        assert_eq!(
            bytes[52..59],
            [3, 232, 0, 53, UDP, HOOK_FROM_NETWORK, verdict]
        );
    }
}
