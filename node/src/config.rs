//! The agent's configuration file.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clustermesh_api::limits::{
    SESSION_TTL_DEFAULT_SECONDS, SESSION_TTL_MAX_SECONDS, SESSION_TTL_MIN_SECONDS,
};
use clustermesh_api::names::{check_cluster_name, check_dns_subdomain};
use clustermesh_client::{ClientConfig, TlsPaths};
use clustermesh_node_core::probes::{INTERVAL_MS_DEFAULT, INTERVAL_MS_MIN};
use serde::Deserialize;

pub mod encryption;

use encryption::Encryption;

/// The configuration as the command's help shows it: the least first, then what has a default.
pub const HELP: &str = r#"A small configuration:
  node = "w1"                  # CN of the certificate
  cluster = "c1"               # OU of the certificate

  [server]
  endpoints = ["https://s1.example.net:2379"]

  [server.tls]
  ca = "ca.crt"
  cert = "w1.crt"              # `clustermesh dev-ca issue node w1 --cluster c1` makes one
  key = "w1.key"

Settings that may stand above [server], with their defaults:
  state_dir = "/var/lib/clustermesh/node"
  run_dir = "/run/clustermesh" # of the socket agent.sock
  bpffs = "/sys/fs/bpf"
  cgroup = "/sys/fs/cgroup"    # (or unified below it) whose sockets are balanced; "" = none
  attach_mode = "auto"         # or "tcx", "clsact"
  routing = "tunnel"           # or "direct"
  underlay_devices = []        # none: the device of the default route
  underlay_addresses = []      # none: the first global one of each family on them
  mtu = 0                      # of pods, bytes; 0: the underlay's less the tunnel's headers
  admin = "127.0.0.1:9964"     # metrics and health
  probe_interval_ms = 1000
  path_probe_seconds = 15      # paths to other nodes are probed for their MTU; 0 = never
  session_ttl_seconds = 15     # silent for so long, the node is stale
  log_format = "text"          # or "json"

  [labels]                     # of the node; none

  [encryption]                 # between nodes, by WireGuard; see docs/encryption.md
  mode = "off"                 # or "inter-cluster", "all"
  nodes = false                # what the nodes themselves say to each other, too
  strict = false               # what cannot be encrypted is dropped
  backend = "auto"             # or "kernel", "userspace"
  port = 51871                 # UDP; keys that change use the next one, too
  keepalive_seconds = 0        # for nodes behind address translation; 0 = none
  rotate_hours = 24            # age at which keys are changed; 0 = never
  program = ""                 # of the device in user space; "" = beside this one
  socket_dir = "/var/run/wireguard" # of that device, for `wg`
  control_ports = [2379, 2380] # of servers: nodes reach them without encryption
  strict_cidrs = []            # where only pods and nodes of the mesh live, known or not

  [encryption.clusters]        # single clusters, "on" or "off"; none; not with mode "off"

Exit codes: 0 ended in order, 1 failed, 64 bad configuration."#;
/// Where the agent looks for its configuration.
pub const DEFAULT_CONFIG: &str = "/etc/clustermesh/node.toml";
/// Name of the socket in the run folder.
pub const SOCKET_NAME: &str = "agent.sock";
/// Name of the folder of queued DELs in the state folder.
pub const QUEUE_NAME: &str = "cni-queue";
/// Default state folder.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/clustermesh/node";
/// Default run folder.
pub const DEFAULT_RUN_DIR: &str = "/run/clustermesh";

