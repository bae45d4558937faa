//! The copy of a peer: whoever leads writes the peer's changes with a cursor, and no replica may ever have a cursor that is ahead of its records.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_core::{
    State,
    pb::{PeerChange, PeerCopy, Proposal, proposal::Command},
};
use clustermesh_raft::Replica;
use openraft::async_runtime::AsyncRuntime;
use parking_lot::Mutex;

use crate::{
    random::Random,
    runtime::{Life, SimRuntime, draw},
};

const CLUSTER: &str = "peer";
const STORE_ID: u64 = 7;
const PREFIX: &[u8] = b"cilium/cache/nodes/v1/peer/";
const PREFIX_END: &[u8] = b"cilium/cache/nodes/v1/peer0";
/// Records that the peer has, most.
const RECORDS: u64 = 6;

type Records = BTreeMap<Bytes, Bytes>;

#[derive(Default)]
struct Inner {
    /// What the peer has at each of its revisions, from 0 on.
    peer: Vec<Records>,
    newest: BTreeMap<Life, i64>,
}

/// What is known of the copy.
#[derive(Clone, Default)]
pub struct Copies {
    inner: Arc<Mutex<Inner>>,
    ended: Arc<AtomicBool>,
}

/// What the peer changes at a revision of its own.
fn change_at(revision: i64) -> PeerChange {
    let mut random = Random::new(revision.unsigned_abs());
    let key = format!(
        "{}{}",
        String::from_utf8_lossy(PREFIX),
        random.below(RECORDS)
    );
    let value = (!random.chance(20)).then(|| Bytes::from(format!("p{revision}")));
    PeerChange {
        key: key.into(),
        value,
    }
}

impl Inner {
    fn at(&mut self, revision: i64) -> &Records {
        let place = usize::try_from(revision).unwrap_or(0);
        if self.peer.is_empty() {
            self.peer.push(Records::new());
        }
        while self.peer.len() <= place {
            let mut records = self.peer.last().cloned().unwrap_or_default();
            let change = change_at(i64::try_from(self.peer.len()).unwrap_or(0));
            match change.value {
                Some(value) => drop(records.insert(change.key, value)),
                None => drop(records.remove(&change.key)),
            }
            self.peer.push(records);
        }
        &self.peer[place]
    }
}

impl Copies {
    /// Nothing is copied any more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// The records are those that the peer had at the cursor, and the cursor does not go back.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, life: Life, state: &State) -> Result<(), String> {
        let cursor = state
            .peer_cursor(CLUSTER)
            .map_or(0, |cursor| cursor.revision);
        let copied: Records = state
            .range(&RangeRequest {
                key: Bytes::from_static(PREFIX),
                range_end: Bytes::from_static(PREFIX_END),
                ..RangeRequest::default()
            })
            .map_err(|error| error.to_string())?
            .kvs
            .into_iter()
            .map(|kv| (kv.key, kv.value))
            .collect();
        let mut inner = self.inner.lock();
        let newest = inner.newest.entry(life).or_insert(cursor);
        let before = *newest;
        *newest = cursor;
        if cursor < before {
            return Err(format!(
                "the cursor of a copy went back from {before} to {cursor}"
            ));
        }
        let wanted = inner.at(cursor);
        if copied != *wanted {
            return Err(format!(
                "the cursor of a copy is at {cursor}, the records are {copied:?}, not {wanted:?}"
            ));
        }
        Ok(())
    }
}

/// Copies while this replica leads, as the server does: from the stored cursor on, until a write fails.
pub async fn run(copies: Copies, replica: Replica<SimRuntime>) {
    while !copies.ended.load(Ordering::Relaxed) {
        SimRuntime::sleep(draw(|random| random.time_ms(50..400))).await;
        if replica.status().is_leader {
            copy(&copies, &replica).await;
        }
    }
}

async fn copy(copies: &Copies, replica: &Replica<SimRuntime>) {
    if replica.linearize().await.is_err() {
        return;
    }
    let (mut cursor, mut sequence) = replica.read(|state| {
        let cursor = state.peer_cursor(CLUSTER);
        (
            cursor.map_or(0, |cursor| cursor.revision),
            state.next_copy_sequence(CLUSTER),
        )
    });
    while !copies.ended.load(Ordering::Relaxed) {
        let next = cursor + 1 + draw(|random| random.below(4)).cast_signed();
        let command = Command::PeerCopy(PeerCopy {
            cluster: CLUSTER.to_owned(),
            store_id: STORE_ID,
            revision: next,
            synced: true,
            changes: (cursor + 1..=next).map(change_at).collect(),
            sequence,
            ..PeerCopy::default()
        });
        let told = replica.propose_as_leader(Proposal::system(command)).await;
        if !told.is_ok_and(|committed| committed.outcome.is_ok()) {
            return;
        }
        cursor = next;
        sequence += 1;
        SimRuntime::sleep(draw(|random| random.time_ms(20..400))).await;
    }
}

#[cfg(test)]
mod tests;
