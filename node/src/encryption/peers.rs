//! From the model's peers to those of a device.

use std::net::SocketAddr;

use clustermesh_encryption_core::config::PeerConfig;
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_node_core::WireguardPeer;

/// Where the peer's device is by its record.
pub fn endpoint(peer: &WireguardPeer) -> SocketAddr {
    SocketAddr::new(peer.endpoint, peer.key.port)
}

/// The peer as a device has it; without `has_moved` the device keeps the place that it has heard the peer from.
pub fn config(peer: &WireguardPeer, has_moved: bool, keepalive_seconds: u16) -> PeerConfig {
    PeerConfig {
        endpoint: has_moved.then(|| endpoint(peer)),
        persistent_keepalive_seconds: (keepalive_seconds > 0).then_some(keepalive_seconds),
        allowed_ips: peer.allowed_ips.clone(),
        ..PeerConfig::new(PublicKey(peer.key.key))
    }
}

/// Whether two lists of peers make the same device: how packets to them travel is no device's business.
pub fn are_same_to_a_device(one: &[WireguardPeer], other: &[WireguardPeer]) -> bool {
    one.len() == other.len()
        && one.iter().zip(other).all(|(one, other)| {
            (one.key, one.endpoint, &one.allowed_ips)
                == (other.key, other.endpoint, &other.allowed_ips)
        })
}
