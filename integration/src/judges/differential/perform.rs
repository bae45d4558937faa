//! One server: performs an operation on it.

use anyhow::Result;
use clustermesh_api::etcd::rpc::auth_client::AuthClient;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::lease_client::LeaseClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::{
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, RangeRequest, RangeResponse,
};
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::access::Tokens;
use super::answer::Answer;
use super::operation::Op;
use super::queue::Queue;
use super::watching::Watching;
use crate::judges::group::Group;

/// Answers are taken up to this size; etcd sets no limit.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// Connections to one server.
pub struct Side {
    kv: KvClient<Channel>,
    lease: LeaseClient<Channel>,
    maintenance: MaintenanceClient<Channel>,
    auth: AuthClient<Channel>,
    queue: Queue,
    watching: Watching,
    tokens: Tokens,
}

impl Side {
    /// Connects to the first replica.
    pub async fn connect(group: &Group) -> Result<Self> {
        let channel = group.connect(0).await?.channel();
        let kv = KvClient::new(channel.clone())
            .max_decoding_message_size(ANSWER_BYTES_MAX)
            .max_encoding_message_size(ANSWER_BYTES_MAX);
        Ok(Self {
            watching: Watching::start(channel.clone(), kv.clone()).await?,
            kv,
            lease: LeaseClient::new(channel.clone()),
            auth: AuthClient::new(channel.clone()),
            queue: Queue::new(channel.clone()),
            maintenance: MaintenanceClient::new(channel),
            tokens: Tokens::default(),
        })
    }

    /// Performs an operation. An error of the server is an answer.
    pub async fn perform(&mut self, op: &Op) -> Result<Answer> {
        match op {
            Op::As { user, op } => self.perform_as(*user, op).await,
            op => self.perform_as(None, op).await,
        }
    }

    async fn perform_as(&mut self, user: Option<&str>, op: &Op) -> Result<Answer> {
        macro_rules! ask {
            ($client:ident.$method:ident($request:expr)) => {{
                let request = self.tokens.asked_by(user, $request)?;
                Answer::of(self.$client.$method(request).await)
            }};
        }
        Ok(match op {
            Op::Range(request) => ask!(kv.range(request.clone())),
            Op::RangeStream(request) => {
                let request = self.tokens.asked_by(user, request.clone())?;
                Answer::of(self.range_stream(request).await)
            }
            Op::Put(request) => ask!(kv.put(request.clone())),
            Op::DeleteRange(request) => ask!(kv.delete_range(request.clone())),
            Op::Txn(request) => ask!(kv.txn(request.clone())),
            Op::Compact(request) => ask!(kv.compact(*request)),
            Op::LeaseGrant(request) => ask!(lease.lease_grant(*request)),
            Op::LeaseRevoke(request) => ask!(lease.lease_revoke(*request)),
            Op::LeaseKeepAlive(request) => {
                let beat = self.tokens.asked_by(user, tokio_stream::once(*request))?;
                Answer::of(self.keep_alive(beat).await)
            }
            Op::LeaseTimeToLive(request) => ask!(lease.lease_time_to_live(*request)),
            Op::LeaseLeases(request) => ask!(lease.lease_leases(*request)),
            Op::HashKv(request) => ask!(maintenance.hash_kv(*request)),
            Op::Watch(op) => self.watching.perform(op, &self.tokens, user).await?,
            Op::Queue(op) => self.queue.perform(op).await?,
            Op::Access(op) => op.perform(&mut self.auth, &mut self.tokens, user).await?,
            Op::As { .. } => anyhow::bail!("one user asks, not two"),
        })
    }

    /// All messages as one answer: how keys are cut into messages is the server's affair.
    async fn range_stream(
        &mut self,
        request: Request<RangeRequest>,
    ) -> Result<tonic::Response<RangeResponse>, Status> {
        let mut answers = self.kv.range_stream(request).await?.into_inner();
        let mut whole = RangeResponse::default();
        while let Some(answer) = answers.message().await? {
            let part = answer.range_response.unwrap_or_default();
            let mut kvs = std::mem::take(&mut whole.kvs);
            kvs.extend(part.kvs);
            // The last one has all the rest.
            whole = RangeResponse { kvs, ..part };
        }
        Ok(tonic::Response::new(whole))
    }

    async fn keep_alive(
        &mut self,
        request: Request<tokio_stream::Once<LeaseKeepAliveRequest>>,
    ) -> Result<tonic::Response<LeaseKeepAliveResponse>, Status> {
        let mut answers = self.lease.lease_keep_alive(request).await?.into_inner();
        let answer = answers.message().await?;
        answer
            .map(tonic::Response::new)
            .ok_or_else(|| Status::internal("the stream ended without an answer"))
    }
}
