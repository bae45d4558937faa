//! Commands that change the group rather than keys.

use super::{Applied, Entry, Outcome};
use crate::{
    error::KvError,
    pb::{self, AlarmKind},
    state::State,
};

impl State {
    pub(super) fn apply_bootstrap(&mut self, request: pb::Bootstrap) -> Result<Outcome, KvError> {
        if request.cluster_id == 0 {
            return Err(KvError::ClusterIdZero);
        }
        if self.cluster_id != 0 {
            return Err(KvError::ClusterIdAlreadySet);
        }
        self.cluster_id = request.cluster_id;
        self.group.feature_level = self.group.feature_level.max(request.feature_level);
        Ok(Outcome::Bootstrap {
            cluster_id: request.cluster_id,
        })
    }

    pub(super) fn apply_auth(
        &mut self,
        request: &pb::AuthChange,
        entry: Entry,
    ) -> Result<Outcome, KvError> {
        if let Some(change) = &request.change {
            self.auth.apply(change, entry.leader_time_unix_ms)?;
        }
        Ok(Outcome::Auth)
    }

    /// Kinds that this build does not know change nothing, as in etcd.
    pub(super) fn apply_alarm(
        &mut self,
        request: pb::AlarmChange,
        applied: &mut Applied,
    ) -> Result<Outcome, KvError> {
        let mut alarms = Vec::new();
        if let Some(alarm) = request.alarm {
            let (kind, member_id) = (alarm.kind(), alarm.member_id);
            let stands = if kind == AlarmKind::None {
                false
            } else if request.active {
                self.group.alarms.raise(kind, member_id)?;
                true
            } else {
                self.group.alarms.take_back(kind, member_id)
            };
            if stands {
                alarms.push(alarm);
                applied.alarms_changed = true;
            }
        }
        Ok(Outcome::Alarm { alarms })
    }

    pub(super) fn apply_feature_level(&mut self, request: pb::FeatureLevel) -> Outcome {
        let level = self.group.feature_level.max(request.level);
        self.group.feature_level = level;
        Outcome::FeatureLevel { level }
    }

    pub(super) fn apply_downgrade(&mut self, request: &pb::Downgrade) -> Outcome {
        self.group
            .downgrade_target
            .clone_from(&request.target_version);
        Outcome::Downgrade
    }

    pub(super) fn apply_recover(&mut self, request: pb::Recover) -> Result<Outcome, KvError> {
        self.recover(request.cluster_id, request.revision_bump)?;
        Ok(Outcome::Recover)
    }

    pub(super) fn apply_member_removed(
        &mut self,
        request: pb::MemberRemoved,
    ) -> Result<Outcome, KvError> {
        self.group.remove_member(request.member_id)?;
        Ok(Outcome::MemberRemoved)
    }
}

#[cfg(test)]
mod tests;
