//! `etcdserverpb.Watch`: many watches on one stream.

mod stream;

use clustermesh_api::etcd::rpc::watch_server::Watch;
use clustermesh_api::etcd::rpc::{WatchRequest, WatchResponse};
use clustermesh_process::Drain;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::auth::Caller;
use crate::etcd::needs_leader;
use crate::metrics::WatchMetrics;
use crate::store::Store;

/// Responses made ahead of what the connection takes. Past it, watches fall back to stored history.
const STREAM_QUEUE_MESSAGES: usize = 8;

/// The service.
#[derive(Debug)]
pub struct WatchService {
    store: Store,
    metrics: WatchMetrics,
    drain: Drain,
}

impl WatchService {
    /// Over `store`; streams end when `drain` begins.
    pub fn new(store: Store, metrics: WatchMetrics, drain: Drain) -> Self {
        Self {
            store,
            metrics,
            drain,
        }
    }
}

#[tonic::async_trait]
impl Watch for WatchService {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = Caller::of(&request)?;
        let store = self.store.asked_by(&request)?;
        let (responses, stream) = mpsc::channel(STREAM_QUEUE_MESSAGES);
        let watches = stream::WatchStream::new(
            store,
            caller,
            self.metrics.clone(),
            responses.clone(),
            needs_leader(request.metadata().as_ref()),
        );
        let drain = self.drain.clone();
        tokio::spawn(async move {
            if let Err(status) = watches.run(request.into_inner(), &drain).await {
                // The client may be gone already.
                let _ = responses.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
