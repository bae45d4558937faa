//! What the model must know of its node: names, addresses, paths, and what is to be encrypted.

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_ebpf_abi::IdentitySplit;

use crate::change::ClusterName;

/// What a path to other nodes is like, for one family of the underlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnderlayPath {
    /// Device that leads to the nodes; 0 = let the kernel's routes decide.
    pub egress_ifindex: u32,
    /// Largest inner packet, bytes; 0 = not known.
    pub mtu_bytes: u16,
    /// The same for packets that are encrypted.
    pub encrypted_mtu_bytes: u16,
}

/// What the model must know of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Own cluster.
    pub cluster: ClusterName,
    /// Its id.
    pub cluster_id: u16,
    /// Own node name.
    pub node: Box<str>,
    /// Own underlay addresses.
    pub underlay: Vec<IpAddr>,
    /// How identities are split.
    pub split: IdentitySplit,
    /// Traffic to other nodes is routed, not encapsulated.
    pub direct_routing: bool,
    /// Path over IPv4, if the node has it.
    pub path_v4: Option<UnderlayPath>,
    /// Path over IPv6, if the node has it.
    pub path_v6: Option<UnderlayPath>,
    /// Entries of the ipcache that are wanted at most: [`crate::IPCACHE_WANTED_MAX`] of the whole map.
    pub ipcache_wanted_max: usize,
    /// What is to be encrypted.
    pub encryption: EncryptionSettings,
}

/// Which traffic to other nodes is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EncryptionMode {
    /// None.
    #[default]
    Off,
    /// To other clusters.
    InterCluster,
    /// All.
    All,
}

/// What is to be encrypted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncryptionSettings {
    /// In general.
    pub mode: EncryptionMode,
    /// For single clusters, whatever the mode says.
    pub clusters: BTreeMap<Box<str>, bool>,
    /// What cannot be encrypted is dropped.
    pub strict: bool,
}

impl EncryptionSettings {
    /// Whether traffic to nodes of that cluster is to be encrypted.
    #[must_use]
    pub fn covers(&self, cluster: &str, is_own: bool) -> bool {
        match (self.mode, self.clusters.get(cluster)) {
            (EncryptionMode::Off, _) => false,
            (_, Some(on)) => *on,
            (EncryptionMode::All, None) => true,
            (EncryptionMode::InterCluster, None) => !is_own,
        }
    }
}
