//! Apply: one log entry's proposals in order, each to its outcome.

mod gate;
mod group;
mod peer_copy;

use std::sync::Arc;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
    LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeResponse, PutRequest, PutResponse,
    TxnRequest, TxnResponse,
};

use crate::{
    check,
    error::{ApplyError, KvError},
    hash_kv::HashCursor,
    index::key_of,
    limits::{BATCH_FORMAT_QUOTA, DROPPED_EVENTS_PER_ENTRY, FEATURE_LEVEL},
    pb::{self, proposal::Command},
    peer::PeerCursor,
    state::State,
    txn::{Plan, WriteTxn},
    version::EventGroup,
};

/// What applying one entry did.
#[derive(Debug, Default)]
pub struct Applied {
    /// One for each proposal, in order.
    pub outcomes: Vec<ProposalResult>,
    /// One for each main revision that wrote, in order.
    pub groups: Vec<Arc<EventGroup>>,
    /// Cursors that changed, in order, with their place among the groups.
    pub cursors: Vec<CursorChange>,
    /// Users, roles or whether permissions are checked changed: watches must be looked at again.
    pub auth_changed: bool,
    /// An alarm was raised or taken back.
    pub alarms_changed: bool,
    /// Of the entry's last compaction: the hash at its revision as it was before, to be finished and kept ([`crate::CompactionHashes`]).
    pub compaction_hash: Option<HashCursor>,
}

/// Answer to one proposal.
#[derive(Clone, Debug, PartialEq)]
pub struct ProposalResult {
    /// The outcome, or why the proposal was refused; a refused one changed nothing.
    pub result: Result<Outcome, KvError>,
    /// Main revision after the proposal, for the header of the answer.
    pub revision: i64,
}

/// Outcome of a proposal. Headers of the responses are left to the caller; those inside a transaction are filled as etcd fills them.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Of a put.
    Put(PutResponse),
    /// Of a delete.
    DeleteRange(DeleteRangeResponse),
    /// Of a transaction.
    Txn(TxnResponse),
    /// Of a compaction.
    Compact(CompactionResponse),
    /// Of a lease grant.
    LeaseGrant(LeaseGrantResponse),
    /// Of a lease revocation.
    LeaseRevoke(LeaseRevokeResponse),
    /// Leases that were there and are gone now; none when the entry's term is not the expected one.
    LeaseExpire {
        /// Their ids.
        expired: Vec<i64>,
    },
    /// The group has its id.
    Bootstrap {
        /// The id.
        cluster_id: u64,
    },
    /// Of a peer copy.
    PeerCopy {
        /// Changes that were none of identical bytes or absent keys.
        written: usize,
    },
    /// Of forgetting a peer.
    PeerForget {
        /// Whether there was a cursor.
        known: bool,
    },
    /// Users, roles or tokens are as asked for.
    Auth,
    /// Of a change of an alarm: the one that stands now or was taken back; none where nothing stood.
    Alarm {
        /// At most one.
        alarms: Vec<pb::MemberAlarm>,
    },
    /// Kinds of entry that all replicas can apply.
    FeatureLevel {
        /// The level now.
        level: u32,
    },
    /// The announced downgrade stands, or is taken back.
    Downgrade,
    /// The group has a new identity; all that was below the new revision is compacted.
    Recover,
    /// The id is never used again.
    MemberRemoved,
}

/// What an entry says beside its proposals.
#[derive(Clone, Copy)]
struct Entry {
    term: u64,
    leader_time_unix_ms: i64,
    leader_id: u64,
    quota_bytes: u64,
}

/// A cursor that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CursorChange {
    /// Number of the entry's groups that come before it: the cursor covers them.
    pub after_groups: usize,
    /// Name of the peer.
    pub cluster: String,
    /// The new cursor; `None` when the peer was forgotten.
    pub cursor: Option<PeerCursor>,
}

/// What this build knows of an entry.
fn check_known(batch: &pb::Batch) -> Result<(), ApplyError> {
    if batch.format == 0 || batch.format > BATCH_FORMAT_QUOTA {
        return Err(ApplyError::UnknownFormat {
            found: batch.format,
            known: BATCH_FORMAT_QUOTA,
        });
    }
    for (position, proposal) in batch.proposals.iter().enumerate() {
        let wanted = wanted_level(proposal).ok_or(ApplyError::UnknownCommand { position })?;
        if wanted > FEATURE_LEVEL {
            return Err(ApplyError::UnknownFeatureLevel {
                wanted,
                known: FEATURE_LEVEL,
            });
        }
    }
    Ok(())
}

/// Feature level that a command itself names; `None` for one that this build does not know.
const fn wanted_level(proposal: &pb::Proposal) -> Option<u32> {
    match &proposal.command {
        None | Some(Command::Auth(pb::AuthChange { change: None })) => None,
        Some(Command::FeatureLevel(request)) => Some(request.level),
        Some(Command::Bootstrap(request)) => Some(request.feature_level),
        Some(_) => Some(0),
    }
}

