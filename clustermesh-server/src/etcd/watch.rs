//! `etcdserverpb.Watch`: many watches on one stream.

mod message;
mod stream;
mod task;

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use clustermesh_api::etcd::rpc::WatchRequest;
use clustermesh_api::etcd::rpc::watch_server::SERVICE_NAME;
use clustermesh_process::Drain;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};

use self::message::{WatchCodec, WatchMessage};
use crate::auth::Caller;
use crate::etcd::{MAX_MESSAGE_BYTES, needs_leader};
use crate::metrics::WatchMetrics;
use crate::places::Places;
use crate::store::Store;

/// Responses made ahead of what the connection takes. Past it, watches fall back to stored history.
const STREAM_QUEUE_MESSAGES: usize = 8;
/// The only method.
const WATCH_PATH: &str = "/etcdserverpb.Watch/Watch";

type Responses = mpsc::Sender<Result<WatchMessage, Status>>;

/// The client is gone.
struct Gone;

/// The service; clones share it. Not the generated one, whose messages are encoded for every watcher anew.
#[derive(Debug, Clone)]
pub struct WatchService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    metrics: WatchMetrics,
    places: Places,
    drain: Drain,
    progress_notify_interval: Duration,
}

impl WatchService {
    /// Over `store`; streams end when `drain` begins. A quiet watch tells its revision at the interval, if asked to.
    pub fn new(
        store: Store,
        metrics: WatchMetrics,
        drain: Drain,
        progress_notify_interval: Duration,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                metrics,
                places: stream::places(),
                drain,
                progress_notify_interval,
            }),
        }
    }
}

impl NamedService for WatchService {
    const NAME: &'static str = SERVICE_NAME;
}

impl tower::Service<http::Request<Body>> for WatchService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != WATCH_PATH {
            let refused = Status::unimplemented("").into_http();
            return Box::pin(std::future::ready(Ok(refused)));
        }
        let service = self.clone();
        let mut grpc = Grpc::new(WatchCodec)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(usize::MAX)
            // Only for clients that take it, as peers do; the others get what etcd sends.
            .send_compressed(CompressionEncoding::Zstd);
        Box::pin(async move { Ok(grpc.streaming(service, request).await) })
    }
}

impl StreamingService<WatchRequest> for WatchService {
    type Response = WatchMessage;
    type ResponseStream = ReceiverStream<Result<WatchMessage, Status>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<WatchRequest>>) -> Self::Future {
        let opened = self.open(request);
        Box::pin(std::future::ready(opened))
    }
}

impl WatchService {
    fn open(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<ReceiverStream<Result<WatchMessage, Status>>>, Status> {
        let caller = Caller::of(&request)?;
        let store = self.shared.store.asked_by(&request)?;
        let (responses, stream) = mpsc::channel(STREAM_QUEUE_MESSAGES);
        let watches = stream::WatchStream::new(
            store,
            caller,
            self.shared.metrics.clone(),
            self.shared.places.clone(),
            responses.clone(),
            stream::Manner {
                needs_leader: needs_leader(request.metadata().as_ref()),
                progress_notify_interval: self.shared.progress_notify_interval,
            },
        );
        let drain = self.shared.drain.clone();
        tokio::spawn(async move {
            if let Err(status) = watches.run(request.into_inner(), &drain).await {
                // The client may be gone already.
                let _ = responses.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
