//! The kernel's WireGuard device, by generic netlink.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, SystemTime};

use clustermesh_encryption_core::config::{
    Change, DeviceConfig, PeerChange, PeerConfig, canonical,
};
use clustermesh_encryption_core::control::PeerStatus;
use clustermesh_encryption_core::control_client::Description;
use clustermesh_encryption_core::key::{PresharedKey, PrivateKey, PublicKey};
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use wireguard_control::{DeviceUpdate, InterfaceName, Key, PeerConfigBuilder};

use crate::device::{Backend, Device, DeviceError, Origin};
use crate::link;

/// Prefixes of one peer in one message, which has a page's room.
const PREFIXES_PER_MESSAGE_MAX: usize = 64;

/// A device of the kernel.
#[derive(Debug)]
pub struct KernelDevice {
    name: String,
    interface: InterfaceName,
}

/// Whether the kernel has WireGuard: makes a device and removes it again.
///
/// # Errors
/// What the kernel says: `EOPNOTSUPP` where it has none.
pub fn probe() -> io::Result<()> {
    let name = format!("cmwgp{:x}", std::process::id());
    link::delete(&name)?;
    link::create_wireguard(&name)?;
    link::delete(&name)
}

impl KernelDevice {
    /// Finds the device, or makes it, in the calling thread's network namespace; a new one is down.
    ///
    /// # Errors
    /// When the kernel has no WireGuard, or the name is bad.
    pub fn open(name: &str) -> Result<(Self, Origin), DeviceError> {
        let interface = name
            .parse()
            .map_err(|_| failed(name, "name", io::ErrorKind::InvalidInput.into()))?;
        let device = Self {
            name: name.to_owned(),
            interface,
        };
        if link::exists(name) {
            match device.ask() {
                Ok(_) => return Ok((device, Origin::Adopted)),
                Err(error) if is_of_another_kind(&error) => {}
                // It lives, and carries packets perhaps: whoever asks tries again.
                Err(source) => return Err(failed(name, "ask", source)),
            }
            // Another kind of device of this name can only be what an earlier run in user space left.
            link::delete(name).map_err(|source| failed(name, "replace", source))?;
        }
        link::create_wireguard(name).map_err(|source| DeviceError::NoKernelDevice { source })?;
        Ok((device, Origin::Started))
    }

    fn ask(&self) -> io::Result<wireguard_control::Device> {
        wireguard_control::Device::get(&self.interface, wireguard_control::Backend::Kernel)
    }
}

/// The kernel says `EOPNOTSUPP` of a device that is no WireGuard device, and `ENOENT` while it has no WireGuard at all.
fn is_of_another_kind(error: &io::Error) -> bool {
    let number = error.raw_os_error().map(Errno::from_raw);
    matches!(number, Some(Errno::EOPNOTSUPP | Errno::ENOENT))
}

fn failed(name: &str, action: &'static str, source: io::Error) -> DeviceError {
    DeviceError::Io {
        action,
        device: name.to_owned(),
        source,
    }
}

/// A peer with many prefixes comes in several parts: they are put together.
fn describe(device: &wireguard_control::Device) -> Description {
    let mut peers: BTreeMap<PublicKey, (PeerConfig, PeerStatus)> = BTreeMap::new();
    for info in &device.peers {
        let key = PublicKey(info.config.public_key.0);
        let (config, status) = peers
            .entry(key)
            .or_insert_with(|| (PeerConfig::new(key), PeerStatus::default()));
        let prefixes = info
            .config
            .allowed_ips
            .iter()
            .filter_map(|ip| IpNetwork::new(ip.address, ip.cidr).ok());
        config.allowed_ips.extend(prefixes.map(canonical));
        if let Some(key) = &info.config.preshared_key {
            config.preshared_key = PresharedKey::from_bytes(key.0);
        }
        if info.config.endpoint.is_some() {
            config.endpoint = info.config.endpoint;
            status.endpoint = info.config.endpoint;
        }
        let keepalive = info.config.persistent_keepalive_interval;
        if let Some(seconds) = keepalive.filter(|seconds| *seconds > 0) {
            config.persistent_keepalive_seconds = Some(seconds);
        }
        let handshake = info.stats.last_handshake_time.and_then(since_epoch);
        status.last_handshake = status.last_handshake.max(handshake);
        status.rx_bytes = status.rx_bytes.max(info.stats.rx_bytes);
        status.tx_bytes = status.tx_bytes.max(info.stats.tx_bytes);
    }
    let (configs, statuses) = peers.into_values().unzip();
    let private_key = device
        .private_key
        .as_ref()
        .filter(|key| key.0 != [0; 32])
        .map(|key| PrivateKey::from_bytes(key.0));
    Description {
        public_key: private_key.as_ref().map(PrivateKey::public),
        config: DeviceConfig {
            private_key,
            listen_port: device.listen_port.unwrap_or(0),
            fwmark: device.fwmark.unwrap_or(0),
            peers: configs,
        },
        peers: statuses,
        counters: Vec::new(),
    }
}

fn since_epoch(time: SystemTime) -> Option<Duration> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    (!since.is_zero()).then_some(since)
}

