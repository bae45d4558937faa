//! Addresses of the mesh that no record names: nothing goes to or comes from them in clear in strict mode.

use clustermesh_ebpf_abi::{
    CONFIG_DIRECT, CONFIG_ENCRYPT_NODES, CONFIG_STRICT, DropReason, MESH_LISTED, MESH_NODES,
    MESH_PODS,
};

use crate::support::packet::{ICMPV6, TCP, UDP, datagram, ethernet, packet, tunnelled, udp};

use super::super::fixture::*;
use super::*;

/// A node that nobody has named, and pods of its.
const NODE: &str = "192.168.9.1";
const NODE_V6: &str = "fd00::9";
const THERE: &str = "10.9.0.9";
const THERE_V6: &str = "fd10:0:0:9::9";
/// In what the operator has listed.
const LISTED: &str = "10.200.0.9";
/// There, in a cluster that does not encrypt.
const EXEMPT: &str = "10.201.0.9";

/// The node of these tests, which knows 10.9/16 and 10.1/16 (its own cluster's) to be pods', and 192.168.9.1 a node's.
fn knowing(flags: u32) -> Datapath {
    let datapath = encrypting(flags);
    for (prefix, bits, flags) in [
        ("10.1.0.0", 112, MESH_PODS),
        ("fd10:0:0:1::", 64, MESH_PODS),
        ("10.9.0.0", 112, MESH_PODS),
        ("fd10:0:0:9::", 64, MESH_PODS),
        (NODE, 128, MESH_NODES),
        (NODE_V6, 128, MESH_NODES),
        ("10.200.0.0", 103, MESH_LISTED),
        ("10.201.0.0", 112, 0),
        (OWN, 128, 0),
        (OWN_V6, 128, 0),
    ] {
        datapath.set_mesh(addr(prefix), bits, flags);
    }
    datapath
}

fn refused() -> Result<i32, DropReason> {
    Err(DropReason::MeshUnknown)
}

fn to(source: &str, target: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    ethernet(&packet(source, target, protocol, payload))
}

#[test]
fn pods_do_not_reach_them_by_the_hosts_routes() {
    let datapath = knowing(CONFIG_STRICT);
    for (target, wanted) in [
        (THERE, refused()),
        (NODE, refused()),
        (LISTED, refused()),
        (EXEMPT, Ok(REDIRECT)),
        ("1.1.1.1", Ok(REDIRECT)),
        (OWN, Ok(REDIRECT)),
        // Known.
        ("10.2.0.9", Ok(REDIRECT)),
        ("192.168.2.1", Ok(REDIRECT)),
    ] {
        let frame = ethernet(&datagram(V4, target));
        check(&datapath, "from_pod", target, &frame, wanted);
    }
    for (target, wanted) in [
        (THERE_V6, refused()),
        (NODE_V6, refused()),
        ("2001:db8::1", Ok(REDIRECT)),
        (OWN_V6, Ok(REDIRECT)),
        ("fd10:0:0:2::9", Ok(REDIRECT)),
    ] {
        let frame = ethernet(&datagram(V6, target));
        check(&datapath, "from_pod", target, &frame, wanted);
    }
    let datapath = knowing(0);
    for (source, target) in [(V4, THERE), (V6, THERE_V6), (V4, NODE), (V4, LISTED)] {
        let frame = ethernet(&datagram(source, target));
        check(&datapath, "from_pod", target, &frame, Ok(REDIRECT));
    }
}

