//! The server's configuration file: TOML, unknown keys refused, checked once as a whole.

mod address;
mod compaction;
mod limits;
mod replica;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clustermesh_api::IdentitySplit;
use clustermesh_api::identity_split::NumberingError;
use clustermesh_api::limits::{MAX_PEERS, SESSION_TTL_DEFAULT_SECONDS};
use clustermesh_api::names::check_cluster_name;
use clustermesh_api::validate::ClusterError;
use clustermesh_mesh::{ClusterSettings, SettingsError};
use clustermesh_process::TlsPaths;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::Deserialize;

pub use compaction::{CompactionConfig, CompactionMode, Retention};
pub use limits::LimitsConfig;
pub use replica::ReplicaSection;

/// Endpoints given for one peer.
pub const MAX_ENDPOINTS_PER_PEER: usize = 16;
/// `auth_token_ttl_seconds`.
const AUTH_TOKEN_TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=86_400;
/// `watch_progress_notify_interval_ms`.
const WATCH_PROGRESS_NOTIFY_INTERVAL_MS: std::ops::RangeInclusive<u64> = 100..=86_400_000;
/// `snapshot_log_bytes`.
const SNAPSHOT_LOG_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=4 << 30;
/// `drain_seconds`.
const DRAIN_MAX_SECONDS: u64 = 3_600;
/// The configuration file has at most so many bytes.
pub const MAX_CONFIG_FILE_BYTES: u64 = 1 << 20;

/// Everything that the file says, with defaults filled in.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster that this server owns. Absent: a plain store that writes nothing of its own.
    pub cluster: Option<ClusterConfig>,
    /// Folder of log, vote and snapshots.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// gRPC and HTTP over mutual TLS.
    #[serde(
        default = "default_listen_client",
        deserialize_with = "address::deserialize"
    )]
    pub listen_client: SocketAddr,
    /// The client port once more, in clear and without certificates: every process of this machine has an operator's
    /// rights there. Loopback only; absent: none.
    #[serde(default, deserialize_with = "address::deserialize_some")]
    pub listen_client_clear: Option<SocketAddr>,
    /// Metrics and health in clear; loopback only.
    #[serde(
        default = "default_listen_admin",
        deserialize_with = "address::deserialize"
    )]
    pub listen_admin: SocketAddr,
    /// This server's certificate, and the CA of its clients.
    pub tls: TlsConfig,
    /// This server as one of several replicas. Absent: the only one, without a port for others.
    pub replica: Option<ReplicaSection>,
    /// Clusters to copy from.
    #[serde(default)]
    pub peers: Vec<PeerConfig>,
    /// Bounds of requests.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// Live and historic data stay below so many bytes: past it writes are refused and the NOSPACE alarm stands. 0 for no limit.
    #[serde(default = "default_quota_bytes")]
    pub quota_bytes: u64,
    /// A snapshot is taken after so many bytes of log; up to three times as much of it is kept.
    #[serde(default = "default_snapshot_log_bytes")]
    pub snapshot_log_bytes: u64,
    /// A user's token ends after so long without use, in seconds.
    #[serde(default = "default_auth_token_ttl_seconds")]
    pub auth_token_ttl_seconds: u32,
    /// A quiet watch that asked for it hears of the revision this often, in milliseconds.
    #[serde(default = "default_watch_progress_notify_interval_ms")]
    pub watch_progress_notify_interval_ms: u64,
    /// Automatic compaction of history.
    #[serde(default)]
    pub compaction: CompactionConfig,
    /// Logging.
    #[serde(default)]
    pub log: LogConfig,
    /// Time that running calls get on SIGTERM, in seconds.
    #[serde(default = "default_drain_seconds")]
    pub drain_seconds: u64,
}

