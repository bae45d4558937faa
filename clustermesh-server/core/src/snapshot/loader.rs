//! Builds a state from the chunks of a snapshot, trusting none of them.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use prost::Message;
use smallvec::smallvec;

use crate::{
    index::{Versions, key_of},
    keyspace::{Keyspace, visible_at},
    limits::{FEATURE_LEVEL, SNAPSHOT_FORMAT_GROUP},
    pb,
    peer::{CopyPlace, PeerCursor},
    snapshot::{SnapshotError, auth},
    state::{FIRST_REVISION, MAX_REVISION, NEVER_COMPACTED, State},
    version::{EventGroup, Revision, StoredEvent, Version, VersionNumbers},
};

/// Takes the chunks of a snapshot in order and yields the state that they describe.
#[derive(Debug, Default)]
pub struct SnapshotLoader {
    sequence: u64,
    state: Option<State>,
    /// Where the history starts.
    first_revision: i64,
    keyspace: Keyspace,
    /// Versions of the last key so far.
    last_key: Versions,
    last_lease: Option<i64>,
    counts: pb::SnapshotTrailer,
    ended: bool,
}

impl SnapshotLoader {
    /// A loader that expects the first chunk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next chunk.
    ///
    /// # Errors
    /// [`SnapshotError`] naming the chunk; the loader is of no use then.
    pub fn push(&mut self, chunk: Bytes) -> Result<(), SnapshotError> {
        let mut chunk =
            pb::SnapshotChunk::decode(chunk).map_err(|error| SnapshotError::Undecodable {
                sequence: self.sequence,
                reason: error.to_string(),
            })?;
        if chunk.format == 0 || chunk.format > SNAPSHOT_FORMAT_GROUP {
            return Err(SnapshotError::UnknownFormat {
                found: chunk.format,
                known: SNAPSHOT_FORMAT_GROUP,
            });
        }
        if self.ended {
            return Err(self.damaged("it follows the last one"));
        }
        if chunk.sequence != self.sequence {
            return Err(self.damaged(format!("it has number {}", chunk.sequence)));
        }
        match (chunk.header.take(), self.state.is_some()) {
            (Some(header), false) => self.state = Some(self.start(header)?),
            (None, true) => {}
            (Some(_), true) => return Err(self.damaged("a second header")),
            (None, false) => return Err(self.damaged("no header")),
        }
        self.counts.roles += chunk.roles.len() as u64;
        self.counts.users += chunk.users.len() as u64;
        self.counts.tokens += chunk.tokens.len() as u64;
        if let Some(state) = &mut self.state
            && let Err(reason) = auth::load(&mut state.auth, &mut chunk)
        {
            return Err(self.damaged(reason));
        }
        for lease in chunk.leases {
            self.push_lease(lease)?;
        }
        for key in chunk.keys {
            self.push_key(key)?;
        }
        if let Some(trailer) = chunk.trailer {
            if trailer != self.counts {
                return Err(self.damaged(format!(
                    "counted {:?}, the trailer says {trailer:?}",
                    self.counts
                )));
            }
            self.ended = true;
        }
        self.sequence += 1;
        Ok(())
    }

    /// The state, once the last chunk is in.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] when chunks are missing or contradict each other.
    pub fn finish(mut self) -> Result<State, SnapshotError> {
        if !self.ended {
            return Err(self.damaged("the end is missing"));
        }
        let mut state = self.state.take().ok_or_else(|| self.damaged("no header"))?;
        self.end_key();
        state.keyspace = std::mem::take(&mut self.keyspace);
        state.history = self.history(&state)?;
        for versions in state.keyspace.index().iter() {
            let lease = versions.last().map_or(0, Version::lease);
            if lease == 0 {
                continue;
            }
            let key = key_of(versions);
            if !state.leases.contains(lease) {
                let key = key.escape_ascii();
                return Err(self.damaged(format!("key {key} has an unknown lease")));
            }
            state.leases.move_key(key, 0, lease);
        }
        // Installing is rare and a replica must never serve a broken state.
        state
            .check_loaded()
            .map_err(|reason| self.damaged(reason))?;
        Ok(state)
    }

    fn damaged(&self, reason: impl Into<String>) -> SnapshotError {
        SnapshotError::Damaged {
            sequence: self.sequence,
            reason: reason.into(),
        }
    }

    fn start(&mut self, header: pb::SnapshotHeader) -> Result<State, SnapshotError> {
        let compact_revision = header.compact_revision.unwrap_or(NEVER_COMPACTED);
        let floor_revision = header.floor_revision.unwrap_or(compact_revision);
        if !(FIRST_REVISION..MAX_REVISION).contains(&header.revision)
            || compact_revision < NEVER_COMPACTED
            || compact_revision > header.revision
            || floor_revision > compact_revision
        {
            return Err(self.damaged(format!(
                "revision {}, compacted at {compact_revision}",
                header.revision
            )));
        }
        self.first_revision = header
            .history_revision
            .unwrap_or_else(|| floor_revision.max(FIRST_REVISION + 1));
        let after_recovery = compact_revision.saturating_add(1);
        if header
            .history_revision
            .is_some_and(|first| first != after_recovery)
        {
            return Err(self.damaged(format!(
                "history begins at {}, compacted at {compact_revision}",
                self.first_revision
            )));
        }
        let mut state = State::new();
        state.cluster_id = header.cluster_id;
        state.revision = header.revision;
        state.compact_revision = compact_revision;
        state.forgotten_sequence = header.forgotten_sequence;
        self.start_group(&header, &mut state)?;
        for cursor in header.cursors {
            let known = state.cursors.insert(
                cursor.cluster.clone(),
                CopyPlace {
                    cursor: PeerCursor {
                        cluster: cursor.cluster,
                        store_id: cursor.store_id,
                        revision: cursor.revision,
                        synced: cursor.synced,
                    },
                    sequence: cursor.sequence,
                },
            );
            if let Some(known) = known {
                return Err(self.damaged(format!("two cursors of {}", known.cursor.cluster)));
            }
        }
        Ok(state)
    }

