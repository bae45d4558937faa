//! Apply: one log entry's proposals in order, each to its outcome.

use std::{collections::HashMap, sync::Arc};

use clustermesh_api::etcd::rpc::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
    LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeResponse, PutRequest, PutResponse,
    TxnRequest, TxnResponse,
};

use crate::{
    check,
    error::{ApplyError, KvError},
    limits::{BATCH_FORMAT, DROPPED_EVENTS_PER_ENTRY},
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

/// Whether this build can apply the proposal.
const fn is_known(proposal: &pb::Proposal) -> bool {
    !matches!(
        proposal.command,
        None | Some(
            Command::Auth(_)
                | Command::Alarm(_)
                | Command::FeatureLevel(_)
                | Command::Downgrade(_)
                | Command::Recover(_)
                | Command::MemberRemoved(_)
        )
    )
}

impl State {
    /// Applies one committed entry of `term`: a pure function of state, entry and term.
    ///
    /// # Errors
    /// [`ApplyError`] when this build does not know the entry's format or a command; nothing is changed then and the replica must stop.
    pub fn apply(&mut self, batch: &pb::Batch, term: u64) -> Result<Applied, ApplyError> {
        if batch.format != BATCH_FORMAT {
            return Err(ApplyError::UnknownFormat {
                found: batch.format,
                known: BATCH_FORMAT,
            });
        }
        if let Some(position) = batch
            .proposals
            .iter()
            .position(|proposal| !is_known(proposal))
        {
            return Err(ApplyError::UnknownCommand { position });
        }
        let mut applied = Applied {
            outcomes: Vec::with_capacity(batch.proposals.len()),
            ..Applied::default()
        };
        for command in batch
            .proposals
            .iter()
            .filter_map(|proposal| proposal.command.as_ref())
        {
            let result = self.apply_command(command, term, &mut applied);
            applied.outcomes.push(ProposalResult {
                result,
                revision: self.revision(),
            });
        }
        self.drop_compacted();
        Ok(applied)
    }

    fn apply_command(
        &mut self,
        command: &Command,
        term: u64,
        applied: &mut Applied,
    ) -> Result<Outcome, KvError> {
        match command {
            Command::Put(request) => self.apply_put(request, applied).map(Outcome::Put),
            Command::DeleteRange(request) => self
                .apply_delete(request, applied)
                .map(Outcome::DeleteRange),
            Command::Txn(request) => self.apply_txn(request, applied).map(Outcome::Txn),
            Command::Compact(request) => self.apply_compact(*request).map(Outcome::Compact),
            Command::LeaseGrant(request) => {
                self.apply_lease_grant(*request).map(Outcome::LeaseGrant)
            }
            Command::LeaseRevoke(request) => {
                if !self.leases.contains(request.id) {
                    return Err(KvError::LeaseNotFound);
                }
                self.remove_leases(&[request.id], applied);
                Ok(Outcome::LeaseRevoke(LeaseRevokeResponse::default()))
            }
            Command::LeaseExpire(request) => {
                let mut expired = Vec::new();
                // A leader of another term may have kept them alive.
                if request.term == term {
                    expired = self.remove_leases(&request.ids, applied);
                }
                Ok(Outcome::LeaseExpire { expired })
            }
            Command::Bootstrap(request) => self.apply_bootstrap(*request),
            Command::PeerCopy(request) => self.apply_peer_copy(request, applied),
            Command::PeerForget(request) => Ok(self.apply_peer_forget(request, applied)),
            Command::Auth(_)
            | Command::Alarm(_)
            | Command::FeatureLevel(_)
            | Command::Downgrade(_)
            | Command::Recover(_)
            | Command::MemberRemoved(_) => Err(KvError::KeyNotFound),
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

    fn apply_compact(&mut self, request: CompactionRequest) -> Result<CompactionResponse, KvError> {
        self.compact(request.revision)?;
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

    /// Removes the leases that are there and all their keys, in one revision.
    fn remove_leases(&mut self, ids: &[i64], applied: &mut Applied) -> Vec<i64> {
        let mut removed = Vec::new();
        let mut keys = Vec::new();
        for id in ids {
            if let Some(attached) = self.leases.remove(*id) {
                removed.push(*id);
                keys.extend(attached);
            }
        }
        self.write_always(applied, |write| {
            for key in &keys {
                write.delete_key(key);
            }
        });
        removed
    }

    fn apply_bootstrap(&mut self, request: pb::Bootstrap) -> Result<Outcome, KvError> {
        if request.cluster_id == 0 {
            return Err(KvError::ClusterIdZero);
        }
        if self.cluster_id != 0 {
            return Err(KvError::ClusterIdAlreadySet);
        }
        self.cluster_id = request.cluster_id;
        Ok(Outcome::Bootstrap {
            cluster_id: request.cluster_id,
        })
    }

    fn apply_peer_copy(
        &mut self,
        request: &pb::PeerCopy,
        applied: &mut Applied,
    ) -> Result<Outcome, KvError> {
        check::check_peer_copy(request)?;
        // One revision holds one change of a key: the last one counts.
        let last: HashMap<&[u8], usize> = request
            .changes
            .iter()
            .enumerate()
            .map(|(place, change)| (change.key.as_ref(), place))
            .collect();
        let written = self.write_always(applied, |write| {
            let mut written = 0;
            for (place, change) in request.changes.iter().enumerate() {
                if last.get(change.key.as_ref()) != Some(&place) {
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
        if self.cursors.get(&request.cluster) != Some(&cursor) {
            self.cursors.insert(request.cluster.clone(), cursor.clone());
            applied.cursors.push(CursorChange {
                after_groups: applied.groups.len(),
                cluster: request.cluster.clone(),
                cursor: Some(cursor),
            });
        }
        Ok(Outcome::PeerCopy { written })
    }

    fn apply_peer_forget(&mut self, request: &pb::PeerForget, applied: &mut Applied) -> Outcome {
        let known = self.cursors.remove(&request.cluster).is_some();
        if known {
            applied.cursors.push(CursorChange {
                after_groups: applied.groups.len(),
                cluster: request.cluster.clone(),
                cursor: None,
            });
        }
        Outcome::PeerForget { known }
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
        let pins = self.live_pins();
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
                            pin.keep(&version);
                        }
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
