//! What a server answered, in a form that can be compared.

use std::fmt;

use clustermesh_api::etcd::election::LeaderKey;
use clustermesh_api::etcd::rpc::{LeaseLeasesResponse, LeaseTimeToLiveResponse, ResponseHeader};
use tonic::{Code, Status};

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
