//! Any record: the value of a key, read and written as the kind of the key demands.

use bytes::Bytes;

use crate::{
    keys::{KeyError, RecordKey},
    limits::MAX_VALUE_BYTES,
    manifest::{StoredService, StoredWorkload},
    records::{
        ClusterConfig, ClusterService, DecodeError, EndpointSlice, Identity, IpIdentityPair, Node,
        Readiness, Session, Timestamp,
    },
};

/// Bytes that are not a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The key is none of ours.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Longer than [`MAX_VALUE_BYTES`].
    #[error("{object}: value of {bytes} bytes is longer than {MAX_VALUE_BYTES}")]
    TooLarge {
        /// The record's key.
        object: String,
        /// Its length.
        bytes: usize,
    },
    /// Not what its kind requires.
    #[error("{object}: {reason}")]
    Malformed {
        /// The record's key.
        object: String,
        /// What is wrong.
        reason: DecodeError,
    },
    /// Kinds that have no typed value.
    #[error("{object}: records of this kind have no typed value")]
    Untyped {
        /// The record's key.
        object: String,
    },
}

/// Any typed value.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// `cilium/.heartbeat`.
    Heartbeat(Timestamp),
    /// A cluster's configuration.
    ClusterConfig(ClusterConfig),
    /// The end of an initial list.
    Canary(Timestamp),
    /// A machine.
    Node(Node),
    /// An address and its identity.
    Ip(IpIdentityPair),
    /// An identity's labels.
    Identity(Identity),
    /// A shared service.
    Service(ClusterService),
    /// Endpoints of a shared service.
    EndpointSlice(EndpointSlice),
    /// A stored Workload.
    Workload(StoredWorkload),
    /// A stored Service.
    StoredService(StoredService),
    /// Readiness of one endpoint's ports.
    Readiness(Readiness),
    /// State of one node's session.
    Session(Session),
}

impl Record {
    /// Reads the value of `key`. Never panics, whatever the bytes.
    ///
    /// # Errors
    /// The value is too long, malformed, or of a kind without typed value; the error names the key.
    pub fn decode(key: &RecordKey, value: &[u8]) -> Result<Self, RecordError> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(RecordError::TooLarge {
                object: key.to_string(),
                bytes: value.len(),
            });
        }
        let decoded = match key {
            RecordKey::Heartbeat => Timestamp::decode(value).map(Self::Heartbeat),
            RecordKey::ClusterConfig { .. } => {
                ClusterConfig::decode(value).map(Self::ClusterConfig)
            }
            RecordKey::Synced { .. } => Timestamp::decode(value).map(Self::Canary),
            RecordKey::Node { .. } => Node::decode(value).map(Self::Node),
            RecordKey::Ip { .. } => IpIdentityPair::decode(value).map(Self::Ip),
            RecordKey::Identity { .. } => Identity::decode(value).map(Self::Identity),
            RecordKey::Service { .. } => ClusterService::decode(value).map(Self::Service),
            RecordKey::EndpointSlice { .. } | RecordKey::LocalEndpointSlice { .. } => {
                EndpointSlice::decode(value).map(Self::EndpointSlice)
            }
            RecordKey::Workload { .. } => StoredWorkload::decode(value).map(Self::Workload),
            RecordKey::StoredService { .. } => {
                StoredService::decode(value).map(Self::StoredService)
            }
            RecordKey::Readiness { .. } => Readiness::decode(value).map(Self::Readiness),
            RecordKey::Session { .. } => Session::decode(value).map(Self::Session),
            RecordKey::Alloc { .. } => {
                return Err(RecordError::Untyped {
                    object: key.to_string(),
                });
            }
        };
        decoded.map_err(|reason| RecordError::Malformed {
            object: key.to_string(),
            reason,
        })
    }

    /// Reads key and value at once.
    ///
    /// # Errors
    /// As [`RecordKey::parse`] and [`Record::decode`].
    pub fn decode_pair(key: &[u8], value: &[u8]) -> Result<(RecordKey, Self), RecordError> {
        let key = RecordKey::parse(key)?;
        let record = Self::decode(&key, value)?;
        Ok((key, record))
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        match self {
            Self::Heartbeat(record) | Self::Canary(record) => record.encode(),
            Self::ClusterConfig(record) => record.encode(),
            Self::Node(record) => record.encode(),
            Self::Ip(record) => record.encode(),
            Self::Identity(record) => record.encode(),
            Self::Service(record) => record.encode(),
            Self::EndpointSlice(record) => record.encode(),
            Self::Workload(record) => record.encode(),
            Self::StoredService(record) => record.encode(),
            Self::Readiness(record) => record.encode(),
            Self::Session(record) => record.encode(),
        }
    }
}

#[cfg(test)]
mod proptests;
#[cfg(test)]
mod tests;
