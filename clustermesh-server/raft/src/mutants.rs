//! Planted faults, for the simulation alone: its oracle must find each of them. One at most is active in a thread.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

use clustermesh_api::etcd::rpc::CompactionRequest;
use clustermesh_core::{SnapshotLoader, State, limits::BATCH_FORMAT, pb, pb::proposal::Command};
use clustermesh_store::{LogId, Origin, ReplicaId};

use crate::{
    answer::{Answer, Committed},
    config::SNAPSHOT_CHUNK_BYTES,
};

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// An entry that was discarded is proposed again, although it may be committed.
    RetryDiscarded,
    /// A forwarded write is answered before it is applied here.
    ReplyBeforeApply,
    /// A linearizable read asks no quorum.
    ReadWithoutIndex,
    /// A snapshot holds only what a newest read sees.
    LiveKeysSnapshot,
}

thread_local! {
    static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    static OUTCOMES: RefCell<BTreeMap<(ReplicaId, u64), Committed>> = const { RefCell::new(BTreeMap::new()) };
}

/// Makes `mutant` the active fault of this thread.
pub fn plant(mutant: Option<Mutant>) {
    ACTIVE.set(mutant);
    OUTCOMES.with_borrow_mut(BTreeMap::clear);
}

pub(crate) fn is(mutant: Mutant) -> bool {
    ACTIVE.get() == Some(mutant)
}

/// Some replica has applied what others forwarded.
pub(crate) fn note(origins: &[Origin], answer: &Answer, log_id: LogId) {
    if !is(Mutant::ReplyBeforeApply) {
        return;
    }
    for origin in origins {
        let result = usize::try_from(origin.place)
            .ok()
            .and_then(|place| answer.results.get(place));
        if let Some(result) = result {
            let committed = Committed {
                outcome: result.result.clone(),
                revision: result.revision,
                compact_revision: answer.compact_revision,
                term: log_id.leader_id.term,
                index: log_id.index,
            };
            let key = (origin.replica_id, origin.request_id);
            OUTCOMES.with_borrow_mut(|outcomes| outcomes.insert(key, committed));
        }
    }
}

/// What came of a forwarded proposal, wherever it was applied.
pub(crate) fn outcome(replica_id: ReplicaId, request_id: u64) -> Option<Committed> {
    OUTCOMES.with_borrow(|outcomes| outcomes.get(&(replica_id, request_id)).cloned())
}

/// A copy of the state without what the newest read does not see.
pub(crate) fn live_keys(state: &State, term: u64) -> Option<State> {
    let mut loader = SnapshotLoader::new();
    let mut cursor = state.snapshot();
    while let Some(chunk) = cursor.next_chunk(state, SNAPSHOT_CHUNK_BYTES).ok()? {
        loader.push(chunk).ok()?;
    }
    let mut copy = loader.finish().ok()?;
    let compact = Command::Compact(CompactionRequest {
        revision: state.revision(),
        physical: false,
    });
    let batch = pb::Batch {
        format: BATCH_FORMAT,
        proposals: vec![pb::Proposal::system(compact)],
        ..pb::Batch::default()
    };
    copy.apply(&batch, term).ok()?;
    Some(copy)
}
