//! The far end is the kernel's own VXLAN device: what we send is ordinary VXLAN.

use clustermesh_ebpf_abi::{TUNNEL_MAC_DESTINATION, TrafficPath};

use crate::support::net::{Namespaces, check, ip, sysctl};
use crate::support::node::{self, Node, POD_MTU, in_cidr, pod_identity, router};
use crate::support::tcp::transfer;

const TRANSFER_BYTES: usize = 16 << 20;

/// Node 2 without any program of ours: a routed pod and a VXLAN device whose id is the identity of both pods.
fn kernel_node(
    namespaces: &mut Namespaces,
    router: &str,
    identity: u32,
    v6_outside: bool,
) -> String {
    let host = node::host(namespaces, router, 2);
    sysctl(&host, "net/ipv4/ip_forward", "1");
    sysctl(&host, "net/ipv6/conf/all/forwarding", "1");
    let pod = node::pod(namespaces, &host, 2, POD_MTU);
    let (local, remote) = (node::underlay(2, v6_outside), node::underlay(1, v6_outside));
    let checksums = if v6_outside {
        "udp6zerocsumrx udp6zerocsumtx"
    } else {
        ""
    };
    ip(&format!(
        "-n {host} link add vx0 type vxlan id {identity} local {local} remote {remote} dstport 8472 dev eth0 {checksums}"
    ));
    let mac = TUNNEL_MAC_DESTINATION.map(|b| format!("{b:02x}")).join(":");
    ip(&format!(
        "-n {host} link set vx0 address {mac} mtu {POD_MTU} arp off"
    ));
    ip(&format!("-n {host} link set vx0 up"));
    for v6 in [false, true] {
        let bits = if v6 { 64 } else { 24 };
        let router = in_cidr(2, 1, v6);
        ip(&format!(
            "-n {host} addr add {router}/{} dev pod0",
            if v6 { "128 nodad" } else { "32" }
                .split(' ')
                .next()
                .unwrap_or("")
        ));
        ip(&format!(
            "-n {host} route add {} dev pod0 src {router}",
            in_cidr(2, 4, v6)
        ));
        ip(&format!(
            "-n {host} route add {}/{bits} dev vx0",
            in_cidr(1, 0, v6)
        ));
    }
    let (_, pod_mac) = crate::support::net::device(&pod, "eth0");
    let pod_mac = pod_mac.map(|b| format!("{b:02x}")).join(":");
    for v6 in [false, true] {
        ip(&format!(
            "-n {host} neigh replace {} lladdr {pod_mac} dev pod0 nud permanent",
            in_cidr(2, 4, v6)
        ));
    }
    pod
}

fn talks(v6_outside: bool) {
    let mut namespaces = Namespaces::new();
    let router = router(&mut namespaces);
    let a = Node::new(&mut namespaces, &router, 1);
    let identity = pod_identity(1);
    // Both pods share the identity that is the device's id, so the kernel's node counts as one of our cluster.
    a.learn_in_cluster(2, 1, v6_outside, false);
    let pod = kernel_node(&mut namespaces, &router, identity, v6_outside);
    for link in ["to1", "to2"] {
        check(
            &router,
            "ethtool",
            &[
                "-K",
                link,
                "tso",
                "off",
                "gso",
                "off",
                "gro",
                "off",
                "tx-udp_tnl-segmentation",
                "off",
            ],
        );
    }
    for v6 in [false, true] {
        let (here, there) = (in_cidr(1, 4, v6), in_cidr(2, 4, v6));
        a.ping(there, 1380)
            .unwrap_or_else(|error| panic!("ping {there}: {error}"));
        transfer(&a.pod, &pod, there, TRANSFER_BYTES)
            .unwrap_or_else(|error| panic!("to {there}: {error}"));
        transfer(&pod, &a.pod, here, TRANSFER_BYTES)
            .unwrap_or_else(|error| panic!("from {there}: {error}"));
    }
    assert!(a.datapath.traffic(TrafficPath::TunnelOut).packets > 0);
    assert!(a.datapath.traffic(TrafficPath::TunnelIn).packets > 0);
    assert_eq!(a.datapath.all_drops(), []);
}

#[test]
fn a_kernel_vxlan_device_understands_us_and_we_it() {
    talks(false);
}

#[test]
fn a_kernel_vxlan_device_understands_us_and_we_it_with_ipv6_outside() {
    talks(true);
}
