//! The operator's API.

use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::{
    limits::{MAX_GRPC_CLIENT_RECV_BYTES, WAIT_MAX_MS},
    v1::{
        ApplyRequest, ApplyResponse, DeleteRequest, DeleteResponse, MeshStatusRequest,
        MeshStatusResponse, ObjectRef, WaitProgress, WaitRequest, mesh_client::MeshClient,
    },
};
use tonic::transport::Channel;

use crate::{Client, ClientError, Messages, kv::timed};

impl Client {
    fn mesh(&self) -> MeshClient<Channel> {
        MeshClient::new(self.channel())
            .max_decoding_message_size(MAX_GRPC_CLIENT_RECV_BYTES)
            .max_encoding_message_size(MAX_GRPC_CLIENT_RECV_BYTES)
    }

    /// Stores manifests, all or none.
    ///
    /// # Errors
    /// The call failed; the message names the object that was refused.
    pub async fn apply(
        &self,
        manifests_json: Vec<Bytes>,
        dry_run: bool,
    ) -> Result<ApplyResponse, ClientError> {
        let request = ApplyRequest {
            manifests_json,
            dry_run,
        };
        let answer = self.mesh().apply(timed(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Deletes stored manifests.
    ///
    /// # Errors
    /// The call failed.
    pub async fn delete(&self, objects: Vec<ObjectRef>) -> Result<DeleteResponse, ClientError> {
        let answer = self.mesh().delete(timed(DeleteRequest { objects })).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Own cluster, peers and nodes, with the revisions applied.
    ///
    /// # Errors
    /// The call failed.
    pub async fn mesh_status(&self) -> Result<MeshStatusResponse, ClientError> {
        self.ask_status(false).await
    }

    /// The same; without a quorum what the connected replica has applied, which is marked as `stale`.
    ///
    /// # Errors
    /// The call failed.
    pub async fn known_mesh_status(&self) -> Result<MeshStatusResponse, ClientError> {
        self.ask_status(true).await
    }

    async fn ask_status(&self, accept_stale: bool) -> Result<MeshStatusResponse, ClientError> {
        let request = MeshStatusRequest { accept_stale };
        let answer = self.mesh().status(timed(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// Fixes the present revision of every source cluster and reports until every node has applied it.
    ///
    /// # Errors
    /// The call failed. A wait that ran out is no error: its last message is not `done`. No time at all is the shortest
    /// wait that there is, which may end without a message.
    pub async fn wait(&self, limit: Duration) -> Result<Messages<WaitProgress>, ClientError> {
        let timeout_ms = timeout_ms(limit);
        let answer = self.mesh().wait(WaitRequest { timeout_ms }).await;
        let stream = answer.map_err(|status| self.fault(status))?.into_inner();
        Ok(Messages::new(self, stream))
    }
}

/// On the wire 0 asks for the longest wait, so the shortest one is 1 ms.
fn timeout_ms(limit: Duration) -> u32 {
    u32::try_from(limit.as_millis())
        .unwrap_or(WAIT_MAX_MS)
        .clamp(1, WAIT_MAX_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_the_shortest_wait_and_not_the_longest() {
        assert_eq!(timeout_ms(Duration::ZERO), 1);
        assert_eq!(timeout_ms(Duration::from_micros(1)), 1);
        assert_eq!(timeout_ms(Duration::from_millis(250)), 250);
        assert_eq!(timeout_ms(Duration::MAX), WAIT_MAX_MS);
    }
}
