//! What is dropped, and why.

use clustermesh_ebpf_abi::{CONFIG_DIRECT, DropReason, IDENTITY_HOST, NodeConfig, TrafficPath};

use crate::support::bpf::Datapath;
use crate::support::packet::{
    FRAGMENT, ICMP, ICMPV6, OPTIONS, TCP, UDP, datagram, ethernet, fix_v4, framed, inner_frame,
    packet, tcp, tunnelled, udp, vxlan_with,
};

use super::fixture::*;

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
    // Those that need another configuration have tests of their own.
    let elsewhere = [
        DropReason::NotConfigured,
        DropReason::NoUnderlayFamily,
        DropReason::AwaitingKey,
        DropReason::ClearReceived,
        DropReason::ClearWouldLeave,
        DropReason::MeshUnknown,
        DropReason::NotForHere,
    ];
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
fn the_world_may_not_say_that_it_is_somebody_else() {
    let datapath = datapath();
    datapath.set_config(&NodeConfig {
        flags: CONFIG_DIRECT,
        ..config()
    });
    let sources = [
        ("127.0.0.1", V4),
        ("0.0.0.1", V4),
        ("224.0.0.1", V4),
        ("255.255.255.255", V4),
        ("192.168.1.1", V4),
        ("10.1.0.77", V4),
        ("10.2.0.9", V4),
        ("::1", V6),
        ("fe80::1", V6),
        ("ff02::1", V6),
        ("fd00::1", V6),
        ("fd10:0:0:1::77", V6),
    ];
    for (source, target) in sources {
        let frame = ethernet(&datagram(source, target));
        let verdict = datapath.run("from_network", &frame).verdict;
        assert_eq!(verdict, DROP, "{source}");
    }
    let expected = ("direct-forged-source", sources.len() as u64);
    assert_eq!(datapath.all_drops(), [expected]);
    for (source, target) in [("8.8.8.8", V4), ("2001:db8::1", V6)] {
        let frame = ethernet(&datagram(source, target));
        forwarded(&datapath, "from_network", &frame, TrafficPath::DirectIn);
    }
}
