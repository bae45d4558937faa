//! What is done on both servers.

use clustermesh_api::etcd::rpc::{
    CompactionRequest, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
    LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest,
    TxnRequest,
};

use super::access::AccessOp;
use super::queue::QueueOp;
use super::watching::WatchOp;

/// One operation on both servers.
#[derive(Clone, Debug)]
pub enum Op {
    Range(RangeRequest),
    RangeStream(RangeRequest),
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    LeaseGrant(LeaseGrantRequest),
    LeaseRevoke(LeaseRevokeRequest),
    LeaseKeepAlive(LeaseKeepAliveRequest),
    LeaseTimeToLive(LeaseTimeToLiveRequest),
    LeaseLeases(LeaseLeasesRequest),
    HashKv(HashKvRequest),
    Watch(WatchOp),
    Queue(QueueOp),
    Access(AccessOp),
    /// With this user's token, or with none.
    As {
        user: Option<&'static str>,
        op: Box<Op>,
    },
}

impl Op {
    /// Whether it leaves both servers as they were.
    #[must_use]
    pub fn only_reads(&self) -> bool {
        match self {
            Self::Range(_)
            | Self::RangeStream(_)
            | Self::LeaseTimeToLive(_)
            | Self::LeaseLeases(_)
            | Self::HashKv(_)
            | Self::Watch(WatchOp::Try(_))
            | Self::Queue(QueueOp::Leader(_)) => true,
            Self::Access(op) => op.only_reads(),
            Self::As { op, .. } => op.only_reads(),
            _ => false,
        }
    }

    /// Name in reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Range(_) => "range",
            Self::RangeStream(_) => "range-stream",
            Self::Put(_) => "put",
            Self::DeleteRange(_) => "delete-range",
            Self::Txn(_) => "txn",
            Self::Compact(_) => "compact",
            Self::LeaseGrant(_) => "lease-grant",
            Self::LeaseRevoke(_) => "lease-revoke",
            Self::LeaseKeepAlive(_) => "lease-keep-alive",
            Self::LeaseTimeToLive(_) => "lease-time-to-live",
            Self::LeaseLeases(_) => "lease-leases",
            Self::HashKv(_) => "hash-kv",
            Self::Watch(WatchOp::Create(..)) => "watch-create",
            Self::Watch(WatchOp::Try(..)) => "watch-try",
            Self::Watch(WatchOp::Cancel(..)) => "watch-cancel",
            Self::Watch(WatchOp::Barrier { .. }) => "watch-events",
            Self::Queue(op) => op.name(),
            Self::Access(op) => op.name(),
            Self::As { op, .. } => op.name(),
        }
    }
}
