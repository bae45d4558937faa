//! Traffic of the host itself, packets that are too big, and pods that are gone.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use clustermesh_ebpf_abi::{CONFIG_DIRECT, DropReason, TrafficPath};

use crate::support::net::{check, inside, ip, run};
use crate::support::node::{Node, POD_MTU, in_cidr};
use crate::support::tcp::transfer;
use crate::tunnel::pair;

const TRANSFER_BYTES: usize = 1 << 20;
/// Far more than an answer takes, far less than a lost SYN.
const PROMPTLY: Duration = Duration::from_millis(500);

fn ping(namespace: &str, target: std::net::IpAddr) {
    check(
        namespace,
        "ping",
        &["-c2", "-i0.05", "-W1", &target.to_string()],
    );
}

#[test]
fn host_and_pods_reach_each_other_here_and_there() {
    let (_namespaces, a, b) = pair(false, false);
    for v6 in [false, true] {
        ping(&a.host, in_cidr(1, 4, v6));
        ping(&a.pod, in_cidr(1, 1, v6));
        ping(&a.host, in_cidr(2, 4, v6));
        ping(&a.pod, in_cidr(2, 1, v6));
        ping(&a.host, in_cidr(2, 1, v6));
        transfer(&a.host, &b.pod, in_cidr(2, 4, v6), TRANSFER_BYTES)
            .expect("host to a pod of the other node");
        transfer(&a.pod, &a.host, in_cidr(1, 1, v6), TRANSFER_BYTES).expect("pod to its host");
        transfer(&a.pod, &b.host, in_cidr(2, 1, v6), TRANSFER_BYTES)
            .expect("pod to the other host");
    }
    assert!(a.datapath.traffic(TrafficPath::ToHost).packets > 0);
    assert_eq!(
        (a.datapath.all_drops(), b.datapath.all_drops()),
        (vec![], vec![])
    );
}

#[test]
fn a_pod_reaches_the_world_through_the_hosts_stack() {
    let (_namespaces, a, _b) = pair(false, false);
    let router = a.host.replace("node1", "router");
    ip(&format!(
        "-n {router} route add 10.1.0.0/24 via 192.168.1.1"
    ));
    ip(&format!("-n {router} addr add 203.0.113.1/32 dev lo"));
    // What comes back has a pod's address and is no tunnel packet: as on a node that masquerades, it is
    // the host's address that the world sees.
    check(
        &a.host,
        "iptables",
        &[
            "-t",
            "nat",
            "-A",
            "POSTROUTING",
            "-o",
            "eth0",
            "-s",
            "10.1.0.0/24",
            "-j",
            "MASQUERADE",
        ],
    );
    ping(&a.pod, "203.0.113.1".parse().expect("an address"));
    transfer(
        &a.pod,
        &router,
        "203.0.113.1".parse().expect("an address"),
        TRANSFER_BYTES,
    )
    .expect("to the world");
}

#[test]
fn where_pods_are_routed_they_and_the_world_reach_each_other_without_translation() {
    let (_namespaces, a, _b) = pair(false, true);
    let router = a.host.replace("node1", "router");
    let world = "203.0.113.1";
    ip(&format!(
        "-n {router} route add 10.1.0.0/24 via 192.168.1.1"
    ));
    ip(&format!("-n {router} addr add {world}/32 dev lo"));
    let pinged = || run(&a.pod, "ping", &["-c1", "-W1", world]).status.success();
    // With a tunnel pods are not routed: nothing comes in for them that way.
    assert!(!pinged());
    assert_eq!(a.datapath.drops(DropReason::DirectForgedSource), 1);
    a.configure(CONFIG_DIRECT);
    assert!(pinged());
    let world = world.parse().expect("an address");
    transfer(&a.pod, &router, world, TRANSFER_BYTES).expect("to the world");
    transfer(&router, &a.pod, in_cidr(1, 4, false), TRANSFER_BYTES).expect("from the world");
    assert_eq!(a.datapath.drops(DropReason::DirectForgedSource), 1);
}