#[test]
fn local_traffic_is_as_before() {
    let datapath = knowing(CONFIG_STRICT | CONFIG_ENCRYPT_NODES);
    for (source, target, target_gone) in [
        (V4, "10.1.0.1", "10.1.0.77"),
        (V6, "fd10:0:0:1::1", "fd10:0:0:1::77"),
    ] {
        for program in ["from_pod", "from_host"] {
            let frame = ethernet(&datagram(source, target));
            check(&datapath, program, target, &frame, Ok(REDIRECT));
            let before = datapath.drops(DropReason::UnknownPod);
            let outcome = datapath.run(program, &ethernet(&datagram(source, target_gone)));
            assert_eq!(
                outcome.verdict, REDIRECT,
                "{program} answers for a pod that is gone"
            );
            assert_eq!(datapath.drops(DropReason::UnknownPod), before + 1);
        }
    }
    assert_eq!(datapath.drops(DropReason::MeshUnknown), 0);
}

#[test]
fn nothing_leaves_for_them() {
    let opens = segment(1000, SERVER_PORT, SYN);
    for (nodes, judged) in [(0, Ok(PASS)), (CONFIG_ENCRYPT_NODES, refused())] {
        let datapath = knowing(CONFIG_STRICT | nodes);
        for (what, frame, wanted) in [
            ("a pod", ethernet(&datagram(V4, THERE)), refused()),
            ("a pod, IPv6", ethernet(&datagram(V6, THERE_V6)), refused()),
            ("the host", ethernet(&datagram(OWN, THERE)), refused()),
            (
                "the host, IPv6",
                ethernet(&datagram(OWN_V6, THERE_V6)),
                refused(),
            ),
            (
                "to a server's port of a pod",
                to(OWN, THERE, TCP, &opens),
                refused(),
            ),
            ("fragment", fragment_v4(datagram(V4, THERE), 9), refused()),
            (
                "IPv6 fragment",
                fragment_v6(V6, THERE_V6, UDP, 8, &[0; 8]),
                refused(),
            ),
            ("a pod to a node", ethernet(&datagram(V4, NODE)), refused()),
            (
                "a pod to a node, IPv6",
                ethernet(&datagram(V6, NODE_V6)),
                refused(),
            ),
            ("a pod to a server", to(V4, NODE, TCP, &opens), refused()),
            ("the host to a node", ethernet(&datagram(OWN, NODE)), judged),
            (
                "the host to a node, IPv6",
                ethernet(&datagram(OWN_V6, NODE_V6)),
                judged,
            ),
            (
                "a tunnel",
                tunnelled(OWN, NODE, POD, &datagram(V4, THERE)),
                judged,
            ),
            ("the host to a server", to(OWN, NODE, TCP, &opens), Ok(PASS)),
            (
                "the host to a server, IPv6",
                to(OWN_V6, NODE_V6, TCP, &opens),
                Ok(PASS),
            ),
            (
                "neighbour solicitation",
                discovery(OWN_V6, NODE_V6, 135, 255),
                Ok(PASS),
            ),
            ("listed", ethernet(&datagram(OWN, LISTED)), refused()),
            (
                "to a server that is listed",
                to(OWN, LISTED, TCP, &opens),
                Ok(PASS),
            ),
            ("exempt", ethernet(&datagram(OWN, EXEMPT)), Ok(PASS)),
            (
                "exempt, from a pod",
                ethernet(&datagram(V4, EXEMPT)),
                Ok(PASS),
            ),
            ("to the world", ethernet(&datagram(V4, "1.1.1.1")), Ok(PASS)),
            (
                "our own range",
                ethernet(&datagram(OWN, "10.1.0.77")),
                refused(),
            ),
        ] {
            check(&datapath, "to_network", what, &frame, wanted);
        }
        let marked = datapath.run_marked("to_network", &ethernet(&datagram(OWN, NODE)), 0, MARK);
        assert_eq!(marked.verdict, PASS, "WireGuard's own");
    }
    let datapath = knowing(CONFIG_ENCRYPT_NODES);
    for target in [THERE, NODE, LISTED] {
        let frame = ethernet(&datagram(OWN, target));
        check(&datapath, "to_network", target, &frame, Ok(PASS));
    }
}