    fn start_group(
        &self,
        header: &pb::SnapshotHeader,
        state: &mut State,
    ) -> Result<(), SnapshotError> {
        if header.feature_level > FEATURE_LEVEL {
            return Err(SnapshotError::UnknownFeatureLevel {
                found: header.feature_level,
                known: FEATURE_LEVEL,
            });
        }
        state.group.feature_level = header.feature_level;
        if let Some(auth) = &header.auth {
            state.auth.enabled = auth.enabled;
            state.auth.revision = auth.revision;
            state.auth.seeded = auth.seeded;
        }
        for alarm in &header.alarms {
            if alarm.kind() == pb::AlarmKind::None {
                return Err(self.damaged(format!("an alarm of kind {}", alarm.kind)));
            }
            state
                .group
                .alarms
                .raise(alarm.kind(), alarm.member_id)
                .map_err(|error| self.damaged(error.to_string()))?;
        }
        state.group.removed_members = header.removed_members.iter().copied().collect();
        state
            .group
            .downgrade_target
            .clone_from(&header.downgrade_target);
        Ok(())
    }

    fn push_lease(&mut self, lease: pb::SnapshotLease) -> Result<(), SnapshotError> {
        if lease.id == 0 || self.last_lease.is_some_and(|last| last >= lease.id) {
            return Err(self.damaged(format!("lease {} is out of order", lease.id)));
        }
        self.last_lease = Some(lease.id);
        self.counts.leases += 1;
        if let Some(state) = &mut self.state {
            state.leases.restore(lease.id, lease.granted_ttl_seconds);
        }
        Ok(())
    }

    /// Nothing more of the last key will come.
    fn end_key(&mut self) {
        let versions = std::mem::take(&mut self.last_key);
        if !versions.is_empty() {
            self.keyspace.push_last(versions);
        }
    }

    fn push_key(&mut self, entry: pb::SnapshotKey) -> Result<(), SnapshotError> {
        let name = entry.key.escape_ascii();
        let order = key_of(&self.last_key).cmp(&entry.key);
        if entry.key.is_empty() || order.is_gt() {
            return Err(self.damaged(format!("key {name} is out of order")));
        }
        if entry.versions.is_empty() {
            return Err(self.damaged(format!("key {name} has no version")));
        }
        if order.is_lt() {
            self.end_key();
            self.counts.keys += 1;
        }
        let newest_revision = self.state.as_ref().map_or(0, State::revision);
        for version in entry.versions {
            let last = self.last_key.last();
            if !follows(last, &version, newest_revision) {
                return Err(self.damaged(format!("versions of key {name} contradict each other")));
            }
            self.last_key.push(stored(&entry.key, &version));
            self.counts.versions += 1;
        }
        Ok(())
    }

    /// History is the index, read by revision.
    fn history(&self, state: &State) -> Result<VecDeque<Arc<EventGroup>>, SnapshotError> {
        let first = self.first_revision;
        let count = usize::try_from(state.revision - first + 1).unwrap_or(0);
        // With the revision at hand: events lie all over the memory.
        let mut changes: Vec<(Revision, StoredEvent)> = Vec::new();
        for versions in state.keyspace.index().iter() {
            for version in versions {
                let revision = version.mod_revision();
                if revision < first {
                    continue;
                }
                let prev = visible_at(versions, revision - 1)
                    .filter(|_| revision > state.compact_revision)
                    .cloned();
                let event = StoredEvent::new(version.clone(), prev);
                changes.push((version.revision(), event));
            }
        }
        changes.sort_unstable_by_key(|(revision, _)| *revision);
        let mut groups: Vec<EventGroup> = Vec::new();
        for (Revision { main: revision, .. }, event) in changes {
            match groups.last_mut() {
                Some(group) if group.revision == revision => group.events.push(event),
                _ => groups.push(EventGroup {
                    revision,
                    events: smallvec![event],
                }),
            }
        }
        // All lie between the first and the newest revision, so the right number means no hole.
        if groups.len() != count {
            return Err(self.damaged(format!("history has {} revisions of {count}", groups.len())));
        }
        let shrunk = groups.into_iter().map(|mut group| {
            group.events.shrink_to_fit();
            Arc::new(group)
        });
        Ok(shrunk.collect())
    }
}

/// Whether a version has possible numbers and comes after `last`.
fn follows(last: Option<&Version>, version: &pb::SnapshotVersion, newest_revision: i64) -> bool {
    let revision = revision_of(version);
    let possible = 1..=version.mod_revision;
    let numbers_fit = version.version == 0
        || (possible.contains(&version.version) && possible.contains(&version.create_revision));
    numbers_fit
        && (1..=newest_revision).contains(&version.mod_revision)
        && last.is_none_or(|last| last.revision() < revision)
}

fn revision_of(version: &pb::SnapshotVersion) -> Revision {
    Revision {
        main: version.mod_revision,
        sub: version.sub,
    }
}

fn stored(key: &[u8], version: &pb::SnapshotVersion) -> Version {
    let revision = revision_of(version);
    if version.version == 0 {
        return Version::tombstone(key, revision);
    }
    let numbers = VersionNumbers {
        revision,
        create_revision: version.create_revision,
        version: version.version,
        lease: version.lease,
    };
    Version::put(key, &version.value, numbers)
}
