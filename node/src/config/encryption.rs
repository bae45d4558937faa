//! Settings of encryption between nodes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clustermesh_api::names::check_cluster_name;
use clustermesh_api::records::WIREGUARD_PORT_DEFAULT;
use clustermesh_ebpf::abi::CONTROL_PORTS_MAX;
use clustermesh_encryption::process::PROGRAM;
use clustermesh_encryption::userspace::control_socket::SOCKET_DIR;
use clustermesh_node_core::{EncryptionMode, EncryptionSettings};
use ipnetwork::IpNetwork;
use serde::Deserialize;

/// Ports of a server for its clients and for other replicas.
const CONTROL_PORTS_DEFAULT: [u16; 2] = [2_379, 2_380];

/// Prefixes in `strict_cidrs` at most.
const STRICT_CIDRS_MAX: usize = 1_024;
/// Shortest prefixes there, IPv4 and IPv6: a slip must not cut the node off from half the world.
const STRICT_CIDR_BITS_MIN: (u8, u8) = (8, 7);

/// All settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Encryption {
    /// Which traffic is encrypted.
    pub mode: Mode,
    /// What the nodes themselves say to each other, too.
    pub nodes: bool,
    /// What cannot be encrypted is dropped.
    pub strict: bool,
    /// Who runs the device.
    pub backend: BackendChoice,
    /// UDP port; keys that change use the next one, too.
    pub port: u16,
    /// Time between keepalives that are sent without cause, seconds; 0 = none. Needed behind address translation.
    pub keepalive_seconds: u16,
    /// Age at which this node's key is changed, hours; 0 = never. The node that is first takes all others along.
    pub rotate_hours: u32,
    /// Program of the device in user space; empty = beside the agent's own.
    pub program: PathBuf,
    /// Folder of that device's control socket.
    pub socket_dir: PathBuf,
    /// TCP ports of servers, which nodes reach without encryption of theirs: keys are learnt through them.
    pub control_ports: Vec<u16>,
    /// Ranges in which nothing but pods and nodes of the mesh lives: strict mode guards them whatever the records say.
    pub strict_cidrs: Vec<IpNetwork>,
    /// Single clusters, whatever `mode` says, unless it is off.
    pub clusters: BTreeMap<String, Switch>,
}

impl Default for Encryption {
    fn default() -> Self {
        Self {
            mode: Mode::Off,
            nodes: false,
            strict: false,
            backend: BackendChoice::Auto,
            port: WIREGUARD_PORT_DEFAULT,
            keepalive_seconds: 0,
            rotate_hours: 24,
            program: PathBuf::new(),
            socket_dir: SOCKET_DIR.into(),
            control_ports: CONTROL_PORTS_DEFAULT.to_vec(),
            strict_cidrs: Vec::new(),
            clusters: BTreeMap::new(),
        }
    }
}

/// Which traffic to other nodes is encrypted.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// None.
    #[default]
    Off,
    /// To other clusters.
    InterCluster,
    /// All.
    All,
}

impl Mode {
    /// As in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::InterCluster => "inter-cluster",
            Self::All => "all",
        }
    }
}

/// Who runs the device.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The kernel where it can.
    #[default]
    Auto,
    /// The kernel.
    Kernel,
    /// A process of ours.
    Userspace,
}

/// On or off.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

impl Encryption {
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.port == 0 || self.port == u16::MAX {
            bail!("encryption.port is not between 1 and {}", u16::MAX - 1);
        }
        if self.control_ports.len() > CONTROL_PORTS_MAX {
            bail!("encryption.control_ports has more than {CONTROL_PORTS_MAX} ports");
        }
        for cluster in self.clusters.keys() {
            check_cluster_name(cluster).context("encryption.clusters")?;
        }
        if self.mode == Mode::Off && (self.strict || self.nodes) {
            bail!(
                "encryption.strict and encryption.nodes need encryption.mode \"inter-cluster\" or \"all\""
            );
        }
        self.check_strict_cidrs()?;
        let mut on = self
            .clusters
            .iter()
            .filter(|(_, switch)| **switch == Switch::On);
        if self.mode == Mode::Off
            && let Some((cluster, _)) = on.next()
        {
            bail!(
                "encryption.clusters has {cluster} = \"on\", which needs encryption.mode \"inter-cluster\" or \"all\"; \
                 clusters that are not to be encrypted are named there with \"off\""
            );
        }
        Ok(())
    }

    fn check_strict_cidrs(&self) -> anyhow::Result<()> {
        if !self.strict && !self.strict_cidrs.is_empty() {
            bail!("encryption.strict_cidrs needs encryption.strict");
        }
        if self.strict_cidrs.len() > STRICT_CIDRS_MAX {
            bail!("encryption.strict_cidrs has more than {STRICT_CIDRS_MAX} prefixes");
        }
        let (v4_min, v6_min) = STRICT_CIDR_BITS_MIN;
        let is_short = |cidr: &&IpNetwork| {
            let least = if cidr.is_ipv4() { v4_min } else { v6_min };
            cidr.prefix() < least
        };
        if let Some(cidr) = self.strict_cidrs.iter().find(is_short) {
            bail!(
                "encryption.strict_cidrs has {cidr}, which is shorter than /{v4_min} (IPv6: /{v6_min}): \
                 all that lives there and is not of the mesh would not be reached"
            );
        }
        Ok(())
    }

    /// Whether anything is encrypted.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.mode != Mode::Off
    }

    /// What the model needs of it.
    #[must_use]
    pub fn for_model(&self) -> EncryptionSettings {
        EncryptionSettings {
            mode: match self.mode {
                Mode::Off => EncryptionMode::Off,
                Mode::InterCluster => EncryptionMode::InterCluster,
                Mode::All => EncryptionMode::All,
            },
            clusters: self
                .clusters
                .iter()
                .map(|(name, switch)| (name.as_str().into(), *switch == Switch::On))
                .collect(),
            strict: self.strict,
        }
    }

    /// The program of the device in user space.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        if !self.program.as_os_str().is_empty() {
            return self.program.clone();
        }
        let own = std::env::current_exe().unwrap_or_default();
        own.parent().unwrap_or(Path::new("")).join(PROGRAM)
    }
}
