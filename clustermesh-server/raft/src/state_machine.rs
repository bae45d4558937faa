//! Applies log entries to the state, and takes and installs its snapshots.

use std::{
    io,
    sync::{Arc, atomic::AtomicBool},
};

use clustermesh_core::{
    ApplyError, SnapshotError, SnapshotLoader, State, limits::BATCH_FORMAT, pb,
    pb::proposal::Command,
};
use clustermesh_store::{
    LogId, Membership, ReplicaId, SnapshotFile, SnapshotMeta, SnapshotStore, StoreError,
    StoredMembership,
};
use futures_util::{Stream, TryStreamExt};
use openraft::{
    EntryPayload, OptionalSend,
    async_runtime::{AsyncRuntime, Mpsc, MpscSender},
    entry::RaftEntry,
    storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine},
    type_config::alias::SnapshotOf,
};
use parking_lot::{Mutex, RwLock};
use prost::Message;

use crate::{
    Types,
    answer::{Answer, Committed},
    config::SNAPSHOT_CHUNK_BYTES,
    contact::Contact,
    error::{EntryError, ProposeError, StartError},
    group::GroupView,
    hash_kv::keep_compaction_hash,
    hashes::Hashes,
    lease::LeaseKeeper,
    metrics::{Metrics, add},
    pending::Pending,
    proposal::Waiting,
    shared::{Applied, Reports, Shared},
    watch::Publication,
};

pub(crate) struct StateMachine<R: AsyncRuntime> {
    shared: Arc<Shared<R>>,
    snapshots: SnapshotStore,
    /// The newest snapshot that is valid.
    current: Arc<Mutex<Option<SnapshotFile>>>,
    hub: <R::Mpsc as Mpsc>::Sender<Publication>,
}

/// Reads a snapshot into a state.
pub(crate) fn load(snapshot: &SnapshotFile) -> Result<State, StartError> {
    Ok(read(snapshot)??)
}

/// Reads a snapshot to its end, whatever is in it: a file that is damaged is no answer to the question what it holds.
fn read(snapshot: &SnapshotFile) -> Result<Result<State, SnapshotError>, StoreError> {
    let mut loader = SnapshotLoader::new();
    let mut chunks = snapshot.read()?;
    while let Some(chunk) = chunks.next() {
        if let Err(error) = loader.push(chunk?) {
            for rest in chunks {
                rest?;
            }
            return Ok(Err(error));
        }
    }
    Ok(loader.finish())
}

/// Ids that leave the membership are never used again. Every replica sees this entry, so the state may change with it.
pub(crate) fn remove_gone(
    applied: &mut Applied,
    membership: &Membership,
    log_id: LogId,
) -> Result<(), ApplyError> {
    let gone = |id: &ReplicaId| membership.get_node(id).is_none();
    let before = applied.membership.nodes().map(|(id, _)| *id);
    let proposals: Vec<_> = before
        .filter(gone)
        .map(|member_id| {
            pb::Proposal::system(Command::MemberRemoved(pb::MemberRemoved { member_id }))
        })
        .collect();
    if proposals.is_empty() {
        return Ok(());
    }
    let batch = pb::Batch {
        format: BATCH_FORMAT,
        proposals,
        ..pb::Batch::default()
    };
    applied.state.apply(&batch, log_id.leader_id.term).map(drop)
}

impl<R: AsyncRuntime> StateMachine<R> {
    /// The state of the newest valid snapshot, or an empty one.
    pub(crate) fn open(
        snapshots: SnapshotStore,
        metrics: Arc<Metrics>,
        hub: <R::Mpsc as Mpsc>::Sender<Publication>,
        reports: Reports<R>,
        own: ReplicaId,
        first_request_id: u64,
    ) -> Result<Self, StartError> {
        let (current, state, meta) = match snapshots.newest_with(read)? {
            Some((snapshot, state)) => {
                let meta = snapshot.meta().clone();
                (Some(snapshot), state?, meta)
            }
            None => (None, State::new(), SnapshotMeta::default()),
        };
        let applied = Applied::new(state, meta);
        let shared = Arc::new(Shared {
            group: GroupView::new(&applied.state, own),
            diverged: AtomicBool::new(false),
            hashes: Hashes::new(snapshots.is_memory()),
            applied: RwLock::new(applied),
            leases: LeaseKeeper::new(),
            pending: Arc::new(Pending::new(own, first_request_id)),
            contact: Contact::new(),
            metrics,
            reports,
        });
        let current = Arc::new(Mutex::new(current));
        Ok(Self {
            shared,
            snapshots,
            current,
            hub,
        })
    }

