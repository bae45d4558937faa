//! The multi-version index: for each key its versions, oldest first, and what compaction may drop of them.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use smallvec::SmallVec;

use crate::{
    key_range::KeyRange,
    peer::{PeerUsage, cached_cluster},
    version::{Version, VersionNumbers},
};

/// Versions of one key, by (mod revision, sub). Most keys have one.
pub(crate) type Versions = SmallVec<[Arc<Version>; 2]>;

/// Ordered index over all keys that have a version which is still readable.
#[derive(Debug, Default)]
pub(crate) struct Keyspace {
    index: BTreeMap<Bytes, Versions>,
    bytes: u64,
    /// Live records below `cilium/cache/`, by peer.
    copies: BTreeMap<Bytes, PeerUsage>,
}

/// A version that was added, with what watchers are to see as the one before.
pub(crate) struct Added {
    pub(crate) version: Arc<Version>,
    /// Newest live version below the new revision.
    pub(crate) before_revision: Option<Arc<Version>>,
    /// Live version that this one replaced, perhaps of the same revision.
    pub(crate) replaced: Option<Arc<Version>>,
}

impl Keyspace {
    pub(crate) fn from_sorted(index: BTreeMap<Bytes, Versions>) -> Self {
        let bytes = index
            .values()
            .flatten()
            .map(|version| version.approximate_bytes())
            .sum();
        let mut keyspace = Self {
            index: BTreeMap::new(),
            bytes,
            copies: BTreeMap::new(),
        };
        for versions in index.values() {
            keyspace.count_copy(None, versions.last().and_then(live));
        }
        keyspace.index = index;
        keyspace
    }

    /// What a peer's copy holds.
    pub(crate) fn copy(&self, cluster: &[u8]) -> PeerUsage {
        self.copies.get(cluster).copied().unwrap_or_default()
    }

