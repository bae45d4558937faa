//! `etcdserverpb.Cluster`.

use clustermesh_api::etcd::rpc::cluster_server::Cluster;
use clustermesh_api::etcd::rpc::{MemberListRequest, MemberListResponse};
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
}

#[tonic::async_trait]
impl Cluster for ClusterService {
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
}
