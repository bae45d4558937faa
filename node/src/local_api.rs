//! The local API on a Unix socket: the CNI plugin's calls, and what people and tools ask.

mod agent;
mod cni;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use clustermesh_api::v1::agent_server::AgentServer;
use clustermesh_api::v1::cni_server::CniServer;
use clustermesh_process::Drain;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

pub use agent::AgentService;
pub use cni::CniService;

/// The bound socket.
pub struct LocalApi {
    listener: UnixListener,
}

impl LocalApi {
    /// Binds the socket, for root only. The state folder's lock is held: a socket that is there is a dead one's.
    ///
    /// # Errors
    /// The run folder or the socket cannot be made.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        let object = || format!("socket {}", path.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(object)?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(object);
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).with_context(object)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(object)?;
        Ok(Self { listener })
    }

    /// Serves until the drain.
    pub async fn serve(self, cni: CniService, agent: AgentService, drain: Drain) {
        let served = tonic::transport::Server::builder()
            .add_service(CniServer::new(cni))
            .add_service(AgentServer::new(agent))
            .serve_with_incoming_shutdown(UnixListenerStream::new(self.listener), async move {
                drain.draining().await;
            })
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "local API");
        }
    }
}
