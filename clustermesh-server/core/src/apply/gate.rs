//! What an entry's proposal must pass before anything is done: feature level, alarms, permission, quota. In etcd's order.

use clustermesh_api::etcd::rpc::{PutRequest, RequestOp, TxnRequest, request_op::Request};

use super::Entry;
use crate::{
    auth::{Access, Actor},
    error::KvError,
    limits::{LEASE_OVERHEAD_BYTES, VERSION_OVERHEAD_BYTES},
    pb::{AlarmKind, Proposal, proposal::Command},
    state::State,
};

impl State {
    pub(super) fn gate(
        &mut self,
        proposal: &Proposal,
        command: &Command,
        entry: Entry,
    ) -> Result<(), KvError> {
        if self.group.feature_level < needed_level(command) {
            return Err(KvError::NotCapable);
        }
        let cost = self.cost(command);
        if self.group.alarms.stands(AlarmKind::Corrupt) && touches_keys(command) {
            return Err(KvError::Corrupt);
        }
        if cost > 0 && self.group.alarms.stands(AlarmKind::Nospace) {
            return Err(KvError::NoSpace);
        }
        if self.auth.is_enabled() && !proposal.system {
            let actor = Actor {
                user: &proposal.user,
                auth_revision: proposal.auth_revision,
            };
            self.check_permitted(actor, command)?;
        }
        let full = entry.quota_bytes != 0
            && self.approximate_bytes().saturating_add(cost) >= entry.quota_bytes;
        if cost > 0 && full {
            // Full of alarms is as good as alarmed.
            let _full = self.group.alarms.raise(AlarmKind::Nospace, entry.leader_id);
            return Err(KvError::NoSpace);
        }
        Ok(())
    }

    /// What the command may add to [`State::approximate_bytes`]; 0 for what goes on past the quota.
    fn cost(&self, command: &Command) -> u64 {
        match command {
            Command::Put(request) => put_cost(request),
            Command::Txn(request) => txn_cost(request),
            Command::LeaseGrant(_) => LEASE_OVERHEAD_BYTES,
            Command::PeerCopy(request) => request
                .changes
                .iter()
                .filter_map(|change| Some((&change.key, change.value.as_ref()?)))
                // A copy of what is there already writes nothing.
                .filter(|(key, value)| {
                    self.keyspace
                        .latest(key)
                        .is_none_or(|current| current.value_bytes() != value.as_ref())
                })
                .map(|(key, value)| version_cost(key, value))
                .sum(),
            _ => 0,
        }
    }

    fn check_permitted(&self, actor: Actor<'_>, command: &Command) -> Result<(), KvError> {
        let auth = &self.auth;
        match command {
            Command::Put(request) => auth.check_put(actor, &self.leases, request),
            Command::DeleteRange(request) => auth.check_delete(actor, request),
            Command::Txn(request) => auth.check_txn(actor, &self.leases, request),
            Command::LeaseGrant(_) => auth.check_named(actor),
            Command::LeaseRevoke(request) => {
                auth.check_named(actor)?;
                auth.check_lease_keys(actor, self.leases.keys(request.id), Access::Write)
            }
            Command::Compact(_) | Command::Auth(_) | Command::Alarm(_) | Command::Downgrade(_) => {
                auth.check_admin(actor)
            }
            // Of the server only.
            Command::LeaseExpire(_)
            | Command::Bootstrap(_)
            | Command::PeerCopy(_)
            | Command::PeerForget(_)
            | Command::FeatureLevel(_)
            | Command::Recover(_)
            | Command::MemberRemoved(_) => Err(KvError::PermissionDenied),
        }
    }
}

/// Level that all replicas must have before such an entry is applied.
const fn needed_level(command: &Command) -> u32 {
    match command {
        Command::Put(_)
        | Command::DeleteRange(_)
        | Command::Txn(_)
        | Command::Compact(_)
        | Command::LeaseGrant(_)
        | Command::LeaseRevoke(_)
        | Command::LeaseExpire(_)
        | Command::Bootstrap(_)
        | Command::PeerCopy(_)
        | Command::PeerForget(_)
        | Command::FeatureLevel(_) => 0,
        Command::Auth(_)
        | Command::Alarm(_)
        | Command::Downgrade(_)
        | Command::Recover(_)
        | Command::MemberRemoved(_) => 1,
    }
}

/// What etcd refuses while a replica is known to differ.
const fn touches_keys(command: &Command) -> bool {
    matches!(
        command,
        Command::Put(_)
            | Command::DeleteRange(_)
            | Command::Txn(_)
            | Command::Compact(_)
            | Command::LeaseGrant(_)
            | Command::LeaseRevoke(_)
            | Command::LeaseExpire(_)
            | Command::PeerCopy(_)
    )
}

const fn version_cost(key: &[u8], value: &[u8]) -> u64 {
    VERSION_OVERHEAD_BYTES + key.len() as u64 + value.len() as u64
}

fn put_cost(request: &PutRequest) -> u64 {
    version_cost(&request.key, &request.value)
}

/// The dearer branch.
fn txn_cost(request: &TxnRequest) -> u64 {
    let branch = |ops: &[RequestOp]| -> u64 {
        ops.iter()
            .map(|op| match &op.request {
                Some(Request::RequestPut(put)) => put_cost(put),
                Some(Request::RequestTxn(txn)) => txn_cost(txn),
                _ => 0,
            })
            .sum()
    };
    branch(&request.success).max(branch(&request.failure))
}

#[cfg(test)]
mod tests;