/// `[cluster]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// Name, unique in the mesh.
    pub name: String,
    /// Number, unique in the mesh: 1 to `max_connected_clusters`.
    pub id: u32,
    /// 255 or 511; the same in the whole mesh.
    #[serde(default = "default_max_connected_clusters")]
    pub max_connected_clusters: u32,
    /// Range that nodes' IPv4 pod CIDRs are cut from.
    pub pod_cidr_v4: Option<Ipv4Network>,
    /// Range that nodes' IPv6 pod CIDRs are cut from.
    pub pod_cidr_v6: Option<Ipv6Network>,
    /// Prefix length of a node's IPv4 pod CIDR.
    #[serde(default = "default_node_mask_size_v4")]
    pub node_mask_size_v4: u8,
    /// Prefix length of a node's IPv6 pod CIDR.
    #[serde(default = "default_node_mask_size_v6")]
    pub node_mask_size_v6: u8,
    /// Range of services' virtual IPv4 addresses.
    pub service_cidr_v4: Option<Ipv4Network>,
    /// Range of services' virtual IPv6 addresses.
    pub service_cidr_v6: Option<Ipv6Network>,
    /// A store made anew tells peers that its records are complete only so long after the server's start, in seconds:
    /// its agents come back first. 0 for a cluster that never ran before.
    #[serde(default = "default_settle_seconds")]
    pub settle_seconds: u32,
}

/// `[tls]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM file with the CA of clients and peers.
    pub ca: PathBuf,
    /// PEM file with the server's chain.
    pub cert: PathBuf,
    /// PEM file with the server's key.
    pub key: PathBuf,
}

/// `[[peers]]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// The peer's cluster name.
    pub name: String,
    /// `host:port` or `https://host:port`, tried in turn.
    pub endpoints: Vec<String>,
    /// CA of the peer's server; default: `tls.ca`.
    pub ca: Option<PathBuf>,
    /// Client certificate shown to the peer; default: `tls.cert`.
    pub cert: Option<PathBuf>,
    /// Its key; default: `tls.key`.
    pub key: Option<PathBuf>,
    /// Name expected in the peer's certificate; default: the endpoint's host.
    pub server_name: Option<String>,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `text` or `json`.
    pub format: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: "text".to_owned(),
        }
    }
}

fn default_data_dir() -> PathBuf {
    PathBuf::from("/var/lib/clustermesh/server")
}

fn default_listen_client() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 2379))
}

fn default_listen_admin() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9962))
}

fn default_max_connected_clusters() -> u32 {
    255
}

fn default_node_mask_size_v4() -> u8 {
    24
}

fn default_node_mask_size_v6() -> u8 {
    64
}

/// Every agent that lives has opened its session again, or its session would be lost twice over.
fn default_settle_seconds() -> u32 {
    2 * SESSION_TTL_DEFAULT_SECONDS
}

fn default_quota_bytes() -> u64 {
    clustermesh_raft::DEFAULT_QUOTA_BYTES
}

fn default_snapshot_log_bytes() -> u64 {
    clustermesh_raft::DEFAULT_SNAPSHOT_LOG_BYTES
}

/// etcd's `--auth-token-ttl`.
fn default_auth_token_ttl_seconds() -> u32 {
    300
}

/// etcd's `--watch-progress-notify-interval`.
fn default_watch_progress_notify_interval_ms() -> u64 {
    600_000
}

fn default_drain_seconds() -> u64 {
    10
}

/// Why the configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read the configuration {path}, which --config names: {reason}; --help shows what belongs into it"
    )]
    Read {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// Not TOML, an unknown key or a value of another type.
    #[error("{path}: {}; docs/server.md lists all keys", said(source))]
    Parse {
        /// The file.
        path: String,
        /// Line, column and reason.
        source: Box<toml::de::Error>,
    },
    /// A value is not possible.
    #[error("{path}: {key}: {reason}")]
    Invalid {
        /// The file.
        path: String,
        /// The key at fault.
        key: String,
        /// What is wrong and what would be right.
        reason: String,
    },
}

