//! Connections to the local API of the node agent on this machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Longest wait for the agent to take the connection.
const CONNECT_WAIT: Duration = Duration::from_secs(5);

/// Connects to an agent's socket.
///
/// # Errors
/// No agent answers there; the message names the socket.
pub async fn connect(socket: &Path) -> Result<Channel, String> {
    let path: PathBuf = socket.to_owned();
    // The address of a local endpoint is not looked at.
    Endpoint::from_static("http://agent.local")
        .connect_timeout(CONNECT_WAIT)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .map_err(|error| {
            format!(
                "no clustermesh-node answers at {}: {}; is it running, and is that the `run_dir` of its configuration?",
                socket.display(),
                crate::error::chain(&error)
            )
        })
}
