//! `[limits]`: bounds of connections, requests and copies.

use std::time::Duration;

use clustermesh_api::limits::{MAX_PEER_COPY_BYTES, MAX_PEER_COPY_RECORDS};
use serde::Deserialize;

use super::fault;

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Connections on the client port.
    pub max_connections: usize,
    /// Connections on a port that have not finished TLS and begun with HTTP; past it the oldest of the address that has most ends.
    pub max_unfinished_connections: usize,
    /// HTTP/2 streams of one connection.
    pub max_streams_per_connection: u32,
    /// A client must have finished its TLS handshake so long after it has connected, in milliseconds.
    pub tls_handshake_timeout_ms: u64,
    /// It must have begun with HTTP so long after that, in milliseconds: with HTTP/2's preface, or the first 24 bytes of an
    /// HTTP/1.1 request.
    pub http_start_timeout_ms: u64,
    /// The head of an HTTP/1.1 request must have arrived so long after the connection was free for it, in milliseconds.
    pub http1_head_timeout_ms: u64,
    /// A connection on which no frame ends for so long is asked for a sign of life, and closed when none comes within
    /// the same time, in milliseconds; so is one whose client takes none of what is sent to it.
    pub keepalive_ms: u64,
    /// A message must have arrived whole by then, in milliseconds.
    pub request_timeout_ms: u64,
    /// Records that are copied of one peer; those past it are refused and shown in its status.
    pub max_records_per_peer: usize,
    /// Keys and values that are copied of one peer, bytes.
    pub max_bytes_per_peer: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            max_unfinished_connections: 1_024,
            max_streams_per_connection: 1_024,
            tls_handshake_timeout_ms: 10_000,
            http_start_timeout_ms: 10_000,
            http1_head_timeout_ms: 10_000,
            keepalive_ms: 10_000,
            request_timeout_ms: 30_000,
            max_records_per_peer: MAX_PEER_COPY_RECORDS,
            max_bytes_per_peer: MAX_PEER_COPY_BYTES,
        }
    }
}

impl LimitsConfig {
    /// [`Self::tls_handshake_timeout_ms`].
    #[must_use]
    pub const fn tls_handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.tls_handshake_timeout_ms)
    }

    /// [`Self::http_start_timeout_ms`].
    #[must_use]
    pub const fn http_start_timeout(&self) -> Duration {
        Duration::from_millis(self.http_start_timeout_ms)
    }

    /// [`Self::http1_head_timeout_ms`].
    #[must_use]
    pub const fn http1_head_timeout(&self) -> Duration {
        Duration::from_millis(self.http1_head_timeout_ms)
    }

    /// [`Self::keepalive_ms`].
    #[must_use]
    pub const fn keepalive(&self) -> Duration {
        Duration::from_millis(self.keepalive_ms)
    }

    /// [`Self::request_timeout_ms`].
    #[must_use]
    pub const fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let inside = |key: &str, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(fault(key, format!("{value} is outside {low} to {high}")))
            }
        };
        inside("limits.max_connections", self.max_connections, 16, 1 << 20)?;
        inside(
            "limits.max_unfinished_connections",
            self.max_unfinished_connections,
            8,
            1 << 20,
        )?;
        for (key, ms) in [
            (
                "limits.tls_handshake_timeout_ms",
                self.tls_handshake_timeout_ms,
            ),
            ("limits.http_start_timeout_ms", self.http_start_timeout_ms),
            ("limits.http1_head_timeout_ms", self.http1_head_timeout_ms),
            ("limits.keepalive_ms", self.keepalive_ms),
            ("limits.request_timeout_ms", self.request_timeout_ms),
        ] {
            let ms = usize::try_from(ms).unwrap_or(usize::MAX);
            inside(key, ms, 100, 600_000)?;
        }
        inside(
            "limits.max_streams_per_connection",
            usize::try_from(self.max_streams_per_connection).unwrap_or(usize::MAX),
            8,
            1 << 20,
        )?;
        inside(
            "limits.max_records_per_peer",
            self.max_records_per_peer,
            1,
            MAX_PEER_COPY_RECORDS,
        )?;
        inside(
            "limits.max_bytes_per_peer",
            self.max_bytes_per_peer,
            1 << 10,
            MAX_PEER_COPY_BYTES,
        )
    }
}
