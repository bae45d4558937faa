//! What belongs to the group rather than to keys: alarms, feature level, removed replicas, an announced downgrade.

use std::collections::BTreeSet;

use crate::{
    error::KvError,
    hash::Fnv64,
    limits::{MAX_ALARMS, MAX_REMOVED_MEMBERS},
    pb::{AlarmKind, MemberAlarm},
};

/// Part of [`crate::State`].
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) feature_level: u32,
    pub(crate) alarms: Alarms,
    pub(crate) removed_members: BTreeSet<u64>,
    /// Empty for none.
    pub(crate) downgrade_target: String,
}

impl Group {
    pub(crate) fn hash(&self, hash: &mut Fnv64) {
        hash.u64(self.feature_level.into());
        for alarm in self.alarms.iter() {
            hash.i64(alarm.kind.into());
            hash.u64(alarm.member_id);
        }
        for member_id in &self.removed_members {
            hash.u64(*member_id);
        }
        hash.bytes(self.downgrade_target.as_bytes());
    }

    pub(crate) fn remove_member(&mut self, member_id: u64) -> Result<(), KvError> {
        if self.removed_members.len() >= MAX_REMOVED_MEMBERS
            && !self.removed_members.contains(&member_id)
        {
            return Err(KvError::ListFull {
                what: "removed replicas",
                limit: MAX_REMOVED_MEMBERS,
            });
        }
        self.removed_members.insert(member_id);
        // Nobody else could take them back.
        self.alarms.raised.retain(|(_, id)| *id != member_id);
        Ok(())
    }
}

/// Alarms that stand, by kind and replica.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Alarms {
    raised: BTreeSet<(AlarmKind, u64)>,
}

impl Alarms {
    /// Raises an alarm; it may stand already.
    pub(crate) fn raise(&mut self, kind: AlarmKind, member_id: u64) -> Result<(), KvError> {
        if self.raised.len() >= MAX_ALARMS && !self.raised.contains(&(kind, member_id)) {
            return Err(KvError::ListFull {
                what: "alarms",
                limit: MAX_ALARMS,
            });
        }
        self.raised.insert((kind, member_id));
        Ok(())
    }

    /// Takes an alarm back and says whether it stood.
    pub(crate) fn take_back(&mut self, kind: AlarmKind, member_id: u64) -> bool {
        self.raised.remove(&(kind, member_id))
    }

    /// Whether any replica has this alarm.
    pub(crate) fn stands(&self, kind: AlarmKind) -> bool {
        self.raised.iter().any(|(raised, _)| *raised == kind)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = MemberAlarm> + '_ {
        self.raised.iter().map(|(kind, member_id)| MemberAlarm {
            member_id: *member_id,
            kind: (*kind).into(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.raised.len()
    }

    pub(crate) fn clear(&mut self) {
        self.raised.clear();
    }
}
