//! Stored protobuf to openraft's types and back.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use openraft::{EntryPayload, entry::RaftEntry};
use prost::Message;

use crate::{
    pb,
    types::{Command, Entry, LogId, Membership, Node, Origin, StoredMembership, Vote},
};

/// Newest format of log records and metadata that this release reads and writes.
pub const FORMAT: u32 = 1;

/// Why bytes were refused; the caller adds where they came from.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Checksum does not match.
    #[error("checksum does not match")]
    Checksum,
    /// Not protobuf of this kind.
    #[error("{0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Written by a newer release.
    #[error("format {0} is newer than {FORMAT}")]
    NewerFormat(u32),
    /// Voters and nodes contradict each other.
    #[error("membership is not valid: {0}")]
    Membership(String),
}

/// A place in the log as stored and sent.
pub fn log_id_to_pb(id: &LogId) -> pb::LogId {
    pb::LogId {
        term: id.leader_id.term,
        index: id.index,
    }
}

/// A place in the log from what was stored or sent.
pub fn log_id_from_pb(id: &pb::LogId) -> LogId {
    LogId::new_term_index(id.term, id.index)
}

/// A vote as stored and sent.
pub fn vote_to_pb(vote: &Vote) -> pb::Vote {
    pb::Vote {
        term: vote.leader_id.term,
        voted_for: vote.leader_id.voted_for,
        committed: vote.committed,
    }
}

/// A vote from what was stored or sent.
pub fn vote_from_pb(vote: &pb::Vote) -> Vote {
    if vote.committed {
        Vote::new_committed(vote.term, vote.voted_for)
    } else {
        Vote::new(vote.term, vote.voted_for)
    }
}

/// A replica's description as stored and sent.
pub fn node_to_pb(node: &Node) -> pb::Node {
    pb::Node {
        name: node.name.clone(),
        peer_url: node.peer_url.clone(),
        client_urls: node.client_urls.clone(),
        join_as_voter: node.join_as_voter,
        replaces: node.replaces,
    }
}

/// A replica's description from what was stored or sent.
pub fn node_from_pb(node: &pb::Node) -> Node {
    Node {
        name: node.name.clone(),
        peer_url: node.peer_url.clone(),
        client_urls: node.client_urls.clone(),
        join_as_voter: node.join_as_voter,
        replaces: node.replaces,
    }
}

/// A membership as stored and sent.
pub fn membership_to_pb(membership: &Membership) -> pb::Membership {
    pb::Membership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|set| pb::VoterSet {
                ids: set.iter().copied().collect(),
            })
            .collect(),
        nodes: membership
            .nodes()
            .map(|(id, node)| (*id, node_to_pb(node)))
            .collect(),
    }
}

/// A membership from what was stored or sent.
///
/// # Errors
/// [`CodecError::Membership`].
pub fn membership_from_pb(membership: &pb::Membership) -> Result<Membership, CodecError> {
    let configs: Vec<BTreeSet<u64>> = membership
        .configs
        .iter()
        .map(|set| set.ids.iter().copied().collect())
        .collect();
    let nodes: BTreeMap<u64, Node> = membership
        .nodes
        .iter()
        .map(|(id, node)| (*id, node_from_pb(node)))
        .collect();
    if configs.is_empty() && nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|e| CodecError::Membership(e.to_string()))
}

/// A stored membership from its two fields.
///
/// # Errors
/// [`CodecError::Membership`].
pub fn stored_membership_from_pb(
    log_id: Option<&pb::LogId>,
    membership: Option<&pb::Membership>,
) -> Result<StoredMembership, CodecError> {
    let membership = match membership {
        Some(membership) => membership_from_pb(membership)?,
        None => Membership::default(),
    };
    Ok(StoredMembership::new(
        log_id.map(log_id_from_pb),
        membership,
    ))
}

fn origin_to_pb(origin: &Origin) -> pb::Origin {
    pb::Origin {
        place: origin.place,
        replica_id: origin.replica_id,
        request_id: origin.request_id,
    }
}

fn origin_from_pb(origin: &pb::Origin) -> Origin {
    Origin {
        place: origin.place,
        replica_id: origin.replica_id,
        request_id: origin.request_id,
    }
}

