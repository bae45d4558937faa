//! The copy of one peer: its events and listings in, changes of our cache out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use bytes::Bytes;
use clustermesh_api::keys::{Kind, RecordKey};
use clustermesh_api::records::Timestamp;

use super::config::Peer;
use super::owners::CidrOwners;
use super::rules::{Refusal, Rules};
use super::usage::{CopyQuota, Usage};
use crate::keys;
use crate::view::View;

/// Refused records of one peer that are kept to be looked at again.
pub const MAX_REFUSED_RECORDS: usize = 10_000;
/// Bytes of refused values of one peer that are kept.
pub const MAX_REFUSED_BYTES: usize = 16 * 1024 * 1024;

/// One key of our store to write; `None` deletes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerChange {
    /// Full key, under `cilium/cache/` or `cilium/synced/`.
    pub key: Bytes,
    /// New value.
    pub value: Option<Bytes>,
}

/// What became of a batch of a peer's events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ingested {
    /// To be written in one step with the cursor.
    pub changes: Vec<PeerChange>,
    /// Kinds whose initial list became complete at the peer: list them and call [`PeerCopyState::replace`].
    pub completed: Vec<Kind>,
    /// Keys refused in this batch that were not refused before, for the log.
    pub refused: Vec<Refusal>,
}

#[derive(Clone, Debug)]
struct Kept {
    value: Bytes,
    refusal: Refusal,
}

/// State of one peer's copy beside the copy itself. Lost with leadership, rebuilt by [`PeerCopyState::restore`].
#[derive(Clone, Debug)]
pub struct PeerCopyState {
    rules: Rules,
    refused: BTreeMap<RecordKey, Kept>,
    refused_bytes: usize,
    /// Set when refused records found no room, or a predecessor refused some: `CidrOwners::releases` of that time.
    forgotten_at: Option<u64>,
    /// Since then something came that may make one of those records acceptable.
    forgotten_wanted: bool,
    /// `CidrOwners::releases` when all refused records were last looked at.
    looked_at: u64,
    canaries: BTreeMap<Kind, Bytes>,
    usage: Usage,
    /// Records were refused because there was no room for them.
    quota_reached: bool,
    /// `CidrOwners::seizures` by which the copy was judged.
    seized_at: u64,
    /// Whether `refused` tells of all records, not only of those that came lately.
    refused_known: bool,
}

impl PeerCopyState {
    /// A peer of which nothing is copied yet.
    #[must_use]
    pub fn new(peer: Peer) -> Self {
        Self {
            rules: Rules::new(peer),
            refused: BTreeMap::new(),
            refused_bytes: 0,
            forgotten_at: None,
            forgotten_wanted: false,
            looked_at: 0,
            canaries: BTreeMap::new(),
            usage: Usage::default(),
            quota_reached: false,
            seized_at: 0,
            refused_known: true,
        }
    }

    /// Other bounds than [`CopyQuota::default`].
    #[must_use]
    pub fn with_quota(mut self, quota: CopyQuota) -> Self {
        self.usage.set_quota(quota);
        self
    }

    /// Takes up a copy that stands in the store. Nodes that are no longer acceptable (our settings changed) are
    /// deleted by the changes.
    #[must_use]
    pub fn restore(
        peer: Peer,
        owners: &mut CidrOwners,
        view: &dyn View,
    ) -> (Self, Vec<PeerChange>) {
        let mut state = Self::new(peer);
        let mut changes = Vec::new();
        for kv in view.list(Kind::Nodes.cache_prefix(&state.peer().cluster).as_bytes()) {
            let accepted = RecordKey::parse(&kv.key)
                .map_err(|error| Refusal::Malformed(error.to_string()))
                .and_then(|key| state.rules.accept(owners, &key, &kv.value));
            if accepted.is_err() {
                changes.push(PeerChange {
                    key: kv.key,
                    value: None,
                });
            }
        }
        state.looked_at = owners.releases();
        state.forgotten_at = Some(state.looked_at);
        // What hung on those nodes, and what is refused now, only a listing tells.
        state.forgotten_wanted = !changes.is_empty();
        state.seized_at = owners.seizures();
        for kind in Kind::ALL {
            let prefix = kind.cache_prefix(&state.peer().cluster);
            view.scan(prefix.as_bytes(), &mut |kv| {
                state.usage.set(&kv.key, kv.value.len());
                state.refused_known = false;
                ControlFlow::Continue(())
            });
        }
        for PeerChange { key, .. } in &changes {
            state.usage.remove(key);
        }
        (state, changes)
    }

