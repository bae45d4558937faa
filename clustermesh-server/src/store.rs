//! The replica as the services use it: etcd's requests in, responses with headers or etcd's errors out.

mod auth;
mod kv;
mod lease;
mod maintenance;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clustermesh_api::etcd::rpc::ResponseHeader;
use clustermesh_core::pb::{PeerCopy, PeerForget, proposal::Command};
use clustermesh_core::{Outcome, State};
use clustermesh_raft::{Committed, ReadError, Replica, WatchSpec, Watcher};
use openraft_rt_tokio::TokioRuntime;
use tonic::Status;

pub use auth::AuthChanges;

use self::maintenance::is_learner;
use crate::auth::{Credentials, TokenUses};
use crate::status::{kv_status, mixed_up, propose_status, read_status};

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

    /// The same, but false where no quorum answers within `patience`.
    ///
    /// # Errors
    /// As [`Store::linearize`], but for a leader that is missing.
    pub async fn linearize_within(&self, patience: Duration) -> Result<bool, Status> {
        match tokio::time::timeout(patience, self.replica.linearize()).await {
            Ok(Ok(())) => Ok(true),
            Err(_) | Ok(Err(ReadError::NotLeader { .. } | ReadError::NoQuorum)) => Ok(false),
            Ok(Err(error)) => Err(read_status(&error)),
        }
    }

    /// For what is served without [`Store::linearize`], which checks this itself.
    ///
    /// # Errors
    /// `Unavailable`: the group found that the data here is not its own.
    pub fn check_not_diverged(&self) -> Result<(), Status> {
        let checked = self.replica.check_not_diverged();
        checked.map_err(|error| read_status(&error))
    }

    /// Events from a revision on.
    #[must_use]
    pub fn watch(&self, spec: WatchSpec) -> TokioWatcher {
        self.replica.watch(spec)
    }

    /// Changes of a peer's copy with the cursor that they reach; the number of records that changed.
    ///
    /// # Errors
    /// A key outside the copy's ranges, `Aborted` for a step that is not the next one, or this replica does not lead.
    pub async fn peer_copy(&self, copy: PeerCopy) -> Result<usize, Status> {
        match self.propose_as_leader(Command::PeerCopy(copy)).await? {
            (Outcome::PeerCopy { written }, _) => Ok(written),
            _ => Err(mixed_up()),
        }
    }

    /// The term in which this replica leads. What earlier leaders copied is applied once [`Self::linearize`] returns.
    #[must_use]
    pub fn leading_term(&self) -> Option<u64> {
        self.replica.leading_term()
    }

    /// Drops a peer's cursor; `sequence` numbers it as a step of the copy.
    ///
    /// # Errors
    /// `Aborted` for a step that is not the next one, or this replica does not lead.
    pub async fn peer_forget(&self, cluster: String, sequence: u64) -> Result<(), Status> {
        let forget = PeerForget { cluster, sequence };
        self.propose_as_leader(Command::PeerForget(forget)).await?;
        Ok(())
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
        let told = self.replica.propose_as_leader(proposal).await;
        let committed = told.map_err(|error| propose_status(&error))?;
        self.shared
            .term
            .fetch_max(committed.term, Ordering::Relaxed);
        let outcome = committed.outcome.map_err(|error| kv_status(&error))?;
        Ok((outcome, self.header(committed.revision)))
    }
}