impl Config {
    /// Reads and checks `path`; relative file names in it are relative to its folder.
    ///
    /// # Errors
    /// When the file is unreadable, is not valid TOML of this shape, or says something impossible.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let read = |reason: String| ConfigError::Read {
            path: shown.clone(),
            reason,
        };
        let size = std::fs::metadata(path)
            .map_err(|error| read(error.to_string()))?
            .len();
        if size > MAX_CONFIG_FILE_BYTES {
            return Err(read(format!(
                "{size} bytes is more than {MAX_CONFIG_FILE_BYTES}"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|error| read(error.to_string()))?;
        Self::parse(&text, path)
    }

    /// Checks `text`, which stands in the file at `path`.
    ///
    /// # Errors
    /// When it is not valid TOML of this shape, or says something impossible.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let mut config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: shown.clone(),
            source: Box::new(source),
        })?;
        config
            .check()
            .map_err(|(key, reason)| ConfigError::Invalid {
                path: shown,
                key,
                reason,
            })?;
        config.resolve(path.parent().unwrap_or(Path::new("")));
        Ok(config)
    }

    /// TLS files of the client port.
    #[must_use]
    pub fn server_tls_paths(&self) -> TlsPaths {
        TlsPaths {
            ca: self.tls.ca.clone(),
            cert: self.tls.cert.clone(),
            key: self.tls.key.clone(),
        }
    }

    /// TLS files used towards `peer`.
    #[must_use]
    pub fn peer_tls_paths(&self, peer: &PeerConfig) -> TlsPaths {
        TlsPaths {
            ca: peer.ca.as_ref().unwrap_or(&self.tls.ca).clone(),
            cert: peer.cert.as_ref().unwrap_or(&self.tls.cert).clone(),
            key: peer.key.as_ref().unwrap_or(&self.tls.key).clone(),
        }
    }

    fn resolve(&mut self, folder: &Path) {
        let tls = [&mut self.tls.ca, &mut self.tls.cert, &mut self.tls.key];
        let peers = self
            .peers
            .iter_mut()
            .flat_map(|peer| [&mut peer.ca, &mut peer.cert, &mut peer.key])
            .flatten();
        let replica = self.replica.iter_mut().flat_map(ReplicaSection::paths_mut);
        for path in tls
            .into_iter()
            .chain(peers)
            .chain(replica)
            .chain([&mut self.data_dir])
        {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        }
    }

    fn check(&self) -> Result<(), (String, String)> {
        self.check_clear_ports()?;
        if !AUTH_TOKEN_TTL_SECONDS.contains(&self.auth_token_ttl_seconds) {
            return Err(fault(
                "auth_token_ttl_seconds",
                format!(
                    "{} is outside {} to {}",
                    self.auth_token_ttl_seconds,
                    AUTH_TOKEN_TTL_SECONDS.start(),
                    AUTH_TOKEN_TTL_SECONDS.end()
                ),
            ));
        }
        if !WATCH_PROGRESS_NOTIFY_INTERVAL_MS.contains(&self.watch_progress_notify_interval_ms) {
            let bounds = &WATCH_PROGRESS_NOTIFY_INTERVAL_MS;
            return Err(fault(
                "watch_progress_notify_interval_ms",
                format!(
                    "{} is outside {} to {}",
                    self.watch_progress_notify_interval_ms,
                    bounds.start(),
                    bounds.end()
                ),
            ));
        }
        if !SNAPSHOT_LOG_BYTES.contains(&self.snapshot_log_bytes) {
            let (low, high) = (SNAPSHOT_LOG_BYTES.start(), SNAPSHOT_LOG_BYTES.end());
            return Err(fault(
                "snapshot_log_bytes",
                format!("{} is outside {low} to {high}", self.snapshot_log_bytes),
            ));
        }
        if self.drain_seconds > DRAIN_MAX_SECONDS {
            return Err(fault(
                "drain_seconds",
                format!("{} is more than {DRAIN_MAX_SECONDS}", self.drain_seconds),
            ));
        }
        self.log
            .format
            .parse::<clustermesh_process::LogFormat>()
            .map_err(|error| fault("log.format", error.to_string()))?;
        self.limits.check()?;
        self.compaction.policy()?;
        if let Some(replica) = &self.replica {
            replica.check()?;
        }
        match &self.cluster {
            Some(cluster) => cluster.check()?,
            None if !self.peers.is_empty() => {
                return Err(fault(
                    "peers",
                    "a server without [cluster] is a plain store and has no peers; add [cluster]",
                ));
            }
            None => {}
        }
        self.check_peers()
    }

    fn check_clear_ports(&self) -> Result<(), (String, String)> {
        if !self.listen_admin.ip().is_loopback() {
            return Err(fault(
                "listen_admin",
                format!(
                    "{} is not loopback; metrics and health are in clear there (the client port serves them over TLS)",
                    self.listen_admin
                ),
            ));
        }
        match self.listen_client_clear {
            Some(address) if !address.ip().is_loopback() => Err(fault(
                "listen_client_clear",
                format!(
                    "{address} is not loopback; calls there are in clear and need no certificate (listen_client takes those from elsewhere, over TLS)"
                ),
            )),
            _ => Ok(()),
        }
    }

    fn check_peers(&self) -> Result<(), (String, String)> {
        if self.peers.len() > MAX_PEERS {
            return Err(fault(
                "peers",
                format!("{} peers; the limit is {MAX_PEERS}", self.peers.len()),
            ));
        }
        let mut names = BTreeSet::new();
        for (index, peer) in self.peers.iter().enumerate() {
            let key = |field: &str| format!("peers[{index}].{field}");
            check_cluster_name(&peer.name).map_err(|error| (key("name"), error.to_string()))?;
            if self
                .cluster
                .as_ref()
                .is_some_and(|cluster| cluster.name == peer.name)
            {
                return Err((
                    key("name"),
                    format!("{:?} is this cluster's own name", peer.name),
                ));
            }
            if !names.insert(peer.name.as_str()) {
                return Err((key("name"), format!("{:?} is listed twice", peer.name)));
            }
            if peer.endpoints.is_empty() || peer.endpoints.len() > MAX_ENDPOINTS_PER_PEER {
                return Err((
                    key("endpoints"),
                    format!("give 1 to {MAX_ENDPOINTS_PER_PEER} host:port"),
                ));
            }
            for endpoint in &peer.endpoints {
                check_endpoint(endpoint).map_err(|reason| (key("endpoints"), reason))?;
            }
            if peer.cert.is_some() != peer.key.is_some() {
                return Err((key("cert"), "cert and key come together".to_owned()));
            }
        }
        Ok(())
    }
}

