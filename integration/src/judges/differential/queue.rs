//! Locks and elections. Only the texts of their errors are compared: etcd passes most of them on without their codes.

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use clustermesh_api::etcd::election::election_client::ElectionClient;
use clustermesh_api::etcd::election::{
    CampaignRequest, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ResignRequest,
};
use clustermesh_api::etcd::lock::lock_client::LockClient;
use clustermesh_api::etcd::lock::{LockRequest, UnlockRequest};
use tonic::{Code, Request, Streaming, transport::Channel};

use super::answer::{Answer, set_ids_aside};

/// Nobody stands in the way of any of these calls.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// An operation about locks and elections.
#[derive(Clone, Debug)]
pub enum QueueOp {
    Lock(LockRequest),
    Unlock(UnlockRequest),
    Campaign(CampaignRequest),
    Proclaim(ProclaimRequest),
    Leader(LeaderRequest),
    /// Follows an office while its leader proclaims this.
    Observe(LeaderRequest, Bytes),
    Resign(ResignRequest),
}

impl QueueOp {
    /// Name in reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Lock(_) => "lock",
            Self::Unlock(_) => "unlock",
            Self::Campaign(_) => "campaign",
            Self::Proclaim(_) => "proclaim",
            Self::Leader(_) => "leader",
            Self::Observe(..) => "observe",
            Self::Resign(_) => "resign",
        }
    }
}

/// Both services of one server.
pub(super) struct Queue {
    lock: LockClient<Channel>,
    election: ElectionClient<Channel>,
}

impl Queue {
    pub(super) fn new(channel: Channel) -> Self {
        Self {
            lock: LockClient::new(channel.clone()),
            election: ElectionClient::new(channel),
        }
    }

    /// The leader, and what it says then; without a leader there is nothing to be told.
    async fn observe(&mut self, office: LeaderRequest, value: Bytes) -> Result<Answer> {
        let known = self.election.leader(bounded(office.clone())).await;
        let leader = match &known {
            Ok(known) => known.get_ref().kv.clone().unwrap_or_default(),
            Err(_) => return Ok(Answer::of(known)),
        };
        let mut told = self
            .election
            .observe(bounded(office.clone()))
            .await?
            .into_inner();
        let first = told_next(&mut told).await;
        let proclaim = ProclaimRequest {
            leader: Some(LeaderKey {
                name: office.name,
                key: leader.key,
                rev: leader.create_revision,
                lease: leader.lease,
            }),
            value,
        };
        let proclaimed = self.election.proclaim(bounded(proclaim)).await;
        Ok(match Answer::of(proclaimed) {
            Answer::Ok { text, revision, .. } => {
                let second = told_next(&mut told).await;
                Answer::ok([first, text, second].join("\n"), revision)
            }
            refused => refused,
        })
    }

    pub(super) async fn perform(&mut self, op: &QueueOp) -> Result<Answer> {
        let mut leader = None;
        let answer = match op.clone() {
            QueueOp::Lock(request) => Answer::of(self.lock.lock(bounded(request)).await),
            QueueOp::Unlock(request) => Answer::of(self.lock.unlock(bounded(request)).await),
            QueueOp::Campaign(request) => {
                let answer = self.election.campaign(bounded(request)).await;
                if let Ok(answer) = &answer {
                    leader.clone_from(&answer.get_ref().leader);
                }
                Answer::of(answer)
            }
            QueueOp::Proclaim(request) => {
                Answer::of(self.election.proclaim(bounded(request)).await)
            }
            QueueOp::Leader(request) => Answer::of(self.election.leader(bounded(request)).await),
            QueueOp::Observe(office, value) => self.observe(office, value).await?,
            QueueOp::Resign(request) => Answer::of(self.election.resign(bounded(request)).await),
        };
        Ok(match answer {
            Answer::Err { message, .. } => Answer::Err {
                code: Code::Unknown,
                message,
            },
            answer => answer.with_leader(leader),
        })
    }
}

async fn told_next(told: &mut Streaming<LeaderResponse>) -> String {
    match told.message().await {
        Ok(Some(mut response)) => {
            set_ids_aside(&mut response.header);
            format!("{response:#?}")
        }
        Ok(None) => "the end".to_owned(),
        Err(status) => status.message().to_owned(),
    }
}

fn bounded<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(WAIT_MAX);
    request
}

/// The key of a contender, as etcd's clients name it.
pub(super) fn contender_key(name: &[u8], lease: i64) -> Vec<u8> {
    [name, format!("/{lease:x}").as_bytes()].concat()
}

/// What a contender holds that is not there.
pub(super) fn no_leader(name: &[u8], lease: i64) -> LeaderKey {
    LeaderKey {
        name: name.to_vec().into(),
        key: contender_key(name, lease).into(),
        rev: 1,
        lease,
    }
}
