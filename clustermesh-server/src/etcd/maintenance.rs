//! `etcdserverpb.Maintenance`.

use clustermesh_api::etcd::rpc::maintenance_server::Maintenance;
use clustermesh_api::etcd::rpc::{StatusRequest, StatusResponse};
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct MaintenanceService {
    store: Store,
}

impl MaintenanceService {
    /// Over `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        Caller::of(&request)?.check_known()?;
        Ok(Response::new(self.store.maintenance_status()))
    }
}
