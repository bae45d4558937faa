use std::net::IpAddr;

use clustermesh_ebpf_abi::{FrontendKey, IdentitySplit, NODE_INDEX_LOCAL};
use proptest::prelude::*;

use super::*;
use crate::change::{
    AddressOwner, Affinity, BackendEndpoint, BackendPort, ClusterConfig, Condition, EndpointGroup,
    NodeRecord, ServicePort, SliceRecord,
};
use crate::plan::plan;
use crate::tables::{address, host_key, ip};

mod absence;

const WEST_ID: u32 = 2;

fn cluster(name: &str) -> ClusterName {
    name.into()
}

fn settings() -> Settings {
    Settings {
        cluster: cluster("east"),
        cluster_id: 1,
        node: "e1".into(),
        underlay: vec!["192.0.2.1".parse().unwrap()],
        split: IdentitySplit::CLUSTERS_255,
        direct_routing: false,
        path_v4: Some(UnderlayPath {
            egress_ifindex: 3,
            mtu_bytes: 1450,
        }),
        path_v6: None,
    }
}

fn model_of(actual: Tables) -> Model {
    Model::new(settings(), actual)
}

fn parse(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn node(of: &str, name: &str, underlay: &str, router: &str) -> Change {
    Change::Node {
        cluster: cluster(of),
        name: name.into(),
        node: Some(Box::new(NodeRecord {
            underlay: vec![parse(underlay)],
            routers: vec![parse(router)],
            ..NodeRecord::default()
        })),
    }
}

fn pod(of: &str, ip: &str, identity: u32, host: &str) -> Change {
    Change::Address {
        cluster: cluster(of),
        prefix: parse(ip).into(),
        owner: Some(AddressOwner {
            identity,
            host: Some(parse(host)),
        }),
    }
}

fn no_pod(of: &str, ip: &str) -> Change {
    Change::Address {
        cluster: cluster(of),
        prefix: parse(ip).into(),
        owner: None,
    }
}

fn config(name: &str, id: u16) -> Change {
    Change::Cluster {
        name: cluster(name),
        config: Some(ClusterConfig { id, slices: true }),
    }
}

fn service(vip: &str, affinity: Affinity) -> Change {
    named_service("web", vip, affinity)
}

fn named_service(name: &str, vip: &str, affinity: Affinity) -> Change {
    Change::Service {
        service: ServiceName {
            namespace: "shop".into(),
            name: name.into(),
        },
        declaration: Some(Box::new(ServiceDeclaration {
            addresses: vec![parse(vip)],
            ports: vec![ServicePort {
                name: "http".into(),
                protocol: 6,
                port: 80,
                target_port: 8080,
            }],
            global: true,
            affinity,
            ..ServiceDeclaration::default()
        })),
    }
}

fn group(backends: &[(&str, Condition)]) -> EndpointGroup {
    EndpointGroup {
        ports: vec![BackendPort {
            name: "http".into(),
            protocol: 6,
            port: 8080,
        }],
        endpoints: backends
            .iter()
            .map(|(ip, condition)| BackendEndpoint {
                address: parse(ip),
                condition: *condition,
            })
            .collect(),
    }
}

fn slice(of: &str, name: &str, backends: &[(&str, Condition)]) -> Change {
    Change::Slice {
        cluster: cluster(of),
        name: format!("shop/{name}").into(),
        slice: Some(Box::new(SliceRecord {
            service: ServiceName {
                namespace: "shop".into(),
                name: "web".into(),
            },
            group: group(backends),
        })),
    }
}

fn frontend(vip: &str) -> FrontendKey {
    FrontendKey {
        address: address(parse(vip)),
        port_be: [0, 80],
        protocol: 6,
        reserved: 0,
    }
}

/// Carries a plan out and checks that nothing is left to do.
fn settle(model: &mut Model) -> Plan {
    let plan = model.plan();
    for step in plan.steps() {
        model.commit(&step);
    }
    model.finish();
    assert!(model.plan().is_empty());
    plan
}

fn backends(model: &Model, vip: &str) -> Vec<String> {
    let (_, list) = model.actual().list_of(&frontend(vip)).unwrap();
    list.iter().map(|b| ip(&b.address).to_string()).collect()
}

use Condition::{Draining, Ready, Unusable};

/// East has this node and e2; west has w1 with one pod and backend.
fn two_clusters() -> Vec<Change> {
    vec![
        // The order of a listing: copies come before the configuration that makes them valid.
        slice("west", "web-w", &[("10.2.0.4", Ready)]),
        pod("west", "10.2.0.4", WEST_ID << 16 | 300, "192.0.2.21"),
        node("west", "w1", "192.0.2.21", "10.2.0.1"),
        config("west", 2),
        slice("east", "web-e", &[("10.1.0.4", Ready), ("10.1.1.4", Ready)]),
        pod("east", "10.1.0.4", 1 << 16 | 300, "192.0.2.1"),
        pod("east", "10.1.1.4", 1 << 16 | 300, "192.0.2.2"),
        node("east", "e1", "192.0.2.1", "10.1.0.1"),
        node("east", "e2", "192.0.2.2", "10.1.1.1"),
        service("172.20.0.1", Affinity::None),
    ]
}

fn listed(changes: Vec<Change>, actual: Tables) -> Model {
    let mut model = model_of(actual);
    for change in changes {
        model.apply(change);
    }
    model.end_listing();
    for name in ["east", "west"] {
        let position = Position {
            store_id: 7,
            revision: 10,
        };
        model.progress(&cluster(name), position);
    }
    model
}

#[test]
fn nothing_is_planned_before_the_listing_is_complete() {
    let mut model = model_of(Tables::default());
    for change in two_clusters() {
        model.apply(change);
    }
    assert!(model.plan().is_empty());
}

#[test]
fn remote_addresses_are_in_the_ipcache_and_own_pods_are_not() {
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    let entry = |ip: &str| model.actual().ipcache.get(&host_key(parse(ip))).copied();
    assert_eq!(entry("10.1.0.4"), None);
    assert_eq!(entry("192.0.2.1"), None);
    assert_eq!(entry("10.1.1.4").unwrap().identity, 1 << 16 | 300);
    assert_eq!(entry("10.2.0.1").unwrap().identity, 6);
    let west = entry("10.2.0.4").unwrap();
    let node = model.actual().nodes[&west.node_index];
    assert_eq!(
        (ip(&node.endpoint), node.cluster_id),
        (parse("192.0.2.21"), 2)
    );
    assert_ne!(west.node_index, NODE_INDEX_LOCAL);
    assert_eq!(
        backends(&model, "172.20.0.1"),
        ["10.1.0.4", "10.1.1.4", "10.2.0.4"]
    );
    assert_eq!(model.applied().get("west").unwrap().revision, 10);
}

#[test]
fn a_restart_over_the_same_kernel_state_plans_nothing() {
    let mut first = listed(two_clusters(), Tables::default());
    settle(&mut first);
    let mut changes = two_clusters();
    changes.reverse();
    let mut again = listed(changes, first.actual().clone());
    assert_eq!(again.plan(), Plan::default());
}

#[test]
fn a_pod_waits_for_its_node() {
    let mut model = listed(vec![config("west", 2)], Tables::default());
    model.apply(pod("west", "10.2.0.4", WEST_ID << 16 | 300, "192.0.2.21"));
    assert!(settle(&mut model).is_empty());
    model.apply(node("west", "w1", "192.0.2.21", "10.2.0.1"));
    assert_eq!(settle(&mut model).ipcache_upserts.len(), 3);
}

#[test]
fn a_node_that_moves_keeps_its_index_and_one_write_moves_it() {
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    let before = model.actual().ipcache[&host_key(parse("10.2.0.1"))].node_index;
    model.apply(node("west", "w1", "192.0.2.22", "10.2.0.1"));
    let plan = settle(&mut model);
    assert_eq!(plan.node_upserts.len(), 1);
    assert_eq!(plan.node_upserts[0].0, before);
}

#[test]
fn an_identity_of_another_cluster_is_refused_and_touches_nothing_else() {
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    model.apply(pod("west", "10.2.0.9", 1 << 16 | 300, "192.0.2.21"));
    model.apply(pod("west", "10.2.0.10", 1, "192.0.2.21"));
    assert!(settle(&mut model).is_empty());
    let refused = model.refused().take_newest();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].reason, Reason::ForeignIdentity);
}

