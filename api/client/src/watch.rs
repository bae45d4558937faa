//! etcd's Watch service: several watches on one stream.

use clustermesh_api::{
    etcd::rpc::{
        WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
        watch_client::WatchClient, watch_request::RequestUnion,
    },
    limits::MAX_GRPC_CLIENT_RECV_BYTES,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, codec::CompressionEncoding, metadata::MetadataValue};

use crate::{Client, ClientError, Messages};

/// Requests that wait to be sent on one watch stream.
const REQUEST_QUEUE_MESSAGES: usize = 64;
/// Ends a watch on a replica that has lost its leader, instead of leaving it silent.
const REQUIRE_LEADER: &str = "hasleader";

/// An open watch stream.
#[derive(Debug)]
pub struct WatchStream {
    requests: mpsc::Sender<WatchRequest>,
    responses: Messages<WatchResponse>,
}

impl Client {
    /// Opens a stream with its first watches.
    ///
    /// # Errors
    /// The call failed.
    pub async fn watch(
        &self,
        watches: impl IntoIterator<Item = WatchCreateRequest>,
    ) -> Result<WatchStream, ClientError> {
        let (requests, receiver) = mpsc::channel(REQUEST_QUEUE_MESSAGES);
        let mut request = Request::new(ReceiverStream::new(receiver));
        request
            .metadata_mut()
            .insert(REQUIRE_LEADER, MetadataValue::from_static("true"));
        let mut service = WatchClient::new(self.channel())
            .max_decoding_message_size(MAX_GRPC_CLIENT_RECV_BYTES)
            // Over a WAN a burst should fit into what TCP sends at once: records resemble each other.
            .accept_compressed(CompressionEncoding::Zstd);
        let open = async {
            let answer = service.watch(request).await;
            answer
                .map(tonic::Response::into_inner)
                .map_err(|status| self.fault(status))
        };
        let send = async {
            for watch in watches {
                let request = WatchRequest {
                    request_union: Some(RequestUnion::CreateRequest(watch)),
                };
                // A receiver that is gone means that opening fails, with the reason.
                if requests.send(request).await.is_err() {
                    break;
                }
            }
        };
        // Some servers answer only when the first request has come, so both go on at once.
        let (opened, ()) = tokio::join!(open, send);
        Ok(WatchStream {
            requests,
            responses: Messages::new(self, opened?),
        })
    }
}

impl WatchStream {
    /// The next response; `None` when the server ended the stream. Safe to drop while waiting.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn next(&mut self) -> Result<Option<WatchResponse>, ClientError> {
        self.responses.next().await
    }

    /// Adds a watch.
    ///
    /// # Errors
    /// The stream has ended.
    pub async fn create(&self, watch: WatchCreateRequest) -> Result<(), ClientError> {
        self.send(RequestUnion::CreateRequest(watch)).await
    }

    /// Ends a watch.
    ///
    /// # Errors
    /// The stream has ended.
    pub async fn cancel(&self, watch_id: i64) -> Result<(), ClientError> {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))
            .await
    }

    /// Asks for a progress response.
    ///
    /// # Errors
    /// The stream has ended.
    pub async fn request_progress(&self) -> Result<(), ClientError> {
        self.send(RequestUnion::ProgressRequest(WatchProgressRequest {}))
            .await
    }

    async fn send(&self, request: RequestUnion) -> Result<(), ClientError> {
        let request = WatchRequest {
            request_union: Some(request),
        };
        self.requests
            .send(request)
            .await
            .map_err(|_| ClientError::Closed {
                endpoint: self.responses.endpoint(),
            })
    }
}
