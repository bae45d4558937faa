//! Flow records.

use aya::maps::RingBuf;
use clustermesh_ebpf_abi::{
    Address, CONFIG_FLOWS, DropReason, FlowRecord, HOOK_FROM_NETWORK, NodeConfig, TrafficPath,
    VERDICT_DROPPED, VERDICT_FORWARDED,
};

use crate::support::bpf::addr;
use crate::support::packet::{UDP, datagram, tunnelled};

use super::fixture::*;

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