#[test]
fn own_claims_win_over_peers_and_a_freed_address_goes_to_the_next() {
    let mut model = listed(two_clusters(), Tables::default());
    model.apply(pod("west", "10.1.1.4", WEST_ID << 16 | 300, "192.0.2.21"));
    settle(&mut model);
    let identity = |model: &Model| model.actual().ipcache[&host_key(parse("10.1.1.4"))].identity;
    assert_eq!(identity(&model), 1 << 16 | 300);
    model.apply(no_pod("east", "10.1.1.4"));
    settle(&mut model);
    assert_eq!(identity(&model), WEST_ID << 16 | 300);
}

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
fn nodes_with_many_addresses_cannot_overfill_the_map() {
    let mut changes = vec![config("west", 2)];
    for n in 0..1_200_u32 {
        let underlay = (0..60)
            .map(|i| IpAddr::from((0x0a40_0000 + n * 64 + i).to_be_bytes()))
            .collect();
        changes.push(Change::Node {
            cluster: cluster("west"),
            name: format!("w{n}").into(),
            node: Some(Box::new(NodeRecord {
                underlay,
                ..NodeRecord::default()
            })),
        });
    }
    let mut model = listed(changes, Tables::default());
    settle(&mut model);
    assert_eq!(
        model.actual().node_addresses.len(),
        NODE_ADDRESSES_WANTED_MAX
    );
    let full = model
        .refused()
        .counts()
        .find(|(reason, _)| *reason == Reason::MapFull);
    assert!(full.is_some());
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

#[test]
fn a_rejected_step_is_planned_again() {
    let mut model = listed(two_clusters(), Tables::default());
    let plan = model.plan();
    for step in plan.steps() {
        model.reject(&step);
    }
    assert_eq!(model.plan(), plan);
}

/// Operations on a small world, so that they meet.
#[derive(Clone, Debug)]
enum Op {
    Node(bool, u8, Option<u8>),
    Pod(bool, u8, Option<(bool, u8)>),
    Slice(bool, u8, Option<Vec<(u8, u8)>>),
    Config(Option<u16>, bool),
    Service(u8, Option<(u8, u8)>),
    Plan,
    Relist,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => (any::<bool>(), 0u8..3, prop::option::of(0u8..4)).prop_map(|(w, n, u)| Op::Node(w, n, u)),
        4 => (any::<bool>(), 0u8..6, prop::option::of((any::<bool>(), 0u8..4)))
            .prop_map(|(w, n, h)| Op::Pod(w, n, h)),
        4 => (any::<bool>(), 0u8..3, prop::option::of(prop::collection::vec((0u8..6, 0u8..3), 0..4)))
            .prop_map(|(w, n, b)| Op::Slice(w, n, b)),
        1 => (prop::option::of(1u16..3), any::<bool>()).prop_map(|(id, s)| Op::Config(id, s)),
        2 => (0u8..3, prop::option::of((0u8..2, 0u8..3))).prop_map(|(n, s)| Op::Service(n, s)),
        3 => Just(Op::Plan),
        1 => Just(Op::Relist),
    ]
}