    /// Peers with what their copies hold, by name.
    pub(crate) fn copies(&self) -> impl Iterator<Item = (&Bytes, PeerUsage)> + '_ {
        self.copies.iter().map(|(cluster, usage)| (cluster, *usage))
    }

    /// Counts the change of one key's newest live version.
    fn count_copy(&mut self, before: Option<&Arc<Version>>, after: Option<&Arc<Version>>) {
        let Some(cluster) = before
            .or(after)
            .and_then(|version| cached_cluster(version.key()))
        else {
            return;
        };
        let usage = match self.copies.get_mut(cluster) {
            Some(usage) => usage,
            None => self
                .copies
                .entry(Bytes::copy_from_slice(cluster))
                .or_default(),
        };
        if let Some(before) = before {
            usage.remove(before.key(), before.value_bytes());
        }
        if let Some(after) = after {
            usage.add(after.key(), after.value_bytes());
        }
        if usage.records == 0 {
            self.copies.remove(cluster);
        }
    }

    pub(crate) const fn index(&self) -> &BTreeMap<Bytes, Versions> {
        &self.index
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Newest live version of a key.
    pub(crate) fn latest(&self, key: &[u8]) -> Option<&Arc<Version>> {
        live(self.index.get(key)?.last()?)
    }

    /// Live versions in a range as they were at `revision`, in key order.
    pub(crate) fn visible<'a>(
        &'a self,
        range: &'a KeyRange,
        revision: i64,
    ) -> impl Iterator<Item = &'a Arc<Version>> + 'a {
        range
            .bounds()
            .into_iter()
            .flat_map(|bounds| self.index.range::<[u8], _>(bounds))
            .filter_map(move |(_, versions)| visible_at(versions, revision))
    }

    pub(crate) fn put(
        &mut self,
        key: &[u8],
        value: &Bytes,
        lease: i64,
        revision: i64,
        sub: u32,
    ) -> Added {
        if let Some(versions) = self.index.get_mut(key) {
            let replaced = versions.last().and_then(live).cloned();
            let shared_key = versions.first().map_or_else(
                || Bytes::copy_from_slice(key),
                |version| version.key().clone(),
            );
            let (create_revision, version) = replaced.as_ref().map_or((revision, 1), |old| {
                (old.create_revision(), old.version() + 1)
            });
            let before_revision = visible_at(versions, revision - 1).cloned();
            let added = Arc::new(Version::put(
                shared_key,
                value,
                VersionNumbers {
                    mod_revision: revision,
                    sub,
                    create_revision,
                    version,
                    lease,
                },
            ));
            self.bytes += added.approximate_bytes();
            versions.push(Arc::clone(&added));
            self.count_copy(replaced.as_ref(), Some(&added));
            return Added {
                version: added,
                before_revision,
                replaced,
            };
        }
        // A copy: a slice of the request would keep the whole log entry in memory.
        let own_key = Bytes::copy_from_slice(key);
        let added = Arc::new(Version::put(
            own_key.clone(),
            value,
            VersionNumbers {
                mod_revision: revision,
                sub,
                create_revision: revision,
                version: 1,
                lease,
            },
        ));
        self.bytes += added.approximate_bytes();
        self.index
            .insert(own_key, SmallVec::from_iter([Arc::clone(&added)]));
        self.count_copy(None, Some(&added));
        Added {
            version: added,
            before_revision: None,
            replaced: None,
        }
    }

    /// Adds a tombstone; `None` where the key does not live.
    pub(crate) fn delete(&mut self, key: &[u8], revision: i64, sub: u32) -> Option<Added> {
        let versions = self.index.get_mut(key)?;
        let replaced = Arc::clone(live(versions.last()?)?);
        let before_revision = visible_at(versions, revision - 1).cloned();
        let added = Arc::new(Version::tombstone(replaced.key().clone(), revision, sub));
        self.bytes += added.approximate_bytes();
        versions.push(Arc::clone(&added));
        self.count_copy(Some(&replaced), None);
        Some(Added {
            version: added,
            before_revision,
            replaced: Some(replaced),
        })
    }

    /// Takes back the newest version of a key: a transaction that fails half-way leaves no trace.
    pub(crate) fn take_back(&mut self, key: &[u8]) {
        let Some(versions) = self.index.get_mut(key) else {
            return;
        };
        let taken = versions.pop();
        let now = versions.last().and_then(live).cloned();
        if versions.is_empty() {
            self.index.remove(key);
        }
        if let Some(version) = taken {
            self.bytes -= version.approximate_bytes();
            self.count_copy(live(&version), now.as_ref());
        }
    }

    /// Drops versions of a key that no revision from `compact_revision` on can show and hands them to `dropped`.
    ///
    /// A tombstone at the compact revision itself stays: a watch may start there.
    pub(crate) fn trim(
        &mut self,
        key: &[u8],
        compact_revision: i64,
        mut dropped: impl FnMut(Arc<Version>),
    ) {
        let Some(versions) = self.index.get_mut(key) else {
            return;
        };
        let older = versions.partition_point(|version| version.mod_revision() < compact_revision);
        let replaced_at_compact = versions
            .get(older)
            .is_some_and(|version| version.mod_revision() == compact_revision);
        let last_is_live = older
            .checked_sub(1)
            .and_then(|last| versions.get(last))
            .is_some_and(|version| !version.is_tombstone());
        let count = if last_is_live && !replaced_at_compact {
            older - 1
        } else {
            older
        };
        for version in versions.drain(..count) {
            self.bytes -= version.approximate_bytes();
            dropped(version);
        }
        if versions.is_empty() {
            self.index.remove(key);
        } else if versions.spilled() && versions.len() <= versions.inline_size() {
            versions.shrink_to_fit();
        }
    }
}

/// The version that a reader at `revision` sees.
pub(crate) fn visible_at(versions: &[Arc<Version>], revision: i64) -> Option<&Arc<Version>> {
    let newest = versions.last()?;
    if newest.mod_revision() <= revision {
        return live(newest);
    }
    let end = versions.partition_point(|version| version.mod_revision() <= revision);
    live(versions.get(end.checked_sub(1)?)?)
}

fn live(version: &Arc<Version>) -> Option<&Arc<Version>> {
    (!version.is_tombstone()).then_some(version)
}
