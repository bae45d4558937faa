//! Client of clustermesh-server: one mTLS channel that moves on to another endpoint when its own fails, and thin typed
//! calls on it. Used by the node agent, the peering of the server, the operator's command and the lab.
//!
//! Calls are not repeated here: only the caller knows whether its call may run twice ([`ClientError::is_transient`]
//! says whether trying again makes sense). Connecting again is automatic, with a bounded delay.

mod config;
mod connector;
mod error;
mod kv;
mod lease;
pub mod local;
mod maintenance;
mod members;
mod mesh;
mod messages;
mod session;
mod watch;

use std::error::Error;
use std::sync::Arc;

use tonic::transport::Channel;

pub use clustermesh_process::TlsPaths;
pub use config::{ClientConfig, ConfigError};
pub use error::ClientError;
pub use kv::{ListPager, Listing};
pub use lease::KeepAlive;
pub use messages::Messages;
pub use session::{AgentWatch, NodeSession, SessionSender};
pub use watch::WatchStream;

use connector::Connector;

/// A connection to one cluster's server. Clones share it.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    connector: Arc<Connector>,
}

impl Client {
    /// Prepares a connection; it is made by the first call, and made again after a loss.
    /// Certificates are read again when their files change.
    ///
    /// # Errors
    /// The configuration is unusable: no endpoint, clear text to another machine, unreadable certificates.
    pub fn new(config: &ClientConfig) -> Result<Self, ClientError> {
        let connector = Arc::new(Connector::new(config)?);
        let channel = connector::channel(&connector)?;
        Ok(Self { channel, connector })
    }

    /// Prepares a connection and makes it.
    ///
    /// # Errors
    /// As [`Client::new`], or none of the endpoints takes the connection; the error says of each one why.
    pub async fn connect(config: &ClientConfig) -> Result<Self, ClientError> {
        let connector = Arc::new(Connector::new(config)?);
        let channel = connector::connected_channel(&connector).await?;
        Ok(Self { channel, connector })
    }

    /// The endpoint of the last connection; all of them, while there was none.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.connector.current()
    }

    /// The channel, for services that have no wrapper here.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn fault(&self, status: tonic::Status) -> ClientError {
        let endpoint = self.endpoint();
        // The endpoint itself says that it cannot serve: another one may. A broken connection is replaced anyhow.
        if status.code() == tonic::Code::Unavailable && status.source().is_none() {
            self.connector.abandon();
        }
        ClientError::from_status(endpoint, status)
    }
}

#[cfg(test)]
mod tests;
