//! `etcdserverpb.Lease`.

use clustermesh_api::etcd::rpc::lease_server::Lease;
use clustermesh_api::etcd::rpc::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};
use clustermesh_process::Drain;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::auth::Caller;
use crate::store::Store;

/// Answers queued for one keepalive stream.
const KEEPALIVE_QUEUE_MESSAGES: usize = 16;

/// The service.
#[derive(Debug)]
pub struct LeaseService {
    store: Store,
    drain: Drain,
}

impl LeaseService {
    /// Over `store`; streams end when `drain` begins.
    pub fn new(store: Store, drain: Drain) -> Self {
        Self { store, drain }
    }
}

#[tonic::async_trait]
impl Lease for LeaseService {
    type LeaseKeepAliveStream = ReceiverStream<Result<LeaseKeepAliveResponse, Status>>;

    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        Ok(Response::new(
            store.lease_grant(request.into_inner()).await?,
        ))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        Ok(Response::new(
            store.lease_revoke(request.into_inner()).await?,
        ))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        let (answers, stream) = mpsc::channel(KEEPALIVE_QUEUE_MESSAGES);
        tokio::spawn(keep_alive(
            store,
            self.drain.clone(),
            request.into_inner(),
            answers,
        ));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        Ok(Response::new(
            store.lease_time_to_live(request.into_inner()).await?,
        ))
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = self.store.asked_by(&request)?;
        Ok(Response::new(store.lease_leases().await?))
    }
}

async fn keep_alive(
    store: Store,
    drain: Drain,
    mut requests: Streaming<LeaseKeepAliveRequest>,
    answers: mpsc::Sender<Result<LeaseKeepAliveResponse, Status>>,
) {
    loop {
        let request = tokio::select! {
            request = requests.message() => request,
            () = drain.draining() => Err(server_stopped()),
        };
        let answer = match request {
            Ok(Some(request)) => store.lease_keep_alive(request.id).await,
            Ok(None) => return,
            Err(status) => Err(status),
        };
        let failed = answer.is_err();
        if answers.send(answer).await.is_err() || failed {
            return;
        }
    }
}

/// etcd's error for calls that a stopping server cannot finish.
pub(super) fn server_stopped() -> Status {
    Status::unavailable("etcdserver: server stopped")
}
