//! Builds a state from the chunks of a snapshot, trusting none of them.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use prost::Message;
use smallvec::SmallVec;

use crate::{
    index::{Versions, key_of},
    keyspace::{Keyspace, visible_at},
    limits::{FEATURE_LEVEL, SNAPSHOT_FORMAT_GROUP},
    pb,
    peer::{CopyPlace, PeerCursor},
    snapshot::{SnapshotError, auth},
    state::{FIRST_REVISION, MAX_REVISION, NEVER_COMPACTED, State, check_versions},
    version::{EventGroup, Revision, StoredEvent, Version, VersionNumbers},
};

/// Takes the chunks of a snapshot in order and yields the state that they describe.
#[derive(Debug, Default)]
pub struct SnapshotLoader {
    sequence: u64,
    state: Option<State>,
    /// Where the history starts.
    first_revision: i64,
    /// What the index was dropped up to.
    floor_revision: i64,
    /// What the history is made of, in the order of keys, each with its revision: events lie all over the memory.
    changes: Vec<(i64, StoredEvent)>,
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
        self.end_key()?;
        let mut state = self.state.take().ok_or_else(|| self.damaged("no header"))?;
        state.keyspace = std::mem::take(&mut self.keyspace);
        state.history = self.history(state.revision)?;
        // Installing is rare and a replica must never serve a broken state. Keys were checked as they came.
        state
            .check_history()
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
        self.floor_revision = if self.first_revision > header.revision {
            compact_revision
        } else {
            compact_revision.min(self.first_revision)
        };
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

    /// Nothing more of the last key will come: it is checked, attached and noted for the history while it is at hand.
    fn end_key(&mut self) -> Result<(), SnapshotError> {
        let versions = std::mem::take(&mut self.last_key);
        let (Some(newest), Some(state)) = (versions.last(), &mut self.state) else {
            return Ok(());
        };
        let lease = newest.lease();
        let checked = check_versions(&versions, self.floor_revision, state.revision);
        let checked = checked.and_then(|()| {
            if lease == 0 || state.leases.contains(lease) {
                return Ok(());
            }
            let key = key_of(&versions).escape_ascii();
            Err(format!("key {key} has an unknown lease"))
        });
        if let Err(reason) = checked {
            return Err(self.damaged(reason));
        }
        state.leases.move_key(key_of(&versions), 0, lease);
        for version in &versions {
            let revision = version.mod_revision();
            if revision < self.first_revision {
                continue;
            }
            let prev = visible_at(&versions, revision - 1)
                .filter(|_| revision > state.compact_revision)
                .cloned();
            self.changes
                .push((revision, StoredEvent::new(version.clone(), prev)));
        }
        self.keyspace.push_last(versions);
        Ok(())
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
            self.end_key()?;
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
    fn history(&mut self, newest: i64) -> Result<VecDeque<Arc<EventGroup>>, SnapshotError> {
        let changes = std::mem::take(&mut self.changes);
        let first = self.first_revision;
        let revisions = usize::try_from(newest - first + 1).unwrap_or(0);
        // Before memory is taken for what a header claims.
        if changes.len() < revisions {
            let changes = changes.len();
            return Err(self.damaged(format!("{revisions} revisions have {changes} changes")));
        }
        let place = |revision: i64| usize::try_from(revision - first).unwrap_or(usize::MAX);
        let mut sizes = vec![0_usize; revisions];
        for (revision, _) in &changes {
            match sizes.get_mut(place(*revision)) {
                Some(size) => *size += 1,
                None => return Err(self.damaged(format!("a change of revision {revision}"))),
            }
        }
        let missing = sizes.iter().filter(|size| **size == 0).count();
        if missing > 0 {
            return Err(self.damaged(format!("history lacks {missing} of {revisions} revisions")));
        }
        let mut groups: Vec<SmallVec<[StoredEvent; 1]>> =
            sizes.into_iter().map(SmallVec::with_capacity).collect();
        for (revision, event) in changes {
            if let Some(events) = groups.get_mut(place(revision)) {
                events.push(event);
            }
        }
        let group = |(revision, mut events): (i64, SmallVec<[StoredEvent; 1]>)| {
            if events.len() > 1 {
                events.sort_unstable_by_key(|event| event.kv().sub());
            }
            Arc::new(EventGroup { revision, events })
        };
        Ok((first..).zip(groups).map(group).collect())
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
