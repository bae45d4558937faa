//! Paths that take less than their devices.

use clustermesh_ebpf_abi::{NODE_NARROW, PROBE_MARK};

use super::super::fixture::*;
use super::leaving::syn;
use super::*;

/// What such a path takes.
const NARROW: u16 = 1_300;

fn option(bytes: u16) -> [u8; 4] {
    let bytes = bytes.to_be_bytes();
    [2, 4, bytes[0], bytes[1]]
}

fn with_path(index: u32, end: &str, flags: u16) -> Datapath {
    let datapath = encrypting(0);
    let value = NodeValue {
        path_mtu_bytes: NARROW,
        ..node(end, 2, NODE_PRESENT | NODE_ENCRYPTED | flags)
    };
    datapath.set_node(index, &value);
    datapath
}

#[test]
fn pods_connections_are_told_of_a_narrow_path_when_they_begin() {
    for (narrow, named, then_v4, then_v6) in [
        (NODE_NARROW, 1_460, NARROW - 40, NARROW - 60),
        (NODE_NARROW, 536, 536, 536),
        // What only the devices take less is what pods' interfaces say themselves.
        (0, 1_460, 1_460, 1_460),
    ] {
        let direct = with_path(5, "192.168.5.1", narrow | NODE_DIRECT);
        let tunnel = with_path(2, "192.168.2.1", narrow);
        for (source, far, near, then) in [
            (V4, "10.5.0.9", "10.2.0.9", then_v4),
            (V6, "fd10:0:0:5::9", "fd10:0:0:2::9", then_v6),
        ] {
            let sent = syn(source, far, &option(named));
            let outcome = forwarded(&direct, "from_pod", &sent, TrafficPath::DirectOut);
            assert_eq!(outcome.packet[14..], syn(source, far, &option(then))[14..]);
            let sent = syn(source, near, &option(named));
            let outcome = forwarded(&tunnel, "from_pod", &sent, TrafficPath::TunnelOut);
            let inner = &syn(source, near, &option(then))[14..];
            assert_tunnelled(&outcome.packet, OWN, "192.168.2.1", POD, inner);
        }
        // Later segments are nobody's business.
        let data = ethernet(&packet(V4, "10.5.0.9", TCP, &segment(1000, 22, ACK)));
        let outcome = forwarded(&direct, "from_pod", &data, TrafficPath::DirectOut);
        assert_eq!(outcome.packet[14..], data[14..]);
    }
}

#[test]
fn only_probes_are_sent_larger_than_is_known_to_pass() {
    let datapath = with_path(2, "192.168.2.1", NODE_NARROW);
    let large = ethernet(&packet(
        "10.1.0.1",
        "10.2.0.2",
        UDP,
        &udp(1, 2, &vec![0; usize::from(NARROW)]),
    ));
    let too_big = Err(DropReason::TooBig);
    check(&datapath, "from_host", "the host", &large, too_big);
    let probe = datapath.run_marked("from_host", &large, 0, PROBE_MARK);
    assert_eq!(probe.verdict, REDIRECT, "{:?}", datapath.all_drops());
    let other = datapath.run_marked("from_host", &large, 0, MARK);
    assert_eq!(other.verdict, DROP);
}