#[test]
fn a_pod_is_told_when_its_packets_are_too_big_for_the_path() {
    let (_namespaces, a, _b) = pair(false, false);
    ip(&format!("-n {} link set eth0 mtu 1500", a.pod));
    for (v6, bytes) in [(false, POD_MTU), (true, POD_MTU - 20)] {
        let target = in_cidr(2, 4, v6).to_string();
        let output = run(
            &a.pod,
            "ping",
            &[
                "-c2",
                "-i0.2",
                "-W1",
                "-M",
                "do",
                "-s",
                &bytes.to_string(),
                &target,
            ],
        );
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(text.contains("mtu"), "{target}: {text}");
        assert!(text.contains(&POD_MTU.to_string()), "{target}: {text}");
    }
}

fn refused_at_once(from: &str, target: SocketAddr, nodes: [&Node; 2]) {
    let started = std::time::Instant::now();
    let error = inside(from, || {
        TcpStream::connect_timeout(&target, Duration::from_secs(3))
    })
    .expect_err("nobody listens there");
    assert_eq!(
        error.kind(),
        ErrorKind::ConnectionRefused,
        "{from} to {target}: {error}, drops {:?}",
        nodes.map(|n| n.datapath.all_drops())
    );
    assert!(
        started.elapsed() < PROMPTLY,
        "{target} took {:?}",
        started.elapsed()
    );
}

fn datagram_refused_at_once(from: &str, target: SocketAddr, nodes: [&Node; 2]) {
    inside(from, || {
        let any = if target.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = UdpSocket::bind(any).expect("bind");
        socket.connect(target).expect("connect");
        socket.set_read_timeout(Some(PROMPTLY)).expect("timeout");
        socket.send(b"anybody?").expect("send");
        let error = socket.recv(&mut [0; 16]).expect_err("nobody answers");
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "{from} to {target}: {error}, drops {:?}",
            nodes.map(|n| n.datapath.all_drops())
        );
    });
}

#[test]
fn clients_of_a_pod_that_is_gone_learn_it_at_once() {
    let (_namespaces, a, b) = pair(false, false);
    for v6 in [false, true] {
        let gone = |n: u8| SocketAddr::new(in_cidr(n, 99, v6), 80);
        for (from, target) in [
            (&a.pod, gone(1)),
            (&a.host, gone(1)),
            (&a.pod, gone(2)),
            (&a.host, gone(2)),
        ] {
            refused_at_once(from, target, [&a, &b]);
            datagram_refused_at_once(from, target, [&a, &b]);
        }
    }
    assert_eq!(a.datapath.drops(DropReason::UnknownPod), 8);
    assert_eq!(b.datapath.drops(DropReason::UnknownPod), 8);
}

#[test]
fn rst_reaches_the_client_also_without_checksum_offload() {
    let (_namespaces, a, b) = pair(false, false);
    for (namespace, link) in [
        (&a.pod, "eth0"),
        (&a.host, "eth0"),
        (&b.host, "eth0"),
        (&b.pod, "eth0"),
    ] {
        check(
            namespace,
            "ethtool",
            &["-K", link, "tx", "off", "rx", "off"],
        );
    }
    for v6 in [false, true] {
        refused_at_once(&a.pod, SocketAddr::new(in_cidr(2, 99, v6), 80), [&a, &b]);
        datagram_refused_at_once(&a.pod, SocketAddr::new(in_cidr(2, 99, v6), 80), [&a, &b]);
        transfer(&a.pod, &b.pod, in_cidr(2, 4, v6), TRANSFER_BYTES).expect("TCP without offloads");
    }
}

#[test]
fn a_withdrawn_node_is_not_sent_to() {
    let (_namespaces, a, _b) = pair(false, false);
    a.datapath.set_node(2, &withdrawn());
    assert!(a.ping(in_cidr(2, 4, false), 56).is_err());
    assert!(a.datapath.drops(DropReason::NodeWithdrawn) >= 3);
}

fn withdrawn() -> clustermesh_ebpf_abi::NodeValue {
    clustermesh_ebpf_abi::NodeValue {
        endpoint: crate::support::bpf::mapped(crate::support::node::underlay(2, false)),
        cluster_id: 2,
        flags: 0,
        path_mtu_bytes: 0,
        reserved: 0,
        egress_ifindex: 1,
        reserved2: 0,
        #[cfg(feature = "layout-next")]
        next_layout: 0,
    }
}
