//! Who is sent to encrypted, in clear or not at all.

use std::collections::{BTreeMap, BTreeSet};

use clustermesh_ebpf_abi::{NODE_CLEAR_REFUSED, NODE_ENCRYPTED, NODE_PRESENT, NODE_WITHHELD};
use proptest::prelude::*;

use super::*;
use crate::change::{NodeKey, WireguardKey};
use crate::refused::Reason;

/// Of the WireGuard device.
const DEVICE: u32 = 40;
/// Of the second one.
const NEXT_DEVICE: u32 = 41;

fn key(number: u8, epoch: u32) -> NodeKey {
    NodeKey {
        epoch,
        key: [number; 32],
        port: 51_871,
    }
}

fn node_with(of: &str, name: &str, underlay: &[&str], keys: &[NodeKey]) -> Change {
    Change::Node {
        cluster: cluster(of),
        name: name.into(),
        node: Some(Box::new(NodeRecord {
            underlay: underlay.iter().map(|ip| parse(ip)).collect(),
            pod_cidrs: vec![format!("10.{}.0.0/24", name.len()).parse().unwrap()],
            keys: keys.to_vec(),
            ..NodeRecord::default()
        })),
    }
}

fn encrypting(mode: EncryptionMode, strict: bool) -> Settings {
    Settings {
        encryption: EncryptionSettings {
            mode,
            clusters: BTreeMap::new(),
            strict,
        },
        ..settings()
    }
}

fn knows(peers: &[(u8, u32, bool)]) -> WireguardState {
    WireguardState {
        own_keys: BTreeSet::from([[1; 32]]),
        peers: peers
            .iter()
            .map(|(number, ifindex, has_answered)| {
                let state = PeerState {
                    ifindex: *ifindex,
                    has_answered: *has_answered,
                };
                ([*number; 32], state)
            })
            .collect(),
        ..WireguardState::default()
    }
}

fn world() -> Vec<Change> {
    vec![
        config("west", 2),
        node_with("east", "e1", &["192.0.2.1"], &[key(1, 0)]),
        node_with("east", "e2", &["192.0.2.2"], &[key(2, 0)]),
        node_with("west", "w1", &["192.0.2.21"], &[key(21, 0)]),
        node_with("west", "w22", &["192.0.2.22"], &[]),
    ]
}

/// Flags beside "present", device and largest packet of the node at that address.
fn path(model: &Model, underlay: &str) -> (u16, u32, u16) {
    let place = model.actual().node_addresses[&address(parse(underlay))];
    let node = model.actual().nodes[&place.node_index];
    (
        node.flags & !NODE_PRESENT,
        node.egress_ifindex,
        node.path_mtu_bytes,
    )
}

const CLEAR: (u16, u32, u16) = (0, 3, 1450);
const ENCRYPTED: (u16, u32, u16) = (NODE_ENCRYPTED, DEVICE, 1390);
const WITHHELD: (u16, u32, u16) = (NODE_WITHHELD | NODE_CLEAR_REFUSED, 3, 1450);

#[test]
fn a_node_is_sent_to_encrypted_once_the_device_knows_its_key() {
    let settings = encrypting(EncryptionMode::All, false);
    let mut model = list(Model::new(settings, Tables::default()), world());
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.2"), CLEAR);
    assert!(model.take_peers_changed());
    let wanted: Vec<_> = model
        .wireguard_peers()
        .into_iter()
        .map(|peer| (peer.node.to_string(), peer.endpoint, peer.allowed_ips))
        .collect();
    let only = |ip: &str| BTreeSet::from([parse(ip).into()]);
    assert_eq!(
        wanted,
        [
            ("e2".to_owned(), parse("192.0.2.2"), only("192.0.2.2")),
            ("w1".to_owned(), parse("192.0.2.21"), only("192.0.2.21")),
        ]
    );
    model.set_wireguard(knows(&[(2, DEVICE, false)]));
    let plan = settle(&mut model);
    assert_eq!(plan.node_upserts.len(), 1, "one write and nothing else");
    assert_eq!(path(&model, "192.0.2.2"), ENCRYPTED);
    assert_eq!(path(&model, "192.0.2.21"), CLEAR);
    model.set_wireguard(knows(&[(2, DEVICE, false), (21, DEVICE, false)]));
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.21"), ENCRYPTED);
    assert_eq!(path(&model, "192.0.2.22"), CLEAR, "it has no key");
    // A device that is made anew has another number and knows nobody.
    model.set_wireguard(knows(&[]));
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.2"), CLEAR);
}

#[test]
fn strict_mode_withholds_what_cannot_be_encrypted_and_refuses_what_comes_in_clear() {
    let settings = encrypting(EncryptionMode::All, true);
    let mut model = list(Model::new(settings, Tables::default()), world());
    settle(&mut model);
    for node in ["192.0.2.2", "192.0.2.21", "192.0.2.22"] {
        assert_eq!(path(&model, node), WITHHELD);
    }
    model.set_wireguard(knows(&[(2, DEVICE, true)]));
    settle(&mut model);
    let (flags, device, mtu) = ENCRYPTED;
    assert_eq!(
        path(&model, "192.0.2.2"),
        (flags | NODE_CLEAR_REFUSED, device, mtu)
    );
    // A node that no longer has a key is not sent to in clear.
    model.apply(node_with("east", "e2", &["192.0.2.2"], &[]));
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.2"), WITHHELD);
}

