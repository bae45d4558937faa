//! `etcdserverpb.KV`.

use clustermesh_api::etcd::rpc::kv_server::Kv;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, TxnRequest, TxnResponse,
};
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct KvService {
    store: Store,
}

impl KvService {
    /// Over `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }
}

#[tonic::async_trait]
impl Kv for KvService {
    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.check_read(&request.key, &request.range_end)?;
        Ok(Response::new(self.store.range(&request).await?))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        Ok(Response::new(self.store.put(request.into_inner()).await?))
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        Ok(Response::new(
            self.store.delete_range(request.into_inner()).await?,
        ))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.check_txn(&request)?;
        Ok(Response::new(self.store.txn(request).await?))
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        Ok(Response::new(
            self.store.compact(request.into_inner()).await?,
        ))
    }
}
