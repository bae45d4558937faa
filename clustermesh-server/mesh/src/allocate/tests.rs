use clustermesh_api::IdentitySplit;
use clustermesh_api::limits::IDENTITY_QUARANTINE_MS;
use clustermesh_api::records::{Identity, Label};
use proptest::prelude::*;

use super::*;
use crate::address::overlaps;
use crate::settings::{ClusterSettings, example};
use crate::test_support::{Lab, commit, workload};
use crate::view::MapView;

fn labels(app: &str) -> Identity {
    Identity::new([
        Label::k8s("io.cilium.k8s.policy.cluster", "c1"),
        Label::k8s("app", app),
    ])
    .unwrap()
}

fn give(view: &mut MapView, settings: &ClusterSettings, app: &str, now: i64) -> u32 {
    let plan = plan_identity(view, settings, &labels(app), now).unwrap();
    commit(view, plan)
}

#[test]
fn numbers_lie_in_the_clusters_range_of_both_splits() {
    let mut view = MapView::new();
    assert_eq!(give(&mut view, &example(), "a", 0), 65537);
    let settings = ClusterSettings {
        id: 511,
        split: IdentitySplit::Clusters511,
        ..example()
    };
    assert_eq!(
        give(&mut MapView::new(), &settings, "a", 0),
        (511 << 15) + 1
    );
}

#[test]
fn two_plans_on_one_view_never_both_succeed() {
    let mut view = MapView::new();
    let settings = example();
    for (first, second) in [("a", "b"), ("c", "c")] {
        let one = plan_identity(&view, &settings, &labels(first), 0).unwrap();
        let two = plan_identity(&view, &settings, &labels(second), 0).unwrap();
        commit(&mut view, one);
        assert!(!two.txn.holds(&view), "{first} and {second}");
    }
}

#[test]
fn labels_of_another_cluster_are_refused() {
    let foreign = Identity::new([Label::k8s("io.cilium.k8s.policy.cluster", "c2")]).unwrap();
    let error = plan_identity(&MapView::new(), &example(), &foreign, 0).unwrap_err();
    assert!(matches!(error, AllocateError::ForeignLabels { .. }));
}

#[test]
fn a_freed_number_waits_out_its_quarantine_but_its_own_labels_may_return() {
    let mut lab = Lab::new();
    let first = lab.apply(&[workload("a", &[("app", "a")])])[0].identity;
    lab.view.delete(b"clustermesh.io/workloads/v1/shop/a");
    let plan = plan_release(&lab.view, &lab.settings, 1000).unwrap();
    assert_eq!(commit(&mut lab.view, plan).identities, [first]);
    assert!(lab.view.list(b"cilium/state/identities/").is_empty());

    let mut returned = lab.view.clone();
    std::mem::swap(&mut returned, &mut lab.view);
    assert_eq!(
        lab.apply(&[workload("a", &[("app", "a")])])[0].identity,
        first
    );
    assert!(
        lab.view
            .list(b"clustermesh.io/alloc/identities/")
            .is_empty()
    );
    lab.view = returned;

    // The circle is short-cut to the number before the freed one.
    lab.view
        .put("clustermesh.io/alloc/cursor/identity", "131071");
    lab.now_unix_ms = 1000 + IDENTITY_QUARANTINE_MS - 1;
    assert_eq!(
        lab.apply(&[workload("b", &[("app", "b")])])[0].identity,
        first + 1
    );
    lab.view
        .put("clustermesh.io/alloc/cursor/identity", "131071");
    lab.now_unix_ms += 1;
    assert_eq!(
        lab.apply(&[workload("c", &[("app", "c")])])[0].identity,
        first
    );
    // The old labels are a new label set now.
    assert_eq!(
        lab.apply(&[workload("a", &[("app", "a")])])[0].identity,
        first + 2
    );
}

#[test]
fn numbers_in_use_by_workloads_or_addresses_are_not_released() {
    let mut lab = Lab::new();
    lab.apply(&[
        workload("a", &[("app", "a")]),
        workload("b", &[("app", "b")]),
    ]);
    lab.node("n1", "192.0.2.1");
    lab.endpoint("n1", "b", "10.1.0.4");
    lab.view.delete(b"clustermesh.io/workloads/v1/shop/b");
    let plan = plan_release(&lab.view, &lab.settings, 0).unwrap();
    assert_eq!(plan.result, Released::default());
    assert!(plan.txn.is_empty());
}

#[test]
fn a_workload_stored_meanwhile_voids_the_release() {
    let mut lab = Lab::new();
    lab.apply(&[workload("a", &[("app", "a")])]);
    lab.view.delete(b"clustermesh.io/workloads/v1/shop/a");
    let plan = plan_release(&lab.view, &lab.settings, 0).unwrap();
    lab.apply(&[workload("z", &[("app", "a")])]);
    assert!(!plan.txn.holds(&lab.view));
}

