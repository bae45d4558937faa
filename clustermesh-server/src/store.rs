//! The replica as the services use it: etcd's requests in, responses with headers or etcd's errors out.

mod auth;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clustermesh_api::etcd::rpc::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, DowngradeInfo,
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse, Member, MemberListResponse, PutRequest, PutResponse, RangeRequest,
    RangeResponse, RequestOp, ResponseHeader, StatusResponse, TxnRequest, TxnResponse, request_op,
};
use clustermesh_core::auth::Access;
use clustermesh_core::pb::{PeerCopy, PeerForget, proposal::Command};
use clustermesh_core::{KvError, Outcome, State, check, is_read_only};
use clustermesh_raft::{Committed, ProposeError, ReadError, Replica, WatchSpec, Watcher};
use openraft_rt_tokio::TokioRuntime;
use prost::Message;
use tonic::{Code, Status};

pub use auth::AuthChanges;

use crate::auth::{Credentials, TokenUses};
use crate::version::{ETCD_CLUSTER_VERSION, ETCD_VERSION};

/// A leader that heard from no quorum for so long does not count as one.
const LEADER_SILENCE_MAX: Duration = Duration::from_secs(5);

/// The replica on tokio.
pub type TokioReplica = Replica<TokioRuntime>;

/// Watches on tokio.
pub type TokioWatcher = Watcher<TokioRuntime>;

/// The handle; clones share it.
#[derive(Clone)]
pub struct Store {
    replica: TokioReplica,
    shared: Arc<Shared>,
    /// On whose behalf this handle asks: the server's, unless said otherwise.
    credentials: Arc<Credentials>,
}

struct Shared {
    cluster_id: u64,
    member_id: u64,
    term: AtomicU64,
    token_uses: TokenUses,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("cluster_id", &self.shared.cluster_id)
            .field("member_id", &self.shared.member_id)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Over a started replica, which has its cluster id by then; users' tokens end after so long without use.
    #[must_use]
    pub fn new(replica: TokioReplica, auth_token_ttl_seconds: u32) -> Self {
        let status = replica.status();
        let shared = Shared {
            cluster_id: status.cluster_id,
            member_id: status.replica_id,
            term: AtomicU64::new(status.term),
            token_uses: TokenUses::new(auth_token_ttl_seconds),
        };
        Self {
            replica,
            shared: Arc::new(shared),
            credentials: Arc::new(Credentials::System),
        }
    }

    /// The replica itself.
    #[must_use]
    pub fn replica(&self) -> &TokioReplica {
        &self.replica
    }

    /// Id of the group: changes when the history of revisions is another one.
    #[must_use]
    pub fn cluster_id(&self) -> u64 {
        self.shared.cluster_id
    }

    /// Id of this replica.
    #[must_use]
    pub fn member_id(&self) -> u64 {
        self.shared.member_id
    }

    /// The header that etcd sends on every message.
    #[must_use]
    pub fn header(&self, revision: i64) -> ResponseHeader {
        ResponseHeader {
            cluster_id: self.shared.cluster_id,
            member_id: self.shared.member_id,
            revision,
            raft_term: self.shared.term.load(Ordering::Relaxed),
        }
    }

    /// The header of what is about replicas: etcd's has no revision there.
    #[must_use]
    pub fn group_header(&self) -> ResponseHeader {
        self.header(0)
    }