fn side(west: bool) -> &'static str {
    if west { "west" } else { "east" }
}

fn change_of(op: &Op) -> Option<Change> {
    let pod_ip = |n: u8| format!("10.9.0.{n}");
    let change = match op {
        Op::Node(west, n, underlay) => Change::Node {
            cluster: cluster(side(*west)),
            name: format!("n{n}").into(),
            node: underlay.map(|u| {
                Box::new(NodeRecord {
                    underlay: vec![parse(&format!("192.0.2.{u}"))],
                    routers: vec![parse(&format!("10.9.1.{n}"))],
                    ..NodeRecord::default()
                })
            }),
        },
        Op::Pod(west, n, None) => no_pod(side(*west), &pod_ip(*n)),
        Op::Pod(west, n, Some((right, host))) => {
            let id = if west == right { 2 } else { 1 };
            pod(
                side(*west),
                &pod_ip(*n),
                id << 16 | 300,
                &format!("192.0.2.{host}"),
            )
        }
        Op::Slice(west, n, backends) => {
            let ips: Vec<(String, Condition)> = backends
                .iter()
                .flatten()
                .map(|(b, c)| (pod_ip(*b), [Ready, Draining, Unusable][usize::from(*c)]))
                .collect();
            let list: Vec<_> = ips.iter().map(|(ip, c)| (ip.as_str(), *c)).collect();
            let name = format!("s{n}");
            match backends {
                Some(_) => slice(side(*west), &name, &list),
                None => Change::Slice {
                    cluster: cluster(side(*west)),
                    name: format!("shop/{name}").into(),
                    slice: None,
                },
            }
        }
        Op::Config(id, slices) => Change::Cluster {
            name: cluster("west"),
            config: id.map(|id| ClusterConfig {
                id,
                slices: *slices,
            }),
        },
        Op::Service(n, Some((vip, affinity))) => {
            let affinity =
                [Affinity::None, Affinity::Local, Affinity::Remote][usize::from(*affinity)];
            named_service(
                ["web", "a", "b"][usize::from(*n)],
                &format!("172.20.0.{vip}"),
                affinity,
            )
        }
        Op::Service(n, None) => Change::Service {
            service: ServiceName {
                namespace: "shop".into(),
                name: ["web", "a", "b"][usize::from(*n)].into(),
            },
            declaration: None,
        },
        Op::Plan | Op::Relist => return None,
    };
    Some(change)
}

