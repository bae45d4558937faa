//! The network of a group of one: every other replica is unreachable.

use std::future::Future;

use clustermesh_store::{Node, ReplicaId, SnapshotFile, Vote};
use openraft::{
    OptionalSend, RaftNetworkFactory, RaftNetworkV2,
    async_runtime::AsyncRuntime,
    errors::{RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
    },
    type_config::alias::SnapshotOf,
};

use crate::Types;

/// Network of a group without peers.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPeers;

/// A peer that cannot be reached.
#[derive(Debug, Clone, Copy)]
pub struct NoPeer(ReplicaId);

impl NoPeer {
    fn unreachable<R: AsyncRuntime>(self) -> Unreachable<Types<R>> {
        Unreachable::from_string(format!(
            "replica {} has no connection: this server runs a group of one",
            self.0
        ))
    }
}

impl<R: AsyncRuntime> RaftNetworkFactory<Types<R>> for NoPeers {
    type Network = NoPeer;

    async fn new_client(&mut self, target: ReplicaId, _node: &Node) -> NoPeer {
        NoPeer(target)
    }
}

impl<R: AsyncRuntime> RaftNetworkV2<Types<R>> for NoPeer {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        _rpc: AppendEntriesRequest<Types<R>>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types<R>>, RPCError<Types<R>>> {
        Err(RPCError::Unreachable(self.unreachable()))
    }

    async fn vote(
        &mut self,
        _rpc: VoteRequest<Types<R>>,
        _option: RPCOption,
    ) -> Result<VoteResponse<Types<R>>, RPCError<Types<R>>> {
        Err(RPCError::Unreachable(self.unreachable()))
    }

    // The default grants every pre-vote.
    async fn pre_vote(
        &mut self,
        _rpc: VoteRequest<Types<R>>,
        _option: RPCOption,
    ) -> Result<VoteResponse<Types<R>>, RPCError<Types<R>>> {
        Err(RPCError::Unreachable(self.unreachable()))
    }

    async fn full_snapshot(
        &mut self,
        _vote: Vote,
        _snapshot: SnapshotOf<Types<R>, SnapshotFile>,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types<R>>, StreamingError<Types<R>>> {
        Err(StreamingError::Unreachable(self.unreachable()))
    }
}
