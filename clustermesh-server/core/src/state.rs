//! The replicated state and its views for readers.

mod invariants;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use clustermesh_api::etcd::mvcc::KeyValue;
use clustermesh_api::etcd::rpc::{RangeRequest, RangeResponse, TxnRequest, TxnResponse};

use crate::{
    auth::{Access, Actor, Auth},
    check,
    error::{Compacted, KvError},
    group::Group,
    hash::Fnv64,
    keyspace::{Keyspace, visible_at},
    lease::{LeaseTable, LeaseView},
    limits::{LEASE_OVERHEAD_BYTES, NUMBERED_COPIES_LEVEL},
    pb::MemberAlarm,
    peer::{CopyPlace, PeerCursor, PeerUsage},
    pin::Pins,
    range::ReadView,
    txn::Plan,
    version::{EventGroup, Version},
};

pub(crate) use invariants::check_versions;

/// Revision of an empty store: the first write gets 2, as in etcd.
pub(crate) const FIRST_REVISION: i64 = 1;

/// No store comes near: a higher revision is damage, and counting on from it would overflow.
pub(crate) const MAX_REVISION: i64 = i64::MAX / 2;

/// Compact revision before the first compaction, as in etcd: a compaction at 0 succeeds once.
pub(crate) const NEVER_COMPACTED: i64 = -1;

/// What every replica holds: keys with their history, leases, the group's identity and the cursors of peers.
#[derive(Debug)]
pub struct State {
    pub(crate) cluster_id: u64,
    pub(crate) revision: i64,
    pub(crate) compact_revision: i64,
    pub(crate) keyspace: Keyspace,
    /// One group for each revision to the newest, without holes, from the compact revision or the first one; from an earlier one while compacted
    /// groups are still to be dropped; from the one after the compact revision after a recovery, which made that revision without a change. The index holds what readers from the first group's revision on can see.
    pub(crate) history: VecDeque<Arc<EventGroup>>,
    pub(crate) leases: LeaseTable,
    pub(crate) cursors: BTreeMap<String, CopyPlace>,
    /// Largest number of a step of a copy whose cursor is gone: a new copy goes on after it, so that nothing made of the old one fits.
    pub(crate) forgotten_sequence: u64,
    pub(crate) auth: Auth,
    pub(crate) group: Group,
    /// Running snapshots and hashes; compaction gives them what they still need.
    pub(crate) pins: Pins,
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// An empty store: revision 1, no cluster id.
    #[must_use]
    pub fn new() -> Self {
        Self {
            cluster_id: 0,
            revision: FIRST_REVISION,
            compact_revision: NEVER_COMPACTED,
            keyspace: Keyspace::default(),
            history: VecDeque::new(),
            leases: LeaseTable::default(),
            cursors: BTreeMap::new(),
            forgotten_sequence: 0,
            auth: Auth::default(),
            group: Group::default(),
            pins: Pins::default(),
        }
    }

    /// Id of the group; 0 before its first entry.
    #[must_use]
    pub const fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    /// Newest main revision.
    #[must_use]
    pub const fn revision(&self) -> i64 {
        self.revision
    }

    /// Revision of the last compaction; 0 when there was none. Reads and watches may start there, not below.
    #[must_use]
    pub const fn compact_revision(&self) -> i64 {
        if self.compact_revision < 0 {
            0
        } else {
            self.compact_revision
        }
    }

    /// Bytes of all stored versions, live and historic, and of leases, with an overhead for each: the same on every replica. What the quota counts.
    #[must_use]
    pub fn approximate_bytes(&self) -> u64 {
        self.keyspace.bytes() + self.leases.len() as u64 * LEASE_OVERHEAD_BYTES
    }

    /// Users, roles and tokens.
    #[must_use]
    pub const fn auth(&self) -> &Auth {
        &self.auth
    }

