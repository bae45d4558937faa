use std::collections::BTreeMap;

use clustermesh_api::records::ClusterService;
use proptest::prelude::*;

use super::*;
use crate::test_support::{Lab, service, workload};
use crate::view::MapView;

const SHARED: &[(&str, &str)] = &[
    ("service.cilium.io/global", "true"),
    ("service.cilium.io/affinity", "local"),
    ("other", "x"),
];

fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.apply(&[
        workload("cart-0", &[("app", "cart")]),
        service("cart", &[("app", "cart")], SHARED),
    ]);
    lab.node("n1", "192.0.2.1");
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    lab
}

/// What a join from scratch publishes over what `view` holds.
fn publish(lab: &mut Lab) -> (Vec<Change>, Vec<Change>) {
    let mut join = ServiceJoin::from_view(lab.settings.clone(), &lab.view);
    let changes = (join.take_slices(), join.take_services(0));
    lab.view.apply(
        changes
            .0
            .iter()
            .chain(&changes.1)
            .map(|change| (change.key.clone(), change.value.clone())),
    );
    changes
}

fn slice(view: &MapView, key: &str) -> Option<EndpointSlice> {
    view.get(key.as_bytes())
        .map(|kv| EndpointSlice::decode(&kv.value).unwrap())
}

const SLICE: &str = "cilium/state/endpointslices/v1/c1/shop/cart-ipv4-0";
const LOCAL_SLICE: &str = "clustermesh.io/endpointslices/v1/shop/cart.local-ipv4-0";
const RECORD: &str = "cilium/state/services/v1/c1/shop/cart";

fn record(view: &MapView) -> Option<ClusterService> {
    view.get(RECORD.as_bytes())
        .map(|kv| ClusterService::decode(&kv.value).unwrap())
}

#[test]
fn an_endpoint_takes_traffic_only_after_its_first_good_probe() {
    let mut lab = lab();
    publish(&mut lab);
    let found = slice(&lab.view, SLICE).unwrap();
    assert_eq!(found.service_name(), Some("cart"));
    assert_eq!(found.endpoints[0].addresses, ["10.1.0.4"]);
    assert_eq!(found.endpoints[0].node_name.as_deref(), Some("n1"));
    assert_eq!(found.ports[0].port, Some(8080));
    assert_eq!(
        found.annotations.len(),
        2,
        "only the mesh's annotations: {:?}",
        found.annotations
    );
    assert!(!found.endpoints[0].is_ready());
    assert!(record(&lab.view).unwrap().backends.is_empty());

    lab.ready("n1", "10.1.0.4", true);
    publish(&mut lab);
    assert!(slice(&lab.view, SLICE).unwrap().endpoints[0].is_ready());
    let found = record(&lab.view).unwrap();
    assert_eq!(found.backends["10.1.0.4"]["http"].port, 8080);
    assert_eq!(found.frontends["10.96.1.1"]["http"].port, 80);
    assert!(found.shared && found.include_external);

    lab.ready("n1", "10.1.0.4", false);
    publish(&mut lab);
    assert!(!slice(&lab.view, SLICE).unwrap().endpoints[0].is_ready());
    assert!(record(&lab.view).unwrap().backends.is_empty());
}

#[test]
fn a_service_that_is_not_shared_stays_out_of_the_exported_tree() {
    for annotations in [
        &[][..],
        &[
            ("service.cilium.io/global", "true"),
            ("service.cilium.io/shared", "false"),
        ],
    ] {
        let mut lab = lab();
        publish(&mut lab);
        lab.apply(&[service("cart", &[("app", "cart")], annotations)]);
        publish(&mut lab);
        assert!(slice(&lab.view, SLICE).is_none() && record(&lab.view).is_none());
        assert_eq!(slice(&lab.view, LOCAL_SLICE).unwrap().endpoints.len(), 1);
    }
}

#[test]
fn nothing_is_written_twice() {
    let mut lab = lab();
    publish(&mut lab);
    assert_eq!(publish(&mut lab), (Vec::new(), Vec::new()));
}

