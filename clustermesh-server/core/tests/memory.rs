//! What a key costs in memory beside its own bytes. A process of its own: its resident memory is what is measured.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{PutRequest, RequestOp, TxnRequest, request_op::Request};
use clustermesh_core::{
    State,
    limits::BATCH_FORMAT,
    pb::{Batch, Proposal, proposal::Command},
};

const KEYS: usize = 200_000;
const PUTS_PER_TXN: usize = 100;
const VALUE_BYTES: usize = 500;
const KEY_BYTES: usize = 14;
/// Of a version: its counts of owners and bytes, its revision, fields of the event (36), what the allocator adds. Of
/// the index 24 in leaves that may be half empty, of history 16.
const MAX_OVERHEAD_BYTES: usize = 160;

fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<usize>().unwrap() * 1_024
}

fn txn(number: usize) -> Batch {
    let put = |place: usize| {
        // Two runs that grow side by side, as of clients that write at the same time.
        let key = (number % 2) * KEYS + (number / 2) * PUTS_PER_TXN + place;
        let put = PutRequest {
            key: format!("bench/{key:08}").into(),
            value: Bytes::from(vec![b'v'; VALUE_BYTES]),
            ..PutRequest::default()
        };
        RequestOp {
            request: Some(Request::RequestPut(put)),
        }
    };
    let txn = TxnRequest {
        success: (0..PUTS_PER_TXN).map(put).collect(),
        ..TxnRequest::default()
    };
    Batch {
        format: BATCH_FORMAT,
        proposals: vec![Proposal::from(Command::Txn(txn))],
        ..Batch::default()
    }
}

#[test]
fn a_key_costs_little_beside_its_bytes() {
    let before = resident_bytes();
    let mut state = State::new();
    for number in 0..KEYS / PUTS_PER_TXN {
        state.apply(&txn(number), 1).unwrap();
    }
    let each = (resident_bytes() - before) / KEYS;
    println!("{each} bytes of memory for a key");
    assert!(state.get(b"bench/00000000").is_some());
    assert!(each > KEY_BYTES + VALUE_BYTES, "{each} bytes are no memory");
    let overhead = each - KEY_BYTES - VALUE_BYTES;
    assert!(overhead <= MAX_OVERHEAD_BYTES, "{overhead} bytes");
}