    /// Alarms that stand, by kind and replica.
    pub fn alarms(&self) -> impl Iterator<Item = MemberAlarm> + '_ {
        self.group.alarms.iter()
    }

    /// Kinds of entry that all replicas can apply ([`crate::limits::FEATURE_LEVEL`]).
    #[must_use]
    pub const fn feature_level(&self) -> u32 {
        self.group.feature_level
    }

    /// Whether this replica id was removed: it is never used again.
    #[must_use]
    pub fn is_removed_member(&self, member_id: u64) -> bool {
        self.group.removed_members.contains(&member_id)
    }

    /// Ids of removed replicas, sorted.
    pub fn removed_members(&self) -> impl Iterator<Item = u64> + '_ {
        self.group.removed_members.iter().copied()
    }

    /// Version that a downgrade was announced to.
    #[must_use]
    pub fn downgrade_target(&self) -> Option<&str> {
        Some(self.group.downgrade_target.as_str()).filter(|target| !target.is_empty())
    }

    /// What the copy of one peer holds below `cilium/cache/`.
    #[must_use]
    pub fn peer_usage(&self, cluster: &str) -> PeerUsage {
        self.keyspace.copy(cluster.as_bytes())
    }

    /// What the copies of all peers hold, by name.
    pub fn peer_usages(&self) -> impl Iterator<Item = (String, PeerUsage)> + '_ {
        self.keyspace.copies().map(|(cluster, usage)| {
            let name = String::from_utf8_lossy(cluster).into_owned();
            (name, usage)
        })
    }

    /// May the actor do all that the transaction holds, in whichever branch?
    ///
    /// # Errors
    /// As [`Auth::check_range`].
    pub fn check_txn_permitted(
        &self,
        actor: Actor<'_>,
        request: &TxnRequest,
    ) -> Result<(), KvError> {
        self.auth.check_txn(actor, &self.leases, request)
    }

    /// May the actor read, or write, all keys of a lease? Yes for a lease that is not there.
    ///
    /// # Errors
    /// As [`Auth::check_range`].
    pub fn check_lease_permitted(
        &self,
        actor: Actor<'_>,
        lease: i64,
        access: Access,
    ) -> Result<(), KvError> {
        self.auth
            .check_lease_keys(actor, self.leases.keys(lease), access)
    }

    /// Gives the group another identity and revisions that no client has seen: what `Recover` does, and what a restored backup needs. Keys, leases,
    /// users and roles stay; history, alarms and tokens go.
    ///
    /// # Errors
    /// [`KvError::ClusterIdZero`], [`KvError::RecoveryRevision`].
    pub fn recover(&mut self, cluster_id: u64, revision_bump: i64) -> Result<(), KvError> {
        if cluster_id == 0 {
            return Err(KvError::ClusterIdZero);
        }
        let revision = self
            .revision
            .checked_add(revision_bump)
            .filter(|revision| revision_bump > 0 && *revision < MAX_REVISION)
            .ok_or(KvError::RecoveryRevision {
                revision: self.revision,
                bump: revision_bump,
            })?;
        self.cluster_id = cluster_id;
        self.revision = revision;
        self.compact_revision = revision;
        self.auth.tokens.clear();
        self.group.alarms.clear();
        self.drop_history();
        Ok(())
    }

    pub(crate) const fn view(&self) -> ReadView<'_> {
        ReadView {
            keyspace: &self.keyspace,
            revision: self.revision,
            compact_revision: self.compact_revision,
        }
    }

    /// Answers a range request; the header is left to the caller, its revision is [`State::revision`].
    ///
    /// # Errors
    /// Those of [`check::check_range`], [`KvError::Compacted`], [`KvError::FutureRevision`].
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, KvError> {
        check::check_range(request)?;
        self.view().range(request)
    }

    /// One key as it is now: what [`State::range`] of that key alone holds, without the cost of a request.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<KeyValue> {
        self.keyspace
            .latest(key)
            .map(|version| version.to_key_value())
    }

    /// As [`State::range`], but the count is 0 unless nothing else was asked for: for readers of a range in pages.
    ///
    /// # Errors
    /// As [`State::range`].
    pub fn range_page(&self, request: &RangeRequest) -> Result<RangeResponse, KvError> {
        check::check_range(request)?;
        self.view().range_page(request)
    }

    /// Answers a transaction for which [`crate::is_read_only`] holds; the outer header is left to the caller.
    ///
    /// # Errors
    /// Those of [`check::check_txn`], [`KvError::Compacted`], [`KvError::FutureRevision`].
    pub fn read_txn(&self, request: &TxnRequest) -> Result<TxnResponse, KvError> {
        check::check_txn(request)?;
        Plan::new(self.view(), &self.leases, request)?.read(self.view())
    }

    /// A lease with its keys (copied and sorted: costs by their number), or `None`.
    #[must_use]
    pub fn lease(&self, id: i64) -> Option<LeaseView> {
        self.leases.view(id)
    }

    /// Granted TTL of a lease in seconds, or `None`.
    #[must_use]
    pub fn lease_ttl_s(&self, id: i64) -> Option<i64> {
        self.leases.granted_ttl_s(id)
    }

    /// All leases as (id, granted TTL in seconds), by id.
    pub fn leases(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.leases.iter()
    }

    /// Cursors of all peers, by name.
    pub fn peer_cursors(&self) -> impl Iterator<Item = &PeerCursor> + '_ {
        self.cursors.values().map(|place| &place.cursor)
    }

    /// Cursor of one peer.
    #[must_use]
    pub fn peer_cursor(&self, cluster: &str) -> Option<&PeerCursor> {
        self.cursors.get(cluster).map(|place| &place.cursor)
    }

    /// The number that the next step of a peer's copy must have; 0 while not all replicas know such numbers.
    #[must_use]
    pub fn next_copy_sequence(&self, cluster: &str) -> u64 {
        if self.group.feature_level < NUMBERED_COPIES_LEVEL {
            return 0;
        }
        let last = self
            .cursors
            .get(cluster)
            .map_or(self.forgotten_sequence, |place| place.sequence);
        last.saturating_add(1)
    }

    /// Groups of the revisions after `after_revision`, in order and without holes, up to `max_bytes` of encoded events but at least one if
    /// there is any. Empty when `after_revision` is the newest.
    ///
    /// # Errors
    /// [`Compacted`] when the next revision lies below the compact one.
    pub fn history(
        &self,
        after_revision: i64,
        max_bytes: usize,
    ) -> Result<Vec<Arc<EventGroup>>, Compacted> {
        let next = after_revision.saturating_add(1);
        if next < self.compact_revision {
            return Err(Compacted {
                compact_revision: self.compact_revision(),
            });
        }
        let Some(first) = self.history.front() else {
            return Ok(Vec::new());
        };
        // Without holes the place follows from the revision.
        let skip = usize::try_from(next - first.revision).unwrap_or(0);
        let mut bytes = 0_usize;
        let mut groups = Vec::new();
        for group in self.history.iter().skip(skip) {
            bytes = bytes.saturating_add(group.encoded_bytes());
            if bytes > max_bytes && !groups.is_empty() {
                break;
            }
            groups.push(Arc::clone(group));
        }
        Ok(groups)
    }

    fn readable_history(&self) -> impl Iterator<Item = &Arc<EventGroup>> + '_ {
        self.history
            .iter()
            .filter(|group| group.revision >= self.compact_revision)
    }

    /// First revision that has a group, or would have one.
    pub(crate) fn first_history_revision(&self) -> i64 {
        self.history.front().map_or_else(
            || self.revision + 1,
            |group| {
                let first = self.floor_revision().max(FIRST_REVISION + 1);
                // Only a recovery leaves the compact revision without a group.
                if group.revision == self.compact_revision + 1 {
                    group.revision
                } else {
                    first
                }
            },
        )
    }

    /// Revision that the index is dropped up to: at most the compact revision.
    pub(crate) fn floor_revision(&self) -> i64 {
        self.history.front().map_or(self.compact_revision, |group| {
            group.revision.min(self.compact_revision)
        })
    }

    /// Hash over everything that apply reads; equal on replicas that applied the same log.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let mut hash = Fnv64::new();
        hash.u64(self.cluster_id);
        hash.i64(self.revision);
        hash.i64(self.compact_revision);
        for versions in self.keyspace.index().iter() {
            // Compacted versions that are still to be dropped do not count.
            let seen = visible_at(versions, self.compact_revision).map(Version::revision);
            for version in versions.iter().filter(|version| {
                version.mod_revision() >= self.compact_revision || seen == Some(version.revision())
            }) {
                hash.bytes(version.key());
                hash.bytes(version.value_bytes());
                for number in [
                    version.mod_revision(),
                    i64::from(version.sub()),
                    version.create_revision(),
                    version.version(),
                    version.lease(),
                ] {
                    hash.i64(number);
                }
            }
        }
        for group in self.readable_history() {
            hash.i64(group.revision);
            hash.u64(group.events.len() as u64);
            for event in &group.events {
                hash.bytes(event.encoded());
                hash.i64(event.prev().map_or(0, |prev| prev.mod_revision()));
            }
        }
        for (id, _) in self.leases.iter() {
            for key in self
                .leases
                .view(id)
                .map(|view| view.keys)
                .unwrap_or_default()
            {
                hash.bytes(&key);
            }
        }
        hash.u64(self.hash_beside_keys());
        hash.finish()
    }

    /// Hash over what the state holds beside keys: leases, cursors of peers, users, roles, tokens, the group. It moves no revision, so that no hash of
    /// keys tells of it. Which keys a lease has follows from them.
    #[must_use]
    pub fn hash_beside_keys(&self) -> u64 {
        let mut hash = Fnv64::new();
        for (id, granted_ttl_s) in self.leases.iter() {
            hash.i64(id);
            hash.i64(granted_ttl_s);
        }
        for CopyPlace { cursor, sequence } in self.cursors.values() {
            hash.bytes(cursor.cluster.as_bytes());
            hash.u64(cursor.store_id);
            hash.i64(cursor.revision);
            hash.u64(u64::from(cursor.synced));
            // Replicas that do not know the number have none: both take the same hash of it.
            if *sequence != 0 {
                hash.u64(*sequence);
            }
        }
        if self.forgotten_sequence != 0 {
            hash.u64(self.forgotten_sequence);
        }
        self.auth.hash(&mut hash);
        self.group.hash(&mut hash);
        hash.finish()
    }
}