#[test]
fn a_release_is_bounded() {
    let mut lab = Lab::new();
    for index in 0..=IDENTITIES_PER_RELEASE {
        let app = format!("a{index}");
        lab.apply(&[workload("w", &[("app", &app)])]);
    }
    lab.view.delete(b"clustermesh.io/workloads/v1/shop/w");
    let plan = plan_release(&lab.view, &lab.settings, 0).unwrap();
    let released = commit(&mut lab.view, plan);
    assert_eq!(
        (released.identities.len(), released.more),
        (IDENTITIES_PER_RELEASE, true)
    );
    let plan = plan_release(&lab.view, &lab.settings, 0).unwrap();
    assert!(!commit(&mut lab.view, plan).more);
}

#[test]
fn exhaustion_is_an_error_with_a_remedy() {
    let mut view = MapView::new();
    for id in 65537..=131_071 {
        view.put(format!("cilium/state/identities/v1/id/{id}"), "k8s:x=y;");
    }
    let error = plan_identity(&view, &example(), &labels("a"), 0).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("all 65535 identities of cluster c1"),
        "{error}"
    );

    let settings = ClusterSettings {
        pod_cidrs: vec!["10.1.0.0/23".parse().unwrap()],
        service_cidrs: vec![],
        ..example()
    };
    let mut view = MapView::new();
    for node in ["a", "b"] {
        let plan = plan_pod_cidrs(&view, &settings, node, &[]).unwrap();
        commit(&mut view, plan);
    }
    let error = plan_pod_cidrs(&view, &settings, "c", &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no free /24 block for node c in pod CIDRs 10.1.0.0/23: add a pod CIDR or remove nodes"
    );
}

#[test]
fn a_held_block_is_granted_again_only_when_it_is_free_and_fits() {
    let mut view = MapView::new();
    let settings = example();
    let plan = plan_pod_cidrs(&view, &settings, "a", &["10.1.7.0/24".parse().unwrap()]).unwrap();
    assert_eq!(
        commit(&mut view, plan).v4,
        Some("10.1.7.0/24".parse().unwrap())
    );
    for held in ["10.1.7.0/24", "10.9.0.0/24", "10.1.8.0/25"] {
        let plan = plan_pod_cidrs(&view, &settings, "b", &[held.parse().unwrap()]).unwrap();
        assert_eq!(
            plan.result.v4,
            Some("10.1.0.0/24".parse().unwrap()),
            "{held}"
        );
    }
}

#[test]
fn two_nodes_never_get_overlapping_blocks_from_one_view() {
    let mut view = MapView::new();
    let settings = example();
    let one = plan_pod_cidrs(&view, &settings, "a", &[]).unwrap();
    let smaller = ClusterSettings {
        node_mask_v4: 25,
        ..example()
    };
    let two = plan_pod_cidrs(&view, &smaller, "b", &[]).unwrap();
    commit(&mut view, one);
    assert!(!two.txn.holds(&view));
}

proptest! {
    #[test]
    fn blocks_never_overlap_whatever_the_masks_and_order(
        steps in prop::collection::vec((0_u8..12, 20_u8..=28, any::<bool>(), any::<u16>()), 1..40),
    ) {
        let mut view = MapView::new();
        let mut nodes: std::collections::BTreeMap<u8, IpNetwork> = std::collections::BTreeMap::new();
        for (node, mask, remove, held) in steps {
            let settings = ClusterSettings { node_mask_v4: mask, ..example() };
            let name = format!("n{node}");
            if remove {
                let mut draft = Draft::new(&view);
                release_pod_cidrs(&mut draft, &name).unwrap();
                let txn = draft.into_txn();
                prop_assert!(txn.holds(&view));
                view.apply(txn.writes().clone());
                nodes.remove(&node);
                continue;
            }
            let held = IpNetwork::new(std::net::Ipv4Addr::from_bits(0x0a01_0000 | u32::from(held)).into(), mask).unwrap();
            let plan = plan_pod_cidrs(&view, &settings, &name, &[held]).unwrap();
            let own = commit(&mut view, plan).v4.unwrap();
            if let Some(before) = nodes.insert(node, own) {
                prop_assert_eq!(before, own);
            }
            for (other, cidr) in &nodes {
                prop_assert!(*other == node || !overlaps(*cidr, own), "{} and {}", cidr, own);
            }
        }
    }

    #[test]
    fn equal_labels_equal_numbers_and_different_labels_different_ones(apps in prop::collection::vec(0_u8..20, 1..60)) {
        let mut view = MapView::new();
        let mut given = std::collections::BTreeMap::new();
        for app in apps {
            let id = give(&mut view, &example(), &app.to_string(), 0);
            prop_assert_eq!(*given.entry(app).or_insert(id), id);
        }
        let distinct: std::collections::BTreeSet<_> = given.values().collect();
        prop_assert_eq!(distinct.len(), given.len());
    }
}
