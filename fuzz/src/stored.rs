//! What disks give back: snapshots and the log. Damage is refused; what is accepted is a state that every replica can go on from.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, DeleteRangeRequest, LeaseRevokeRequest, PutRequest,
};
use clustermesh_core::limits::{BATCH_FORMAT, SNAPSHOT_FORMAT_GROUP};
use clustermesh_core::pb::proposal::Command;
use clustermesh_core::pb::{Batch, Proposal, SnapshotChunk, SnapshotTrailer};
use clustermesh_core::{SnapshotLoader, State};
use clustermesh_store::pb::{SnapshotFrame, SnapshotHeader, snapshot_frame};
use clustermesh_store::wire::{record_from_bytes, record_to_bytes, seal, unseal};
use clustermesh_store::{Entry, LogId, SnapshotFile, SnapshotStore};
use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use prost::Message;

use crate::input::{Input, pieces};
use crate::requests::{alarm, store};

const TERM: u64 = 1;
/// Bytes of a chunk when a state is taken apart again: small, so that there are several.
const CHUNK_BYTES: usize = 64;

fn entry_of(command: Command) -> Batch {
    Batch {
        format: BATCH_FORMAT,
        proposals: vec![Proposal::system(command)],
        ..Batch::default()
    }
}

fn chunks(state: &State) -> Vec<Bytes> {
    let mut cursor = state.snapshot();
    let mut chunks = Vec::new();
    loop {
        match cursor.next_chunk(state, CHUNK_BYTES) {
            Ok(Some(chunk)) => chunks.push(chunk),
            Ok(None) => return chunks,
            Err(error) => panic!("a state that nobody changes: {error}"),
        }
    }
}

fn load(chunks: impl IntoIterator<Item = Bytes>) -> Option<State> {
    let mut loader = SnapshotLoader::new();
    for chunk in chunks {
        loader.push(chunk).ok()?;
    }
    loader.finish().ok()
}

/// A state that was accepted is whole: it can be told to another replica, and goes on.
fn use_state(mut state: State) {
    let Some(twin) = load(chunks(&state)) else {
        panic!("its own snapshot is refused: {state:?}");
    };
    assert_eq!(twin.hash(), state.hash(), "{state:?}");
    let put = PutRequest {
        key: "a".into(),
        value: "new".into(),
        ..PutRequest::default()
    };
    let revision = state.revision();
    let lease = state.leases().next().map_or(1, |(id, _)| id);
    let commands = [
        Command::Put(put),
        Command::LeaseRevoke(LeaseRevokeRequest { id: lease }),
        Command::DeleteRange(DeleteRangeRequest {
            key: "\0".into(),
            range_end: "\0".into(),
            prev_kv: true,
        }),
        Command::Compact(CompactionRequest {
            revision,
            physical: true,
        }),
    ];
    for command in commands {
        if let Err(error) = state.apply(&entry_of(command), TERM) {
            panic!("{error}: {state:?}");
        }
        assert_eq!(state.check(), Ok(()));
    }
    let _ = state.history(state.compact_revision(), usize::MAX);
}

pub(crate) fn snapshot_state(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    // Numbers that any change would break are put right, so that changes go deeper.
    let repaired = input.flag();
    let mut found = Vec::new();
    while !input.is_empty() {
        found.push(Bytes::copy_from_slice(input.piece()));
    }
    let state = if repaired {
        load(repair(found))
    } else {
        load(found)
    };
    state.is_some_and(|state| {
        use_state(state);
        true
    })
}

fn repair(chunks: Vec<Bytes>) -> Vec<Bytes> {
    let mut decoded: Vec<SnapshotChunk> = chunks
        .into_iter()
        .filter_map(|chunk| SnapshotChunk::decode(chunk).ok())
        .collect();
    let mut counts = SnapshotTrailer::default();
    let mut last_key = Bytes::new();
    for (chunk, sequence) in decoded.iter_mut().zip(0..) {
        chunk.format = SNAPSHOT_FORMAT_GROUP;
        chunk.sequence = sequence;
        chunk.trailer = None;
        counts.leases += chunk.leases.len() as u64;
        counts.roles += chunk.roles.len() as u64;
        counts.users += chunk.users.len() as u64;
        counts.tokens += chunk.tokens.len() as u64;
        for key in &chunk.keys {
            counts.keys += u64::from(key.key != last_key);
            counts.versions += key.versions.len() as u64;
            last_key = key.key.clone();
        }
    }
    if let Some(last) = decoded.last_mut() {
        last.trailer = Some(counts);
    }
    decoded
        .iter()
        .map(|chunk| chunk.encode_to_vec().into())
        .collect()
}

fn example_states() -> Vec<State> {
    let mut with_alarm = store();
    let raised = with_alarm.apply(&entry_of(alarm()), TERM);
    assert!(raised.is_ok(), "{raised:?}");
    vec![State::new(), store(), with_alarm]
}

pub(crate) fn snapshot_state_seeds() -> Vec<Vec<u8>> {
    let seed = |repaired: u8, state: &State| [vec![repaired], pieces(chunks(state))].concat();
    example_states()
        .iter()
        .flat_map(|state| [seed(0, state), seed(1, state)])
        .collect()
}

