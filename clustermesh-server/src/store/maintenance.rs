//! What operators ask of a replica and its group: status, members, alarms, hashes.

use std::sync::atomic::Ordering;

use clustermesh_api::etcd::rpc::{
    AlarmMember, AlarmRequest, AlarmResponse, DowngradeInfo, HashKvResponse, Member,
    MemberListResponse, StatusResponse, alarm_request::AlarmAction,
};
use clustermesh_core::pb::{self, AlarmChange, MemberAlarm, proposal::Command};
use clustermesh_core::{Outcome, State};
use tonic::Status;

use super::Store;
use crate::status::{kv_status, mixed_up, read_status};
use crate::version::{ETCD_CLUSTER_VERSION, ETCD_VERSION};

impl Store {
    /// `Maintenance.Status`.
    #[must_use]
    pub fn maintenance_status(&self) -> StatusResponse {
        let status = self.replica.status();
        self.shared.term.fetch_max(status.term, Ordering::Relaxed);
        let size = i64::try_from(status.state_bytes).unwrap_or(i64::MAX);
        let errors = self
            .check_leader()
            .err()
            .map(|status| status.message().to_owned());
        let alarms: Vec<String> =
            self.read(|state| state.alarms().map(|alarm| alarm_text(&alarm)).collect());
        StatusResponse {
            header: Some(self.header(status.revision)),
            version: ETCD_VERSION.to_owned(),
            db_size: i64::try_from(status.log_bytes)
                .unwrap_or(i64::MAX)
                .saturating_add(size),
            leader: status.leader.unwrap_or(0),
            raft_index: status.last_log_index,
            raft_term: status.term,
            raft_applied_index: status.applied_index,
            errors: errors.into_iter().chain(alarms).collect(),
            db_size_in_use: size,
            is_learner: is_learner(&status),
            storage_version: ETCD_CLUSTER_VERSION.to_owned(),
            db_size_quota: i64::try_from(status.quota_bytes).unwrap_or(i64::MAX),
            downgrade_info: Some(DowngradeInfo::default()),
        }
    }

    /// `Cluster.MemberList`.
    ///
    /// # Errors
    /// No leader, when a linearizable answer was asked for.
    pub async fn member_list(&self, linearizable: bool) -> Result<MemberListResponse, Status> {
        if linearizable {
            self.linearize().await?;
        }
        let members = self.members();
        Ok(MemberListResponse {
            header: Some(self.group_header()),
            members,
        })
    }

    /// All replicas, as etcd lists them.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        let members = self.replica.status().members.into_iter();
        members
            .map(|member| Member {
                id: member.id,
                name: member.node.name,
                peer_ur_ls: Some(member.node.peer_url)
                    .filter(|url| !url.is_empty())
                    .into_iter()
                    .collect(),
                client_ur_ls: member.node.client_urls,
                is_learner: !member.voter,
            })
            .collect()
    }

    /// `Maintenance.Alarm`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse, Status> {
        let wanted = request.alarm;
        let active = match request.action() {
            AlarmAction::Get => {
                self.linearize().await?;
                let (alarms, revision) = self.read(|state| {
                    self.permit_on(state, |state, actor| state.auth().check_named(actor))?;
                    let alarms = state
                        .alarms()
                        .filter(|alarm| wanted == 0 || alarm.kind == wanted)
                        .map(member)
                        .collect();
                    Ok::<_, Status>((alarms, state.revision()))
                })?;
                return Ok(AlarmResponse {
                    header: Some(self.header(revision)),
                    alarms,
                });
            }
            AlarmAction::Activate => true,
            AlarmAction::Deactivate => false,
        };
        let command = Command::Alarm(AlarmChange {
            active,
            alarm: Some(MemberAlarm {
                member_id: request.member_id,
                kind: wanted,
            }),
        });
        match self.propose(command).await? {
            (Outcome::Alarm { alarms }, header) => Ok(AlarmResponse {
                header: Some(header),
                alarms: alarms.into_iter().map(member).collect(),
            }),
            _ => Err(mixed_up()),
        }
    }

    /// `Maintenance.HashKV`: etcd's own value.
    ///
    /// # Errors
    /// etcd's.
    pub async fn hash_kv(&self, revision: i64) -> Result<HashKvResponse, Status> {
        let (hash, newest) = self
            .replica
            .hash_kv(revision)
            .await
            .map_err(|error| read_status(&error))?
            .map_err(|error| kv_status(&error))?;
        Ok(HashKvResponse {
            header: Some(self.header(newest)),
            hash: hash.hash,
            compact_revision: hash.compact_revision,
            hash_revision: hash.revision,
        })
    }

    /// Hash over everything that replicas must have in common, with its revision.
    ///
    /// # Errors
    /// The replica stops.
    pub async fn hash(&self) -> Result<(u32, i64), Status> {
        let keys = self.hash_kv(0).await?;
        let rest = self.read(State::hash_group);
        Ok((keys.hash.rotate_left(1) ^ rest, keys.hash_revision))
    }
}

pub(super) fn is_learner(status: &clustermesh_raft::Status) -> bool {
    let is_self = |member: &&clustermesh_raft::Member| member.id == status.replica_id;
    status
        .members
        .iter()
        .find(is_self)
        .is_some_and(|member| !member.voter)
}

fn member(alarm: MemberAlarm) -> AlarmMember {
    AlarmMember {
        member_id: alarm.member_id,
        alarm: alarm.kind,
    }
}

/// etcd's text of an alarm in the errors of a status.
fn alarm_text(alarm: &MemberAlarm) -> String {
    let kind = match alarm.kind() {
        pb::AlarmKind::None => "NONE",
        pb::AlarmKind::Nospace => "NOSPACE",
        pb::AlarmKind::Corrupt => "CORRUPT",
    };
    format!("memberID:{} alarm:{kind} ", alarm.member_id)
}
