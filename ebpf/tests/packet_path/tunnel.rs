//! Real traffic between two nodes in namespaces, with a router between them.

use clustermesh_ebpf_abi::TrafficPath;

use crate::support::net::{Namespaces, ip};
use crate::support::node::{Node, in_cidr, router};
use crate::support::tcp::transfer;

/// Enough for offloaded packets and a grown window.
const TRANSFER_BYTES: usize = 8 << 20;

/// Two nodes that know each other.
pub fn pair(v6_outside: bool, direct: bool) -> (Namespaces, Node, Node) {
    let mut namespaces = Namespaces::new();
    let router = router(&mut namespaces);
    let a = Node::new(&mut namespaces, &router, 1);
    let b = Node::new(&mut namespaces, &router, 2);
    a.learn(2, v6_outside, direct);
    b.learn(1, v6_outside, direct);
    (namespaces, a, b)
}

fn pods_talk(a: &Node, b: &Node) {
    for v6 in [false, true] {
        let target = in_cidr(b.number, 4, v6);
        for size in [56, 1380] {
            a.ping(target, size).unwrap_or_else(|error| {
                panic!(
                    "ping {target}: {error}\nfar end drops {:?}",
                    b.datapath.all_drops()
                )
            });
        }
        transfer(&a.pod, &b.pod, target, TRANSFER_BYTES).unwrap_or_else(|error| {
            panic!(
                "TCP to {target}: {error}; {:?} {:?}",
                a.datapath.all_drops(),
                b.datapath.all_drops()
            )
        });
    }
}

#[test]
fn pods_talk_through_a_tunnel_with_ipv4_outside() {
    let (_namespaces, a, b) = pair(false, false);
    pods_talk(&a, &b);
    pods_talk(&b, &a);
    assert!(a.datapath.traffic(TrafficPath::TunnelOut).packets > 0);
    assert!(a.datapath.traffic(TrafficPath::TunnelIn).packets > 0);
    assert_eq!(a.datapath.all_drops(), []);
}

#[test]
fn pods_talk_through_a_tunnel_with_ipv6_outside() {
    let (_namespaces, a, b) = pair(true, false);
    pods_talk(&a, &b);
    assert!(a.datapath.traffic(TrafficPath::TunnelOut).packets > 0);
}

/// The router must know where pods live; with a tunnel it does not.
fn route_pods(a: &Node) {
    let router = a.host.replace("node1", "router");
    for n in [1, 2] {
        ip(&format!(
            "-n {router} route add 10.{n}.0.0/24 via 192.168.{n}.1"
        ));
        ip(&format!(
            "-n {router} -6 route add {}/64 via fd00:0:0:{n}::1",
            in_cidr(n, 0, true)
        ));
    }
}

#[test]
fn pods_talk_by_direct_routing_with_an_ipv6_underlay() {
    let (_namespaces, a, b) = pair(true, true);
    route_pods(&a);
    pods_talk(&a, &b);
    assert!(a.datapath.traffic(TrafficPath::DirectOut).packets > 0);
    assert!(a.datapath.traffic(TrafficPath::DirectIn).packets > 0);
    assert_eq!(a.datapath.traffic(TrafficPath::TunnelOut).packets, 0);
    assert_eq!(b.datapath.all_drops(), []);
}

#[test]
fn direct_routing_with_an_ipv4_underlay_leaves_ipv6_to_the_tunnel() {
    let (_namespaces, a, b) = pair(false, true);
    route_pods(&a);
    pods_talk(&a, &b);
    assert!(a.datapath.traffic(TrafficPath::DirectOut).packets > 0);
    assert!(a.datapath.traffic(TrafficPath::TunnelOut).packets > 0);
    assert_eq!(b.datapath.all_drops(), []);
}
