//! Peers that come, leave, or are not in sync.

use super::*;

#[test]
fn a_peer_with_our_cluster_id_gives_nothing() {
    let mut changes = two_clusters();
    changes.push(config("west", 1));
    let mut model = listed(changes, Tables::default());
    settle(&mut model);
    assert_eq!(backends(&model, "172.20.0.1"), ["10.1.0.4", "10.1.1.4"]);
    assert!(
        model
            .refused()
            .take_newest()
            .iter()
            .any(|r| r.reason == Reason::ClusterIdConflict)
    );
}

#[test]
fn nothing_of_a_known_peer_is_removed_before_it_is_in_sync() {
    let mut first = listed(two_clusters(), Tables::default());
    settle(&mut first);
    let mut model = model_of(first.actual().clone());
    let of_west = |change: &Change| {
        matches!(change, Change::Node { cluster, .. } | Change::Address { cluster, .. }
            | Change::Slice { cluster, .. } if &**cluster == "west")
    };
    for change in two_clusters().into_iter().filter(|c| !of_west(c)) {
        model.apply(change);
    }
    model.end_listing();
    let plan = model.plan();
    assert_eq!(plan, Plan::default());
    model.progress(
        &cluster("west"),
        Position {
            store_id: 9,
            revision: 1,
        },
    );
    let plan = settle(&mut model);
    assert_eq!(plan.node_deletes.len(), 1);
    assert_eq!(plan.frontend_upserts.len(), 1);
    assert_eq!(plan.ipcache_deletes.len(), 3);
}

#[test]
fn a_peer_that_leaves_is_removed() {
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    model.apply(Change::Cluster {
        name: cluster("west"),
        config: None,
    });
    settle(&mut model);
    assert_eq!(backends(&model, "172.20.0.1"), ["10.1.0.4", "10.1.1.4"]);
    assert!(model.applied().get("west").is_none());
}
