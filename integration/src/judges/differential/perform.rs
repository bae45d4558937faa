//! One server: performs an operation and gives the answer in a form that can be compared.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use clustermesh_api::etcd::election::LeaderKey;
use clustermesh_api::etcd::rpc::auth_client::AuthClient;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::lease_client::LeaseClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::{
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseTimeToLiveResponse,
    RangeRequest, RangeResponse, ResponseHeader,
};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::generate::Op;
use super::queue::Queue;
use super::watching::Watching;
use crate::judges::group::Group;

/// Answers are taken up to this size; etcd sets no limit.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// A remaining TTL may be so much below the granted one.
const TTL_PASSED_SECONDS_MAX: i64 = 300;

/// How gRPC libraries begin to say that a message is above the limit.
const TOO_LARGE: [&str; 2] = [
    "grpc: received message larger than max",
    "Error, decoded message length too large",
];

/// What a server answered, without what may differ.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Success.
    Ok {
        /// Every field, one a line.
        text: String,
        /// Revision in the header.
        revision: i64,
        /// The watch that the answer says to run from now on.
        watch: Option<i64>,
        /// Who was elected.
        leader: Option<LeaderKey>,
    },
    /// An error.
    Err {
        /// gRPC code.
        code: Code,
        /// Text.
        message: String,
    },
}

impl PartialEq for Answer {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ok { text: left, .. }, Self::Ok { text: right, .. }) => left == right,
            (
                Self::Err { code, message },
                Self::Err {
                    code: other_code,
                    message: other_message,
                },
            ) => code == other_code && message == other_message,
            _ => false,
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok { text, .. } => f.write_str(text),
            Self::Err { code, message } => write!(f, "error {code:?}: {message}"),
        }
    }
}

impl Answer {
    pub(super) fn ok(text: String, revision: i64) -> Self {
        Self::Ok {
            text,
            revision,
            watch: None,
            leader: None,
        }
    }

    pub(super) fn with_leader(mut self, elected: Option<LeaderKey>) -> Self {
        if let Self::Ok { leader, .. } = &mut self {
            *leader = elected;
        }
        self
    }

    /// Who was elected by this answer.
    pub const fn leader(&self) -> Option<&LeaderKey> {
        match self {
            Self::Ok { leader, .. } => leader.as_ref(),
            Self::Err { .. } => None,
        }
    }

    /// Whether it is no error.
    pub const fn is_ok(&self) -> bool {
        matches!(self, Self::Ok { .. })
    }

    /// Revision of the header; 0 of an error.
    pub const fn revision(&self) -> i64 {
        match self {
            Self::Ok { revision, .. } => *revision,
            Self::Err { .. } => 0,
        }
    }

    /// Whether two servers that answered so can be compared further.
    pub fn leaves_same_state(&self, other: &Self) -> bool {
        self.revision() == other.revision()
            && self.is_ok() == other.is_ok()
            && self.running_watch() == other.running_watch()
    }

    /// The watch that runs since this answer.
    pub const fn running_watch(&self) -> Option<i64> {
        match self {
            Self::Ok { watch, .. } => *watch,
            Self::Err { .. } => None,
        }
    }

    /// `ok`, or the error's text.
    pub fn outcome(&self) -> String {
        match self {
            Self::Ok { .. } => "ok".to_owned(),
            Self::Err { message, .. } => message.clone(),
        }
    }

    pub(super) fn of<T: Comparable>(answer: Result<tonic::Response<T>, Status>) -> Self {
        match answer {
            Ok(response) => {
                let mut message = response.into_inner();
                let revision = set_ids_aside(message.header_mut());
                message.settle();
                Self::ok(format!("{message:#?}"), revision)
            }
            Err(status)
                if TOO_LARGE
                    .iter()
                    .any(|text| status.message().starts_with(text)) =>
            {
                Self::Err {
                    code: Code::ResourceExhausted,
                    message: "message above the limit".to_owned(),
                }
            }
            Err(status) => Self::refused(&status),
        }
    }

    pub(super) fn refused(status: &Status) -> Self {
        Self::Err {
            code: status.code(),
            message: status.message().to_owned(),
        }
    }
}

/// Removes what differs between any two clusters; returns the revision.
pub(super) fn set_ids_aside(header: &mut Option<ResponseHeader>) -> i64 {
    header.as_mut().map_or(0, |header| {
        header.cluster_id = 0;
        header.member_id = 0;
        header.raft_term = 0;
        header.revision
    })
}

/// A response with a header.
pub(super) trait Comparable: fmt::Debug {
    fn header_mut(&mut self) -> &mut Option<ResponseHeader>;
    /// Removes what depends on the time or on the order of a hash map.
    fn settle(&mut self) {}
}

macro_rules! comparable {
    ($package:ident: $($name:ident),*) => {$(
        impl Comparable for clustermesh_api::etcd::$package::$name {
            fn header_mut(&mut self) -> &mut Option<ResponseHeader> {
                &mut self.header
            }
        }
    )*};
}

comparable!(lock: LockResponse, UnlockResponse);
comparable!(
    election: CampaignResponse,
    ProclaimResponse,
    LeaderResponse,
    ResignResponse
);
comparable!(
    rpc: AuthEnableResponse,
    AuthDisableResponse,
    AuthStatusResponse,
    AuthenticateResponse,
    AuthUserAddResponse,
    AuthUserGetResponse,
    AuthUserListResponse,
    AuthUserDeleteResponse,
    AuthUserChangePasswordResponse,
    AuthUserGrantRoleResponse,
    AuthUserRevokeRoleResponse,
    AuthRoleAddResponse,
    AuthRoleGetResponse,
    AuthRoleListResponse,
    AuthRoleDeleteResponse,
    AuthRoleGrantPermissionResponse,
    AuthRoleRevokePermissionResponse,
    RangeResponse,
    PutResponse,
    DeleteRangeResponse,
    TxnResponse,
    CompactionResponse,
    LeaseGrantResponse,
    LeaseRevokeResponse,
    LeaseKeepAliveResponse,
    HashKvResponse
);

impl Comparable for LeaseTimeToLiveResponse {
    fn header_mut(&mut self) -> &mut Option<ResponseHeader> {
        &mut self.header
    }

    fn settle(&mut self) {
        let passed = self.granted_ttl - self.ttl;
        if self.ttl > 0 && (0..=TTL_PASSED_SECONDS_MAX).contains(&passed) {
            self.ttl = self.granted_ttl;
        }
        self.keys.sort();
    }
}

impl Comparable for LeaseLeasesResponse {
    fn header_mut(&mut self) -> &mut Option<ResponseHeader> {
        &mut self.header
    }

    fn settle(&mut self) {
        self.leases.sort_by_key(|lease| lease.id);
    }
}

/// Tokens of users, by name.
#[derive(Default)]
pub(super) struct Tokens(BTreeMap<String, String>);

impl Tokens {
    pub(super) fn keep(&mut self, user: &str, token: String) {
        self.0.insert(user.to_owned(), token);
    }

    /// A request with the token of `user`, where there is one.
    pub(super) fn asked_by<T>(&self, user: Option<&str>, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        if let Some(token) = user.and_then(|user| self.0.get(user)) {
            request.metadata_mut().insert("token", token.parse()?);
        }
        Ok(request)
    }
}

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
