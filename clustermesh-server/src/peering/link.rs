//! The task of one peer: connect, copy, and again after a pause when something broke.

use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::v1::peer_status::State;
use clustermesh_client::{Client, ClientConfig, ClientError};
use clustermesh_mesh::peering::PeerCopyState;
use rand::RngExt;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::Shared;
use super::error::LinkError;
use super::refusals::RefusalLog;
use super::sync::Sync;
use crate::metrics::ClusterLabels;

/// First pause after a failure.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause; a healed link is used again within this.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A follower looks this often whether it leads now.
const FOLLOWER_PAUSE: Duration = Duration::from_millis(500);

/// The same error is told again after this.
const SAME_WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Which errors were told: a change at once, the same one from time to time.
#[derive(Debug, Default)]
struct Warnings {
    last: Option<(String, Instant)>,
    unsaid: u64,
}

impl Warnings {
    /// Whether to tell `error`, and how many were left out since the last one that was told.
    fn admit(&mut self, error: &str, now: Instant) -> Option<u64> {
        let known = self.last.as_ref().is_some_and(|(last, at)| {
            last == error && now.duration_since(*at) < SAME_WARNING_INTERVAL
        });
        if known {
            self.unsaid += 1;
            return None;
        }
        self.last = Some((error.to_owned(), now));
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// The copy of one peer.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    name: String,
    client: ClientConfig,
    /// Kept over reconnections; lost with leadership.
    copy: Option<PeerCopyState>,
    /// The term that `copy` is of.
    term: u64,
    refusals: RefusalLog,
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
            term: 0,
            refusals: RefusalLog::default(),
        })
    }

    /// Until it is dropped.
    pub(super) async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        let mut warnings = Warnings::default();
        loop {
            let Some(term) = self.shared.store.leading_term() else {
                self.copy = None;
                self.shared.statuses.not_leading(&self.name);
                tokio::time::sleep(FOLLOWER_PAUSE).await;
                continue;
            };
            if std::mem::replace(&mut self.term, term) != term {
                // Another replica may have copied on meanwhile.
                self.copy = None;
            }
            let mut synced = false;
            let error = match self.connection(&mut synced).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            if synced {
                backoff = BACKOFF_MIN;
                warnings = Warnings::default();
            }
            if let (LinkError::Store(_), Some(copy)) = (&error, &mut self.copy) {
                copy.changes_lost();
            }
            let state = match error {
                LinkError::Refused(_) => State::Refused,
                _ => State::Unreachable,
            };
            let text = error.to_string();
            if matches!(error, LinkError::Reconfigured | LinkError::Outdated) {
                info!(peer = self.name, reason = text, "the peer is judged anew");
            } else if let Some(unsaid) = warnings.admit(&text, Instant::now()) {
                warn!(
                    peer = self.name,
                    error = text,
                    unsaid,
                    "peer connection ended, what was copied stays"
                );
            } else {
                debug!(
                    peer = self.name,
                    error = text,
                    "peer connection ended again"
                );
            }
            self.shared.statuses.ended(&self.name, state, text);
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
        let mut sync = Sync::begin(
            &self.shared,
            self.term,
            &self.name,
            client,
            &mut self.copy,
            &mut self.refusals,
        )
        .await?;
        sync.run(synced).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_when_it_changes_and_then_once_a_minute() {
        let (mut warnings, start) = (Warnings::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(warnings.admit("down", at(0)), Some(0));
        assert_eq!(warnings.admit("down", at(1)), None);
        assert_eq!(warnings.admit("down", at(59)), None);
        assert_eq!(warnings.admit("refused", at(59)), Some(2));
        assert_eq!(warnings.admit("refused", at(118)), None);
        assert_eq!(warnings.admit("refused", at(119)), Some(1));
    }
}
