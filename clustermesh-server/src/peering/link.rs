//! The task of one peer: connect, copy, and again after a pause when something broke.

use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::v1::peer_status::State;
use clustermesh_client::{Client, ClientConfig, ClientError};
use clustermesh_mesh::peering::{ConfigRefused, PeerCopyState};
use rand::RngExt;
use tonic::Status;
use tracing::{info, warn};

use super::Shared;
use super::sync::Sync;
use crate::metrics::ClusterLabels;

/// First pause after a failure.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause; a healed link is used again within this.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A follower looks this often whether it leads now.
const FOLLOWER_PAUSE: Duration = Duration::from_millis(500);

/// The copy of one peer.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    name: String,
    client: ClientConfig,
    /// Kept over reconnections; lost with leadership.
    copy: Option<PeerCopyState>,
}

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
    /// The peer's configuration changed: it is judged anew.
    #[error("the peer's cluster configuration changed")]
    Reconfigured,
}

impl From<Status> for LinkError {
    fn from(status: Status) -> Self {
        Self::Store(Box::new(status))
    }
}

impl Link {
    pub(super) fn new(
        shared: Arc<Shared>,
        name: &str,
        client: ClientConfig,
    ) -> Result<Self, ClientError> {
        // Made anew for each connection; here only to find mistakes at start.
        Client::new(&client)?;
        Ok(Self {
            shared,
            name: name.to_owned(),
            client,
            copy: None,
        })
    }

    /// Until it is dropped.
    pub(super) async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            if !self.shared.store.is_leader() {
                self.copy = None;
                tokio::time::sleep(FOLLOWER_PAUSE).await;
                continue;
            }
            let mut synced = false;
            let error = match self.connection(&mut synced).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            if synced {
                backoff = BACKOFF_MIN;
            }
            if let (LinkError::Store(_), Some(copy)) = (&error, &mut self.copy) {
                copy.changes_lost();
            }
            let state = match error {
                LinkError::Refused(_) => State::Refused,
                _ => State::Unreachable,
            };
            if matches!(error, LinkError::Reconfigured) {
                info!(peer = self.name, "the peer's cluster configuration changed");
            } else {
                warn!(peer = self.name, %error, "peer connection ended, what was copied stays");
            }
            self.shared
                .statuses
                .ended(&self.name, state, error.to_string());
            let labels = ClusterLabels {
                cluster: self.name.clone(),
            };
            self.shared.metrics.reconnects.get_or_create(&labels).inc();
            self.shared.metrics.synced.get_or_create(&labels).set(0);
            // Jitter: peers of a cluster that comes back do not all knock at once.
            let pause = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
            tokio::time::sleep(pause).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn connection(
        &mut self,
        synced: &mut bool,
    ) -> Result<std::convert::Infallible, LinkError> {
        let client = Client::connect(&self.client).await?;
        self.shared.statuses.connected(&self.name, client.clone());
        let mut sync = Sync::begin(&self.shared, &self.name, client, &mut self.copy).await?;
        sync.run(synced).await
    }
}
