//! `etcdserverpb.Cluster`.

use clustermesh_api::etcd::rpc::cluster_server::Cluster;
use clustermesh_api::etcd::rpc::{
    MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse,
};
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct ClusterService {
    store: Store,
}

impl ClusterService {
    /// Over `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// etcd's error for a member that is not there.
    fn check_member(&self, id: u64) -> Result<(), Status> {
        let members = self.store.replica().status().members;
        if members.iter().any(|member| member.id == id) {
            Ok(())
        } else {
            Err(Status::not_found("etcdserver: member not found"))
        }
    }
}

/// etcd's error for a change that would leave the group without a quorum.
fn not_enough_started() -> Status {
    Status::failed_precondition(
        "etcdserver: re-configuration failed due to not enough started members",
    )
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        Err(not_enough_started())
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.check_member(request.get_ref().id)?;
        Err(not_enough_started())
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.check_member(request.get_ref().id)?;
        Err(not_enough_started())
    }

    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        Caller::of(&request)?.check_known()?;
        Ok(Response::new(
            self.store
                .member_list(request.into_inner().linearizable)
                .await?,
        ))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let id = request.get_ref().id;
        self.check_member(id)?;
        Err(Status::failed_precondition(
            "etcdserver: can only promote a learner member",
        ))
    }
}
