//! Writes changes of one peer's copy, with its cursor, in entries of bounded size.

use clustermesh_core::limits::NUMBERED_FORGETS_LEVEL;
use clustermesh_core::pb::{PeerChange as WireChange, PeerCopy};
use clustermesh_mesh::peering::PeerChange;
use tonic::Status;

use super::Shared;
use crate::metrics::ClusterLabels;

/// Bytes of keys and values of one log entry's copy.
const MAX_COPY_BYTES: usize = 1 << 20;

/// The copy's cursor and the way to move it.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    shared: &'a Shared,
    cluster: String,
    store_id: u64,
    revision: i64,
    synced: bool,
    /// Number of the next step: who else has written since, this one among them, makes it refused. 0 while not all replicas know numbers.
    sequence: u64,
    /// Where no number guards a step, the replica must lead as it did at the beginning.
    term: Option<u64>,
}

/// The judge keeps to the quota; what is applied keeps to it but for one entry's worth, which may put before the next
/// one deletes. A record has at least a byte.
const fn with_slack(limit: usize) -> u64 {
    limit.saturating_add(MAX_COPY_BYTES) as u64
}

impl<'a> Writer<'a> {
    /// Where the stored cursor stands, at nothing when there is none.
    ///
    /// # Errors
    /// No leader: what others copied before may not be known here.
    pub(super) async fn new(shared: &'a Shared, cluster: &str) -> Result<Self, Status> {
        let term = shared.store.leading_term();
        shared.store.linearize().await?;
        let (cursor, sequence) = shared.store.read(|state| {
            let cursor = state.peer_cursor(cluster).cloned();
            (cursor, state.next_copy_sequence(cluster))
        });
        let (store_id, revision, synced) = cursor.map_or((0, 0, false), |cursor| {
            (cursor.store_id, cursor.revision, cursor.synced)
        });
        Ok(Self {
            shared,
            cluster: cluster.to_owned(),
            store_id,
            revision,
            synced,
            sequence,
            term,
        })
    }

    pub(super) fn store_id(&self) -> u64 {
        self.store_id
    }

    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    pub(super) fn is_synced(&self) -> bool {
        self.synced
    }

    /// What is written from here on is a part of a copy that is not complete.
    pub(super) fn unsync(&mut self) {
        self.synced = false;
    }

    /// A listing of `store_id` at `revision` begins: until its end the copy equals no revision of the peer.
    pub(super) fn begin(&mut self, store_id: u64, revision: i64) {
        self.store_id = store_id;
        self.revision = revision;
        self.synced = false;
    }

    /// Writes changes; the cursor stays.
    pub(super) async fn write(&mut self, changes: Vec<PeerChange>) -> Result<(), Status> {
        if changes.is_empty() {
            return Ok(());
        }
        self.commit(changes, self.revision, self.synced).await
    }

    /// Writes changes that bring the copy to `revision`; complete from then on if `synced`.
    pub(super) async fn advance(
        &mut self,
        changes: Vec<PeerChange>,
        revision: i64,
        synced: bool,
    ) -> Result<(), Status> {
        if changes.is_empty() && revision == self.revision && synced == self.synced {
            return Ok(());
        }
        self.commit(changes, revision, synced).await
    }

    /// The last part carries the new cursor: a reader that sees it has seen all.
    async fn commit(
        &mut self,
        changes: Vec<PeerChange>,
        revision: i64,
        synced: bool,
    ) -> Result<(), Status> {
        let mut parts: Vec<Vec<WireChange>> = vec![Vec::new()];
        let mut bytes = 0;
        for PeerChange { key, value } in changes {
            let size = key.len() + value.as_ref().map_or(0, bytes::Bytes::len);
            if bytes + size > MAX_COPY_BYTES && bytes > 0 {
                parts.push(Vec::new());
                bytes = 0;
            }
            bytes += size;
            if let Some(part) = parts.last_mut() {
                part.push(WireChange { key, value });
            }
        }
        let last = parts.len() - 1;
        for (index, changes) in parts.into_iter().enumerate() {
            let (revision, synced) = if index == last {
                (revision, synced)
            } else {
                (self.revision, self.synced)
            };
            if self.sequence == 0 {
                self.check_term()?;
            }
            let written = self
                .shared
                .store
                .peer_copy(PeerCopy {
                    cluster: self.cluster.clone(),
                    store_id: self.store_id,
                    revision,
                    synced,
                    changes,
                    max_records: with_slack(self.shared.quota.records_max),
                    max_bytes: with_slack(self.shared.quota.bytes_max),
                    sequence: self.sequence,
                })
                .await?;
            if self.sequence != 0 {
                self.sequence = self.sequence.saturating_add(1);
            }
            self.metrics(written, revision, synced);
        }
        self.revision = revision;
        self.synced = synced;
        Ok(())
    }

    /// Drops the cursor: the copy is at its end.
    pub(super) async fn forget(self) -> Result<(), Status> {
        let level = self
            .shared
            .store
            .read(clustermesh_core::State::feature_level);
        // Steps have had numbers one level longer than what ends them.
        if level < NUMBERED_FORGETS_LEVEL {
            self.check_term()?;
        }
        self.shared
            .store
            .peer_forget(self.cluster, self.sequence)
            .await
    }

    fn check_term(&self) -> Result<(), Status> {
        if self.shared.store.leading_term() != self.term {
            return Err(Status::aborted(
                "another replica has led since this copy began",
            ));
        }
        Ok(())
    }

    fn metrics(&self, written: usize, revision: i64, synced: bool) {
        let labels = ClusterLabels {
            cluster: self.cluster.clone(),
        };
        let metrics = &self.shared.metrics;
        metrics
            .changes
            .get_or_create(&labels)
            .inc_by(written as u64);
        metrics.revision.get_or_create(&labels).set(revision);
        metrics.synced.get_or_create(&labels).set(i64::from(synced));
    }
}
