//! Nodes, their addresses, and the pods behind them.

use super::*;

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

/// 1,200 nodes of west with 60 addresses each, the last nodes first if `reversed`.
fn many_addresses(reversed: bool) -> Model {
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
    if reversed {
        changes.reverse();
    }
    let mut model = listed(changes, Tables::default());
    settle(&mut model);
    model
}

#[test]
fn nodes_with_many_addresses_cannot_overfill_the_map_and_who_is_left_out_does_not_depend_on_order()
{
    let mut model = many_addresses(false);
    let placed = |model: &Model| {
        let mut keys: Vec<_> = model.actual().node_addresses.keys().copied().collect();
        keys.sort_unstable();
        keys
    };
    assert_eq!(placed(&model).len(), NODE_ADDRESSES_WANTED_MAX);
    assert_eq!(placed(&model), placed(&many_addresses(true)));
    let full = model
        .refused()
        .counts()
        .find(|(reason, _)| *reason == Reason::MapFull);
    let left_out = (1_200 * 60 - NODE_ADDRESSES_WANTED_MAX) as u64;
    assert_eq!(full, Some((Reason::MapFull, left_out)));
    let named = model.refused().take_newest();
    assert!(
        named
            .iter()
            .all(|r| r.object.contains("node address 10.") && r.object.contains("of node west/w")),
        "{named:?}"
    );
    // The tunnel end of the last node is there, and a node that leaves makes room for those in line.
    let end = IpAddr::from((0x0a40_0000_u32 + 1_199 * 64).to_be_bytes());
    assert!(model.actual().node_addresses.contains_key(&address(end)));
    model.apply(Change::Node {
        cluster: cluster("west"),
        name: "w0".into(),
        node: None,
    });
    settle(&mut model);
    assert_eq!(placed(&model).len(), NODE_ADDRESSES_WANTED_MAX);
    assert!(!placed(&model).contains(&address(parse("10.64.0.0"))));
}

#[test]
fn a_changed_underlay_changes_the_path_to_every_node_and_nothing_else() {
    let mut model = listed(two_clusters(), Tables::default());
    settle(&mut model);
    let before = model.actual().clone();
    let path = UnderlayPath {
        egress_ifindex: 9,
        mtu_bytes: 1350,
    };
    model.change_underlay(vec![parse("192.0.2.9")], Some(path), None);
    let plan = settle(&mut model);
    assert_eq!(plan.node_upserts.len(), before.nodes.len());
    for (index, node) in &model.actual().nodes {
        assert_eq!((node.egress_ifindex, node.path_mtu_bytes), (9, 1350));
        assert_eq!(node.endpoint, before.nodes[index].endpoint);
    }
    assert_eq!(model.actual().ipcache, before.ipcache);
    // Without a family in common nobody is reached, until there is one again.
    model.change_underlay(vec![parse("2001:db8::9")], None, Some(path));
    settle(&mut model);
    assert!(model.actual().nodes.is_empty());
    model.change_underlay(vec![parse("192.0.2.9")], Some(path), None);
    settle(&mut model);
    assert_eq!(model.actual().nodes.len(), before.nodes.len());
    assert_eq!(backends(&model, "172.20.0.1").len(), 3);
}
