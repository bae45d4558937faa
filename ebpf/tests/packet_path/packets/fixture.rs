//! The node on which single packets are tried, and what the tests of them share.

use clustermesh_ebpf_abi::{
    ENDPOINT_HOST, EndpointValue, InterfaceValue, NODE_DIRECT, NODE_PRESENT, NodeConfig, NodeValue,
    TUNNEL_PORT, TrafficPath,
};

use crate::support::bpf::{Datapath, Outcome, addr};
use crate::support::packet::{OPTIONS, UDP, inner_frame, ip, packet, udp, verified, vxlan_with};

pub const PASS: i32 = 0;
pub const DROP: i32 = 2;
pub const REDIRECT: i32 = 7;

pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

pub const POD: u32 = (1 << 16) | 5;
pub const REMOTE: u32 = (2 << 16) | 9;
pub const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x41];
pub const END_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x42];
pub const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x43];
/// The device on which test packets come in.
pub const LOOPBACK: u32 = 1;
pub const MTU: u16 = 1400;

pub fn config() -> NodeConfig {
    NodeConfig {
        underlay_v4: addr("192.168.1.1"),
        underlay_v6: addr("fd00::1"),
        pod_cidr_v4: addr("10.1.0.0"),
        pod_cidr_v6: addr("fd10:0:0:1::"),
        pod_cidr_v4_bits: 120,
        pod_cidr_v6_bits: 64,
        identity_local_bits: 16,
        cluster_id: 1,
        tunnel_port_be: TUNNEL_PORT.to_be_bytes(),
        host_ifindex: LOOPBACK,
        flags: 0,
        host_mac: HOST_MAC,
        ..NodeConfig::EMPTY
    }
}

pub fn node(endpoint: &str, cluster_id: u16, flags: u16) -> NodeValue {
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
pub fn datapath() -> Datapath {
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

pub const V4: &str = "10.1.0.4";
pub const V6: &str = "fd10:0:0:1::4";

pub fn edited(mut frame: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    frame[offset..offset + bytes.len()].copy_from_slice(bytes);
    frame
}

/// IPv6 destination options, `count` times, then UDP.
pub fn extended(source: &str, destination: &str, count: usize) -> Vec<u8> {
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

pub fn forwarded(datapath: &Datapath, program: &str, frame: &[u8], path: TrafficPath) -> Outcome {
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
pub fn assert_tunnelled(outer: &[u8], source: &str, target: &str, vni: u32, inner: &[u8]) {
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