impl pb::Proposal {
    /// Whether it may change what [`State::hash_beside_keys`] is taken of.
    #[must_use]
    pub const fn may_change_beside_keys(&self) -> bool {
        !matches!(
            self.command,
            Some(Command::Put(_) | Command::DeleteRange(_) | Command::Txn(_) | Command::Compact(_))
        )
    }

    /// Whether this build can apply it. What it cannot read whole it must not pass on either: decoding has dropped the rest.
    #[must_use]
    pub fn is_known(&self) -> bool {
        wanted_level(self).is_some_and(|wanted| wanted <= FEATURE_LEVEL)
    }
}

impl State {
    /// Applies one committed entry of `term`: a pure function of state, entry and term.
    ///
    /// # Errors
    /// [`ApplyError`] when this build does not know the entry's format or a command; nothing is changed then and the replica must stop.
    pub fn apply(&mut self, batch: &pb::Batch, term: u64) -> Result<Applied, ApplyError> {
        check_known(batch)?;
        let entry = Entry {
            term,
            leader_time_unix_ms: batch.leader_time_unix_ms,
            leader_id: batch.leader_id,
            quota_bytes: batch.quota_bytes,
        };
        let mut applied = Applied {
            outcomes: Vec::with_capacity(batch.proposals.len()),
            ..Applied::default()
        };
        let auth = (self.auth.is_enabled(), self.auth.revision());
        for proposal in &batch.proposals {
            let Some(command) = &proposal.command else {
                continue;
            };
            let result = self.apply_proposal(proposal, command, entry, &mut applied);
            applied.outcomes.push(ProposalResult {
                result,
                revision: self.revision(),
            });
        }
        applied.auth_changed = auth != (self.auth.is_enabled(), self.auth.revision());
        self.drop_compacted();
        Ok(applied)
    }

    fn apply_proposal(
        &mut self,
        proposal: &pb::Proposal,
        command: &Command,
        entry: Entry,
        applied: &mut Applied,
    ) -> Result<Outcome, KvError> {
        let alarms = self.group.alarms.len();
        let passed = self.gate(proposal, command, entry);
        applied.alarms_changed |= alarms != self.group.alarms.len();
        passed?;
        match command {
            Command::Put(request) => self.apply_put(request, applied).map(Outcome::Put),
            Command::DeleteRange(request) => self
                .apply_delete(request, applied)
                .map(Outcome::DeleteRange),
            Command::Txn(request) => self.apply_txn(request, applied).map(Outcome::Txn),
            Command::Compact(request) => {
                self.apply_compact(*request, applied).map(Outcome::Compact)
            }
            Command::LeaseGrant(request) => {
                self.apply_lease_grant(*request).map(Outcome::LeaseGrant)
            }
            Command::LeaseRevoke(request) => {
                if !self.remove_lease(request.id, applied) {
                    return Err(KvError::LeaseNotFound);
                }
                Ok(Outcome::LeaseRevoke(LeaseRevokeResponse::default()))
            }
            Command::LeaseExpire(request) => {
                // A leader of another term may have kept them alive.
                let expired = if request.term == entry.term {
                    self.expire_leases(&request.ids, applied)
                } else {
                    Vec::new()
                };
                Ok(Outcome::LeaseExpire { expired })
            }
            Command::PeerCopy(request) => self.apply_peer_copy(request, applied),
            Command::PeerForget(request) => self.apply_peer_forget(request, applied),
            Command::Auth(request) => self.apply_auth(request, entry),
            Command::Bootstrap(request) => self.apply_bootstrap(*request),
            Command::Alarm(request) => self.apply_alarm(*request, applied),
            Command::FeatureLevel(request) => Ok(self.apply_feature_level(*request)),
            Command::Downgrade(request) => Ok(self.apply_downgrade(request)),
            Command::Recover(request) => self.apply_recover(*request),
            Command::MemberRemoved(request) => self.apply_member_removed(*request),
        }
    }

    fn apply_put(
        &mut self,
        request: &PutRequest,
        applied: &mut Applied,
    ) -> Result<PutResponse, KvError> {
        check::check_put(request)?;
        self.write(applied, |write| write.put(request))
    }

    fn apply_delete(
        &mut self,
        request: &DeleteRangeRequest,
        applied: &mut Applied,
    ) -> Result<DeleteRangeResponse, KvError> {
        check::check_delete_range(request)?;
        self.write(applied, |write| Ok(write.delete_range(request)))
    }

    fn apply_txn(
        &mut self,
        request: &TxnRequest,
        applied: &mut Applied,
    ) -> Result<TxnResponse, KvError> {
        check::check_applied_txn(request)?;
        let plan = Plan::new(self.view(), &self.leases, request)?;
        self.write(applied, |write| plan.execute(write))
    }

    fn apply_compact(
        &mut self,
        request: CompactionRequest,
        applied: &mut Applied,
    ) -> Result<CompactionResponse, KvError> {
        let hash = self.hash_compaction(request.revision);
        self.compact(request.revision)?;
        applied.compaction_hash = hash;
        Ok(CompactionResponse::default())
    }

