//! From the configuration that is to the one that is wanted: what to add, change and remove. A peer that stays is never
//! removed and added again, so its sessions live on.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::IpNetwork;

use crate::config::{Change, DeviceConfig, PEERS_MAX, PeerChange, PeerConfig, canonical};
use crate::key::{PrivateKey, PublicKey};

/// Why a wanted configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DifferenceError {
    /// Two peers with one key: traffic for one would go to the other.
    #[error("two peers have the public key {key}: every machine needs a key of its own")]
    DuplicatePeer {
        /// The key.
        key: PublicKey,
    },
    /// One prefix at two peers.
    #[error("{prefix} is allowed for both {first} and {second}: one of them must give it up")]
    DuplicateAllowedIp {
        /// The prefix.
        prefix: IpNetwork,
        /// One peer.
        first: PublicKey,
        /// The other.
        second: PublicKey,
    },
    /// A peer that has our key.
    #[error("peer {key} has this machine's own key: every machine needs a key of its own")]
    OwnKey {
        /// The key.
        key: PublicKey,
    },
    /// Too many peers.
    #[error("{count} peers are wanted; a device has at most {PEERS_MAX}")]
    TooManyPeers {
        /// Number of wanted peers.
        count: usize,
    },
}

/// The steps from `actual` to `desired`, in the order in which they are to be taken.
///
/// A wanted peer without an endpoint keeps the one that it was heard from.
///
/// # Errors
/// When what is desired contradicts itself.
pub fn difference(
    actual: &DeviceConfig,
    desired: &DeviceConfig,
) -> Result<Vec<Change>, DifferenceError> {
    let wanted = checked(desired)?;
    let present: BTreeMap<PublicKey, &PeerConfig> = actual
        .peers
        .iter()
        .map(|peer| (peer.public_key, peer))
        .collect();
    let mut owners = BTreeMap::new();
    for (key, peer) in &wanted {
        owners.extend(
            peer.allowed_ips
                .iter()
                .map(|prefix| (canonical(*prefix), *key)),
        );
    }
    let mut changes = Vec::new();
    if actual.private_key != desired.private_key {
        changes.push(Change::PrivateKey(desired.private_key.clone()));
    }
    if desired.listen_port != 0 && actual.listen_port != desired.listen_port {
        changes.push(Change::ListenPort(desired.listen_port));
    }
    if actual.fwmark != desired.fwmark {
        changes.push(Change::Fwmark(desired.fwmark));
    }
    for key in present.keys().filter(|key| !wanted.contains_key(key)) {
        changes.push(Change::RemovePeer(*key));
    }
    for (key, peer) in &wanted {
        let old = present.get(key).copied();
        changes.extend(peer_change(old, peer, &owners).map(Change::Peer));
    }
    Ok(changes)
}

/// What is wanted, with the peers that are there beside it: for as long as not every source of peers has been heard, one
/// that is missing there may only be late. Prefixes that are wanted at another peer go there all the same.
#[must_use]
pub fn with_present(actual: &DeviceConfig, desired: &DeviceConfig) -> DeviceConfig {
    let wanted: BTreeSet<PublicKey> = desired.peers.iter().map(|peer| peer.public_key).collect();
    let taken: BTreeSet<IpNetwork> = desired
        .peers
        .iter()
        .flat_map(|peer| peer.allowed_ips.iter().copied().map(canonical))
        .collect();
    let own = desired.private_key.as_ref().map(PrivateKey::public);
    let mut whole = desired.clone();
    for peer in &actual.peers {
        if !wanted.contains(&peer.public_key) && own != Some(peer.public_key) {
            let mut kept = peer.clone();
            kept.allowed_ips.retain(|prefix| !taken.contains(prefix));
            whole.peers.push(kept);
        }
    }
    whole
}

fn checked(desired: &DeviceConfig) -> Result<BTreeMap<PublicKey, &PeerConfig>, DifferenceError> {
    if desired.peers.len() > PEERS_MAX {
        let count = desired.peers.len();
        return Err(DifferenceError::TooManyPeers { count });
    }
    let own = desired.private_key.as_ref().map(PrivateKey::public);
    let mut wanted = BTreeMap::new();
    let mut owners: BTreeMap<IpNetwork, PublicKey> = BTreeMap::new();
    for peer in &desired.peers {
        let key = peer.public_key;
        if own == Some(key) {
            return Err(DifferenceError::OwnKey { key });
        }
        if wanted.insert(key, peer).is_some() {
            return Err(DifferenceError::DuplicatePeer { key });
        }
        for prefix in &peer.allowed_ips {
            let prefix = canonical(*prefix);
            if let Some(first) = owners.insert(prefix, key).filter(|first| *first != key) {
                return Err(DifferenceError::DuplicateAllowedIp {
                    prefix,
                    first,
                    second: key,
                });
            }
        }
    }
    Ok(wanted)
}