#[test]
fn mode_and_clusters_say_who_is_sent_to_encrypted_not_who_may_send() {
    for (mode, cluster, expected) in [
        (EncryptionMode::Off, None, (CLEAR, CLEAR)),
        (EncryptionMode::InterCluster, None, (CLEAR, ENCRYPTED)),
        (EncryptionMode::All, None, (ENCRYPTED, ENCRYPTED)),
        (
            EncryptionMode::All,
            Some(("west", false)),
            (ENCRYPTED, CLEAR),
        ),
        (
            EncryptionMode::InterCluster,
            Some(("east", true)),
            (ENCRYPTED, ENCRYPTED),
        ),
    ] {
        let mut settings = encrypting(mode, false);
        let clusters = cluster.map(|(name, on)| (name.into(), on));
        settings.encryption.clusters.extend(clusters);
        let mut model = list(Model::new(settings, Tables::default()), world());
        model.set_wireguard(knows(&[(2, DEVICE, true), (21, DEVICE, true)]));
        settle(&mut model);
        let found = (path(&model, "192.0.2.2"), path(&model, "192.0.2.21"));
        assert_eq!(found, expected, "{mode:?} {cluster:?}");
        assert_eq!(model.wireguard_peers().len(), 2);
    }
}

#[test]
fn a_key_that_two_nodes_have_is_nobodys_and_both_are_named() {
    let settings = encrypting(EncryptionMode::All, false);
    let mut changes = world();
    changes.push(node_with("west", "w333", &["192.0.2.23"], &[key(21, 0)]));
    let mut model = list(Model::new(settings, Tables::default()), changes);
    model.set_wireguard(knows(&[(21, DEVICE, true)]));
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.21"), CLEAR);
    assert_eq!(path(&model, "192.0.2.23"), CLEAR);
    assert_eq!(model.wireguard_peers().len(), 1, "only e2");
    let refused = model.refused().take_newest();
    let [refusal] = refused.as_slice() else {
        panic!("{refused:?}");
    };
    assert_eq!(refusal.reason, Reason::DuplicateKey);
    assert!(refusal.object.contains("west/w1 and west/w333"));
    // One of them gets a key of its own.
    let other = node_with("west", "w333", &["192.0.2.23"], &[key(23, 0)]);
    model.apply(other);
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.21"), ENCRYPTED);
    assert_eq!(model.wireguard_peers().len(), 3);
    // A peer cluster that claims a key of ours gets nothing and takes nothing.
    model.set_wireguard(knows(&[(2, DEVICE, true)]));
    for (name, claimed) in [("w1", 2), ("w333", 1)] {
        let thief = node_with("west", name, &["192.0.2.29"], &[key(claimed, 0)]);
        model.apply(thief);
        settle(&mut model);
    }
    assert_eq!(path(&model, "192.0.2.2"), ENCRYPTED);
    assert_eq!(model.wireguard_peers().len(), 1, "only e2");
}

#[test]
fn a_new_key_is_used_when_its_owner_has_answered_under_it() {
    let settings = encrypting(EncryptionMode::All, true);
    let mut model = list(Model::new(settings, Tables::default()), world());
    let two = [key(2, 0), key(102, 1)];
    model.apply(node_with("east", "e2", &["192.0.2.2"], &two));
    let device = |model: &mut Model, peers: &[(u8, u32, bool)]| {
        model.set_wireguard(knows(peers));
        settle(model);
        path(model, "192.0.2.2").1
    };
    let both = model.wireguard_peers();
    let of_e2 = both.iter().filter(|peer| &*peer.node == "e2").count();
    assert_eq!(of_e2, 2);
    let m = &mut model;
    assert_eq!(device(m, &[(2, DEVICE, true)]), DEVICE);
    let silent = (102, NEXT_DEVICE, false);
    assert_eq!(device(m, &[(2, DEVICE, true), silent]), DEVICE);
    let answered = (102, NEXT_DEVICE, true);
    assert_eq!(device(m, &[(2, DEVICE, true), answered]), NEXT_DEVICE);
    model.apply(node_with("east", "e2", &["192.0.2.2"], &[key(102, 1)]));
    assert_eq!(device(&mut model, &[answered]), NEXT_DEVICE);
}