    /// The peer as its configuration describes it.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.rules.peer
    }

    /// Refused records, by the key in the peer's store.
    pub fn refused(&self) -> impl Iterator<Item = (&RecordKey, &Refusal)> {
        self.refused.iter().map(|(key, kept)| (key, &kept.refusal))
    }

    /// Refused records by reason, for status and metrics.
    #[must_use]
    pub fn refused_counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        for kept in self.refused.values() {
            *counts.entry(kept.refusal.reason()).or_default() += 1;
        }
        counts
    }

    /// Whether [`PeerCopyState::refused_counts`] tells of all records: after a restart not before the next listing.
    #[must_use]
    pub const fn refused_known(&self) -> bool {
        self.refused_known
    }

    /// True when one of our own nodes got an address that a peer's node was believed to have: the copy is to be taken
    /// up by [`PeerCopyState::restore`] again.
    #[must_use]
    pub fn is_outdated(&self, owners: &CidrOwners) -> bool {
        self.seized_at != owners.seizures()
    }

    /// True when a range became free, or a node of the peer changed, and records were refused that this state does not
    /// hold: only a new listing of the peer can tell whether they are acceptable now.
    #[must_use]
    pub fn needs_relist(&self, owners: &CidrOwners) -> bool {
        self.forgotten_at
            .is_some_and(|then| self.forgotten_wanted || then != owners.releases())
    }

    /// To be called when changes that this state handed out were not stored: records that are no longer refused are in
    /// no later event, so only a new listing brings them.
    pub fn changes_lost(&mut self) {
        self.forgotten_at.get_or_insert(self.looked_at);
        self.forgotten_wanted = true;
    }

    /// To be called before all canaries of the peer's store are taken: those of another store say nothing about it.
    pub fn begin_canaries(&mut self) {
        self.canaries.clear();
    }

    /// Kinds whose initial list is complete at the peer, as its canaries say.
    pub fn completed(&self) -> impl Iterator<Item = Kind> + '_ {
        Kind::ALL.into_iter().filter(|kind| self.is_complete(*kind))
    }

    fn is_complete(&self, kind: Kind) -> bool {
        !self.peer().synced_canaries
            || !self.peer().exports(kind)
            || self.canaries.contains_key(&kind)
    }

    /// Takes live events of the peer, in order: `None` deletes. A deletion applies at once: it is the owner's own.
    pub fn ingest(
        &mut self,
        owners: &mut CidrOwners,
        events: &[(Bytes, Option<Bytes>)],
    ) -> Ingested {
        let mut outcome = Ingested::default();
        let mut latest: BTreeMap<RecordKey, Option<&Bytes>> = BTreeMap::new();
        for (key, value) in events {
            match RecordKey::parse(key) {
                Ok(key) => {
                    latest.insert(key, value.as_ref());
                }
                // Kinds that we do not know are the business of newer versions.
                Err(error) if value.is_some() => {
                    outcome.refused.push(Refusal::Malformed(error.to_string()))
                }
                Err(_) => {}
            }
        }
        let mut changes = BTreeMap::new();
        // Nodes own what the other kinds refer to, so they come first; releases before claims.
        let mut ordered: Vec<_> = latest.into_iter().collect();
        ordered.sort_by_key(|(key, value)| (rank(key), value.is_some()));
        let mut nodes_changed = false;
        for (key, value) in ordered {
            if key.kind() == Some(Kind::Nodes) {
                nodes_changed = true;
                // A deletion counts as a release.
                self.forgotten_wanted |= self.forgotten_at.is_some() && value.is_some();
            }
            if let RecordKey::Synced {
                cluster,
                tree,
                kind,
            } = &key
            {
                if *cluster == self.peer().cluster && *tree == self.peer().source_tree() {
                    let kind = *kind;
                    match value {
                        Some(value) => {
                            if self.canaries.insert(kind, value.clone()).is_none() {
                                outcome.completed.push(kind);
                            }
                        }
                        None => drop(self.canaries.remove(&kind)),
                    }
                }
                continue;
            }
            self.take(owners, key, value, &mut changes, &mut outcome.refused);
        }
        if nodes_changed || owners.releases() != self.looked_at || self.has_new_room() {
            self.look_again(owners, &mut changes);
        }
        outcome.changes = into_changes(changes);
        outcome
    }

    /// Looks at the refused records again, after another peer's copy changed.
    pub fn reconsider(&mut self, owners: &mut CidrOwners) -> Vec<PeerChange> {
        if owners.releases() == self.looked_at {
            return Vec::new();
        }
        let mut changes = BTreeMap::new();
        self.look_again(owners, &mut changes);
        into_changes(changes)
    }

    /// Takes a complete listing of one kind at one revision and gives the differences to our cache in `view`, which
    /// must hold all changes taken before. What is absent is deleted, and our canary written, only once the
    /// peer's own list is complete. Kinds in the order of [`Kind::ALL`].
    pub fn replace(
        &mut self,
        owners: &mut CidrOwners,
        kind: Kind,
        listing: &[(Bytes, Bytes)],
        view: &dyn View,
        now_unix_ms: i64,
    ) -> Ingested {
        let complete = self.is_complete(kind);
        let mut outcome = Ingested::default();
        let mut listed = BTreeMap::new();
        for (key, value) in listing {
            match RecordKey::parse(key) {
                Ok(key) if key.kind() == Some(kind) => {
                    listed.insert(key, value);
                }
                Ok(_) => {}
                Err(error) => outcome.refused.push(Refusal::Malformed(error.to_string())),
            }
        }
        let existing = view.list(kind.cache_prefix(&self.peer().cluster).as_bytes());
        let mut changes: BTreeMap<Bytes, Option<Bytes>> = BTreeMap::new();
        if complete {
            // First what is gone, so that what it owned is free for what is new.
            for kv in &existing {
                let source = RecordKey::parse(&kv.key)
                    .ok()
                    .and_then(|key| self.peer().source_key(&key));
                if source
                    .as_ref()
                    .is_none_or(|source| !listed.contains_key(source))
                {
                    changes.insert(kv.key.clone(), None);
                    if let Some(source) = source {
                        self.take(owners, source, None, &mut changes, &mut outcome.refused);
                    }
                }
            }
            let gone: Vec<_> = self
                .refused
                .keys()
                .filter(|key| key.kind() == Some(kind) && !listed.contains_key(*key))
                .cloned()
                .collect();
            for key in gone {
                self.forget_refused(&key);
            }
        }
        for (key, value) in listed {
            self.take(owners, key, Some(value), &mut changes, &mut outcome.refused);
        }
        if kind == Kind::Nodes || owners.releases() != self.looked_at {
            self.look_again(owners, &mut changes);
        }
        let stored: BTreeMap<_, _> = existing.into_iter().map(|kv| (kv.key, kv.value)).collect();
        changes.retain(|key, value| {
            let other_kind =
                !key.starts_with(kind.cache_prefix(&self.rules.peer.cluster).as_bytes());
            other_kind || stored.get(key) != value.as_ref()
        });
        if complete {
            let key = keys::bytes(&self.peer().own_canary(kind));
            let canary = self.canaries.get(&kind).cloned();
            let value = canary.unwrap_or_else(|| Timestamp::from_unix_ms(now_unix_ms).encode());
            if view.get(&key).is_none() {
                changes.insert(key, Some(value));
            }
        }
        outcome.changes = into_changes(changes);
        outcome
    }

    /// To be called before the listings of all kinds are taken: they tell again what is refused.
    pub fn begin_listing(&mut self) {
        self.forgotten_at = None;
        self.forgotten_wanted = false;
        self.refused_known = true;
    }

    /// Whether records that were refused for lack of room may have it now.
    fn has_new_room(&mut self) -> bool {
        let freed = self.usage.take_freed() && self.quota_reached;
        if freed && self.forgotten_at.is_some() && self.usage.has_much_room() {
            self.forgotten_wanted = true;
            self.quota_reached = false;
        }
        freed
    }

    /// The judge's word, and room for the record.
    fn judge(
        &mut self,
        owners: &mut CidrOwners,
        key: &RecordKey,
        copy: &[u8],
        value: &Bytes,
    ) -> Result<(), Refusal> {
        // First: a node that is not copied must own nothing.
        if !self.usage.fits(copy, value.len()) {
            self.quota_reached = true;
            let CopyQuota {
                records_max,
                bytes_max,
            } = self.usage.quota();
            return Err(Refusal::Quota {
                object: key.to_string(),
                cluster: self.peer().cluster.clone(),
                records_max,
                bytes_max,
            });
        }
        self.rules.accept(owners, key, value)?;
        self.usage.set(copy, value.len());
        Ok(())
    }

    fn take(
        &mut self,
        owners: &mut CidrOwners,
        key: RecordKey,
        value: Option<&Bytes>,
        changes: &mut BTreeMap<Bytes, Option<Bytes>>,
        refused: &mut Vec<Refusal>,
    ) {
        let Some(copy) = self.peer().cache_key(&key) else {
            return;
        };
        let copy = keys::bytes(&copy);
        let known = self.forget_refused(&key);
        let Some(value) = value else {
            if let RecordKey::Node { name, .. } = &key {
                self.rules.release_node(owners, name);
            }
            self.usage.remove(&copy);
            changes.insert(copy, None);
            return;
        };
        match self.judge(owners, &key, &copy, value) {
            Ok(()) => {
                changes.insert(copy, Some(value.clone()));
            }
            Err(refusal) => {
                if let RecordKey::Node { name, .. } = &key {
                    // The node gave up what its earlier record said; its new claim is not taken.
                    self.rules.release_node(owners, name);
                }
                // What was accepted under this key is no longer what the peer says.
                self.usage.remove(&copy);
                changes.insert(copy, None);
                if known.is_none_or(|known| known.reason() != refusal.reason()) {
                    refused.push(refusal.clone());
                }
                self.keep_refused(key, value, refusal);
            }
        }
    }

    fn look_again(
        &mut self,
        owners: &mut CidrOwners,
        changes: &mut BTreeMap<Bytes, Option<Bytes>>,
    ) {
        let mut candidates: Vec<_> = self.refused.keys().cloned().collect();
        candidates.sort_by_key(rank);
        for key in candidates {
            let Some(value) = self.refused.get(&key).map(|kept| kept.value.clone()) else {
                continue;
            };
            let Some(copy) = self.peer().cache_key(&key) else {
                continue;
            };
            let copy = keys::bytes(&copy);
            match self.judge(owners, &key, &copy, &value) {
                Ok(()) => {
                    self.forget_refused(&key);
                    changes.insert(copy, Some(value));
                }
                Err(refusal) => {
                    if let Some(kept) = self.refused.get_mut(&key) {
                        kept.refusal = refusal;
                    }
                }
            }
        }
        self.looked_at = owners.releases();
    }

    fn keep_refused(&mut self, key: RecordKey, value: &Bytes, refusal: Refusal) {
        let bytes = self.refused_bytes + value.len();
        if self.refused.len() >= MAX_REFUSED_RECORDS || bytes > MAX_REFUSED_BYTES {
            self.forgotten_at = Some(self.looked_at);
            return;
        }
        self.refused_bytes = bytes;
        self.refused.insert(
            key,
            Kept {
                value: value.clone(),
                refusal,
            },
        );
    }

    fn forget_refused(&mut self, key: &RecordKey) -> Option<Refusal> {
        let kept = self.refused.remove(key)?;
        self.refused_bytes -= kept.value.len();
        Some(kept.refusal)
    }
}

