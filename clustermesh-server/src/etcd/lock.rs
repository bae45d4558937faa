//! `v3lockpb.Lock`: fair locks that live as long as their lease.

use bytes::Bytes;
use clustermesh_api::etcd::lock::lock_server::Lock;
use clustermesh_api::etcd::lock::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};
use clustermesh_api::etcd::rpc::{DeleteRangeRequest, RangeRequest};
use clustermesh_process::Drain;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::etcd::recipe::{self, Withdrawal};
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct LockService {
    store: Store,
    drain: Drain,
}

impl LockService {
    /// Over `store`; waiting callers are sent away when `drain` begins.
    pub fn new(store: Store, drain: Drain) -> Self {
        Self { store, drain }
    }
}

#[tonic::async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let LockRequest { name, lease } = request.into_inner();
        let contender = recipe::enter(&self.store, &name, lease, Bytes::new()).await?;
        let withdrawal = Withdrawal::of(&self.store, &contender);
        recipe::wait_for_turn(&self.store, &name, contender.revision, &self.drain).await?;
        // It may have been taken away while it waited.
        let found = self
            .store
            .range(&RangeRequest {
                key: contender.key.clone(),
                ..RangeRequest::default()
            })
            .await?;
        withdrawal.disarm();
        if found.kvs.is_empty() {
            return Err(Status::unknown("mutex: session is expired"));
        }
        Ok(Response::new(LockResponse {
            header: found.header,
            key: contender.key,
        }))
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let deleted = self
            .store
            .delete_range(DeleteRangeRequest {
                key: request.into_inner().key,
                ..DeleteRangeRequest::default()
            })
            .await?;
        Ok(Response::new(UnlockResponse {
            header: deleted.header,
        }))
    }
}
