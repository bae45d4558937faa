//! What probes find of paths.

use clustermesh_ebpf_abi::{NODE_NARROW, NODE_PRESENT};

use super::*;

fn path(model: &Model) -> (u16, u16) {
    let place = model.actual().node_addresses[&address(parse("192.0.2.21"))];
    let node = model.actual().nodes[&place.node_index];
    (node.flags & !NODE_PRESENT, node.path_mtu_bytes)
}

fn with_range(of: &str, name: &str, underlay: &str, health: &str, cidr: &str) -> Change {
    Change::Node {
        cluster: cluster(of),
        name: name.into(),
        node: Some(Box::new(NodeRecord {
            underlay: vec![parse(underlay)],
            health: vec![parse(health)],
            pod_cidrs: vec![cidr.parse().unwrap()],
            ..NodeRecord::default()
        })),
    }
}

fn world() -> Vec<Change> {
    vec![
        config("west", 2),
        with_range("east", "e1", "192.0.2.1", "10.1.0.2", "10.1.0.0/24"),
        with_range("west", "w1", "192.0.2.21", "10.2.0.2", "10.2.0.0/24"),
    ]
}

fn ranges(model: &Model) -> Vec<(String, u16)> {
    let cidrs = model.remote_pod_cidrs().into_iter();
    cidrs.map(|(cidr, mtu)| (cidr.to_string(), mtu)).collect()
}

#[test]
fn what_is_found_is_written_and_outlives_a_restart_until_more_is_proven() {
    let mut model = listed(world(), Tables::default());
    settle(&mut model);
    assert_eq!(path(&model), (0, 1450));
    let [target] = <[_; 1]>::try_from(model.path_targets()).unwrap();
    assert_eq!(target.address, parse("10.2.0.2"));
    assert_eq!((target.most_bytes, target.usable_bytes), (1450, 1450));
    model.take_pod_cidrs_changed();
    model.set_path_mtu("west", "w1", 1390);
    let plan = settle(&mut model);
    assert_eq!(plan.node_upserts.len(), 1, "one write and nothing else");
    assert_eq!(path(&model), (NODE_NARROW, 1390));
    assert!(model.take_pod_cidrs_changed());
    assert_eq!(ranges(&model), [("10.2.0.0/24".to_owned(), 1390)]);
    // Another run begins with what the kernel has.
    let mut model = listed(world(), model.actual().clone());
    assert_eq!(settle(&mut model), Plan::default());
    let [target] = <[_; 1]>::try_from(model.path_targets()).unwrap();
    assert_eq!((target.most_bytes, target.usable_bytes), (1450, 1390));
    // And goes on from there: a new listing changes nothing of it.
    model.set_path_mtu("west", "w1", 1450);
    settle(&mut model);
    assert_eq!(path(&model), (0, 1450));
    model.begin_listing();
    model.set_path_mtu("west", "w1", 1400);
    let mut model = list(model, world());
    settle(&mut model);
    assert_eq!(path(&model), (NODE_NARROW, 1400));
    model.forget_path_mtu("west", "w1");
    model.forget_measured();
    model.change_underlay(
        vec![parse("192.0.2.1")],
        settings().path_v4,
        settings().path_v6,
    );
    settle(&mut model);
    assert_eq!(path(&model), (0, 1450));
}

#[test]
fn devices_bound_what_is_found() {
    let mut model = listed(world(), Tables::default());
    model.set_path_mtu("west", "w1", 9_000);
    model.set_path_mtu("nobody", "w1", 1_300);
    settle(&mut model);
    assert_eq!(path(&model), (0, 1450));
}

#[test]
fn nobody_is_probed_that_nothing_is_sent_to() {
    let withheld = Settings {
        encryption: EncryptionSettings {
            mode: EncryptionMode::All,
            strict: true,
            ..EncryptionSettings::default()
        },
        ..settings()
    };
    let model = list(Model::new(withheld, Tables::default()), world());
    assert_eq!(model.path_targets(), []);
    // Directly routed packets of the other family would take another way.
    let direct = Settings {
        direct_routing: true,
        ..settings()
    };
    let changes = vec![
        config("west", 2),
        with_range("west", "w1", "192.0.2.21", "fd00:2::2", "fd00:2::/64"),
    ];
    let model = list(Model::new(direct, Tables::default()), changes);
    assert_eq!(model.path_targets(), []);
}
