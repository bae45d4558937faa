//! The openraft types of a replica: ids, nodes, log entries.

use std::{
    cmp::Ordering,
    fmt::{self, Debug, Display},
    marker::PhantomData,
};

use bytes::Bytes;
use openraft::{
    RaftTypeConfig,
    async_runtime::AsyncRuntime,
    impls::{BoxedErrorSource, InlineBatch, ProgressResponder, leader_id_std},
};

/// Id of a replica: random, never used twice.
pub type ReplicaId = u64;

/// What apply answers for one entry.
pub trait Reply: Send + Sync + 'static {}
impl<T: Send + Sync + 'static> Reply for T {}

/// openraft's types, over the runtime `R` and the answer `A` of one applied entry.
pub struct TypeConfig<R, A>(PhantomData<fn() -> (R, A)>);

impl<R, A> Debug for TypeConfig<R, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TypeConfig")
    }
}
impl<R, A> Clone for TypeConfig<R, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<R, A> Copy for TypeConfig<R, A> {}
impl<R, A> Default for TypeConfig<R, A> {
    fn default() -> Self {
        Self(PhantomData)
    }
}
impl<R, A> PartialEq for TypeConfig<R, A> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl<R, A> Eq for TypeConfig<R, A> {}
impl<R, A> PartialOrd for TypeConfig<R, A> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<R, A> Ord for TypeConfig<R, A> {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}

impl<R: AsyncRuntime, A: Reply> RaftTypeConfig for TypeConfig<R, A> {
    type D = Command;
    type R = A;
    type NodeId = ReplicaId;
    type Node = Node;
    type Term = u64;
    type LeaderId = leader_id_std::LeaderId<u64, ReplicaId>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Command, ReplicaId, Node>;
    type Entry = Entry;
    type AsyncRuntime = R;
    type Responder<T>
        = ProgressResponder<Self, T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = BoxedErrorSource;
}

/// A committed leader: one per term.
pub type CommittedLeaderId = openraft::vote::leader_id_std::CommittedLeaderId<u64>;
/// Place of an entry in the log.
pub type LogId = openraft::LogId<CommittedLeaderId>;
/// A vote, granted or not.
pub type Vote = openraft::impls::Vote<leader_id_std::LeaderId<u64, ReplicaId>>;
/// One entry of the log.
pub type Entry =
    openraft::Entry<CommittedLeaderId, openraft::EntryPayload<Command, ReplicaId, Node>>;
/// Voters and learners of the group.
pub type Membership = openraft::Membership<ReplicaId, Node>;
/// A membership and where it was agreed.
pub type StoredMembership = openraft::StoredMembership<CommittedLeaderId, ReplicaId, Node>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::SnapshotMeta<CommittedLeaderId, ReplicaId, Node>;

/// A replica as the membership describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Name that people gave it.
    pub name: String,
    /// Where other replicas reach it.
    pub peer_url: String,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
    /// A learner that becomes a voter as soon as it has caught up.
    pub join_as_voter: bool,
    /// The replica that goes once this one votes; 0 for none.
    pub replaces: ReplicaId,
}

/// What a log entry does.
#[derive(Clone, PartialEq, Eq)]
pub struct Command {
    /// An encoded `clustermesh.core.v1.Batch`: every replica applies the same bytes.
    pub batch: Bytes,
    /// Whose proposals they are, where a replica forwarded them; by place.
    pub origins: Vec<Origin>,
}

impl Command {
    /// A batch of this replica's own proposals.
    #[must_use]
    pub fn new(batch: impl Into<Bytes>) -> Self {
        Self {
            batch: batch.into(),
            origins: Vec::new(),
        }
    }
}

/// A proposal that a replica forwarded: it answers its client when it has applied it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Place in the batch.
    pub place: u32,
    /// The replica that was asked.
    pub replica_id: ReplicaId,
    /// Chosen by that replica for this proposal only.
    pub request_id: u64,
}

impl Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}
impl Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.batch.len())
    }
}