    /// Newest applied revision.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.read(State::revision)
    }

    /// Whether this replica leads.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        let status = self.replica.status();
        self.shared.term.fetch_max(status.term, Ordering::Relaxed);
        status.is_leader
    }

    /// Whether there is a leader that a quorum follows.
    ///
    /// # Errors
    /// `Unavailable` when there is none.
    pub fn check_leader(&self) -> Result<(), Status> {
        let status = self.replica.status();
        self.shared.term.fetch_max(status.term, Ordering::Relaxed);
        // A leader goes by its quorum, another replica by its leader; an isolated leader still calls itself one.
        let heard = if status.is_leader {
            status.last_quorum_ack
        } else {
            status.last_leader_contact
        };
        let fresh = heard.is_some_and(|age| age < LEADER_SILENCE_MAX);
        match (status.failure, status.leader) {
            (None, Some(_)) if fresh => Ok(()),
            _ => Err(Status::unavailable("etcdserver: no leader")),
        }
    }

    /// Whether this replica follows without a vote.
    #[must_use]
    pub fn is_learner(&self) -> bool {
        is_learner(&self.replica.status())
    }

    /// Health as etcd's `/health` judges it.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub fn health(&self) -> Result<(), String> {
        if let Some(failure) = self.replica.status().failure {
            return Err(format!("replica stopped: {failure}"));
        }
        self.check_leader()
            .map_err(|status| status.message().to_owned())
    }

    /// Reads the state as applied here.
    pub fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        self.replica.read(read)
    }

    /// Waits until everything committed before the call is applied here.
    ///
    /// # Errors
    /// `Unavailable` without a leader that a quorum follows, `ResourceExhausted` when too many wait.
    pub async fn linearize(&self) -> Result<(), Status> {
        self.replica
            .linearize()
            .await
            .map_err(|error| read_status(&error))
    }

    fn check_not_diverged(&self) -> Result<(), Status> {
        let checked = self.replica.check_not_diverged();
        checked.map_err(|error| read_status(&error))
    }

    /// Events from a revision on.
    #[must_use]
    pub fn watch(&self, spec: WatchSpec) -> TokioWatcher {
        self.replica.watch(spec)
    }

    /// `KV.Range`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Status> {
        check::check_range(request).map_err(|error| kv_status(&error))?;
        if request.serializable {
            self.check_not_diverged()?;
        } else {
            self.linearize().await?;
        }
        let (response, revision) = self.read(|state| {
            self.permit_on(state, |state, actor| {
                let (key, range_end) = (&request.key, &request.range_end);
                state
                    .auth()
                    .check_range(actor, key, range_end, Access::Read)
            })?;
            Ok::<_, Status>((state.range(request), state.revision()))
        })?;
        let mut response = response.map_err(|error| kv_status(&error))?;
        response.header = Some(self.header(revision));
        Ok(response)
    }

    /// `KV.Put`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn put(&self, request: PutRequest) -> Result<PutResponse, Status> {
        check::check_put(&request).map_err(|error| kv_status(&error))?;
        check_size(&request)?;
        match self.propose(Command::Put(request)).await? {
            (Outcome::Put(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `KV.DeleteRange`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn delete_range(
        &self,
        request: DeleteRangeRequest,
    ) -> Result<DeleteRangeResponse, Status> {
        check::check_delete_range(&request).map_err(|error| kv_status(&error))?;
        check_size(&request)?;
        match self.propose(Command::DeleteRange(request)).await? {
            (Outcome::DeleteRange(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `KV.Txn`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        check::check_txn(&request).map_err(|error| kv_status(&error))?;
        check_size(&request)?;
        if is_read_only(&request) {
            if is_serializable(&request) {
                self.check_not_diverged()?;
            } else {
                self.linearize().await?;
            }
            let (response, revision) = self.read(|state| {
                self.permit_on(state, |state, actor| {
                    state.check_txn_permitted(actor, &request)
                })?;
                Ok::<_, Status>((state.read_txn(&request), state.revision()))
            })?;
            let mut response = response.map_err(|error| kv_status(&error))?;
            response.header = Some(self.header(revision));
            return Ok(response);
        }
        self.txn_planned(request).await
    }

    /// A transaction that the server itself planned: bound by the log's limits only.
    ///
    /// # Errors
    /// etcd's.
    pub async fn txn_planned(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        match self.propose(Command::Txn(request)).await? {
            (Outcome::Txn(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// [`Self::txn_planned`] for what only the leader writes, while this replica leads.
    ///
    /// # Errors
    /// etcd's; `Unavailable` where another replica leads.
    pub async fn txn_as_leader(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        match self.propose_as_leader(Command::Txn(request)).await? {
            (Outcome::Txn(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `KV.Compact`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse, Status> {
        self.permit_admin()?;
        match self.propose(Command::Compact(request)).await? {
            (Outcome::Compact(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// Changes of a peer's copy with the cursor that they reach; the number of records that changed.
    ///
    /// # Errors
    /// A key outside the copy's ranges, or no leader.
    pub async fn peer_copy(&self, copy: PeerCopy) -> Result<usize, Status> {
        match self.propose_as_leader(Command::PeerCopy(copy)).await? {
            (Outcome::PeerCopy { written }, _) => Ok(written),
            _ => Err(mixed_up()),
        }
    }

    /// Drops a peer's cursor.
    ///
    /// # Errors
    /// No leader.
    pub async fn peer_forget(&self, cluster: String) -> Result<(), Status> {
        self.propose_as_leader(Command::PeerForget(PeerForget { cluster }))
            .await?;
        Ok(())
    }

    /// `Lease.LeaseGrant`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn lease_grant(
        &self,
        request: LeaseGrantRequest,
    ) -> Result<LeaseGrantResponse, Status> {
        check::check_lease_grant(&request).map_err(|error| kv_status(&error))?;
        match self.propose(Command::LeaseGrant(request)).await? {
            (Outcome::LeaseGrant(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `Lease.LeaseRevoke`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn lease_revoke(
        &self,
        request: LeaseRevokeRequest,
    ) -> Result<LeaseRevokeResponse, Status> {
        match self.propose(Command::LeaseRevoke(request)).await? {
            (Outcome::LeaseRevoke(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// One message of `Lease.LeaseKeepAlive`; an unknown lease gets TTL 0, as in etcd.
    ///
    /// # Errors
    /// No leader.
    pub async fn lease_keep_alive(&self, id: i64) -> Result<LeaseKeepAliveResponse, Status> {
        self.permit(|state, actor| {
            state.auth().check_named(actor)?;
            state.check_lease_permitted(actor, id, Access::Write)
        })?;
        let ttl = self
            .replica
            .keep_alive(id)
            .await
            .map_err(|error| read_status(&error))?;
        Ok(LeaseKeepAliveResponse {
            header: Some(self.header(self.revision())),
            id,
            ttl: ttl.map_or(0, seconds),
        })
    }

    /// `Lease.LeaseTimeToLive`; an unknown lease gets TTL -1, as in etcd.
    ///
    /// # Errors
    /// No leader.
    pub async fn lease_time_to_live(
        &self,
        request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Status> {
        self.permit(|state, actor| {
            state.auth().check_named(actor)?;
            if request.keys {
                state.check_lease_permitted(actor, request.id, Access::Read)?;
            }
            Ok(())
        })?;
        let lease = self
            .replica
            .time_to_live(request.id)
            .await
            .map_err(|error| read_status(&error))?;
        let header = Some(self.header(self.revision()));
        Ok(match lease {
            Some(lease) => LeaseTimeToLiveResponse {
                header,
                id: request.id,
                ttl: seconds(lease.remaining),
                granted_ttl: lease.granted_ttl_s,
                keys: if request.keys { lease.keys } else { Vec::new() },
            },
            None => LeaseTimeToLiveResponse {
                header,
                id: request.id,
                ttl: -1,
                ..Default::default()
            },
        })
    }

    /// `Lease.LeaseLeases`.
    ///
    /// # Errors
    /// No leader.
    pub async fn lease_leases(&self) -> Result<LeaseLeasesResponse, Status> {
        self.linearize().await?;
        self.permit(|state, actor| {
            state.auth().check_named(actor)?;
            state
                .leases()
                .try_for_each(|(id, _)| state.check_lease_permitted(actor, id, Access::Read))
        })?;
        let (leases, revision) = self.read(|state| {
            let leases = state.leases().map(|(id, _)| LeaseStatus { id }).collect();
            (leases, state.revision())
        });
        Ok(LeaseLeasesResponse {
            header: Some(self.header(revision)),
            leases,
        })
    }

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
        let alarms: Vec<String> = self.read(|state| {
            state
                .alarms()
                .map(|alarm| auth::alarm_text(&alarm))
                .collect()
        });
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

    async fn propose(&self, command: Command) -> Result<(Outcome, ResponseHeader), Status> {
        let proposal = self.proposal(command)?;
        let Committed {
            outcome,
            revision,
            term,
            ..
        } = self
            .replica
            .propose(proposal)
            .await
            .map_err(|error| propose_status(&error))?;
        self.shared.term.fetch_max(term, Ordering::Relaxed);
        let outcome = outcome.map_err(|error| kv_status(&error))?;
        Ok((outcome, self.header(revision)))
    }

    /// For the server's own tasks that run on the leader only.
    async fn propose_as_leader(
        &self,
        command: Command,
    ) -> Result<(Outcome, ResponseHeader), Status> {
        let proposal = clustermesh_core::pb::Proposal::system(command);
        let committed = self
            .replica
            .propose_as_leader(proposal)
            .await
            .map_err(|error| propose_status(&error))?;
        self.shared
            .term
            .fetch_max(committed.term, Ordering::Relaxed);
        let outcome = committed.outcome.map_err(|error| kv_status(&error))?;
        Ok((outcome, self.header(committed.revision)))
    }
}

fn is_learner(status: &clustermesh_raft::Status) -> bool {
    let is_self = |member: &&clustermesh_raft::Member| member.id == status.replica_id;
    status
        .members
        .iter()
        .find(is_self)
        .is_some_and(|member| !member.voter)
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// Every range of the transaction may be served from what is applied here.
fn is_serializable(request: &TxnRequest) -> bool {
    // etcd: compares are always linearizable here.
    request.compare.is_empty()
        && request
            .success
            .iter()
            .chain(&request.failure)
            .all(is_serializable_op)
}

fn is_serializable_op(op: &RequestOp) -> bool {
    match &op.request {
        Some(request_op::Request::RequestRange(range)) => range.serializable,
        Some(request_op::Request::RequestTxn(txn)) => is_serializable(txn),
        _ => false,
    }
}

fn check_size(request: &impl Message) -> Result<(), Status> {
    check::check_size(request.encoded_len()).map_err(|error| kv_status(&error))
}

fn mixed_up() -> Status {
    Status::internal("clustermesh: the answer is of another kind than the request")
}

/// etcd's code and text of a refused request.
pub(crate) fn kv_status(error: &KvError) -> Status {
    Status::new(Code::from_i32(error.code()), error.to_string())
}

pub(crate) fn read_status(error: &ReadError) -> Status {
    match error {
        ReadError::NotLeader { .. } => Status::unavailable("etcdserver: no leader"),
        ReadError::NoQuorum => Status::unavailable("etcdserver: request timed out"),
        ReadError::QueueFull { .. } => too_many_requests(),
        ReadError::Stopped => Status::unavailable("etcdserver: server stopped"),
        // Another replica can serve: clients go there.
        ReadError::Diverged => Status::unavailable(format!("clustermesh: {error}")),
    }
}

fn propose_status(error: &ProposeError) -> Status {
    match error {
        ProposeError::NotLeader { .. } => Status::unavailable("etcdserver: no leader"),
        // The outcome is open, which is what this text tells etcd's clients.
        ProposeError::Unknown => Status::unavailable(
            "etcdserver: request timed out, possibly due to previous leader failure",
        ),
        ProposeError::Timeout => Status::unavailable("etcdserver: request timed out"),
        ProposeError::QueueFull { .. } => too_many_requests(),
        ProposeError::TooLarge { .. } => kv_status(&KvError::RequestTooLarge),
        ProposeError::Stopped => Status::unavailable("etcdserver: server stopped"),
    }
}

fn too_many_requests() -> Status {
    Status::resource_exhausted("etcdserver: too many requests")
}
