//! `etcdserverpb.KV`.

mod range_stream;

use clustermesh_api::etcd::rpc::kv_server::Kv;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse,
};
use clustermesh_core::auth::Access;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::answers::AnswerBudget;
use crate::auth::Caller;
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct KvService {
    store: Store,
    answers: AnswerBudget,
}

impl KvService {
    /// Over `store`; answers live on `answers` until clients took them.
    pub fn new(store: Store, answers: AnswerBudget) -> Self {
        Self { store, answers }
    }
}

#[tonic::async_trait]
impl Kv for KvService {
    type RangeStreamStream = ReceiverStream<Result<RangeStreamResponse, Status>>;

    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let store = self.store.asked_by(&request)?;
        let request = request.into_inner();
        caller.check_read(&request.key, &request.range_end)?;
        self.answers.answer(store.range(&request).await?)
    }

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let caller = Caller::of(&request)?;
        let store = self.store.asked_by(&request)?;
        let request = request.into_inner();
        range_stream::check(&request)?;
        caller.check_read(&request.key, &request.range_end)?;
        if request.serializable {
            store.check_not_diverged()?;
        } else {
            store.linearize().await?;
        }
        store.permit(|state, actor| {
            let (key, range_end) = (&request.key, &request.range_end);
            state
                .auth()
                .check_range(actor, key, range_end, Access::Read)
        })?;
        let reservation = self.answers.reserve(range_stream::HELD_BYTES)?;
        // One message is made ahead of the one that is being sent.
        let (pieces, stream) = mpsc::channel(1);
        tokio::spawn(range_stream::run(self.store.clone(), request, pieces));
        let mut response = Response::new(ReceiverStream::new(stream));
        response.extensions_mut().insert(reservation);
        Ok(response)
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        self.answers.answer(store.put(request.into_inner()).await?)
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        self.answers
            .answer(store.delete_range(request.into_inner()).await?)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let caller = Caller::of(&request)?;
        let store = self.store.asked_by(&request)?;
        let request = request.into_inner();
        caller.check_txn(&request)?;
        self.answers.answer(store.txn(request).await?)
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        Ok(Response::new(store.compact(request.into_inner()).await?))
    }
}
