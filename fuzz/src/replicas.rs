//! Messages between replicas: what the port decodes, and the entries, memberships and votes in it.

use bytes::Bytes;
use clustermesh_core::pb::{Batch, Proposal};
use clustermesh_raft::wire::{
    Append, AppendRequest, AppendResponse, CallRequest, CallResponse, Forward, ForwardedProposal,
    Header, Snapshot, SnapshotPart, SnapshotStart, call_request,
};
use clustermesh_store::pb::{LogEntry, Membership, Node, VoterSet, log_entry};
use clustermesh_store::wire::{
    entry_from_pb, entry_to_pb, membership_from_pb, membership_to_pb, node_from_pb, node_to_pb,
    stored_membership_from_pb,
};
use prost::Message;

use crate::requests::{alarm, store};
use crate::stored::written_snapshot;

pub(crate) fn message(bytes: &[u8]) -> bool {
    let Some((kind, body)) = bytes.split_first() else {
        return false;
    };
    let body = Bytes::copy_from_slice(body);
    match kind % 5 {
        0 => CallRequest::decode(body).is_ok_and(|request| call(request).is_some()),
        1 => AppendRequest::decode(body)
            .is_ok_and(|request| request.append.and_then(append).is_some()),
        2 => SnapshotPart::decode(body).is_ok_and(|part| match part.start {
            Some(start) => start.snapshot.as_ref().and_then(snapshot).is_some(),
            None => true,
        }),
        3 => CallResponse::decode(body).is_ok(),
        _ => AppendResponse::decode(body).is_ok(),
    }
}

fn call(request: CallRequest) -> Option<()> {
    match request.call? {
        call_request::Call::Append(request) => append(request),
        call_request::Call::SnapshotOffset(request) => snapshot(&request),
        call_request::Call::Forward(request) => {
            // The leader puts them into an entry as they are.
            let proposals: Vec<Proposal> = request
                .proposals
                .into_iter()
                .filter_map(|forwarded| forwarded.proposal)
                .collect();
            let batch = Batch::new(clustermesh_core::pb::Leader::default(), proposals);
            let encoded = batch.encode_to_vec();
            let decoded = Batch::decode(&*encoded).ok()?;
            assert_eq!(decoded, batch);
            let mut state = store();
            if state.apply(&decoded, 1).is_ok() {
                assert_eq!(state.check(), Ok(()), "{decoded:?}");
            }
            Some(())
        }
        call_request::Call::Join(request) => {
            let node = request.node?;
            assert_eq!(node_to_pb(&node_from_pb(&node)), node);
            Some(())
        }
        _ => Some(()),
    }
}

fn append(append: Append) -> Option<()> {
    for entry in append.entries {
        let entry = entry_from_pb(entry).ok()?;
        let again = entry_from_pb(entry_to_pb(&entry));
        assert!(again.is_ok_and(|again| again == entry), "{entry:?}");
    }
    Some(())
}

fn snapshot(snapshot: &Snapshot) -> Option<()> {
    let stored = stored_membership_from_pb(
        snapshot.membership_log_id.as_ref(),
        snapshot.membership.as_ref(),
    )
    .ok()?;
    let sent = membership_to_pb(stored.membership());
    let again = membership_from_pb(&sent).ok()?;
    assert_eq!(&again, stored.membership());
    Some(())
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let header = Some(Header {
        cluster_id: 1,
        from: 2,
        to: 3,
    });
    let membership = Membership {
        configs: vec![VoterSet { ids: vec![1, 2] }, VoterSet { ids: vec![1, 3] }],
        nodes: [1, 2, 3]
            .map(|id| {
                let node = Node {
                    name: format!("r{id}"),
                    peer_url: format!("https://s{id}:2380"),
                    ..Node::default()
                };
                (id, node)
            })
            .into(),
    };
    let entries = vec![
        LogEntry {
            term: 1,
            index: 5,
            payload: Some(log_entry::Payload::Command(Bytes::from_static(b"\x08\x01"))),
            ..LogEntry::default()
        },
        LogEntry {
            term: 1,
            index: 6,
            payload: Some(log_entry::Payload::Membership(membership.clone())),
            ..LogEntry::default()
        },
    ];
    let append = Append {
        entries,
        ..Append::default()
    };
    let forward = Forward {
        proposals: vec![ForwardedProposal {
            request_id: 9,
            proposal: Some(Proposal::system(alarm())),
        }],
    };
    let snapshot = Snapshot {
        membership: Some(membership),
        size_bytes: written_snapshot().map_or(0, |file| file.size_bytes()),
        ..Snapshot::default()
    };
    let seed = |kind: u8, message: Vec<u8>| [vec![kind], message].concat();
    let request = |call| {
        CallRequest {
            header,
            call: Some(call),
        }
        .encode_to_vec()
    };
    vec![
        seed(0, request(call_request::Call::Append(append.clone()))),
        seed(0, request(call_request::Call::Forward(forward))),
        seed(
            0,
            request(call_request::Call::SnapshotOffset(snapshot.clone())),
        ),
        seed(
            1,
            AppendRequest {
                header,
                append: Some(append),
            }
            .encode_to_vec(),
        ),
        seed(
            2,
            SnapshotPart {
                start: Some(SnapshotStart {
                    header,
                    snapshot: Some(snapshot),
                    ..SnapshotStart::default()
                }),
                ..SnapshotPart::default()
            }
            .encode_to_vec(),
        ),
    ]
}