impl ClusterConfig {
    /// The settings that the planners work with.
    ///
    /// # Errors
    /// When they contradict each other.
    pub fn settings(&self) -> Result<ClusterSettings, SettingsError> {
        ClusterSettings {
            name: self.name.clone(),
            id: self.id,
            split: IdentitySplit::try_from(self.max_connected_clusters)
                .map_err(ClusterError::from)?,
            pod_cidrs: self.pod_cidrs().collect(),
            node_mask_v4: self.node_mask_size_v4,
            node_mask_v6: self.node_mask_size_v6,
            service_cidrs: self.service_cidrs().collect(),
        }
        .checked()
    }

    fn check(&self) -> Result<(), (String, String)> {
        let Err(error) = self.settings() else {
            return Ok(());
        };
        let key = match &error {
            SettingsError::Cluster(ClusterError::Name(_)) => "cluster.name",
            SettingsError::Cluster(ClusterError::Number(NumberingError::MaxConnectedClusters(
                _,
            ))) => "cluster.max_connected_clusters",
            SettingsError::Cluster(ClusterError::Number(_)) => "cluster.id",
            SettingsError::Overlap(..) | SettingsError::TooMany(_) => "cluster.service_cidr",
            SettingsError::NodeMask { cidr, .. } if cidr.is_ipv4() => "cluster.node_mask_size_v4",
            SettingsError::NodeMask { .. } => "cluster.node_mask_size_v6",
        };
        Err(fault(key, error.to_string()))
    }

    /// The cluster's pod CIDRs, IPv4 first.
    pub fn pod_cidrs(&self) -> impl Iterator<Item = IpNetwork> + use<> {
        let v4 = self.pod_cidr_v4.map(IpNetwork::V4);
        v4.into_iter().chain(self.pod_cidr_v6.map(IpNetwork::V6))
    }

    /// The ranges of services' virtual addresses, IPv4 first.
    pub fn service_cidrs(&self) -> impl Iterator<Item = IpNetwork> + use<> {
        let v4 = self.service_cidr_v4.map(IpNetwork::V4);
        v4.into_iter()
            .chain(self.service_cidr_v6.map(IpNetwork::V6))
    }
}

/// The parser's picture of the place ends in an empty line.
fn said(error: &toml::de::Error) -> String {
    error.to_string().trim_end().to_owned()
}

fn fault(key: &str, reason: impl Into<String>) -> (String, String) {
    (key.to_owned(), reason.into())
}

fn check_endpoint(endpoint: &str) -> Result<(), String> {
    let rest = endpoint.strip_prefix("https://").unwrap_or(endpoint);
    let authority: http::uri::Authority = rest
        .parse()
        .map_err(|_| format!("{endpoint:?} is not host:port"))?;
    if authority.port_u16().is_none() || authority.host().is_empty() {
        return Err(format!(
            "{endpoint:?} needs a host and a port, as in \"c2.example.net:2379\""
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
