//! How replicas reach each other: the transport that a process supplies, and what is said over it.

mod convert;
mod snapshots;

use std::{
    collections::BTreeSet,
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use clustermesh_store::{Node, ReplicaId};
use futures_util::{future::BoxFuture, stream::BoxStream};
use openraft::async_runtime::{AsyncRuntime, Watch, WatchSender};
use parking_lot::Mutex;

use crate::wire::{
    AppendRequest, AppendResponse, CallRequest, CallResponse, Header, Refusal, SnapshotPart,
    call_request::Call, call_response::Answer, refusal::Reason,
};

pub(crate) use convert::{
    append_from_wire, append_result_from_wire, append_result_to_wire, append_to_wire,
    snapshot_from_wire, snapshot_to_wire, vote_answer_from_wire, vote_answer_to_wire,
    vote_from_wire, vote_to_wire,
};
pub(crate) use snapshots::Incoming;

/// A replica to reach.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Its id; 0 when only the address is known.
    pub id: ReplicaId,
    /// Where it listens, `https://host:port`.
    pub peer_url: String,
}

/// Why a message has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// Nothing was delivered.
    #[error("cannot reach {peer}: {reason}")]
    Unreachable {
        /// Address or id of the other replica.
        peer: String,
        /// What went wrong.
        reason: String,
    },
    /// It may have been delivered.
    #[error("the connection to {peer} broke: {reason}")]
    Broken {
        /// Address or id of the other replica.
        peer: String,
        /// What went wrong.
        reason: String,
    },
}

/// Carries messages between replicas, over gRPC in the server, in memory in tests and simulations.
///
/// A future or stream that is dropped ends its call. What the other side receives goes into its [`PeerHandler`](crate::PeerHandler).
pub trait Transport: Send + Sync + 'static {
    /// One question, one answer.
    fn call(
        &self,
        target: Target,
        request: CallRequest,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>>;

    /// A stream of entries, answered in order; either end may end it.
    fn append(
        &self,
        target: Target,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxFuture<
        'static,
        Result<BoxStream<'static, Result<AppendResponse, TransportError>>, TransportError>,
    >;

    /// A snapshot in parts, each taken only when the one before is on its way.
    fn install_snapshot(
        &self,
        target: Target,
        parts: BoxStream<'static, SnapshotPart>,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>>;
}

/// Why another replica did not do what it was asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum CallError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("refused: {}", .0.message)]
    Refused(Refusal),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the other replica ended the stream and owes answers")]
    Ended,
    #[error("the answer is of another kind than the question; one of the replicas is too old")]
    Mismatch,
}

impl CallError {
    /// Surely nothing was proposed.
    pub(crate) fn nothing_happened(&self) -> bool {
        match self {
            Self::Transport(TransportError::Unreachable { .. }) => true,
            Self::Refused(refusal) => !matches!(
                refusal.reason(),
                Reason::UnknownOutcome | Reason::Unspecified
            ),
            Self::Transport(TransportError::Broken { .. })
            | Self::Timeout(_)
            | Self::Ended
            | Self::Mismatch => false,
        }
    }
}

/// Why a message to another replica's process did not arrive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AsideError {
    /// The group has no such replica.
    #[error("no replica of the group has this id")]
    Unknown,
    /// The other process does not take it.
    #[error("refused: {0}")]
    Refused(String),
    /// It may have arrived or not.
    #[error("{0}")]
    Failed(String),
}

/// Replicas that this one, as leader, cannot reach or that take no entries.
#[derive(Debug, Default)]
struct Outages(Mutex<BTreeSet<ReplicaId>>);

impl Outages {
    /// Whether it was otherwise before.
    fn is_news(&self, replica: ReplicaId, reached: bool) -> bool {
        let mut lost = self.0.lock();
        if reached {
            lost.remove(&replica)
        } else {
            lost.insert(replica)
        }
    }

    fn forget(&self) {
        self.0.lock().clear();
    }
}

/// The sending end: knows who speaks, and hears when the group has removed this replica.
pub(crate) struct Links<R: AsyncRuntime> {
    transport: Arc<dyn Transport>,
    pub(crate) own: ReplicaId,
    cluster_id: Arc<AtomicU64>,
    removed: AtomicBool,
    removed_signal: Mutex<<R::Watch as Watch>::Sender<bool>>,
    outages: Outages,
    runtime: PhantomData<fn() -> R>,
}

impl<R: AsyncRuntime> Links<R> {
    pub(crate) fn new(
        transport: Arc<dyn Transport>,
        own: ReplicaId,
        cluster_id: Arc<AtomicU64>,
    ) -> Self {
        Self {
            transport,
            own,
            cluster_id,
            removed: AtomicBool::new(false),
            removed_signal: Mutex::new(R::Watch::channel(false).0),
            outages: Outages::default(),
            runtime: PhantomData,
        }
    }

