//! What holds of a state between any two entries.

use std::collections::BTreeMap;

use super::{FIRST_REVISION, State};
use crate::{
    index::key_of,
    peer::{PeerUsage, cached_cluster},
    version::Version,
};

/// Checks the versions of one key where the index was dropped up to `floor`.
///
/// # Errors
/// A text that names what is broken.
pub(crate) fn check_versions(
    versions: &[Version],
    floor: i64,
    newest_revision: i64,
) -> Result<(), String> {
    let key = key_of(versions);
    let name = key.escape_ascii();
    let newest = versions
        .last()
        .ok_or_else(|| "a key has no version".to_owned())?;
    if newest.is_tombstone() && newest.mod_revision() < floor {
        return Err(format!("{name} keeps a compacted tombstone"));
    }
    for version in versions {
        if version.key() != key {
            let other = version.key().escape_ascii();
            return Err(format!("{name} holds a version of {other}"));
        }
        if version.mod_revision() > newest_revision {
            return Err(format!("{name} has a version of the future"));
        }
    }
    // Of what the floor hides, only the version that a reader there sees may stay.
    let hidden = versions
        .iter()
        .zip(versions.iter().skip(1))
        .any(|(one, next)| {
            one.mod_revision() < floor && (one.is_tombstone() || next.mod_revision() <= floor)
        });
    if hidden {
        return Err(format!("{name} keeps a compacted version"));
    }
    if !versions.is_sorted_by_key(Version::revision) {
        return Err(format!("versions of {name} are out of order"));
    }
    Ok(())
}

impl State {
    /// Checks the invariants that hold between any two entries; for tests, as it walks over everything.
    ///
    /// # Errors
    /// A text that names the broken invariant.
    pub fn check(&self) -> Result<(), String> {
        self.check_index()?;
        self.check_history()?;
        for group in &self.history {
            for event in &group.events {
                let stored = self.keyspace.index().get(event.key());
                if !stored.is_some_and(|versions| versions.contains(event.kv())) {
                    let name = event.key().escape_ascii();
                    return Err(format!("event of {name} is not in the index"));
                }
            }
        }
        Ok(())
    }

    fn check_index(&self) -> Result<(), String> {
        let floor = self.floor_revision();
        let mut bytes = 0;
        let mut attached = 0;
        let mut copies = BTreeMap::new();
        self.keyspace.index().check()?;
        for versions in self.keyspace.index().iter() {
            check_versions(versions, floor, self.revision)?;
            let key = key_of(versions);
            let name = key.escape_ascii();
            bytes += versions.iter().map(Version::approximate_bytes).sum::<u64>();
            let Some(newest) = versions.last() else {
                continue;
            };
            if !newest.is_tombstone()
                && let Some(cluster) = cached_cluster(key)
            {
                let usage: &mut PeerUsage = copies.entry(cluster).or_default();
                usage.add(key, newest.value_bytes());
            }
            if newest.lease() != 0 {
                attached += 1;
                if !self.leases.is_attached(newest.lease(), key) {
                    return Err(format!("{name} is not attached to its lease"));
                }
            }
        }
        if bytes != self.keyspace.bytes() {
            return Err(format!(
                "counted {} bytes, there are {bytes}",
                self.keyspace.bytes()
            ));
        }
        let counted = self
            .keyspace
            .copies()
            .map(|(cluster, usage)| (cluster.as_ref(), usage));
        if !counted.eq(copies) {
            return Err("copies of peers are counted wrong".into());
        }
        if attached != self.leases.attached() {
            return Err(format!(
                "leases have {} keys, the index {attached}",
                self.leases.attached()
            ));
        }
        Ok(())
    }

    /// That the history has every revision that it should.
    pub(crate) fn check_history(&self) -> Result<(), String> {
        let mut expected = self.first_history_revision();
        if self.history.is_empty() && self.revision > self.compact_revision.max(FIRST_REVISION) {
            return Err(format!(
                "revision {} has no history, compacted at {}",
                self.revision, self.compact_revision
            ));
        }
        for group in &self.history {
            if group.revision != expected {
                return Err(format!(
                    "history has revision {} at the place of {expected}",
                    group.revision
                ));
            }
            if group.events.is_empty() {
                return Err(format!("revision {expected} has no event"));
            }
            expected += 1;
        }
        if expected != self.revision + 1 {
            return Err(format!(
                "history ends before {expected}, revision is {}",
                self.revision
            ));
        }
        Ok(())
    }
}