#[test]
fn slices_hold_at_most_a_hundred_endpoints() {
    let mut lab = lab();
    for host in 5..=160 {
        lab.endpoint("n1", "cart-0", &format!("10.1.0.{host}"));
    }
    publish(&mut lab);
    assert_eq!(slice(&lab.view, SLICE).unwrap().endpoints.len(), 100);
    assert_eq!(
        slice(
            &lab.view,
            "cilium/state/endpointslices/v1/c1/shop/cart-ipv4-1"
        )
        .unwrap()
        .endpoints
        .len(),
        57
    );
}

#[test]
fn service_records_wait_for_their_interval_and_slices_do_not() {
    let mut lab = lab();
    let mut join = ServiceJoin::from_view(lab.settings.clone(), &lab.view);
    join.take_slices();
    assert_eq!(join.take_services(10_000).len(), 1);
    lab.ready("n1", "10.1.0.4", true);
    let readiness = lab
        .view
        .get(b"clustermesh.io/readiness/v1/n1/10.1.0.4")
        .unwrap();
    join.handle(&readiness.key, Some(&readiness.value));
    assert_eq!(join.take_slices().len(), 1);
    assert_eq!(join.take_services(10_999), []);
    assert_eq!(join.services_due_ms(), Some(11_000));
    assert_eq!(join.take_services(11_000).len(), 1);
    assert_eq!(join.services_due_ms(), None);
}

#[test]
fn failed_changes_are_made_again() {
    let lab = lab();
    let mut join = ServiceJoin::from_view(lab.settings.clone(), &lab.view);
    let (slices, services) = (join.take_slices(), join.take_services(0));
    assert!(!slices.is_empty() && !services.is_empty());
    join.failed(&slices);
    join.failed(&services);
    assert_eq!(join.take_slices(), slices);
    assert_eq!(join.take_services(0), services);
}

#[test]
fn slices_of_nobody_are_deleted() {
    let mut lab = Lab::new();
    lab.view.put(SLICE, "garbage");
    lab.view.put("cilium/state/services/v1/c1/shop/gone", "{}");
    let (slices, services) = publish(&mut lab);
    assert_eq!(
        slices,
        [Change {
            key: SLICE.into(),
            value: None
        }]
    );
    assert_eq!(services[0].value, None);
}

/// One random change of the store.
#[derive(Clone, Debug)]
enum Step {
    Workload(u8, u8, u8),
    Service(u8, u8, Option<u8>, bool),
    Address(u8, u8, u8),
    Readiness(u8, u8, Option<bool>),
    Zone(u8, Option<u8>),
    Delete(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0_u8..4, 0_u8..3, 0_u8..3).prop_map(|(w, a, b)| Step::Workload(w, a, b)),
        (0_u8..3, 0_u8..3, prop::option::of(0_u8..3), any::<bool>())
            .prop_map(|(s, a, b, g)| Step::Service(s, a, b, g)),
        (4_u8..9, 0_u8..4, 0_u8..2).prop_map(|(i, w, n)| Step::Address(i, w, n)),
        (4_u8..9, 0_u8..2, prop::option::of(any::<bool>()))
            .prop_map(|(i, n, r)| Step::Readiness(i, n, r)),
        (0_u8..2, prop::option::of(0_u8..2)).prop_map(|(n, z)| Step::Zone(n, z)),
        (0_u8..3, 0_u8..9).prop_map(|(k, i)| Step::Delete(k, i)),
    ]
}

