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

    /// The same on behalf of the request's user.
    fn asked_by<T>(&self, request: &Request<T>) -> Result<Self, Status> {
        Ok(Self {
            store: self.store.asked_by(request)?,
            drain: self.drain.clone(),
        })
    }
}

#[tonic::async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let this = self.asked_by(&request)?;
        let LockRequest { name, lease } = request.into_inner();
        let contender = recipe::enter(&this.store, &name, lease, Bytes::new()).await?;
        let withdrawal = Withdrawal::of(&this.store, &contender);
        recipe::wait_for_turn(&this.store, &name, contender.revision, &this.drain).await?;
        // It may have been taken away while it waited.
        let found = this
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
        let this = self.asked_by(&request)?;
        let deleted = this
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
