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

#[test]
fn addresses_without_room_in_the_ipcache_are_named_wait_and_take_what_becomes_free() {
    let of_west = |place: u32| {
        pod(
            "west",
            &format!("10.2.0.{place}"),
            WEST_ID << 16 | 300,
            "192.0.2.21",
        )
    };
    let settings = Settings {
        ipcache_wanted_max: 4,
        ..settings()
    };
    // Two are the node's own: its underlay and its router.
    let node = node("west", "w1", "192.0.2.21", "10.2.0.1");
    let mut model = list(
        Model::new(settings, Tables::default()),
        vec![config("west", 2), node, of_west(4), of_west(5)],
    );
    settle(&mut model);
    for late in [of_west(9), of_west(8), of_west(7)] {
        model.apply(late.clone());
        // Said once, however often the record comes.
        model.apply(late);
    }
    let held = |model: &Model, place: u8| {
        let key = host_key(IpAddr::from([10, 2, 0, place]));
        model.actual().ipcache.contains_key(&key)
    };
    assert!(settle(&mut model).is_empty());
    let named: Vec<String> = model
        .refused()
        .take_newest()
        .into_iter()
        .map(|r| r.object)
        .collect();
    assert_eq!(
        named,
        ["address 10.2.0.9", "address 10.2.0.8", "address 10.2.0.7"]
    );
    // Who was there keeps its place, also with another value.
    model.apply(pod("west", "10.2.0.4", WEST_ID << 16 | 301, "192.0.2.21"));
    assert_eq!(settle(&mut model).ipcache_upserts.len(), 1);

    // One of those that wait goes by itself, the others follow who leaves.
    model.apply(no_pod("west", "10.2.0.7"));
    model.apply(no_pod("west", "10.2.0.4"));
    settle(&mut model);
    assert_eq!(
        [4, 5, 7, 8, 9].map(|place| held(&model, place)),
        [false, true, false, true, false]
    );
    model.apply(no_pod("west", "10.2.0.5"));
    settle(&mut model);
    assert!(held(&model, 8) && held(&model, 9));
    assert_eq!(model.wanted().ipcache.len(), 4);
}

#[test]
fn a_node_without_an_index_waits_until_another_has_gone_from_the_kernel() {
    let nth = |n: u32| {
        let underlay = IpAddr::from((0x0a40_0000 + n).to_be_bytes()).to_string();
        let router = IpAddr::from((0x0b40_0000 + n).to_be_bytes()).to_string();
        node("west", &format!("w{n}"), &underlay, &router)
    };
    // One index is this node's own.
    let fitting = NODES_MAX - 1;
    let changes = std::iter::once(config("west", 2)).chain((0..fitting).map(nth));
    let mut model = listed(changes.collect(), Tables::default());
    settle(&mut model);
    model.refused().take_newest();
    model.apply(nth(fitting));
    assert!(settle(&mut model).node_upserts.is_empty());
    assert_eq!(model.actual().nodes.len(), fitting as usize);
    let refused = model.refused().take_newest();
    assert!(
        refused
            .iter()
            .any(|r| r.object == format!("node west/w{fitting}") && r.reason == Reason::MapFull),
        "{refused:?}"
    );
    model.apply(Change::Node {
        cluster: cluster("west"),
        name: "w7".into(),
        node: None,
    });
    let plan = model.plan();
    assert!(
        plan.node_upserts.is_empty(),
        "the kernel still has the old node"
    );
    for step in plan.steps() {
        model.commit(&step);
    }
    assert_eq!(settle(&mut model).node_upserts.len(), 1);
    assert_eq!(model.actual().nodes.len(), fitting as usize);
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
        encrypted_mtu_bytes: 1290,
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
