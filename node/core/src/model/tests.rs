//! The model on a world of two clusters.

use std::net::IpAddr;

use clustermesh_ebpf_abi::{FrontendKey, IdentitySplit, NODE_INDEX_LOCAL, NODES_MAX};

use super::*;
use crate::change::{
    AddressOwner, Affinity, BackendEndpoint, BackendPort, ClusterConfig, Condition, EndpointGroup,
    NodeRecord, ServicePort, SliceRecord,
};
use crate::settings::{EncryptionMode, EncryptionSettings, UnderlayPath};
use crate::tables::{address, host_key, ip};

mod absence;
mod encryption;
mod frontends;
mod listing;
mod mesh_prefixes;
mod nodes;
mod paths;
mod peers;
mod properties;

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
            encrypted_mtu_bytes: 1390,
        }),
        path_v6: None,
        ipcache_wanted_max: IPCACHE_WANTED_MAX,
        encryption: EncryptionSettings::default(),
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
    list(model_of(actual), changes)
}

fn list(mut model: Model, changes: Vec<Change>) -> Model {
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
