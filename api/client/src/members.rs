//! etcd's Cluster service: the replicas of a cluster's store.

use clustermesh_api::etcd::rpc::{
    Member, MemberAddRequest, MemberListRequest, MemberPromoteRequest, MemberRemoveRequest,
    cluster_client::ClusterClient,
};
use tonic::transport::Channel;

use crate::{Client, ClientError, kv::timed};

impl Client {
    fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel())
    }

    /// All replicas.
    ///
    /// # Errors
    /// The call failed.
    pub async fn members(&self) -> Result<Vec<Member>, ClientError> {
        self.list_members(true).await
    }

    /// All replicas as the connected one knows them, also while no quorum runs.
    ///
    /// # Errors
    /// The call failed.
    pub async fn known_members(&self) -> Result<Vec<Member>, ClientError> {
        self.list_members(false).await
    }

    async fn list_members(&self, linearizable: bool) -> Result<Vec<Member>, ClientError> {
        let request = MemberListRequest { linearizable };
        let answer = self.cluster().member_list(timed(request)).await;
        answer
            .map(|answer| answer.into_inner().members)
            .map_err(|status| self.fault(status))
    }

    /// Adds a replica that will listen at `peer_url`; its id. It becomes a voter once it has caught up, unless `learner`.
    ///
    /// # Errors
    /// The call failed.
    pub async fn add_member(&self, peer_url: String, learner: bool) -> Result<u64, ClientError> {
        let request = MemberAddRequest {
            peer_ur_ls: vec![peer_url],
            is_learner: learner,
        };
        let answer = self.cluster().member_add(timed(request)).await;
        answer
            .map(|answer| answer.into_inner().member.map_or(0, |member| member.id))
            .map_err(|status| self.fault(status))
    }

    /// Makes a voter of a learner that has caught up.
    ///
    /// # Errors
    /// The call failed.
    pub async fn promote_member(&self, id: u64) -> Result<(), ClientError> {
        let request = MemberPromoteRequest { id };
        let answer = self.cluster().member_promote(timed(request)).await;
        answer.map(drop).map_err(|status| self.fault(status))
    }

    /// Removes a replica for good.
    ///
    /// # Errors
    /// The call failed.
    pub async fn remove_member(&self, id: u64) -> Result<(), ClientError> {
        let request = MemberRemoveRequest { id };
        let answer = self.cluster().member_remove(timed(request)).await;
        answer.map(drop).map_err(|status| self.fault(status))
    }
}
