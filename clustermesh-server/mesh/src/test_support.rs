//! What the tests share: manifests, sessions, and a view that takes plans as the store does.

use bytes::Bytes;
use clustermesh_api::v1::{
    EndpointReadiness, Hello, PortReadiness, ReportReadiness, UpsertEndpoint,
};

use crate::allocate::Plan;
use crate::claims::{NodeMemo, plan_hello, plan_readiness, plan_upsert};
use crate::manifests::plan_apply;
use crate::settings::{ClusterSettings, example};
use crate::view::MapView;

/// Applies a plan as the store does: only when its guards hold.
pub(crate) fn commit<T>(view: &mut MapView, plan: Plan<T>) -> T {
    assert!(
        plan.txn.holds(view),
        "guards fail on the view that was planned on: {:?}",
        plan.txn.guards()
    );
    view.apply(plan.txn.writes().clone());
    plan.result
}

pub(crate) fn workload(name: &str, labels: &[(&str, &str)]) -> Bytes {
    let labels: serde_json::Map<_, _> = labels
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).into()))
        .collect();
    serde_json::json!({
        "apiVersion": "clustermesh.io/v1", "kind": "Workload",
        "metadata": {"name": name, "namespace": "shop", "labels": labels}, "spec": {}
    })
    .to_string()
    .into()
}

pub(crate) fn service(
    name: &str,
    selector: &[(&str, &str)],
    annotations: &[(&str, &str)],
) -> Bytes {
    let map = |pairs: &[(&str, &str)]| -> serde_json::Map<String, serde_json::Value> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).into()))
            .collect()
    };
    serde_json::json!({
        "apiVersion": "clustermesh.io/v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", "annotations": map(annotations)},
        "spec": {"selector": map(selector), "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}
    })
    .to_string()
    .into()
}

/// A cluster with its manifests and nodes, for tests that need one.
pub(crate) struct Lab {
    pub(crate) settings: ClusterSettings,
    pub(crate) view: MapView,
    pub(crate) now_unix_ms: i64,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self {
            settings: example(),
            view: MapView::new(),
            now_unix_ms: 1_000_000,
        }
    }

    pub(crate) fn apply(&mut self, manifests: &[Bytes]) -> Vec<clustermesh_api::v1::ObjectOutcome> {
        let plan = plan_apply(&self.view, &self.settings, manifests, self.now_unix_ms).unwrap();
        commit(&mut self.view, plan)
    }

    pub(crate) fn node(&mut self, name: &str, underlay: &str) {
        let plan = plan_hello(&self.view, &self.settings, &hello(name, underlay)).unwrap();
        commit(&mut self.view, plan);
    }

    pub(crate) fn endpoint(&mut self, node: &str, name: &str, address: &str) {
        let plan = plan_upsert(
            &self.view,
            &self.settings,
            node,
            &mut NodeMemo::default(),
            &claim(name, &[address]),
        )
        .unwrap();
        commit(&mut self.view, plan);
    }

    pub(crate) fn ready(&mut self, node: &str, address: &str, ready: bool) {
        let report = ReportReadiness {
            request_id: 0,
            endpoints: vec![EndpointReadiness {
                address: address.to_owned(),
                ports: vec![PortReadiness {
                    port: 8080,
                    protocol: "TCP".to_owned(),
                    ready,
                }],
            }],
        };
        let plan = plan_readiness(&self.view, node, &report).unwrap();
        commit(&mut self.view, plan);
    }
}

pub(crate) fn hello(node: &str, underlay: &str) -> Hello {
    Hello {
        node: node.to_owned(),
        boot_id: "boot".to_owned(),
        underlay_addresses: vec![underlay.to_owned()],
        ..Default::default()
    }
}

pub(crate) fn claim(name: &str, addresses: &[&str]) -> UpsertEndpoint {
    UpsertEndpoint {
        request_id: 0,
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
    }
}