pub(crate) fn snapshot_file(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let file = if input.flag() {
        // Each piece as a frame with its right length and checksum.
        let mut file = Vec::new();
        while !input.is_empty() {
            file.extend(frame(input.piece()));
        }
        file
    } else {
        input.rest().to_vec()
    };
    let Ok(file) = SnapshotFile::from_bytes(file.into()) else {
        return false;
    };
    let Ok(reader) = file.read() else {
        panic!("bytes in memory can be read");
    };
    let Ok(chunks) = reader.collect::<Result<Vec<_>, _>>() else {
        return false;
    };
    if let Some(state) = load(chunks) {
        use_state(state);
    }
    true
}

fn frame(body: &[u8]) -> Vec<u8> {
    // A piece is shorter than 64 KiB.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    [
        &length.to_le_bytes()[..],
        &crc32c::crc32c(body).to_le_bytes(),
        body,
    ]
    .concat()
}

pub(crate) fn snapshot_file_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for state in example_states() {
        let mut bodies = vec![snapshot_frame::Frame::Header(SnapshotHeader {
            format: 1,
            ..SnapshotHeader::default()
        })];
        let (mut count, mut size, mut checksum) = (0, 0, 0);
        for chunk in chunks(&state) {
            count += 1;
            size += chunk.len() as u64;
            checksum = crc32c::crc32c_append(checksum, &chunk);
            bodies.push(snapshot_frame::Frame::Chunk(chunk));
        }
        let trailer = clustermesh_store::pb::SnapshotTrailer {
            chunks: count,
            bytes: size,
            crc32c: checksum,
        };
        bodies.push(snapshot_frame::Frame::Trailer(trailer));
        let bodies: Vec<Vec<u8>> = bodies
            .into_iter()
            .map(|body| SnapshotFrame { frame: Some(body) }.encode_to_vec())
            .collect();
        let file: Vec<u8> = bodies.iter().flat_map(|body| frame(body)).collect();
        seeds.push([vec![0], file].concat());
        seeds.push([vec![1], pieces(bodies)].concat());
    }
    seeds
}

pub(crate) fn log_record(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    match input.choice(4) {
        0 => {
            let body = input.rest();
            let sealed = clustermesh_store::pb::Sealed {
                crc32c: crc32c::crc32c(body),
                data: Bytes::copy_from_slice(body),
            };
            let Ok(value) = unseal(&sealed.encode_to_vec()) else {
                return false;
            };
            assert!(unseal(&seal(value.clone())).is_ok_and(|again| again == value));
            true
        }
        1 => unseal(input.rest()).is_ok(),
        _ => {
            let Ok((entries, committed)) = record_from_bytes(Bytes::copy_from_slice(input.rest()))
            else {
                return false;
            };
            replay(&entries, committed);
            true
        }
    }
}

/// Entries are stored again as they were, and two replicas make the same of them.
fn replay(entries: &[Entry], committed: Option<LogId>) {
    let again = record_from_bytes(record_to_bytes(entries, committed).into());
    assert!(
        again.is_ok_and(|again| again == (entries.to_vec(), committed)),
        "stored and read again: {entries:?}"
    );
    let (mut state, mut twin) = (store(), store());
    for entry in entries {
        let EntryPayload::Normal(command) = &entry.payload else {
            continue;
        };
        let Ok(batch) = Batch::decode(&*command.batch) else {
            return;
        };
        let term = entry.log_id.leader_id.term;
        let applied = state.apply(&batch, term);
        let other = twin.apply(&batch, term);
        assert_eq!(
            applied.as_ref().map(|applied| &applied.outcomes),
            other.as_ref().map(|applied| &applied.outcomes)
        );
        if applied.is_err() {
            // The replica stops there.
            return;
        }
        assert_eq!(state.check(), Ok(()), "{batch:?}");
    }
    assert_eq!(state.hash(), twin.hash());
}

pub(crate) fn log_record_seeds() -> Vec<Vec<u8>> {
    let put = |key: &str| {
        Command::Put(PutRequest {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: "v".into(),
            ..PutRequest::default()
        })
    };
    let entry = |index: u64, command: Command| {
        let command = clustermesh_store::Command {
            batch: entry_of(command).encode_to_vec().into(),
            origins: Vec::new(),
        };
        Entry::new(
            LogId::new_term_index(TERM, index),
            EntryPayload::Normal(command),
        )
    };
    let entries = [entry(1, put("a")), entry(2, put("b")), entry(3, alarm())];
    let vote = clustermesh_store::pb::meta::Value::Vote(clustermesh_store::pb::Vote {
        term: 3,
        voted_for: 2,
        committed: true,
    });
    let sealed = seal(vote);
    let body = clustermesh_store::pb::Sealed::decode(&*sealed).unwrap_or_default();
    vec![
        [vec![2], record_to_bytes(&entries, None)].concat(),
        [vec![1], sealed].concat(),
        [vec![0], body.data.to_vec()].concat(),
    ]
}

/// A whole snapshot as a store in memory writes it, for what is sent between replicas.
pub(crate) fn written_snapshot() -> Option<SnapshotFile> {
    let mut writer = SnapshotStore::memory()
        .create(clustermesh_store::SnapshotMeta::default())
        .ok()?;
    for chunk in chunks(&store()) {
        writer.chunk(chunk).ok()?;
    }
    writer.finish().ok()
}
