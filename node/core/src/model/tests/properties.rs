//! Any order of changes leads to the same state.

use proptest::prelude::*;

use super::*;
use crate::plan::plan;

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
