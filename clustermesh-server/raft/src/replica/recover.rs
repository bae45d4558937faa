//! A new group from the data of one replica, when the majority of the old one is gone for good.

use std::{collections::BTreeMap, path::Path};

use clustermesh_core::State;
use clustermesh_store::{
    DataDir, Identity, LogId, Membership, Node, ReplicaId, SledLog, SnapshotFile, SnapshotMeta,
    SnapshotStore, StoreError, StoredMembership, Vote,
};
use openraft::{
    EntryPayload,
    async_runtime::AsyncRuntime,
    entry::RaftEntry,
    storage::{RaftLogReader, RaftLogStorage},
};
use prost::Message;

use super::Replica;
use crate::{
    Answer,
    config::SNAPSHOT_CHUNK_BYTES,
    error::StartError,
    identity::random_id,
    shared::Applied,
    state_machine::{load, remove_gone},
};

/// What the revision grows by: clients of the old group have seen none so high.
pub const REVISION_BUMP: i64 = 1_000_000_000;
/// Entries read from the log at once.
const READ_ENTRIES: u64 = 256;

fn storage(error: impl std::fmt::Display) -> StartError {
    StartError::Raft(error.to_string())
}

/// The state of a replica's newest snapshot, and all that its log adds: also the last entries. What it knows to be committed is written down
/// later than it is acknowledged, so that would be too little.
pub(crate) async fn recover_state<R: AsyncRuntime>(
    log: &mut SledLog<R, Answer>,
    newest: Option<&SnapshotFile>,
) -> Result<Applied, StartError> {
    let (state, meta) = match newest {
        Some(snapshot) => (load(snapshot)?, snapshot.meta().clone()),
        None => (State::new(), SnapshotMeta::default()),
    };
    let mut applied = Applied::new(state, meta);
    let state = log.get_log_state().await.map_err(storage)?;
    let last = state.last_log_id;
    let end = last.map_or(0, |last| last.index + 1);
    loop {
        let next = applied.last.map_or(0, |last| last.index + 1);
        let upto = end.min(next + READ_ENTRIES);
        let entries = log
            .try_get_log_entries(next..upto.max(next))
            .await
            .map_err(storage)?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            let log_id = entry.log_id();
            if log_id.index != applied.last.map_or(0, |last| last.index + 1) {
                return Err(StartError::Gap {
                    purged: log_id,
                    snapshot: format!("{:?}", applied.last),
                });
            }
            match &entry.payload {
                EntryPayload::Normal(command) => {
                    let batch = clustermesh_core::pb::Batch::decode(command.batch.clone())
                        .map_err(storage)?;
                    let term = log_id.leader_id.term;
                    applied.state.apply(&batch, term).map_err(storage)?;
                }
                EntryPayload::Membership(membership) => {
                    remove_gone(&mut applied, membership, log_id).map_err(storage)?;
                    applied.membership = StoredMembership::new(Some(log_id), membership.clone());
                }
                EntryPayload::Blank => {}
            }
            applied.last = Some(log_id);
        }
    }
    Ok(applied)
}

/// The only snapshot in folder `path`, of a group of `nodes`.
pub(crate) fn write_snapshot(
    path: &Path,
    state: &State,
    last: Option<LogId>,
    nodes: BTreeMap<ReplicaId, Node>,
) -> Result<(), StartError> {
    let voters = nodes.keys().copied().collect();
    let membership = Membership::new(vec![voters], nodes).map_err(storage)?;
    let meta = SnapshotMeta {
        last_log_id: last,
        last_membership: StoredMembership::new(last, membership),
    };
    let mut writer = SnapshotStore::folder(path)?.create(meta)?;
    let mut cursor = state.snapshot();
    while let Some(chunk) = cursor.next_chunk(state, SNAPSHOT_CHUNK_BYTES)? {
        writer.chunk(chunk)?;
    }
    writer.finish()?;
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<(), StartError> {
    std::fs::rename(from, to).map_err(|source| {
        StartError::Store(StoreError::Io {
            action: "rename",
            path: from.to_owned(),
            source,
        })
    })
}

/// A log of no entries: terms go on from the old ones, since the next entry must come after the last.
pub(crate) async fn write_empty_log<R: AsyncRuntime>(
    path: &Path,
    last: Option<LogId>,
    replica_id: ReplicaId,
) -> Result<(), StartError> {
    let mut log = SledLog::<R, Answer>::open(path)?;
    let term = last.map_or(0, |last| last.leader_id.term);
    log.save_vote(&Vote::new(term, replica_id))
        .await
        .map_err(storage)?;
    close(log).await;
    Ok(())
}

/// Its folder may be opened again, or moved, afterwards.
pub(crate) async fn close<R: AsyncRuntime>(log: SledLog<R, Answer>) {
    let closed = log.closed();
    drop(log);
    while !closed.is_closed() {
        R::sleep(std::time::Duration::from_millis(1)).await;
    }
}

impl<R: AsyncRuntime> Replica<R> {
    /// Makes a group of one of the data in `path`: new ids of the group and of the replica, a revision that no client has seen, everything below it
    /// compacted. Only for a group whose majority is lost for good: what this replica has not is lost, and no other replica of the old group may
    /// run again. All of its log is taken, also the last entries, of which nobody can know whether they were committed. The old log and
    /// snapshots stay beside the new ones, under `before-<group id>`.
    ///
    /// # Errors
    /// [`StartError`]: the folder holds no replica, or cannot be read or written.
    pub async fn force_new_cluster(
        path: &Path,
        cluster_name: &str,
        node: Node,
    ) -> Result<(), StartError> {
        let mut data_dir = DataDir::open(path, cluster_name)?;
        let mut log = SledLog::<R, Answer>::open(&data_dir.log_path())?;
        let snapshots = SnapshotStore::folder(&data_dir.snapshots_path())?;
        let newest = snapshots.newest()?;
        let Applied {
            mut state, last, ..
        } = recover_state(&mut log, newest.as_ref()).await?;
        let old = state.cluster_id();
        let (replica_id, cluster_id) = (random_id::<R>(), random_id::<R>());
        let before = state.revision();
        state.recover(cluster_id, REVISION_BUMP).map_err(storage)?;
        let revision = state.revision();
        let fresh = path.join("snapshots.new");
        write_snapshot(&fresh, &state, last, [(replica_id, node)].into())?;

        close(log).await;
        let aside = path.join(format!("before-{old:016x}"));
        std::fs::create_dir_all(&aside).map_err(|source| StoreError::Io {
            action: "create folder",
            path: aside.clone(),
            source,
        })?;
        rename(&data_dir.log_path(), &aside.join("log"))?;
        rename(&data_dir.snapshots_path(), &aside.join("snapshots"))?;
        rename(&fresh, &data_dir.snapshots_path())?;
        write_empty_log::<R>(&data_dir.log_path(), last, replica_id).await?;
        data_dir.set_identity(Identity {
            replica_id,
            cluster_name: cluster_name.to_owned(),
            cluster_id,
        })?;
        tracing::warn!(
            old_cluster_id = %format_args!("{old:016x}"),
            cluster_id = %format_args!("{cluster_id:016x}"),
            before,
            revision,
            "a new group begins from this replica's data"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests;