    pub(crate) fn transport(&self) -> &dyn Transport {
        &*self.transport
    }

    pub(crate) fn header(&self, to: ReplicaId) -> Header {
        Header {
            cluster_id: self.cluster_id.load(Ordering::Relaxed),
            from: self.own,
            to,
        }
    }

    /// The group has removed this replica.
    pub(crate) fn set_removed(&self) {
        self.removed.store(true, Ordering::Relaxed);
        self.removed_signal
            .lock()
            .send_if_modified(|removed| !std::mem::replace(removed, true));
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    pub(crate) fn removed(&self) -> <R::Watch as Watch>::Receiver<bool> {
        self.removed_signal.lock().subscribe()
    }

    /// A new leadership begins: what an earlier one found may have passed unseen since, and is news again.
    pub(crate) fn forget_outages(&self) {
        self.outages.forget();
    }

    #[cfg(test)]
    pub(crate) fn is_lost(&self, replica: ReplicaId) -> bool {
        self.outages.0.lock().contains(&replica)
    }

    /// Says once that a replica takes no entries, or does again: Raft tries many times a second.
    pub(crate) fn note_reached(&self, target: &Target, reached: Result<(), &CallError>) {
        if !self.outages.is_news(target.id, reached.is_ok()) {
            return;
        }
        let (replica, peer_url) = (format_args!("{:016x}", target.id), &target.peer_url);
        match reached {
            Ok(()) => tracing::info!(%replica, peer_url, "the replica is reached again"),
            Err(error) => {
                tracing::warn!(%replica, peer_url, %error, "a replica cannot be reached or takes no entries");
            }
        }
    }

    /// Looks at a refusal for what concerns this replica itself.
    pub(crate) fn heed(&self, refusal: &Refusal) {
        if refusal.reason() == Reason::Removed {
            self.set_removed();
        }
    }

    pub(crate) async fn call(
        &self,
        target: &Target,
        call: Call,
        timeout: Duration,
    ) -> Result<Answer, CallError> {
        let request = CallRequest {
            header: Some(self.header(target.id)),
            call: Some(call),
        };
        let answered = R::timeout(timeout, self.transport.call(target.clone(), request)).await;
        let response = answered.map_err(|_| CallError::Timeout(timeout))??;
        self.answer(response)
    }

    /// What a response says.
    pub(crate) fn answer(&self, response: CallResponse) -> Result<Answer, CallError> {
        match response.answer {
            Some(Answer::Refusal(refusal)) => {
                self.heed(&refusal);
                Err(CallError::Refused(refusal))
            }
            Some(answer) => Ok(answer),
            None => Err(CallError::Mismatch),
        }
    }
}

pub(crate) fn target(id: ReplicaId, node: &Node) -> Target {
    Target {
        id,
        peer_url: node.peer_url.clone(),
    }
}

/// The transport of a group of one: every other replica is unreachable.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPeers;

fn alone(target: Target) -> TransportError {
    TransportError::Unreachable {
        peer: target.peer_url,
        reason: "this server runs a group of one".into(),
    }
}

impl Transport for NoPeers {
    fn call(
        &self,
        target: Target,
        _request: CallRequest,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        Box::pin(async move { Err(alone(target)) })
    }

    fn append(
        &self,
        target: Target,
        _requests: BoxStream<'static, AppendRequest>,
    ) -> BoxFuture<
        'static,
        Result<BoxStream<'static, Result<AppendResponse, TransportError>>, TransportError>,
    > {
        Box::pin(async move { Err(alone(target)) })
    }

    fn install_snapshot(
        &self,
        target: Target,
        _parts: BoxStream<'static, SnapshotPart>,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        Box::pin(async move { Err(alone(target)) })
    }
}

#[cfg(test)]
mod tests {
    use super::Outages;

    #[test]
    fn an_outage_is_news_when_it_begins_and_when_it_ends() {
        let outages = Outages::default();
        let told = [true, false, false, true, true, false].map(|reached| {
            // Another replica's is its own.
            assert!(!outages.is_news(2, true));
            outages.is_news(1, reached)
        });
        assert_eq!(told, [false, true, false, true, false, true]);
    }

    #[test]
    fn an_outage_is_news_again_to_the_next_leadership() {
        let outages = Outages::default();
        assert!(outages.is_news(1, false));
        assert!(!outages.is_news(1, false));
        outages.forget();
        assert!(outages.is_news(1, false));
    }
}