/// All settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Node name; must be the CN of the certificate.
    pub node: String,
    /// Cluster name; must be the OU of the certificate.
    pub cluster: String,
    /// How to reach the cluster's server.
    pub server: Server,
    /// Labels of the node.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
    /// Durable state.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Socket.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Mount point of a BPF file system.
    #[serde(default = "default_bpffs")]
    pub bpffs: PathBuf,
    /// cgroup (v2) whose sockets are load-balanced; an empty path turns that off.
    #[serde(default = "default_cgroup")]
    pub cgroup: PathBuf,
    /// How programs are attached.
    #[serde(default)]
    pub attach_mode: AttachMode,
    /// How packets travel between nodes.
    #[serde(default)]
    pub routing: Routing,
    /// Devices of the underlay; empty = the device of the default route.
    #[serde(default)]
    pub underlay_devices: Vec<String>,
    /// Addresses on the underlay; empty = the first global one of each family on these devices.
    #[serde(default)]
    pub underlay_addresses: Vec<IpAddr>,
    /// Largest packet of pods, bytes; 0 = the underlay's less the tunnel's headers.
    #[serde(default)]
    pub mtu: u16,
    /// Metrics and health, on loopback.
    #[serde(default = "default_admin")]
    pub admin: SocketAddr,
    /// Time between two readiness probes of a port, milliseconds.
    #[serde(default = "default_probe_interval")]
    pub probe_interval_ms: u64,
    /// What the path to each other node takes is probed for this often, seconds; 0 = never.
    #[serde(default = "default_path_probe")]
    pub path_probe_seconds: u32,
    /// The server calls this node stale after so long without a message, seconds.
    #[serde(default = "default_session_ttl")]
    pub session_ttl_seconds: u32,
    /// `text` or `json`.
    #[serde(default = "default_log_format")]
    pub log_format: String,
    /// Encryption between nodes.
    #[serde(default)]
    pub encryption: Encryption,
}

/// How to reach the server.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// `https://host:port`, tried in turn.
    pub endpoints: Vec<String>,
    /// Name in the server's certificate, when it is not the endpoint's host.
    #[serde(default)]
    pub server_name: Option<String>,
    /// Certificates.
    pub tls: Option<Tls>,
}

/// PEM files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// CA.
    pub ca: PathBuf,
    /// Certificate of this node.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// tcx where the kernel has it.
    #[default]
    Auto,
    /// tcx links.
    Tcx,
    /// clsact filters.
    Clsact,
}

/// How packets travel between nodes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Routing {
    /// Encapsulated in VXLAN.
    #[default]
    Tunnel,
    /// As they are; the network must route or the nodes be neighbours.
    Direct,
}

impl Routing {
    /// As in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Direct => "direct",
        }
    }
}

