//! etcd's Lease service.

use clustermesh_api::etcd::rpc::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
    lease_client::LeaseClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::{Client, ClientError, Messages, kv::timed};

/// Keep-alives that wait to be sent.
const REQUEST_QUEUE_MESSAGES: usize = 16;

/// A stream that keeps leases alive.
#[derive(Debug)]
pub struct KeepAlive {
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    responses: Messages<LeaseKeepAliveResponse>,
}

impl Client {
    fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel())
    }

    /// Grants a lease; id 0 lets the server choose.
    ///
    /// # Errors
    /// The call failed.
    pub async fn lease_grant(
        &self,
        ttl_seconds: i64,
        id: i64,
    ) -> Result<LeaseGrantResponse, ClientError> {
        let request = LeaseGrantRequest {
            ttl: ttl_seconds,
            id,
        };
        let answer = self.lease().lease_grant(timed(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Ends a lease and deletes its keys.
    ///
    /// # Errors
    /// The call failed.
    pub async fn lease_revoke(&self, id: i64) -> Result<LeaseRevokeResponse, ClientError> {
        let answer = self
            .lease()
            .lease_revoke(timed(LeaseRevokeRequest { id }))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Time left, and the keys of a lease.
    ///
    /// # Errors
    /// The call failed.
    pub async fn lease_time_to_live(
        &self,
        id: i64,
        keys: bool,
    ) -> Result<LeaseTimeToLiveResponse, ClientError> {
        let answer = self
            .lease()
            .lease_time_to_live(timed(LeaseTimeToLiveRequest { id, keys }))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Opens a keep-alive stream with a first request for `id`.
    ///
    /// # Errors
    /// The call failed.
    pub async fn lease_keep_alive(&self, id: i64) -> Result<KeepAlive, ClientError> {
        let (requests, receiver) = mpsc::channel(REQUEST_QUEUE_MESSAGES);
        let first = requests.try_send(LeaseKeepAliveRequest { id });
        debug_assert!(first.is_ok(), "the queue is new");
        let answer = self
            .lease()
            .lease_keep_alive(ReceiverStream::new(receiver))
            .await;
        let stream = answer.map_err(|status| self.fault(status))?.into_inner();
        Ok(KeepAlive {
            requests,
            responses: Messages::new(self, stream),
        })
    }
}

impl KeepAlive {
    /// Extends a lease once more.
    ///
    /// # Errors
    /// The stream has ended.
    pub async fn keep_alive(&self, id: i64) -> Result<(), ClientError> {
        let sent = self.requests.send(LeaseKeepAliveRequest { id }).await;
        sent.map_err(|_| ClientError::Closed {
            endpoint: self.responses.endpoint(),
        })
    }

    /// The next response; a TTL of 0 means that the lease is gone.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn next(&mut self) -> Result<Option<LeaseKeepAliveResponse>, ClientError> {
        self.responses.next().await
    }
}
