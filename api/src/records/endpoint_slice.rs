//! `ClusterEndpointSlice`: zstd of a proto2 message whose field numbers are Cilium's and Kubernetes' (`discovery/v1`).

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

use super::error::DecodeError;
use crate::limits::MAX_ENDPOINT_SLICE_DECODED_BYTES;

/// Compression level: higher ones gain little on slices and cost the single writer time.
const ZSTD_LEVEL: i32 = 3;

/// Label of a slice that names its service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Endpoints of a shared service of one cluster.
#[derive(Clone, PartialEq, Message)]
pub struct EndpointSlice {
    /// Publishing cluster.
    #[prost(string, tag = "1")]
    pub cluster: String,
    /// Its id.
    #[prost(uint32, tag = "2")]
    pub cluster_id: u32,
    /// Namespace.
    #[prost(string, tag = "3")]
    pub namespace: String,
    /// Name of the slice.
    #[prost(string, tag = "4")]
    pub name: String,
    /// Labels; [`SERVICE_NAME_LABEL`] names the service.
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[prost(btree_map = "string, string", tag = "6")]
    pub annotations: BTreeMap<String, String>,
    /// `IPv4` or `IPv6`.
    #[prost(string, tag = "7")]
    pub address_type: String,
    /// The endpoints.
    #[prost(message, repeated, tag = "8")]
    pub endpoints: Vec<Endpoint>,
    /// Ports of every endpoint.
    #[prost(message, repeated, tag = "9")]
    pub ports: Vec<EndpointPort>,
}

/// One endpoint (`k8s.io/api/discovery/v1.Endpoint`).
#[derive(Clone, PartialEq, Message)]
pub struct Endpoint {
    /// Its addresses; the first is used.
    #[prost(string, repeated, tag = "1")]
    pub addresses: Vec<String>,
    /// Its conditions.
    #[prost(message, optional, tag = "2")]
    pub conditions: Option<EndpointConditions>,
    /// Its host name.
    #[prost(string, optional, tag = "3")]
    pub hostname: Option<String>,
    /// Topology labels of Kubernetes before 1.22.
    #[prost(btree_map = "string, string", tag = "5")]
    pub deprecated_topology: BTreeMap<String, String>,
    /// Its machine.
    #[prost(string, optional, tag = "6")]
    pub node_name: Option<String>,
    /// Its zone.
    #[prost(string, optional, tag = "7")]
    pub zone: Option<String>,
    /// Who should use it.
    #[prost(message, optional, tag = "8")]
    pub hints: Option<EndpointHints>,
}

/// Conditions (`k8s.io/api/discovery/v1.EndpointConditions`).
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct EndpointConditions {
    /// Takes new connections; absent means true.
    #[prost(bool, optional, tag = "1")]
    pub ready: Option<bool>,
    /// As `ready`, also while terminating; absent means true.
    #[prost(bool, optional, tag = "2")]
    pub serving: Option<bool>,
    /// Is being deleted; absent means false.
    #[prost(bool, optional, tag = "3")]
    pub terminating: Option<bool>,
}

/// Hints (`k8s.io/api/discovery/v1.EndpointHints`).
#[derive(Clone, PartialEq, Message)]
pub struct EndpointHints {
    /// Zones that should use the endpoint.
    #[prost(message, repeated, tag = "1")]
    pub for_zones: Vec<ForZone>,
}

/// A zone (`k8s.io/api/discovery/v1.ForZone`).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ForZone {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// A port (`k8s.io/api/discovery/v1.EndpointPort`).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct EndpointPort {
    /// Name, may be empty.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// `TCP`, `UDP` or `SCTP`.
    #[prost(string, optional, tag = "2")]
    pub protocol: Option<String>,
    /// Number; absent = all ports.
    #[prost(int32, optional, tag = "3")]
    pub port: Option<i32>,
    /// Application protocol.
    #[prost(string, optional, tag = "4")]
    pub app_protocol: Option<String>,
}

impl Endpoint {
    /// Takes new connections.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.conditions
            .and_then(|conditions| conditions.ready)
            .unwrap_or(true)
    }

    /// Answers, perhaps while terminating.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.conditions
            .and_then(|conditions| conditions.serving)
            .unwrap_or(true)
    }

    /// Is being deleted.
    #[must_use]
    pub fn is_terminating(&self) -> bool {
        self.conditions
            .and_then(|conditions| conditions.terminating)
            .unwrap_or(false)
    }
}

impl EndpointSlice {
    /// The service that the slice belongs to.
    #[must_use]
    pub fn service_name(&self) -> Option<&str> {
        self.labels.get(SERVICE_NAME_LABEL).map(String::as_str)
    }

    /// Reads a zstd frame of the message.
    ///
    /// # Errors
    /// No such frame, more than [`MAX_ENDPOINT_SLICE_DECODED_BYTES`] in it, or no such message.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        use std::io::Read as _;

        let zstd_error = |source| DecodeError::Zstd { source };
        // The frame's own size field is the sender's word: the output is bounded, whatever it says.
        let limit = MAX_ENDPOINT_SLICE_DECODED_BYTES as u64;
        let mut message = Vec::new();
        zstd::stream::read::Decoder::with_buffer(value)
            .map_err(zstd_error)?
            .take(limit + 1)
            .read_to_end(&mut message)
            .map_err(zstd_error)?;
        if message.len() as u64 > limit {
            return Err(zstd_error(std::io::Error::other("too large")));
        }
        Ok(Message::decode(message.as_slice())?)
    }

    /// The bytes to store: one zstd frame.
    #[must_use]
    #[expect(
        clippy::expect_used,
        reason = "compressing memory into a buffer of the bound's size fails only for lack of memory"
    )]
    pub fn encode(&self) -> Bytes {
        let message = self.encode_to_vec();
        Bytes::from(zstd::bulk::compress(&message, ZSTD_LEVEL).expect("compression in memory"))
    }
}
