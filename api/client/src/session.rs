//! What an agent uses: its stream of records and its session.

use clustermesh_api::{
    limits::{MAX_GRPC_CLIENT_RECV_BYTES, SESSION_QUEUE_MESSAGES},
    v1::{
        AgentWatchRequest, AgentWatchResponse, Hello, SessionRequest, SessionResponse,
        agent_stream_client::AgentStreamClient, node_session_client::NodeSessionClient,
        session_request::Message,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{Client, ClientError, Messages};

/// Records and watermarks, in revision order.
pub type AgentWatch = Messages<AgentWatchResponse>;

/// An open session: what is sent, and what the server answers.
#[derive(Debug)]
pub struct NodeSession {
    /// Where to send; ends the session when all clones are dropped.
    pub sender: SessionSender,
    /// The answers; the first one is a Welcome or a Refused.
    pub responses: Messages<SessionResponse>,
}

/// The sending side of a session. Clones share it.
#[derive(Clone, Debug)]
pub struct SessionSender {
    client: Client,
    requests: mpsc::Sender<SessionRequest>,
}

impl Client {
    /// Lists the state and follows it; or follows it from a revision of a store that the caller holds.
    ///
    /// # Errors
    /// The call failed.
    pub async fn agent_watch(
        &self,
        store_id: u64,
        resume_after_revision: i64,
    ) -> Result<AgentWatch, ClientError> {
        let request = AgentWatchRequest {
            store_id,
            resume_after_revision,
        };
        let mut service = AgentStreamClient::new(self.channel())
            .max_decoding_message_size(MAX_GRPC_CLIENT_RECV_BYTES);
        let answer = service.watch(request).await;
        let stream = answer.map_err(|status| self.fault(status))?.into_inner();
        Ok(Messages::new(self, stream))
    }

    /// Opens this machine's session.
    ///
    /// # Errors
    /// The call failed. A refused Hello is the first response.
    pub async fn node_session(&self, hello: Hello) -> Result<NodeSession, ClientError> {
        let (requests, receiver) = mpsc::channel(SESSION_QUEUE_MESSAGES);
        let first = requests.try_send(SessionRequest {
            message: Some(Message::Hello(hello)),
        });
        debug_assert!(first.is_ok(), "the queue is new");
        let answer = NodeSessionClient::new(self.channel())
            .open(ReceiverStream::new(receiver))
            .await;
        let stream = answer.map_err(|status| self.fault(status))?.into_inner();
        Ok(NodeSession {
            sender: SessionSender {
                client: self.clone(),
                requests,
            },
            responses: Messages::new(self, stream),
        })
    }
}

impl SessionSender {
    /// Queues a message; waits while the queue is full.
    ///
    /// # Errors
    /// The session has ended.
    pub async fn send(&self, message: Message) -> Result<(), ClientError> {
        let request = SessionRequest {
            message: Some(message),
        };
        self.requests
            .send(request)
            .await
            .map_err(|_| ClientError::Closed {
                endpoint: self.client.endpoint(),
            })
    }
}