#[test]
fn a_node_that_stayed_with_an_old_key_is_not_sent_to_in_clear() {
    let settings = encrypting(EncryptionMode::All, false);
    let mut model = list(Model::new(settings, Tables::default()), world());
    model.set_wireguard(knows(&[(2, DEVICE, true)]));
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.2"), ENCRYPTED);
    assert_eq!(path(&model, "192.0.2.21"), CLEAR, "its key is not here yet");
    // Our keys have changed without both.
    model.set_wireguard(WireguardState {
        epoch: 1,
        ..knows(&[])
    });
    settle(&mut model);
    for node in ["192.0.2.2", "192.0.2.21"] {
        assert_ne!(path(&model, node).0 & NODE_WITHHELD, 0, "{node}");
    }
    assert_eq!(path(&model, "192.0.2.22"), CLEAR, "it has no key at all");
    // One of Cilium's counts no epochs: its key is only not here yet.
    model.apply(node_with(
        "west",
        "w22",
        &["192.0.2.22"],
        &[key(22, u32::MAX)],
    ));
    // One that has come over is as new as we are.
    model.apply(node_with("east", "e2", &["192.0.2.2"], &[key(102, 1)]));
    settle(&mut model);
    assert_eq!(path(&model, "192.0.2.22"), CLEAR);
    assert_eq!(path(&model, "192.0.2.2"), CLEAR);
}

#[test]
fn with_direct_routing_pods_may_come_from_their_node_and_no_other() {
    let mut settings = encrypting(EncryptionMode::All, false);
    settings.direct_routing = true;
    let mut changes = world();
    // Of one range, by the length of their names.
    changes.push(node_with("west", "w333", &["192.0.2.23"], &[key(23, 0)]));
    changes.push(node_with("west", "w444", &["192.0.2.24"], &[key(24, 0)]));
    let mut model = list(Model::new(settings, Tables::default()), changes);
    settle(&mut model);
    let peers = model.wireguard_peers();
    let range = "10.4.0.0/24".parse().unwrap();
    let owners = peers
        .iter()
        .filter(|peer| peer.allowed_ips.contains(&range))
        .count();
    assert_eq!(owners, 1, "{peers:?}");
}

/// Of which cluster and name, and where it is and which keys it has, if it is there.
type Told = (bool, u8, Option<(u8, Vec<u8>)>);

fn records() -> impl Strategy<Value = Vec<Told>> {
    let node = proptest::option::of((1u8..7, proptest::collection::vec(1u8..6, 0..3)));
    proptest::collection::vec((any::<bool>(), 1u8..5, node), 0..24)
}

proptest! {
    #[test]
    fn no_key_and_no_address_is_given_twice_and_none_without_need(
        records in records(),
        known in proptest::collection::btree_set(1u8..6, 0..5),
        strict in any::<bool>(),
    ) {
        let changes = records.iter().map(|(west, name, node)| {
            let (side, name) = (if *west { "west" } else { "east" }, format!("n{name}"));
            match node {
                Some((underlay, keys)) => {
                    let distinct: BTreeSet<u8> = keys.iter().copied().collect();
                    let keys: Vec<NodeKey> = (0u32..).zip(distinct).map(|(epoch, k)| key(k, epoch)).collect();
                    node_with(side, &name, &[&format!("192.0.2.{underlay}")], &keys)
                }
                None => Change::Node { cluster: cluster(side), name: name.into(), node: None },
            }
        });
        let all: Vec<Change> = std::iter::once(config("west", 2)).chain(changes).collect();
        let state = WireguardState {
            own_keys: BTreeSet::from([[5; 32]]),
            peers: known.iter().map(|k| ([*k; 32], PeerState { ifindex: DEVICE, has_answered: true })).collect(),
            ..WireguardState::default()
        };
        let mut model = list(Model::new(encrypting(EncryptionMode::All, strict), Tables::default()), Vec::new());
        model.set_wireguard(state.clone());
        for change in &all {
            model.apply(change.clone());
        }
        settle(&mut model);
        let mut keys: BTreeSet<WireguardKey> = BTreeSet::new();
        let mut prefixes = BTreeSet::new();
        for peer in model.wireguard_peers() {
            prop_assert!(peer.key.key != [5; 32]);
            prop_assert!(keys.insert(peer.key.key), "{:?} twice", peer.key);
            for prefix in peer.allowed_ips {
                prop_assert!(prefixes.insert((peer.key.epoch, prefix)));
            }
        }
        for node in model.actual().nodes.values() {
            let is_encrypted = node.flags & NODE_ENCRYPTED != 0;
            prop_assert_eq!(is_encrypted, node.egress_ifindex == DEVICE);
            // Strict: no node is sent to in clear.
            prop_assert!(!strict || is_encrypted || node.flags & NODE_WITHHELD != 0);
        }
        // What the order was does not matter: a listing of what is there now gives the same.
        let mut last = BTreeMap::new();
        for (place, change) in all.iter().enumerate() {
            if let Change::Node { cluster, name, .. } = change {
                last.insert((cluster.clone(), name.clone()), place);
            }
        }
        let kept = all.iter().enumerate().filter(|(place, change)| match change {
            Change::Node { cluster, name, node } => {
                node.is_some() && last[&(cluster.clone(), name.clone())] == *place
            }
            _ => true,
        });
        let kept: Vec<Change> = kept.map(|(_, change)| change.clone()).collect();
        let mut again = Model::new(encrypting(EncryptionMode::All, strict), Tables::default());
        again.set_wireguard(state);
        let mut again = list(again, kept);
        settle(&mut again);
        let keys_again: BTreeSet<WireguardKey> = again.wireguard_peers().iter().map(|p| p.key.key).collect();
        prop_assert_eq!(keys_again, keys);
    }
}
