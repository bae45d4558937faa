//! The configuration of a device: peers by key, prefixes by owner, and how a change alters them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use ipnetwork::IpNetwork;

use crate::allowed_ips::PREFIXES_MAX;
use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// Peers that one device can have.
pub const PEERS_MAX: usize = 1 << 16;

/// One peer as it is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// Who it is.
    pub public_key: PublicKey,
    /// A secret beside the key pairs.
    pub preshared_key: Option<PresharedKey>,
    /// Where it is, if that is known; it may move.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives that are sent without cause; `None`: never.
    pub persistent_keepalive_seconds: Option<u16>,
    /// What may come from it and goes to it.
    pub allowed_ips: BTreeSet<IpNetwork>,
}

impl PeerConfig {
    /// A peer of which nothing but the key is known.
    #[must_use]
    pub const fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive_seconds: None,
            allowed_ips: BTreeSet::new(),
        }
    }
}

/// A whole device as it is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Our key; without one nothing is sent.
    pub private_key: Option<PrivateKey>,
    /// UDP port; 0: the kernel chooses.
    pub listen_port: u16,
    /// Mark of outgoing datagrams (`SO_MARK`); 0: none.
    pub fwmark: u32,
    /// Peers by key.
    pub peers: Vec<PeerConfig>,
}

/// A change of one peer; what is `None` stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerChange {
    /// Which peer; it is added if there is none.
    pub public_key: PublicKey,
    /// Do nothing if there is no such peer.
    pub update_only: bool,
    /// A new preshared key, or none any more.
    pub preshared_key: Option<Option<PresharedKey>>,
    /// A new place.
    pub endpoint: Option<SocketAddr>,
    /// A new interval, seconds; 0: none any more.
    pub persistent_keepalive_seconds: Option<u16>,
    /// Forget all prefixes first.
    pub replace_allowed_ips: bool,
    /// Prefixes that go; others' stay.
    pub remove_allowed_ips: Vec<IpNetwork>,
    /// Prefixes that come, away from another peer where it has them.
    pub add_allowed_ips: Vec<IpNetwork>,
}

impl PeerChange {
    /// A change that changes nothing, or adds a bare peer.
    #[must_use]
    pub const fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive_seconds: None,
            replace_allowed_ips: false,
            remove_allowed_ips: Vec::new(),
            add_allowed_ips: Vec::new(),
        }
    }
}

/// One step of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Another private key, or none: all sessions end.
    PrivateKey(Option<PrivateKey>),
    /// Another UDP port.
    ListenPort(u16),
    /// Another mark.
    Fwmark(u32),
    /// All peers go.
    RemoveAllPeers,
    /// A peer goes.
    RemovePeer(PublicKey),
    /// A peer comes or changes.
    Peer(PeerChange),
}

/// Why a change is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Too many peers.
    #[error("a device has at most {PEERS_MAX} peers")]
    TooManyPeers,
    /// Too many prefixes.
    #[error("a device has at most {PREFIXES_MAX} allowed IPs")]
    TooManyPrefixes,
}

/// The configuration as it is.
#[derive(Clone, Debug, Default)]
pub struct Config {
    private_key: Option<PrivateKey>,
    listen_port: u16,
    fwmark: u32,
    peers: BTreeMap<PublicKey, PeerConfig>,
    owners: HashMap<IpNetwork, PublicKey>,
}

impl Config {
    /// Our key.
    #[must_use]
    pub const fn private_key(&self) -> Option<&PrivateKey> {
        self.private_key.as_ref()
    }

    /// UDP port as it was asked for.
    #[must_use]
    pub const fn listen_port(&self) -> u16 {
        self.listen_port
    }

    /// Mark of outgoing datagrams.
    #[must_use]
    pub const fn fwmark(&self) -> u32 {
        self.fwmark
    }

    /// A peer.
    #[must_use]
    pub fn peer(&self, key: &PublicKey) -> Option<&PeerConfig> {
        self.peers.get(key)
    }