fn change(step: &Step) -> (String, Option<Vec<u8>>) {
    let json = |value: serde_json::Value| Some(value.to_string().into_bytes());
    match *step {
        Step::Workload(w, a, b) => (
            format!("clustermesh.io/workloads/v1/shop/w{w}"),
            json(
                serde_json::json!({"apiVersion": "clustermesh.io/v1", "kind": "Workload",
                "metadata": {"name": format!("w{w}"), "namespace": "shop", "labels": {"a": a.to_string(), "b": b.to_string()}},
                "spec": {}, "status": {"identity": 65537}}),
            ),
        ),
        Step::Service(s, a, b, global) => {
            let mut selector = BTreeMap::from([("a", a.to_string())]);
            selector.extend(b.map(|b| ("b", b.to_string())));
            (
                format!("clustermesh.io/services/v1/shop/s{s}"),
                json(
                    serde_json::json!({"apiVersion": "clustermesh.io/v1", "kind": "Service",
                    "metadata": {"name": format!("s{s}"), "namespace": "shop",
                        "annotations": {"service.cilium.io/global": global.to_string()}},
                    "spec": {"selector": selector, "ports": [{"port": 80}]},
                    "status": {"clusterIPs": ["10.96.1.1"]}}),
                ),
            )
        }
        Step::Address(i, w, n) => (
            format!("cilium/state/ip/v1/default/10.1.0.{i}"),
            json(
                serde_json::json!({"IP": format!("10.1.0.{i}"), "ID": 65537, "K8sNamespace": "shop",
                "K8sPodName": format!("w{w}"), "clustermesh.io": {"node": format!("n{n}")}}),
            ),
        ),
        Step::Readiness(i, n, ready) => (
            format!("clustermesh.io/readiness/v1/n{n}/10.1.0.{i}"),
            ready.and_then(|ready| {
                json(
                    serde_json::json!({"ports": [{"port": 80, "protocol": "TCP", "ready": ready}]}),
                )
            }),
        ),
        Step::Zone(n, zone) => (
            format!("cilium/state/nodes/v1/c1/n{n}"),
            zone.and_then(|zone| {
                json(
                    serde_json::json!({"Name": format!("n{n}"), "Cluster": "c1", "ClusterID": 1,
                    "Labels": {"topology.kubernetes.io/zone": zone.to_string()}}),
                )
            }),
        ),
        Step::Delete(0, i) => (format!("clustermesh.io/workloads/v1/shop/w{i}"), None),
        Step::Delete(1, i) => (format!("clustermesh.io/services/v1/shop/s{i}"), None),
        Step::Delete(_, i) => (format!("cilium/state/ip/v1/default/10.1.0.{i}"), None),
    }
}

fn outputs(view: &MapView) -> BTreeMap<Bytes, Bytes> {
    [
        "cilium/state/endpointslices/",
        "cilium/state/services/",
        "clustermesh.io/endpointslices/",
    ]
    .iter()
    .flat_map(|prefix| view.list(prefix.as_bytes()))
    .map(|kv| (kv.key, kv.value))
    .collect()
}

proptest! {
    #[test]
    fn the_incremental_result_equals_the_join_from_scratch(
        steps in prop::collection::vec((step(), any::<bool>()), 1..60),
    ) {
        let settings = crate::settings::example();
        let mut inputs = MapView::new();
        let mut published = MapView::new();
        let mut join = ServiceJoin::new(settings.clone());
        let mut now = 0;
        for (step, take) in steps {
            let (key, value) = change(&step);
            match &value {
                Some(value) => inputs.put(key.clone(), value.clone()),
                None => inputs.delete(key.as_bytes()),
            }
            join.handle(key.as_bytes(), value.as_deref());
            if take {
                now += 400;
                let changes = join.take_slices().into_iter().chain(join.take_services(now));
                published.apply(changes.map(|change| (change.key, change.value)));
            }
        }
        let changes = join.take_slices().into_iter().chain(join.take_services(now + SERVICE_RECORD_INTERVAL_MS));
        published.apply(changes.map(|change| (change.key, change.value)));

        let mut scratch = ServiceJoin::from_view(settings, &inputs);
        let mut expected = MapView::new();
        let changes = scratch.take_slices().into_iter().chain(scratch.take_services(0));
        expected.apply(changes.map(|change| (change.key, change.value)));
        prop_assert_eq!(outputs(&published), outputs(&expected));
        prop_assert!(!join.slices_due() && join.services_due_ms().is_none());
    }
}
