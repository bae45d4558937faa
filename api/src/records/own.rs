//! Records that never leave the cluster: readiness of local endpoints, state of node sessions.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{error::DecodeError, json};

/// Readiness of one endpoint's ports, as its node's agent found it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// Probed ports, by number and protocol.
    #[serde(default)]
    pub ports: Vec<PortReadiness>,
}

/// Outcome of the probes of one port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortReadiness {
    /// Number.
    pub port: u16,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// It answers.
    pub ready: bool,
}

/// State of one node's session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Connected or stale.
    pub state: SessionState,
    /// Since when, ms since 1970 by the server's clock.
    pub since_unix_ms: i64,
    /// The run of the agent that holds or held it.
    #[serde(default)]
    pub instance_id: String,
    /// The session is lost after so long without a message, seconds; 0 in records of servers that did not write it.
    #[serde(default)]
    pub ttl_seconds: u32,
}

/// Whether the machine is heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SessionState {
    /// A session is open.
    Connected,
    /// The last session was lost; the machine's records stay.
    Stale,
}

impl Readiness {
    /// Reads the JSON.
    ///
    /// # Errors
    /// Not JSON of this shape.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        json::decode(value)
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        json::encode(self)
    }

    /// The readiness of a port; a port that nobody probed is unknown.
    #[must_use]
    pub fn is_ready(&self, port: u16, protocol: &str) -> Option<bool> {
        self.ports
            .iter()
            .find(|entry| entry.port == port && entry.protocol == protocol)
            .map(|entry| entry.ready)
    }
}

impl Session {
    /// Reads the JSON.
    ///
    /// # Errors
    /// Not JSON of this shape.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        json::decode(value)
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        json::encode(self)
    }
}