    fn apply_lease_grant(
        &mut self,
        request: LeaseGrantRequest,
    ) -> Result<LeaseGrantResponse, KvError> {
        let ttl = self.leases.grant(request.id, request.ttl)?;
        Ok(LeaseGrantResponse {
            header: None,
            id: request.id,
            ttl,
            error: String::new(),
        })
    }

    /// Removes the leases that are there, each with its keys in one revision, as etcd does. Replicas below feature level 1 take one for all.
    fn expire_leases(&mut self, ids: &[i64], applied: &mut Applied) -> Vec<i64> {
        if self.group.feature_level >= 1 {
            let mut expired = ids.to_vec();
            expired.retain(|id| self.remove_lease(*id, applied));
            return expired;
        }
        let mut expired = Vec::new();
        let mut keys = Vec::new();
        for id in ids {
            if let Some(attached) = self.leases.remove(*id) {
                expired.push(*id);
                keys.extend(attached);
            }
        }
        self.delete_keys(&keys, applied);
        expired
    }

    /// Removes a lease and all its keys, in one revision; false where there is none.
    fn remove_lease(&mut self, id: i64, applied: &mut Applied) -> bool {
        let Some(keys) = self.leases.remove(id) else {
            return false;
        };
        self.delete_keys(&keys, applied);
        true
    }

    fn delete_keys(&mut self, keys: &[Bytes], applied: &mut Applied) {
        self.write_always(applied, |write| {
            for key in keys {
                write.delete_key(key);
            }
        });
    }

    /// Runs the writes of one request; an error takes all of them back.
    fn write<T>(
        &mut self,
        applied: &mut Applied,
        run: impl FnOnce(&mut WriteTxn<'_>) -> Result<T, KvError>,
    ) -> Result<T, KvError> {
        let mut write = WriteTxn::new(
            &mut self.keyspace,
            &mut self.leases,
            self.revision,
            self.compact_revision,
        );
        let outcome = match run(&mut write) {
            Ok(outcome) => outcome,
            Err(error) => {
                write.roll_back();
                return Err(error);
            }
        };
        let group = write.commit();
        self.publish(group, applied);
        Ok(outcome)
    }

    /// The same for writes that cannot fail.
    fn write_always<T>(
        &mut self,
        applied: &mut Applied,
        run: impl FnOnce(&mut WriteTxn<'_>) -> T,
    ) -> T {
        let mut write = WriteTxn::new(
            &mut self.keyspace,
            &mut self.leases,
            self.revision,
            self.compact_revision,
        );
        let outcome = run(&mut write);
        let group = write.commit();
        self.publish(group, applied);
        outcome
    }

    fn publish(&mut self, group: Option<EventGroup>, applied: &mut Applied) {
        if let Some(group) = group {
            self.revision = group.revision;
            let group = Arc::new(group);
            self.history.push_back(Arc::clone(&group));
            applied.groups.push(group);
        }
    }

    /// Raises the compact revision; [`State::drop_compacted`] frees what no reader can ask for any more.
    fn compact(&mut self, revision: i64) -> Result<(), KvError> {
        if revision <= self.compact_revision {
            return Err(KvError::Compacted);
        }
        if revision > self.revision {
            return Err(KvError::FutureRevision);
        }
        self.compact_revision = revision;
        // Watches that start here see this group, but what was before it is compacted.
        let place = self
            .history
            .front()
            .and_then(|first| usize::try_from(revision - first.revision).ok());
        if let Some(group) = place.and_then(|place| self.history.get_mut(place)) {
            *group = Arc::new(group.without_prev());
        }
        Ok(())
    }

    /// Drops all history and every version that no reader can ask for: where revisions begin anew.
    pub(crate) fn drop_history(&mut self) {
        self.history.clear();
        let pins = self.pins.live();
        let compact_revision = self.compact_revision;
        let keys = self.keyspace.index().iter();
        let keys: Vec<Bytes> = keys
            .map(|versions| Bytes::copy_from_slice(key_of(versions)))
            .collect();
        for key in keys {
            self.keyspace.trim(&key, compact_revision, |version| {
                for pin in &pins {
                    pin.keep(version.clone());
                }
            });
        }
    }

    /// Drops some of what lies below the compact revision. A part with each entry, so that a large compaction never stops the store, and by a
    /// fixed rule, so that all replicas count the same bytes.
    fn drop_compacted(&mut self) {
        let compact_revision = self.compact_revision;
        if self
            .history
            .front()
            .is_none_or(|group| group.revision >= compact_revision)
        {
            return;
        }
        let pins = self.pins.live();
        let mut events = 0;
        while events < DROPPED_EVENTS_PER_ENTRY {
            let Some(group) = self
                .history
                .pop_front_if(|group| group.revision < compact_revision)
            else {
                return;
            };
            // The index is then as if it had been compacted at the next revision: of the keys changed there older versions go too.
            let next = self.history.front();
            let floor = group.revision + 1;
            for group in [Some(&group), next].into_iter().flatten() {
                events += group.events.len();
                for event in &group.events {
                    self.keyspace.trim(event.key(), floor, |version| {
                        for pin in &pins {
                            pin.keep(version.clone());
                        }
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