fn default_state_dir() -> PathBuf {
    DEFAULT_STATE_DIR.into()
}
fn default_run_dir() -> PathBuf {
    DEFAULT_RUN_DIR.into()
}
fn default_bpffs() -> PathBuf {
    "/sys/fs/bpf".into()
}
fn default_cgroup() -> PathBuf {
    // A machine with both hierarchies mounts the second one below the first.
    let unified = Path::new("/sys/fs/cgroup/unified");
    if unified.is_dir() {
        unified.into()
    } else {
        "/sys/fs/cgroup".into()
    }
}
fn default_admin() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9964))
}
const fn default_probe_interval() -> u64 {
    INTERVAL_MS_DEFAULT
}
const fn default_path_probe() -> u32 {
    15
}
const fn default_session_ttl() -> u32 {
    SESSION_TTL_DEFAULT_SECONDS
}
fn default_log_format() -> String {
    "text".to_owned()
}

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML of this shape, or a value cannot work; the error names file and key.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| {
            format!(
                "cannot read the configuration {}, which --config names; --help shows what belongs into it",
                path.display()
            )
        })?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = toml::from_str(text)?;
        check_dns_subdomain(&config.node).context("node")?;
        check_cluster_name(&config.cluster).context("cluster")?;
        if config.server.endpoints.is_empty() {
            bail!("server.endpoints is empty: name at least one https://host:port");
        }
        if config.probe_interval_ms < INTERVAL_MS_MIN {
            bail!("probe_interval_ms is below {INTERVAL_MS_MIN}");
        }
        let ttl = SESSION_TTL_MIN_SECONDS..=SESSION_TTL_MAX_SECONDS;
        if !ttl.contains(&config.session_ttl_seconds) {
            bail!(
                "session_ttl_seconds is not between {} and {}",
                ttl.start(),
                ttl.end()
            );
        }
        config.encryption.check()?;
        Ok(config)
    }

    /// Path of the local API's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join(SOCKET_NAME)
    }

    /// Folder of DELs that came while the agent was down.
    #[must_use]
    pub fn queue_dir(&self) -> PathBuf {
        self.state_dir.join(QUEUE_NAME)
    }

    /// The client's part.
    #[must_use]
    pub fn client(&self) -> ClientConfig {
        ClientConfig {
            endpoints: self.server.endpoints.clone(),
            tls: self.server.tls.as_ref().map(|tls| TlsPaths {
                ca: tls.ca.clone(),
                cert: tls.cert.clone(),
                key: tls.key.clone(),
            }),
            server_name: self.server.server_name.clone(),
        }
    }

    /// Where the kernel state lives and how programs are attached.
    #[must_use]
    pub fn datapath(&self) -> clustermesh_ebpf::Options {
        clustermesh_ebpf::Options {
            bpffs: self.bpffs.clone(),
            attach_mode: match self.attach_mode {
                AttachMode::Auto => clustermesh_ebpf::AttachMode::detect(),
                AttachMode::Tcx => clustermesh_ebpf::AttachMode::Tcx,
                AttachMode::Clsact => clustermesh_ebpf::AttachMode::Clsact,
            },
            cgroup: (!self.cgroup.as_os_str().is_empty()).then(|| self.cgroup.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
        node = "w1"
        cluster = "east"
        [server]
        endpoints = ["https://127.0.0.1:2379"]
    "#;

    #[test]
    fn the_least_configuration_has_the_documented_defaults() {
        let config = Config::parse(LEAST).unwrap();
        assert_eq!(config.admin.to_string(), "127.0.0.1:9964");
        assert_eq!(config.session_ttl_seconds, 15);
        assert_eq!(config.socket(), Path::new("/run/clustermesh/agent.sock"));
        assert_eq!(config.routing, Routing::Tunnel);
    }

    #[test]
    fn the_help_shows_a_configuration_that_works_and_the_real_defaults() {
        let (least, rest) = HELP.split_once("\n\nSettings").unwrap();
        let least = least.split_once('\n').unwrap().1;
        let defaults = rest.split_once('\n').unwrap().1;
        let defaults = defaults.split_once("\n\nExit").unwrap().0;
        let (settings, labels) = defaults.split_once("\n\n").unwrap();
        let written = Config::parse(&format!("{settings}\n{least}\n{labels}")).unwrap();
        let mut implied = Config::parse(least).unwrap();
        // It depends on the machine.
        implied.cgroup.clone_from(&written.cgroup);
        assert_eq!(format!("{written:?}"), format!("{implied:?}"));
    }

    #[test]
    fn mistakes_are_named() {
        for (wrong, word) in [
            ("node = \"w1\"\nnodee = 1", "nodee"),
            ("node = \"W 1\"", "node"),
            ("node = \"w1\"\nprobe_interval_ms = 5", "probe_interval_ms"),
            (
                "encryption = { port = 0 }\nnode = \"w1\"",
                "encryption.port",
            ),
            (
                "encryption = { strict = true }\nnode = \"w1\"",
                "encryption.mode",
            ),
            (
                "encryption = { mode = \"all\", strict_cidrs = [\"10.0.0.0/8\"] }\nnode = \"w1\"",
                "encryption.strict_cidrs",
            ),
            (
                "encryption = { mode = \"all\", strict = true, strict_cidrs = [\"0.0.0.0/0\"] }\nnode = \"w1\"",
                "encryption.strict_cidrs",
            ),
            (
                "encryption = { clusters = { west = \"on\" } }\nnode = \"w1\"",
                "encryption.clusters",
            ),
            (
                "node = \"w1\"\nsession_ttl_seconds = 1",
                "session_ttl_seconds",
            ),
        ] {
            let text = LEAST.replace("node = \"w1\"", wrong);
            let error = format!("{:#}", Config::parse(&text).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
    }
}