fn peer_change(
    old: Option<&PeerConfig>,
    new: &PeerConfig,
    owners: &BTreeMap<IpNetwork, PublicKey>,
) -> Option<PeerChange> {
    let key = new.public_key;
    let bare = PeerConfig::new(key);
    let before = old.unwrap_or(&bare);
    let wanted: BTreeSet<IpNetwork> = new.allowed_ips.iter().copied().map(canonical).collect();
    let mut change = PeerChange::new(key);
    if before.preshared_key != new.preshared_key {
        change.preshared_key = Some(new.preshared_key.clone());
    }
    if new.endpoint.is_some() && before.endpoint != new.endpoint {
        change.endpoint = new.endpoint;
    }
    if before.persistent_keepalive_seconds != new.persistent_keepalive_seconds {
        change.persistent_keepalive_seconds = Some(new.persistent_keepalive_seconds.unwrap_or(0));
    }
    change.add_allowed_ips = wanted.difference(&before.allowed_ips).copied().collect();
    // One that goes to another peer moves there in one step; removing it here would take it from the other.
    change.remove_allowed_ips = before
        .allowed_ips
        .difference(&wanted)
        .filter(|prefix| !owners.contains_key(prefix))
        .copied()
        .collect();
    (old.is_none() || change != PeerChange::new(key)).then_some(change)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use proptest::prelude::*;

    fn key(number: u8) -> PublicKey {
        PublicKey([number; 32])
    }

    fn peer(number: u8, prefixes: &[&str]) -> PeerConfig {
        PeerConfig {
            allowed_ips: prefixes.iter().map(|text| text.parse().unwrap()).collect(),
            ..PeerConfig::new(key(number))
        }
    }

    fn device(peers: Vec<PeerConfig>) -> DeviceConfig {
        DeviceConfig {
            peers,
            ..DeviceConfig::default()
        }
    }

    #[test]
    fn a_live_peer_is_changed_in_place() {
        let actual = device(vec![peer(1, &["10.0.0.1/32"]), peer(2, &[])]);
        let mut changed = peer(1, &["10.0.0.2/32"]);
        changed.persistent_keepalive_seconds = Some(25);
        let changes = difference(&actual, &device(vec![changed, peer(3, &[])])).unwrap();
        let mut expected = PeerChange::new(key(1));
        expected.persistent_keepalive_seconds = Some(25);
        expected.add_allowed_ips = vec!["10.0.0.2/32".parse().unwrap()];
        expected.remove_allowed_ips = vec!["10.0.0.1/32".parse().unwrap()];
        assert_eq!(
            changes,
            [
                Change::RemovePeer(key(2)),
                Change::Peer(expected),
                Change::Peer(PeerChange::new(key(3))),
            ]
        );
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        let twice = difference(&device(vec![]), &device(vec![peer(1, &[]), peer(1, &[])]));
        assert_eq!(twice, Err(DifferenceError::DuplicatePeer { key: key(1) }));
        let both = device(vec![peer(1, &["10.0.0.0/24"]), peer(2, &["10.0.0.9/24"])]);
        let error = difference(&device(vec![]), &both).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "10.0.0.0/24 is allowed for both {} and {}: one of them must give it up",
                key(1),
                key(2)
            )
        );
        let own = PrivateKey::from_bytes([1; 32]);
        let mut wanted = device(vec![PeerConfig::new(own.public())]);
        wanted.private_key = Some(own);
        assert!(matches!(
            difference(&device(vec![]), &wanted),
            Err(DifferenceError::OwnKey { .. })
        ));
    }

    #[test]
    fn peers_that_may_only_be_late_stay_and_give_up_what_others_have_now() {
        let actual = device(vec![peer(1, &["10.0.0.1/32", "10.0.0.2/32"]), peer(2, &[])]);
        let wanted = device(vec![peer(2, &["10.0.0.2/32"])]);
        let whole = with_present(&actual, &wanted);
        let expected = [peer(2, &["10.0.0.2/32"]), peer(1, &["10.0.0.1/32"])];
        assert_eq!(whole.peers, expected);
        let changes = difference(&actual, &whole).unwrap();
        let mut moved = PeerChange::new(key(2));
        moved.add_allowed_ips = vec!["10.0.0.2/32".parse().unwrap()];
        assert_eq!(changes, [Change::Peer(moved)], "nothing is removed");
    }

    fn devices() -> impl Strategy<Value = DeviceConfig> {
        let peer = (any::<Option<u16>>(), any::<bool>(), any::<Option<u16>>());
        (
            proptest::collection::btree_map(0u8..6, peer, 0..6),
            proptest::collection::btree_map(0u8..12, 0u8..6, 0..12),
        )
            .prop_map(|(peers, prefixes)| {
                let peers = peers
                    .into_iter()
                    .map(|(number, (port, is_shared, keepalive))| PeerConfig {
                        preshared_key: is_shared
                            .then(|| crate::key::PresharedKey::from_bytes([7; 32]))
                            .flatten(),
                        endpoint: port.map(|port| ([192, 0, 2, 1], port).into()),
                        persistent_keepalive_seconds: keepalive.filter(|seconds| *seconds > 0),
                        allowed_ips: prefixes
                            .iter()
                            .filter(|(_, owner)| **owner == number)
                            .map(|(prefix, _)| format!("10.0.{prefix}.0/24").parse().unwrap())
                            .collect(),
                        ..PeerConfig::new(key(number))
                    })
                    .collect();
                device(peers)
            })
    }

    proptest! {
        #[test]
        fn applying_the_difference_gives_what_is_wanted(first in devices(), second in devices()) {
            let mut config = Config::default();
            for wanted in [&first, &second] {
                let before = config.to_device();
                for change in difference(&before, wanted).unwrap() {
                    if let Change::RemovePeer(gone) = &change {
                        prop_assert!(wanted.peers.iter().all(|peer| peer.public_key != *gone));
                    }
                    config.apply(&change).unwrap();
                }
                let mut after = config.to_device();
                for peer in &mut after.peers {
                    let asked = wanted.peers.iter().find(|wanted| wanted.public_key == peer.public_key).unwrap();
                    if asked.endpoint.is_none() {
                        peer.endpoint = None;
                    }
                }
                prop_assert_eq!(&after, wanted);
                prop_assert!(difference(&config.to_device(), wanted).unwrap().is_empty());
                let owned: usize = wanted.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
                prop_assert_eq!(config.prefixes().count(), owned);
            }
        }
    }
}