/// An entry as stored and sent.
pub fn entry_to_pb(entry: &Entry) -> pb::LogEntry {
    let payload = match &entry.payload {
        EntryPayload::Blank => pb::log_entry::Payload::Blank(pb::Blank {}),
        EntryPayload::Normal(command) => pb::log_entry::Payload::Command(command.batch.clone()),
        EntryPayload::Membership(membership) => {
            pb::log_entry::Payload::Membership(membership_to_pb(membership))
        }
    };
    pb::LogEntry {
        term: entry.log_id.leader_id.term,
        index: entry.log_id.index,
        payload: Some(payload),
        origins: match &entry.payload {
            EntryPayload::Normal(command) => command.origins.iter().map(origin_to_pb).collect(),
            EntryPayload::Blank | EntryPayload::Membership(_) => Vec::new(),
        },
    }
}

/// An entry from what was stored or sent.
///
/// # Errors
/// [`CodecError`].
pub fn entry_from_pb(entry: pb::LogEntry) -> Result<Entry, CodecError> {
    let log_id = LogId::new_term_index(entry.term, entry.index);
    let payload = match entry
        .payload
        .ok_or(CodecError::Missing("payload of a log entry"))?
    {
        pb::log_entry::Payload::Blank(_) => EntryPayload::Blank,
        pb::log_entry::Payload::Command(bytes) => EntryPayload::Normal(Command {
            batch: bytes,
            origins: entry.origins.iter().map(origin_from_pb).collect(),
        }),
        pb::log_entry::Payload::Membership(membership) => {
            EntryPayload::Membership(membership_from_pb(&membership)?)
        }
    };
    Ok(Entry::new(log_id, payload))
}

/// Encoded size of an entry, near enough for limits, bytes.
pub fn entry_size_bytes(entry: &Entry) -> usize {
    const FRAME_BYTES: usize = 32;
    FRAME_BYTES
        + match &entry.payload {
            EntryPayload::Blank => 0,
            EntryPayload::Normal(command) => {
                command.batch.len() + command.origins.len() * FRAME_BYTES
            }
            EntryPayload::Membership(membership) => membership_to_pb(membership).encoded_len(),
        }
}

/// Consecutive entries as the log stores them, with what is known to be committed by then.
#[must_use]
pub fn record_to_bytes(entries: &[Entry], committed: Option<LogId>) -> Vec<u8> {
    pb::LogRecord {
        format: FORMAT,
        entries: entries.iter().map(entry_to_pb).collect(),
        committed: committed.as_ref().map(log_id_to_pb),
    }
    .encode_to_vec()
}

/// Consecutive entries from what the log stores, with what was known to be committed.
///
/// # Errors
/// [`CodecError`].
pub fn record_from_bytes(bytes: Bytes) -> Result<(Vec<Entry>, Option<LogId>), CodecError> {
    let record = pb::LogRecord::decode(bytes)?;
    check_format(record.format)?;
    let entries = record.entries.into_iter().map(entry_from_pb);
    let committed = record.committed.as_ref().map(log_id_from_pb);
    Ok((entries.collect::<Result<_, _>>()?, committed))
}

/// A metadata value with its checksum.
#[must_use]
pub fn seal(value: pb::meta::Value) -> Vec<u8> {
    let data = pb::Meta {
        format: FORMAT,
        value: Some(value),
    }
    .encode_to_vec();
    pb::Sealed {
        crc32c: crc32c::crc32c(&data),
        data: data.into(),
    }
    .encode_to_vec()
}

/// A metadata value whose checksum matches.
///
/// # Errors
/// [`CodecError`].
pub fn unseal(bytes: &[u8]) -> Result<pb::meta::Value, CodecError> {
    let sealed = pb::Sealed::decode(bytes)?;
    if crc32c::crc32c(&sealed.data) != sealed.crc32c {
        return Err(CodecError::Checksum);
    }
    let meta = pb::Meta::decode(sealed.data)?;
    check_format(meta.format)?;
    meta.value
        .ok_or(CodecError::Missing("value of a metadata record"))
}

pub fn check_format(format: u32) -> Result<(), CodecError> {
    if format > FORMAT {
        Err(CodecError::NewerFormat(format))
    } else {
        Ok(())
    }
}
