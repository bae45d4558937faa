//! The multi-version index: for each key its versions, oldest first, and what compaction may drop of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::{
    index::{Index, Versions},
    key_range::KeyRange,
    peer::{PeerUsage, cached_cluster},
    version::{Revision, Version, VersionNumbers},
};

/// Ordered index over all keys that have a version which is still readable.
#[derive(Debug, Default)]
pub(crate) struct Keyspace {
    index: Index,
    bytes: u64,
    /// Live records below `cilium/cache/`, by peer.
    copies: BTreeMap<Bytes, PeerUsage>,
}

/// A version that was added, with what watchers are to see as the one before.
pub(crate) struct Added {
    pub(crate) version: Version,
    /// Newest live version below the new revision.
    pub(crate) before_revision: Option<Version>,
    /// Live version that this one replaced, perhaps of the same revision.
    pub(crate) replaced: Option<Version>,
}

impl Keyspace {
    /// Adds a key above all that are there, with its versions.
    pub(crate) fn push_last(&mut self, versions: Versions) {
        self.bytes += versions.iter().map(Version::approximate_bytes).sum::<u64>();
        self.count_copy(None, versions.last().and_then(live));
        self.index.push_last(versions);
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
    fn count_copy(&mut self, before: Option<&Version>, after: Option<&Version>) {
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

    pub(crate) const fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Newest live version of a key.
    pub(crate) fn latest(&self, key: &[u8]) -> Option<&Version> {
        live(self.index.get(key)?.last()?)
    }

    /// Live versions in a range as they were at `revision`, in key order.
    pub(crate) fn visible<'a>(
        &'a self,
        range: &'a KeyRange,
        revision: i64,
    ) -> impl Iterator<Item = &'a Version> + 'a {
        range
            .bounds()
            .into_iter()
            .flat_map(|bounds| self.index.range(bounds))
            .filter_map(move |versions| visible_at(versions, revision))
    }

    /// Number of keys in a range that live now.
    pub(crate) fn count_live(&self, range: &KeyRange) -> usize {
        range
            .bounds()
            .map_or(0, |bounds| self.index.count_live(bounds))
    }

    pub(crate) fn put(
        &mut self,
        key: &[u8],
        value: &[u8],
        lease: i64,
        revision: Revision,
    ) -> Added {
        let known = self.index.update(key, |versions| {
            let replaced = versions.last().and_then(live).cloned();
            let (create_revision, version) = replaced.as_ref().map_or((revision.main, 1), |old| {
                (old.create_revision(), old.version() + 1)
            });
            let before_revision = visible_at(versions, revision.main - 1).cloned();
            let numbers = VersionNumbers {
                revision,
                create_revision,
                version,
                lease,
            };
            let added = Version::put(key, value, numbers);
            versions.push(added.clone());
            Added {
                version: added,
                before_revision,
                replaced,
            }
        });
        if let Some(added) = known {
            self.bytes += added.version.approximate_bytes();
            self.count_copy(added.replaced.as_ref(), Some(&added.version));
            return added;
        }
        let numbers = VersionNumbers {
            revision,
            create_revision: revision.main,
            version: 1,
            lease,
        };
        let added = Version::put(key, value, numbers);
        self.bytes += added.approximate_bytes();
        self.index.insert(SmallVec::from_iter([added.clone()]));
        self.count_copy(None, Some(&added));
        Added {
            version: added,
            before_revision: None,
            replaced: None,
        }
    }

    /// Adds a tombstone; `None` where the key does not live.
    pub(crate) fn delete(&mut self, key: &[u8], revision: Revision) -> Option<Added> {
        let added = self.index.update(key, |versions| {
            let replaced = live(versions.last()?)?.clone();
            let before_revision = visible_at(versions, revision.main - 1).cloned();
            let added = Version::tombstone(key, revision);
            versions.push(added.clone());
            Some(Added {
                version: added,
                before_revision,
                replaced: Some(replaced),
            })
        })??;
        self.bytes += added.version.approximate_bytes();
        self.count_copy(added.replaced.as_ref(), None);
        Some(added)
    }

    /// Takes back the newest version of a key: a transaction that fails half-way leaves no trace.
    pub(crate) fn take_back(&mut self, key: &[u8]) {
        let taken = self.index.update(key, |versions| {
            let taken = versions.pop();
            (taken, versions.last().and_then(live).cloned())
        });
        if let Some((Some(version), now)) = taken {
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
        mut dropped: impl FnMut(Version),
    ) {
        let mut bytes = 0;
        self.index.update(key, |versions| {
            let older =
                versions.partition_point(|version| version.mod_revision() < compact_revision);
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
                bytes += version.approximate_bytes();
                dropped(version);
            }
            if versions.spilled() && versions.len() <= versions.inline_size() {
                versions.shrink_to_fit();
            }
        });
        self.bytes -= bytes;
    }
}

/// The version that a reader at `revision` sees.
pub(crate) fn visible_at(versions: &[Version], revision: i64) -> Option<&Version> {
    let newest = versions.last()?;
    if newest.mod_revision() <= revision {
        return live(newest);
    }
    let end = versions.partition_point(|version| version.mod_revision() <= revision);
    live(versions.get(end.checked_sub(1)?)?)
}

fn live(version: &Version) -> Option<&Version> {
    (!version.is_tombstone()).then_some(version)
}
