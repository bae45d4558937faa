//! Why a connection to a peer was given up.

use clustermesh_client::ClientError;
use clustermesh_mesh::peering::ConfigRefused;
use tonic::Status;

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The peer cannot be reached, or answered with an error.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Nothing is copied from this peer.
    #[error(transparent)]
    Refused(#[from] ConfigRefused),
    /// Our own store did not take a change.
    #[error("own store: {}", .0.message())]
    Store(Box<Status>),
    /// The peer's answers make no sense.
    #[error("{0}")]
    Protocol(String),
    /// What was accepted of the peer is judged anew.
    #[error("one of our own nodes got an address that the peer's node was believed to have")]
    Outdated,
    /// The peer's configuration changed: it is judged anew.
    #[error("the peer's cluster configuration changed")]
    Reconfigured,
}

impl From<Status> for LinkError {
    fn from(status: Status) -> Self {
        Self::Store(Box::new(status))
    }
}
