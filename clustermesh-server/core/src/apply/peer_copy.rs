//! Copies of peers: records and cursor in one step, within the peer's quota.

use std::collections::HashMap;

use super::{Applied, CursorChange, Outcome};
use crate::{
    check,
    error::KvError,
    limits::NUMBERED_FORGETS_LEVEL,
    pb,
    peer::{CopyPlace, PeerCursor, PeerUsage, cached_cluster},
    state::State,
};

impl State {
    pub(super) fn apply_peer_copy(
        &mut self,
        request: &pb::PeerCopy,
        applied: &mut Applied,
    ) -> Result<Outcome, KvError> {
        check::check_peer_copy(request)?;
        let sequence = self.check_copy_order(&request.cluster, request.sequence)?;
        // One revision holds one change of a key: the last one counts.
        let last: HashMap<&[u8], usize> = request
            .changes
            .iter()
            .enumerate()
            .map(|(place, change)| (change.key.as_ref(), place))
            .collect();
        let is_last =
            |place: usize, change: &pb::PeerChange| last.get(change.key.as_ref()) == Some(&place);
        self.check_peer_quota(
            request,
            request
                .changes
                .iter()
                .enumerate()
                .filter(|(place, change)| is_last(*place, change))
                .map(|(_, change)| change),
        )?;
        let written = self.write_always(applied, |write| {
            let mut written = 0;
            for (place, change) in request.changes.iter().enumerate() {
                if !is_last(place, change) {
                    continue;
                }
                let current = write.latest(&change.key);
                match &change.value {
                    Some(value) => {
                        if current.is_some_and(|current| current.value_bytes() == value) {
                            continue;
                        }
                        write.put_value(&change.key, value, 0);
                    }
                    None => {
                        if write.delete_key(&change.key).is_none() {
                            continue;
                        }
                    }
                }
                written += 1;
            }
            written
        });
        let cursor = PeerCursor {
            cluster: request.cluster.clone(),
            store_id: request.store_id,
            revision: request.revision,
            synced: request.synced,
        };
        let place = CopyPlace {
            cursor: cursor.clone(),
            sequence,
        };
        let before = self.cursors.insert(request.cluster.clone(), place);
        if before.map(|before| before.cursor).as_ref() != Some(&cursor) {
            applied.cursors.push(CursorChange {
                after_groups: applied.groups.len(),
                cluster: request.cluster.clone(),
                cursor: Some(cursor),
            });
        }
        Ok(Outcome::PeerCopy { written })
    }

    /// What was made of an older place of the copy must not come after a newer step: its proposer may have been told that its outcome is unknown, and
    /// another one, or itself, has gone on. The number of the step; 0 below the feature level that has numbers.
    fn check_copy_order(&self, cluster: &str, found: u64) -> Result<u64, KvError> {
        let wanted = self.next_copy_sequence(cluster);
        if wanted != 0 && found != wanted {
            return Err(KvError::PeerCopyOutOfOrder {
                cluster: cluster.to_owned(),
                found,
                wanted,
            });
        }
        Ok(wanted)
    }

    pub(super) fn apply_peer_forget(
        &mut self,
        request: &pb::PeerForget,
        applied: &mut Applied,
    ) -> Result<Outcome, KvError> {
        let sequence = if self.group.feature_level < NUMBERED_FORGETS_LEVEL {
            0
        } else {
            self.check_copy_order(&request.cluster, request.sequence)?
        };
        let known = self.cursors.remove(&request.cluster).is_some();
        if known {
            self.forgotten_sequence = self.forgotten_sequence.max(sequence);
            applied.cursors.push(CursorChange {
                after_groups: applied.groups.len(),
                cluster: request.cluster.clone(),
                cursor: None,
            });
        }
        Ok(Outcome::PeerForget { known })
    }

    /// What the peer's copy would hold afterwards is within its limits, or less than now.
    fn check_peer_quota<'a>(
        &self,
        request: &pb::PeerCopy,
        changes: impl Iterator<Item = &'a pb::PeerChange>,
    ) -> Result<(), KvError> {
        if request.max_records == 0 && request.max_bytes == 0 {
            return Ok(());
        }
        let (mut added, mut removed) = (PeerUsage::default(), PeerUsage::default());
        for change in changes.filter(|change| cached_cluster(&change.key).is_some()) {
            if let Some(current) = self.keyspace.latest(&change.key) {
                removed.add(&change.key, current.value_bytes());
            }
            if let Some(value) = &change.value {
                added.add(&change.key, value);
            }
        }
        let held = self.peer_usage(&request.cluster);
        for (what, limit, held, added, removed) in [
            (
                "records",
                request.max_records,
                held.records,
                added.records,
                removed.records,
            ),
            (
                "bytes",
                request.max_bytes,
                held.bytes,
                added.bytes,
                removed.bytes,
            ),
        ] {
            let wanted = held.saturating_add(added).saturating_sub(removed);
            if limit != 0 && added > removed && wanted > limit {
                return Err(KvError::PeerQuotaExceeded {
                    cluster: request.cluster.clone(),
                    what,
                    wanted,
                    limit,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