    pub(crate) fn shared(&self) -> Arc<Shared<R>> {
        self.shared.clone()
    }

    pub(crate) fn last_applied(&self) -> Option<LogId> {
        self.shared.applied.read().last
    }

    fn apply_entry(
        &self,
        entry: &clustermesh_store::Entry,
    ) -> Result<(Answer, Option<Publication>), EntryError> {
        let log_id = entry.log_id();
        let batch = match &entry.payload {
            EntryPayload::Normal(command) => {
                let batch = pb::Batch::decode(command.batch.clone())
                    .map_err(|reason| EntryError::Decode { log_id, reason })?;
                add(
                    &self.shared.metrics.entry_bytes_applied_total,
                    command.batch.len(),
                );
                Some((batch, command.batch.len() as u64))
            }
            EntryPayload::Blank | EntryPayload::Membership(_) => None,
        };
        let mut applied = self.shared.applied.write();
        let mut answer = Answer::default();
        let mut publication = None;
        if let Some((batch, bytes)) = batch {
            let done = applied
                .state
                .apply(&batch, log_id.leader_id.term)
                .map_err(|reason| EntryError::Apply { log_id, reason })?;
            self.shared.leases.observe(&batch, &done.outcomes);
            self.shared.group.follow(&applied.state, done.auth_changed);
            if let Some(cursor) = done.compaction_hash {
                keep_compaction_hash(&self.shared, cursor);
            }
            applied.log_bytes += bytes;
            applied.group_changes += u64::from(done.alarms_changed);
            if batch
                .proposals
                .iter()
                .any(pb::Proposal::may_change_beside_keys)
            {
                applied.beside_keys_since = log_id.index;
            }
            if !done.groups.is_empty() || !done.cursors.is_empty() {
                applied.sequence += 1;
                publication = Some(Publication::Applied {
                    sequence: applied.sequence,
                    groups: done.groups,
                    cursors: done.cursors,
                });
            }
            answer = Answer {
                results: done.outcomes,
                compact_revision: applied.state.compact_revision(),
            };
        }
        if let EntryPayload::Membership(membership) = &entry.payload {
            remove_gone(&mut applied, membership, log_id)
                .map_err(|reason| EntryError::Apply { log_id, reason })?;
            applied.membership = StoredMembership::new(Some(log_id), membership.clone());
            applied.beside_keys_since = log_id.index;
            applied.group_changes += 1;
        }
        applied.last = Some(log_id);
        add(&self.shared.metrics.entries_applied_total, 1);
        Ok((answer, publication))
    }

    async fn publish(&self, publication: Publication) -> Result<(), io::Error> {
        self.hub
            .send(publication)
            .await
            .map_err(|_| io::Error::other("the watch hub has stopped"))
    }
}

