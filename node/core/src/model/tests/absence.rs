//! What a store made anew does not name.

use super::*;

/// A model over the kernel state of both clusters that listed `changes` from a store made anew.
fn over_a_new_store(changes: Vec<Change>) -> Model {
    let mut first = listed(two_clusters(), Tables::default());
    settle(&mut first);
    let mut model = model_of(first.actual().clone());
    model.begin_listing();
    model.distrust_absence(1_000);
    for change in changes {
        model.apply(change);
    }
    model.end_listing();
    model.progress(&cluster("east"), at(8, 1));
    model
}

fn at(store_id: u64, revision: i64) -> Position {
    Position { store_id, revision }
}

#[test]
fn an_empty_new_store_removes_nothing_before_the_grace_is_over_and_then_own_entries_only() {
    let mut model = over_a_new_store(Vec::new());
    let before = model.actual().clone();
    assert_eq!(model.plan(), Plan::default());
    model.replace_actual(before.clone());
    model.pass_time(1_000 + ABSENCE_GRACE_MS - 1);
    assert_eq!(model.plan(), Plan::default());
    assert!(model.kept_entries() > 0);
    model.pass_time(1_000 + ABSENCE_GRACE_MS);
    let plan = settle(&mut model);
    assert_eq!(plan.frontend_deletes.len(), 1);
    assert_eq!(plan.backend_deletes.len(), 3);
    assert_eq!(plan.node_deletes.len(), 1);
    assert!(
        model
            .actual()
            .ipcache
            .contains_key(&host_key(parse("10.2.0.4")))
    );
    assert!(
        !model
            .actual()
            .ipcache
            .contains_key(&host_key(parse("10.1.1.4")))
    );
}

#[test]
fn what_a_new_store_has_named_is_deleted_at_once() {
    let mut model = over_a_new_store(vec![node("east", "e1", "192.0.2.1", "10.1.0.1")]);
    assert_eq!(model.plan(), Plan::default());
    model.apply(node("east", "e2", "192.0.2.2", "10.1.1.1"));
    model.apply(pod("east", "10.1.1.4", 1 << 16 | 300, "192.0.2.2"));
    assert_eq!(settle(&mut model), Plan::default());
    model.apply(no_pod("east", "10.1.1.4"));
    assert_eq!(
        settle(&mut model).ipcache_deletes,
        [host_key(parse("10.1.1.4"))]
    );
}

#[test]
fn a_service_keeps_backends_that_a_new_store_has_not_named_and_follows_those_that_it_has() {
    let mut model = over_a_new_store(vec![
        node("east", "e1", "192.0.2.1", "10.1.0.1"),
        service("172.20.0.1", Affinity::None),
    ]);
    assert_eq!(model.plan(), Plan::default());
    model.apply(slice(
        "east",
        "web-e",
        &[("10.1.0.4", Ready), ("10.1.0.9", Ready)],
    ));
    settle(&mut model);
    let expected = ["10.1.0.4", "10.1.0.9", "10.1.1.4", "10.2.0.4"];
    assert_eq!(backends(&model, "172.20.0.1"), expected);
    model.apply(slice("east", "web-e", &[("10.1.0.9", Ready)]));
    settle(&mut model);
    assert_eq!(
        backends(&model, "172.20.0.1"),
        ["10.1.0.9", "10.1.1.4", "10.2.0.4"]
    );
    model.pass_time(1_000 + ABSENCE_GRACE_MS);
    settle(&mut model);
    assert_eq!(backends(&model, "172.20.0.1"), ["10.1.0.9", "10.2.0.4"]);
}

#[test]
fn a_peer_that_a_new_store_lacks_is_removed_when_its_copy_is_complete_or_it_is_removed() {
    for synced in [true, false] {
        let mut model = over_a_new_store(vec![
            node("east", "e1", "192.0.2.1", "10.1.0.1"),
            service("172.20.0.1", Affinity::None),
        ]);
        model.apply(config("west", 2));
        assert_eq!(model.plan(), Plan::default());
        if synced {
            model.progress(&cluster("west"), at(9, 1));
        } else {
            model.apply(Change::Cluster {
                name: cluster("west"),
                config: None,
            });
        }
        settle(&mut model);
        assert!(
            !model
                .actual()
                .ipcache
                .contains_key(&host_key(parse("10.2.0.4")))
        );
        assert_eq!(backends(&model, "172.20.0.1"), ["10.1.0.4", "10.1.1.4"]);
    }
}

#[test]
fn a_peer_that_was_removed_while_the_store_was_lost_is_given_up_once_all_configured_peers_are_known()
 {
    let mut model = over_a_new_store(vec![
        node("east", "e1", "192.0.2.1", "10.1.0.1"),
        service("172.20.0.1", Affinity::None),
    ]);
    let of_west = |model: &Model| {
        model
            .actual()
            .ipcache
            .contains_key(&host_key(parse("10.2.0.4")))
    };
    // North has not said which number it has: the entries may be north's.
    model.peers_configured(&[cluster("north")]);
    settle(&mut model);
    assert!(of_west(&model));
    model.apply(config("north", 3));
    model.peers_configured(&[cluster("north")]);
    settle(&mut model);
    assert!(!of_west(&model));
    assert_eq!(backends(&model, "172.20.0.1"), ["10.1.0.4", "10.1.1.4"]);
    // Own entries go by the grace alone.
    assert!(model.kept_entries() > 0);
    model.pass_time(1_000 + ABSENCE_GRACE_MS);
    settle(&mut model);
    assert_eq!(model.kept_entries(), 0);
}

#[test]
fn a_configured_peer_keeps_its_entries() {
    let mut model = over_a_new_store(vec![config("west", 2)]);
    model.peers_configured(&[cluster("west")]);
    assert_eq!(model.plan(), Plan::default());
}

#[test]
fn empty_maps_are_not_filled_from_a_new_store_before_it_can_have_everything() {
    // A change of the layout: the maps are new, what the old ones have does not show in them.
    let mut model = model_of(Tables::default());
    model.begin_listing();
    model.distrust_absence(1_000);
    for change in two_clusters() {
        model.apply(change);
    }
    model.end_listing();
    model.progress(&cluster("east"), at(8, 1));
    settle(&mut model);
    assert!(model.is_settled() && !model.is_trusted());
    model.pass_time(1_000 + ABSENCE_GRACE_MS);
    settle(&mut model);
    assert!(!model.is_trusted(), "the copy of west is not complete");
    model.progress(&cluster("west"), at(9, 1));
    assert!(model.is_trusted());
    // Of a store that is known, a complete listing is enough.
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    assert!(model.is_trusted());
}