/// The steps as one update. The kernel cannot take a single prefix from a peer: those that go, go to a peer that nobody
/// is, and with it; so no other prefix of the peer is ever missing.
fn update_of(changes: &[Change], nobody: PublicKey) -> DeviceUpdate {
    let mut update = DeviceUpdate::new();
    let mut gone: Vec<IpNetwork> = Vec::new();
    for change in changes {
        update = match change {
            Change::PrivateKey(Some(key)) => update.set_private_key(Key(*key.bytes())),
            Change::PrivateKey(None) => update.unset_private_key(),
            Change::ListenPort(port) => update.set_listen_port(*port),
            Change::Fwmark(mark) => update.set_fwmark(*mark),
            Change::RemoveAllPeers => update.replace_peers(),
            Change::RemovePeer(key) => update.remove_peer_by_key(&Key(key.0)),
            Change::Peer(change) => {
                gone.extend(&change.remove_allowed_ips);
                with_peer(update, change)
            }
        };
    }
    if gone.is_empty() {
        return update;
    }
    let mut taker = PeerChange::new(nobody);
    taker.add_allowed_ips = gone;
    with_peer(update, &taker).remove_peer_by_key(&Key(nobody.0))
}

fn with_peer(mut update: DeviceUpdate, change: &PeerChange) -> DeviceUpdate {
    let key = Key(change.public_key.0);
    let mut peer = PeerConfigBuilder::new(&key);
    match &change.preshared_key {
        Some(Some(key)) => peer = peer.set_preshared_key(Key(*key.bytes())),
        Some(None) => peer = peer.unset_preshared_key(),
        None => {}
    }
    if let Some(endpoint) = change.endpoint {
        peer = peer.set_endpoint(endpoint);
    }
    if let Some(seconds) = change.persistent_keepalive_seconds {
        peer = peer.set_persistent_keepalive_interval(seconds);
    }
    if change.replace_allowed_ips {
        peer = peer.replace_allowed_ips();
    }
    let mut parts = change.add_allowed_ips.chunks(PREFIXES_PER_MESSAGE_MAX);
    update = update.add_peer(with_prefixes(peer, parts.next().unwrap_or_default()));
    for part in parts {
        update = update.add_peer(with_prefixes(PeerConfigBuilder::new(&key), part));
    }
    update
}

fn with_prefixes(mut peer: PeerConfigBuilder, prefixes: &[IpNetwork]) -> PeerConfigBuilder {
    for prefix in prefixes {
        peer = peer.add_allowed_ip(prefix.network(), prefix.prefix());
    }
    peer
}

impl Device for KernelDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn backend(&self) -> Backend {
        Backend::Kernel
    }

    fn describe(&self) -> Result<Description, DeviceError> {
        let device = self
            .ask()
            .map_err(|source| failed(&self.name, "ask", source))?;
        Ok(describe(&device))
    }

    fn apply(&self, changes: &[Change]) -> Result<(), DeviceError> {
        // By chance nobody's: it has neither a place nor anybody who knows its private key.
        let mut nobody = [0; 32];
        rand::fill(&mut nobody);
        update_of(changes, PublicKey(nobody))
            .apply(&self.interface, wireguard_control::Backend::Kernel)
            .map_err(|source| failed(&self.name, "change", source))
    }

    fn remove(&self) -> Result<(), DeviceError> {
        link::delete(&self.name).map_err(|source| failed(&self.name, "remove", source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> PublicKey {
        PublicKey([number; 32])
    }

    fn prefix(number: u8) -> IpNetwork {
        IpNetwork::new([10, 0, number, 0].into(), 24).unwrap()
    }

    #[test]
    fn a_prefix_that_goes_is_taken_by_nobody_and_no_live_peer_is_replaced() {
        let mut change = PeerChange::new(key(1));
        change.add_allowed_ips = vec![prefix(1)];
        change.remove_allowed_ips = vec![prefix(2)];
        let update = update_of(&[Change::Peer(change)], key(9));
        let shown = format!("{update:?}");
        let nobody = Key([9; 32]).to_base64();
        assert_eq!(shown.matches(&nobody).count(), 2, "comes and goes: {shown}");
        assert!(shown.contains("10.0.2.0/24"), "{shown}");
        assert!(!shown.contains("replace_allowed_ips: true"), "{shown}");
        let without = PeerChange::new(key(1));
        let update = format!("{:?}", update_of(&[Change::Peer(without)], key(9)));
        assert!(!update.contains(&nobody), "{update}");
    }

    #[test]
    fn a_peer_with_many_prefixes_is_told_in_parts_and_read_as_one() {
        let mut change = PeerChange::new(key(1));
        change.add_allowed_ips = (0..200).map(prefix).collect();
        let shown = format!("{:?}", update_of(&[Change::Peer(change)], key(9)));
        let parts = shown.matches(&Key([1; 32]).to_base64()).count();
        assert_eq!(parts, 200_usize.div_ceil(PREFIXES_PER_MESSAGE_MAX));
    }

    #[test]
    fn only_a_device_of_another_kind_is_replaced() {
        for (number, expected) in [
            (Errno::EOPNOTSUPP, true),
            (Errno::ENOENT, true),
            (Errno::EPERM, false),
            (Errno::ENOBUFS, false),
            (Errno::EINTR, false),
        ] {
            assert_eq!(is_of_another_kind(&number.into()), expected, "{number}");
        }
        assert!(!is_of_another_kind(&io::ErrorKind::InvalidData.into()));
    }
}