    /// All peers, by key.
    pub fn peers(&self) -> impl Iterator<Item = &PeerConfig> {
        self.peers.values()
    }

    /// Every prefix and who has it.
    pub fn prefixes(&self) -> impl Iterator<Item = (IpNetwork, PublicKey)> + '_ {
        self.owners.iter().map(|(prefix, owner)| (*prefix, *owner))
    }

    /// As a whole, to compare with what is wanted.
    #[must_use]
    pub fn to_device(&self) -> DeviceConfig {
        DeviceConfig {
            private_key: self.private_key.clone(),
            listen_port: self.listen_port,
            fwmark: self.fwmark,
            peers: self.peers.values().cloned().collect(),
        }
    }

    /// Carries out one step.
    ///
    /// # Errors
    /// When a limit would be exceeded; nothing is changed then but what came before in the same step.
    pub fn apply(&mut self, change: &Change) -> Result<(), ConfigError> {
        match change {
            Change::PrivateKey(key) => {
                self.private_key.clone_from(key);
                // A device is no peer of its own (the kernel's device removes it, too).
                if let Some(own) = key.as_ref().map(PrivateKey::public) {
                    self.remove(&own);
                }
            }
            Change::ListenPort(port) => self.listen_port = *port,
            Change::Fwmark(mark) => self.fwmark = *mark,
            Change::RemoveAllPeers => {
                self.peers.clear();
                self.owners.clear();
            }
            Change::RemovePeer(key) => self.remove(key),
            Change::Peer(change) => return self.change_peer(change),
        }
        Ok(())
    }

    fn remove(&mut self, key: &PublicKey) {
        if let Some(peer) = self.peers.remove(key) {
            for prefix in &peer.allowed_ips {
                self.owners.remove(prefix);
            }
        }
    }

    fn change_peer(&mut self, change: &PeerChange) -> Result<(), ConfigError> {
        let key = change.public_key;
        let is_own = self.private_key.as_ref().map(PrivateKey::public) == Some(key);
        let is_new = !self.peers.contains_key(&key);
        if is_own || (is_new && change.update_only) {
            return Ok(());
        }
        if is_new && self.peers.len() >= PEERS_MAX {
            return Err(ConfigError::TooManyPeers);
        }
        if self.owners.len() + change.add_allowed_ips.len() > PREFIXES_MAX {
            return Err(ConfigError::TooManyPrefixes);
        }
        for prefix in &change.add_allowed_ips {
            let owner = self.owners.insert(*prefix, key);
            if let Some(other) = owner.filter(|owner| *owner != key)
                && let Some(other) = self.peers.get_mut(&other)
            {
                other.allowed_ips.remove(prefix);
            }
        }
        let peer = self
            .peers
            .entry(key)
            .or_insert_with(|| PeerConfig::new(key));
        if let Some(preshared_key) = &change.preshared_key {
            peer.preshared_key.clone_from(preshared_key);
        }
        if change.endpoint.is_some() {
            peer.endpoint = change.endpoint;
        }
        if let Some(seconds) = change.persistent_keepalive_seconds {
            peer.persistent_keepalive_seconds = (seconds > 0).then_some(seconds);
        }
        let gone: Vec<IpNetwork> = if change.replace_allowed_ips {
            peer.allowed_ips.iter().copied().collect()
        } else {
            change.remove_allowed_ips.clone()
        };
        for prefix in gone {
            let stays = change.add_allowed_ips.contains(&prefix);
            if peer.allowed_ips.remove(&prefix) && !stays {
                self.owners.remove(&prefix);
            }
        }
        peer.allowed_ips.extend(&change.add_allowed_ips);
        Ok(())
    }
}

/// The prefix with its host bits cleared: two that say the same are equal.
#[must_use]
pub fn canonical(prefix: IpNetwork) -> IpNetwork {
    IpNetwork::new(prefix.network(), prefix.prefix()).unwrap_or(prefix)
}