/// Nodes, then what refers to them.
fn rank(key: &RecordKey) -> u8 {
    match key.kind() {
        Some(Kind::Nodes) => 0,
        _ => 1,
    }
}

fn into_changes(changes: BTreeMap<Bytes, Option<Bytes>>) -> Vec<PeerChange> {
    changes
        .into_iter()
        .map(|(key, value)| PeerChange { key, value })
        .collect()
}

/// Deletes all that is copied of a cluster that is no peer any more: canaries first, so that no reader takes the
/// shrinking copy for complete.
#[must_use]
pub fn forget(cluster: &str, owners: &mut CidrOwners, view: &dyn View) -> Vec<PeerChange> {
    owners.release_cluster(cluster);
    let mut seen = BTreeSet::new();
    let prefixes = Kind::ALL.into_iter().map(|kind| kind.cache_prefix(cluster));
    let synced = format!("{}{cluster}/", clustermesh_api::keys::SYNCED_PREFIX);
    let config = keys::bytes(&RecordKey::ClusterConfig {
        cluster: cluster.to_owned(),
    });
    let mut changes = Vec::new();
    for prefix in std::iter::once(synced).chain(prefixes) {
        for kv in view.list(prefix.as_bytes()) {
            if seen.insert(kv.key.clone()) {
                changes.push(PeerChange {
                    key: kv.key,
                    value: None,
                });
            }
        }
    }
    if view.get(&config).is_some() {
        changes.push(PeerChange {
            key: config,
            value: None,
        });
    }
    changes
}

#[cfg(test)]
mod tests;