#[test]
fn nothing_is_taken_from_them() {
    for (nodes, judged) in [(0, Ok(PASS)), (CONFIG_ENCRYPT_NODES, refused())] {
        let datapath = knowing(CONFIG_STRICT | CONFIG_DIRECT | nodes);
        let answers = segment(SERVER_PORT, 1000, ACK);
        for (what, frame, wanted) in [
            ("a pod to a pod", ethernet(&datagram(THERE, V4)), refused()),
            (
                "a pod to a pod, IPv6",
                ethernet(&datagram(THERE_V6, V6)),
                refused(),
            ),
            (
                "a pod to a router",
                ethernet(&datagram(THERE, "10.1.0.1")),
                refused(),
            ),
            ("a node to a pod", ethernet(&datagram(NODE, V4)), refused()),
            (
                "a pod to the host",
                ethernet(&datagram(THERE, OWN)),
                refused(),
            ),
            (
                "a pod to the host, IPv6",
                ethernet(&datagram(THERE_V6, OWN_V6)),
                refused(),
            ),
            (
                "a pod with a server's port",
                to(THERE, OWN, TCP, &answers),
                refused(),
            ),
            (
                "later fragment",
                fragment_v4(datagram(THERE, OWN), 9),
                refused(),
            ),
            ("a node", ethernet(&datagram(NODE, OWN)), judged),
            ("a node, IPv6", ethernet(&datagram(NODE_V6, OWN_V6)), judged),
            (
                "a node's echo, IPv6",
                to(NODE_V6, OWN_V6, ICMPV6, &[128; 16]),
                judged,
            ),
            ("a server", to(NODE, OWN, TCP, &answers), Ok(PASS)),
            (
                "WireGuard",
                to(NODE, OWN, UDP, &udp(1, WIREGUARD_PORT, b"")),
                Ok(PASS),
            ),
            (
                "WireGuard, IPv6",
                to(NODE_V6, OWN_V6, UDP, &udp(1, SECOND_PORT, b"")),
                Ok(PASS),
            ),
            // It may be of WireGuard.
            (
                "later fragment of UDP",
                fragment_v4(datagram(NODE, OWN), 9),
                Ok(PASS),
            ),
            (
                "neighbour advertisement",
                discovery(NODE_V6, OWN_V6, 136, 255),
                Ok(PASS),
            ),
            ("listed", ethernet(&datagram(LISTED, OWN)), refused()),
            (
                "a server that is listed",
                to(LISTED, OWN, TCP, &answers),
                Ok(PASS),
            ),
            ("exempt", ethernet(&datagram(EXEMPT, OWN)), Ok(PASS)),
            (
                "exempt, to a pod",
                ethernet(&datagram(EXEMPT, V4)),
                Ok(REDIRECT),
            ),
            (
                "the world",
                ethernet(&datagram("1.1.1.1", V4)),
                Ok(REDIRECT),
            ),
            (
                "the world, IPv6",
                ethernet(&datagram("2001:db8::1", V6)),
                Ok(REDIRECT),
            ),
        ] {
            check(&datapath, "from_network", what, &frame, wanted);
        }
    }
    let datapath = knowing(CONFIG_DIRECT);
    let frame = ethernet(&datagram(THERE, V4));
    check(
        &datapath,
        "from_network",
        "not strict",
        &frame,
        Ok(REDIRECT),
    );
}

#[test]
fn a_node_that_is_withdrawn_is_as_one_that_was_never_named() {
    let datapath = knowing(CONFIG_STRICT);
    // Its prefixes still stand in the ipcache, but the node behind them does not.
    datapath.set_node(
        9,
        &NodeValue {
            flags: 0,
            ..node(NODE, 2, 0)
        },
    );
    datapath.set_ipcache(addr("10.9.0.0"), 112, REMOTE, 9);
    let frame = ethernet(&datagram(OWN, THERE));
    check(&datapath, "to_network", "withdrawn", &frame, refused());
}