/// The wanted state without the numbers that depend on history.
fn shape(tables: &Tables) -> impl PartialEq + std::fmt::Debug {
    let node = |index: &u32| tables.nodes.get(index).copied();
    let mut ipcache: Vec<_> = tables
        .ipcache
        .iter()
        .map(|(key, value)| (*key, value.identity, node(&value.node_index)))
        .collect();
    ipcache.sort_by_key(|(key, ..)| *key);
    let mut frontends: Vec<_> = tables
        .frontends
        .keys()
        .map(|key| (*key, tables.list_of(key).map(|(_, list)| list.to_vec())))
        .collect();
    frontends.sort();
    let mut addresses: Vec<_> = tables
        .node_addresses
        .iter()
        .map(|(key, value)| (*key, node(&value.node_index)))
        .collect();
    addresses.sort_by_key(|(key, _)| *key);
    (ipcache, frontends, addresses, tables.nodes.len())
}

proptest! {
    #[test]
    fn small_steps_lead_to_the_same_state_as_one_look_at_everything(ops in prop::collection::vec(op(), 1..60)) {
        let mut model = listed(vec![node("east", "e1", "192.0.2.1", "10.1.0.1")], Tables::default());
        for op in &ops {
            match op {
                Op::Relist => {
                    let actual = model.actual().clone();
                    let mut fresh = listed(Vec::new(), actual);
                    std::mem::swap(&mut model, &mut fresh);
                }
                Op::Plan => {
                    settle(&mut model);
                }
                op => model.apply(change_of(op).unwrap()),
            }
        }
        // A peer whose configuration came anew is out of sync, and nothing of it is removed until it is not.
        model.progress(&cluster("west"), Position { store_id: 7, revision: 11 });
        settle(&mut model);
        prop_assert!(plan(model.wanted(), model.actual()).is_empty());
        prop_assert_eq!(model.wanted(), model.actual());
        for value in model.wanted().ipcache.values() {
            prop_assert!(model.wanted().nodes.contains_key(&value.node_index));
        }
        for key in model.wanted().frontends.keys() {
            prop_assert!(model.wanted().list_of(key).is_some());
        }
        let in_lists: usize = model.wanted().lists.values().map(|list| list.len()).sum();
        let in_frontends: usize = model.wanted().frontends.values().map(|f| usize::from(f.backend_count)).sum();
        prop_assert_eq!(in_lists, in_frontends);
    }

    #[test]
    fn a_relisting_over_the_kernels_state_gives_the_same_state(ops in prop::collection::vec(op(), 1..40)) {
        // Keep the last value of each record: that is what a listing shows.
        let changes: Vec<Change> = ops.iter().filter(|op| !matches!(op, Op::Config(..))).filter_map(change_of).collect();
        let mut base = vec![config("west", 2), node("east", "e1", "192.0.2.1", "10.1.0.1")];
        base.extend(changes);
        let mut first = listed(base.clone(), Tables::default());
        settle(&mut first);
        let mut again = listed(base, first.actual().clone());
        let before = shape(first.actual());
        settle(&mut again);
        prop_assert_eq!(shape(again.actual()), before);
    }
}
