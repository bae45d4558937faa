//! Which prefixes the records name as the mesh's, and when they name all.

use std::collections::BTreeSet;

use super::*;
use crate::mesh_prefixes::{MeshPrefix, PrefixKind};

fn full_node(of: &str, name: &str, underlay: &[&str], cidrs: &[&str]) -> Change {
    Change::Node {
        cluster: cluster(of),
        name: name.into(),
        node: Some(Box::new(NodeRecord {
            underlay: underlay.iter().map(|ip| parse(ip)).collect(),
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            ..NodeRecord::default()
        })),
    }
}

fn named(model: &Model) -> Vec<(String, &'static str, String)> {
    model
        .mesh_prefixes()
        .into_iter()
        .map(
            |MeshPrefix {
                 cluster,
                 kind,
                 prefix,
             }| {
                let kind = match kind {
                    PrefixKind::Pods => "pods",
                    PrefixKind::Node => "node",
                };
                (cluster.to_string(), kind, prefix.to_string())
            },
        )
        .collect()
}

#[test]
fn nodes_that_cannot_be_reached_are_named_and_this_one_is_not() {
    let model = listed(
        vec![
            config("west", 2),
            full_node("east", "e1", &["192.0.2.1"], &["10.1.0.0/24"]),
            full_node("east", "e2", &["192.0.2.2"], &["10.1.1.0/24"]),
            // This node has no IPv6 on the underlay.
            full_node(
                "west",
                "w1",
                &["2001:db8::21"],
                &["10.2.0.0/24", "fd00:2::/64"],
            ),
            // Too large to be believed.
            full_node("west", "w2", &["192.0.2.22"], &["0.0.0.0/0"]),
            // Nobody has said that this is a cluster of ours.
            full_node("north", "n1", &["192.0.2.31"], &["10.3.0.0/24"]),
        ],
        Tables::default(),
    );
    let entry = |cluster: &str, kind, prefix: &str| (cluster.to_owned(), kind, prefix.to_owned());
    assert_eq!(
        named(&model),
        [
            entry("east", "pods", "10.1.1.0/24"),
            entry("east", "node", "192.0.2.2/32"),
            entry("west", "pods", "10.2.0.0/24"),
            entry("west", "pods", "fd00:2::/64"),
            entry("west", "node", "192.0.2.22/32"),
            entry("west", "node", "2001:db8::21/128"),
        ]
    );
}

#[test]
fn records_are_complete_once_they_are_listed_and_copied_or_the_peer_is_none_any_more() {
    let mut model = model_of(Tables::default());
    model.apply(config("west", 2));
    let complete = |model: &Model| ["east", "west", "north"].map(|name| model.is_complete(name));
    assert_eq!(complete(&model), [false; 3]);
    model.end_listing();
    assert_eq!(complete(&model), [true, false, false]);
    let position = Position {
        store_id: 7,
        revision: 10,
    };
    model.progress(&cluster("west"), position);
    assert_eq!(complete(&model), [true, true, false]);
    // Its server copies west and nobody else: what an earlier run has learnt of north is gone.
    model.set_configured_peers(Some(BTreeSet::from([cluster("west")])));
    assert_eq!(complete(&model), [true; 3]);
    model.begin_listing();
    assert_eq!(complete(&model), [false; 3]);
    // The new store has not copied west yet, but it will.
    model.end_listing();
    assert_eq!(complete(&model), [true, false, true]);
}

#[test]
fn changes_are_told_once() {
    let mut model = listed(two_clusters(), Tables::default());
    assert!(model.take_mesh_changed());
    assert!(!model.take_mesh_changed());
    model.apply(pod("east", "10.1.1.5", 1 << 16 | 301, "192.0.2.2"));
    assert!(!model.has_mesh_changed());
    model.apply(full_node("east", "e2", &["192.0.2.2"], &["10.1.1.0/24"]));
    assert!(model.has_mesh_changed());
}
