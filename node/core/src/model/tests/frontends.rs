//! Services: their lists of backends and their frontends.

use super::*;

#[test]
fn a_backend_counts_only_while_its_address_is_accepted_from_that_cluster() {
    let mut model = listed(two_clusters(), Tables::default());
    model.apply(no_pod("west", "10.2.0.4"));
    settle(&mut model);
    assert_eq!(backends(&model, "172.20.0.1"), ["10.1.0.4", "10.1.1.4"]);
    model.apply(slice("west", "web-w", &[("10.1.1.4", Ready)]));
    settle(&mut model);
    assert_eq!(backends(&model, "172.20.0.1"), ["10.1.0.4", "10.1.1.4"]);
}

#[test]
fn a_switch_writes_the_new_list_first_and_the_old_one_is_removed_last() {
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    let (old, _) = model.actual().list_of(&frontend("172.20.0.1")).unwrap();
    model.apply(slice(
        "east",
        "web-e",
        &[("10.1.0.4", Unusable), ("10.1.1.4", Draining)],
    ));
    let plan = settle(&mut model);
    assert_eq!(plan.backend_upserts.len(), 1);
    assert_eq!(plan.frontend_upserts.len(), 1);
    assert!(plan.backend_deletes.iter().all(|key| key.list_id == old));
    assert_eq!(plan.backend_deletes.len(), 3);
    assert_eq!(backends(&model, "172.20.0.1"), ["10.2.0.4"]);
}

#[test]
fn a_service_without_backends_refuses_connections_instead_of_vanishing() {
    let mut model = listed(
        vec![service("172.20.0.1", Affinity::Local)],
        Tables::default(),
    );
    settle(&mut model);
    assert_eq!(backends(&model, "172.20.0.1"), Vec::<String>::new());
    let gone = Change::Service {
        service: ServiceName {
            namespace: "shop".into(),
            name: "web".into(),
        },
        declaration: None,
    };
    model.apply(gone);
    assert_eq!(settle(&mut model).frontend_deletes.len(), 1);
}

#[test]
fn a_frontend_has_one_owner_and_goes_to_the_next_when_it_is_free() {
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    model.apply(named_service("other", "172.20.0.1", Affinity::None));
    assert!(settle(&mut model).is_empty());
    model.apply(service("172.20.0.2", Affinity::None));
    settle(&mut model);
    assert_eq!(backends(&model, "172.20.0.1"), Vec::<String>::new());
    assert_eq!(backends(&model, "172.20.0.2").len(), 3);
}

#[test]
fn older_peers_are_read_from_their_service_records() {
    let mut changes = two_clusters();
    changes.push(Change::Cluster {
        name: cluster("west"),
        config: Some(ClusterConfig {
            id: 2,
            slices: false,
        }),
    });
    changes.push(pod("west", "10.2.0.5", WEST_ID << 16 | 300, "192.0.2.21"));
    changes.push(Change::LegacyBackends {
        cluster: cluster("west"),
        service: ServiceName {
            namespace: "shop".into(),
            name: "web".into(),
        },
        groups: Some(vec![group(&[("10.2.0.5", Ready)])]),
    });
    let mut model = listed(changes, Tables::default());
    settle(&mut model);
    assert_eq!(
        backends(&model, "172.20.0.1"),
        ["10.1.0.4", "10.1.1.4", "10.2.0.5"]
    );
}