impl<R: AsyncRuntime> RaftStateMachine<Types<R>> for StateMachine<R> {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder<R>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.shared.applied.read();
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<Types<R>>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let (answer, publication) = self.apply_entry(&entry)?;
            #[cfg(feature = "mutants")]
            if let EntryPayload::Normal(command) = &entry.payload {
                crate::mutants::note(&command.origins, &answer, entry.log_id());
            }
            let forwarded = match &entry.payload {
                EntryPayload::Normal(command) => self.shared.pending.take(&command.origins),
                EntryPayload::Blank | EntryPayload::Membership(_) => Vec::new(),
            };
            if let Some(publication) = publication {
                self.publish(publication).await?;
            }
            self.shared.report();
            answer_forwarded(forwarded, &answer, entry.log_id());
            if let Some(responder) = responder {
                responder.send(answer);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder<R> {
        SnapshotBuilder {
            shared: self.shared.clone(),
            snapshots: self.snapshots.clone(),
            current: self.current.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> Result<(), io::Error> {
        let state = if self.snapshots.is_memory() {
            load(&snapshot)
        } else {
            let snapshot = snapshot.clone();
            R::spawn_blocking(move || load(&snapshot)).await?
        }
        .map_err(io::Error::other)?;
        let sequence = {
            let mut applied = self.shared.applied.write();
            applied.state = state;
            applied.last = meta.last_log_id;
            applied.membership = meta.last_membership.clone();
            applied.sequence += 1;
            applied.group_changes += 1;
            applied.log_bytes = 0;
            applied.beside_keys_since = meta.last_log_id.map_or(0, |last| last.index);
            self.shared.leases.replace(&applied.state);
            self.shared.group.follow(&applied.state, true);
            self.shared.hashes.forget();
            applied.sequence
        };
        *self.current.lock() = Some(snapshot);
        self.publish(Publication::Replaced { sequence }).await?;
        self.shared.report();
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<SnapshotOf<Types<R>, SnapshotFile>>, io::Error> {
        Ok(self.current.lock().clone().map(with_meta::<R>))
    }
}

fn with_meta<R: AsyncRuntime>(snapshot: SnapshotFile) -> SnapshotOf<Types<R>, SnapshotFile> {
    openraft::Snapshot {
        meta: snapshot.meta().clone(),
        snapshot,
    }
}

/// Tells those whose proposals this replica forwarded: it has applied them now.
fn answer_forwarded<R: AsyncRuntime>(
    forwarded: Vec<(u32, Waiting<R>)>,
    answer: &Answer,
    log_id: LogId,
) {
    for (place, waiting) in forwarded {
        let result = usize::try_from(place)
            .ok()
            .and_then(|place| answer.results.get(place));
        let told = result.map_or(Err(ProposeError::Unknown), |result| {
            Ok(Committed {
                outcome: result.result.clone(),
                revision: result.revision,
                compact_revision: answer.compact_revision,
                term: log_id.leader_id.term,
                index: log_id.index,
            })
        });
        waiting.tell(told);
    }
}

/// Takes a snapshot of the state as it is when building begins.
pub(crate) struct SnapshotBuilder<R: AsyncRuntime> {
    shared: Arc<Shared<R>>,
    snapshots: SnapshotStore,
    current: Arc<Mutex<Option<SnapshotFile>>>,
}

fn build<R: AsyncRuntime>(
    shared: &Shared<R>,
    snapshots: &SnapshotStore,
) -> Result<(SnapshotFile, u64), StoreError> {
    // A snapshot that was installed meanwhile replaces the state under the cursor: then begin anew.
    loop {
        let (mut cursor, meta, log_bytes) = {
            let applied = shared.applied.read();
            let meta = SnapshotMeta {
                last_log_id: applied.last,
                last_membership: applied.membership.clone(),
            };
            (applied.state.snapshot(), meta, applied.log_bytes)
        };
        #[cfg(feature = "mutants")]
        if crate::mutants::is(crate::mutants::Mutant::LiveKeysSnapshot) {
            let applied = shared.applied.read();
            let term = applied.last.map_or(0, |last| last.leader_id.term);
            if let Some(copy) = crate::mutants::live_keys(&applied.state, term) {
                let mut writer = snapshots.create(meta)?;
                let mut cursor = copy.snapshot();
                while let Ok(Some(chunk)) = cursor.next_chunk(&copy, SNAPSHOT_CHUNK_BYTES) {
                    writer.chunk(chunk)?;
                }
                return Ok((writer.finish()?, log_bytes));
            }
        }
        let mut writer = snapshots.create(meta)?;
        loop {
            // The lock is held for one chunk, so that apply is not kept waiting.
            let chunk = cursor.next_chunk(&shared.applied.read().state, SNAPSHOT_CHUNK_BYTES);
            match chunk {
                Ok(Some(chunk)) => writer.chunk(chunk)?,
                Ok(None) => return Ok((writer.finish()?, log_bytes)),
                Err(error) => {
                    tracing::info!(%error, "snapshot begins anew");
                    break;
                }
            }
        }
    }
}

impl<R: AsyncRuntime> RaftSnapshotBuilder<Types<R>> for SnapshotBuilder<R> {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<Types<R>, SnapshotFile>, io::Error> {
        let (shared, snapshots) = (self.shared.clone(), self.snapshots.clone());
        let built = if self.snapshots.is_memory() {
            build(&shared, &snapshots)
        } else {
            R::spawn_blocking(move || build(&shared, &snapshots)).await?
        };
        match built {
            Ok((snapshot, log_bytes)) => {
                let mut applied = self.shared.applied.write();
                applied.log_bytes = applied.log_bytes.saturating_sub(log_bytes);
                drop(applied);
                *self.current.lock() = Some(snapshot.clone());
                add(&self.shared.metrics.snapshots_total, 1);
                self.shared.report();
                Ok(with_meta::<R>(snapshot))
            }
            Err(error) => {
                add(&self.shared.metrics.snapshot_failures_total, 1);
                self.shared.report();
                Err(error.into())
            }
        }
    }
}

#[cfg(test)]
mod tests;
