//! What servers send to agents, and agents to servers: messages one after the other, each with its length before it.

use bytes::{Buf, Bytes};
use clustermesh_api::etcd::mvcc::event::EventType;
use clustermesh_api::etcd::mvcc::{Event, KeyValue};
use clustermesh_api::v1::agent_watch_response::Message as Sent;
use clustermesh_api::v1::session_request::Message as Asked;
use clustermesh_api::v1::{
    AgentWatchResponse, DeleteEndpoint, EndpointReadiness, Events, Hello, Listing, PortReadiness,
    ReportReadiness, SessionRequest, StreamStart, SyncEndpoints, UpsertEndpoint, Watermark,
};
use clustermesh_api::{IdentitySplit, Record, RecordKey};
use clustermesh_mesh::allocate::Plan;
use clustermesh_mesh::claims::{
    NodeMemo, SyncProgress, plan_delete_endpoint, plan_hello, plan_readiness, plan_sync,
    plan_upsert,
};
use clustermesh_mesh::manifests::plan_apply;
use clustermesh_mesh::{MapView, Step, View};
use clustermesh_node_core::decode::Decoder;
use clustermesh_node_core::progress::Position;
use clustermesh_node_core::tables::Tables;
use clustermesh_node_core::{Model, Settings, UnderlayPath};
use prost::Message;

use crate::peers;

const CLUSTER: &str = "c1";
const NODE: &str = "n1";
/// Steps of one sync: more would be no progress.
const SYNC_STEPS_MAX: usize = 100;

fn messages<M: Message + Default>(bytes: &[u8]) -> Vec<M> {
    let mut rest = Bytes::copy_from_slice(bytes);
    let mut found = Vec::new();
    while rest.has_remaining() {
        match M::decode_length_delimited(&mut rest) {
            Ok(message) => found.push(message),
            Err(_) => break,
        }
    }
    found
}

fn encoded<M: Message>(messages: &[M]) -> Vec<u8> {
    messages
        .iter()
        .flat_map(M::encode_length_delimited_to_vec)
        .collect()
}

fn node_model() -> Model {
    let path = Some(UnderlayPath {
        egress_ifindex: 2,
        mtu_bytes: 1450,
        encrypted_mtu_bytes: 1390,
    });
    let settings = Settings {
        cluster: CLUSTER.into(),
        cluster_id: 1,
        node: NODE.into(),
        underlay: vec![[192, 0, 2, 1].into()],
        split: clustermesh_ebpf_abi::IdentitySplit::CLUSTERS_255,
        direct_routing: false,
        path_v4: path,
        path_v6: None,
        ipcache_wanted_max: 512 * 1024,
        encryption: clustermesh_node_core::EncryptionSettings::default(),
    };
    Model::new(settings, Tables::default())
}

pub(crate) fn stream(bytes: &[u8]) -> bool {
    let decoder = Decoder::new(CLUSTER.into(), IdentitySplit::Clusters255);
    let mut model = node_model();
    let mut any = false;
    for message in messages::<AgentWatchResponse>(bytes) {
        any |= take(&mut model, &decoder, message);
        round(&mut model);
    }
    any
}

fn take(model: &mut Model, decoder: &Decoder, message: AgentWatchResponse) -> bool {
    let record =
        |model: &mut Model, key: &[u8], value: Option<&[u8]>| match decoder.decode(key, value) {
            Ok(change) => model.apply(change),
            Err(refusal) => model.refused().record(refusal),
        };
    match message.message {
        Some(Sent::Start(start)) => {
            if start.full_listing {
                model.begin_listing();
            }
        }
        Some(Sent::Listing(listing)) => {
            for kv in &listing.kvs {
                record(model, &kv.key, Some(&kv.value));
            }
            if listing.last {
                model.end_listing();
            }
        }
        Some(Sent::Events(events)) => {
            for event in &events.events {
                let Some(kv) = &event.kv else { continue };
                let put = event.r#type() == EventType::Put;
                record(model, &kv.key, put.then_some(kv.value.as_ref()));
            }
        }
        Some(Sent::Progress(_)) => {}
        Some(Sent::Watermark(watermark)) => {
            let position = Position {
                store_id: watermark.store_id,
                revision: watermark.revision,
            };
            model.progress(&watermark.cluster.into(), position);
        }
        None => return false,
    }
    true
}

/// A kernel that takes everything: nothing is left to do after it.
fn round(model: &mut Model) {
    let plan = model.plan();
    for step in plan.steps() {
        model.commit(&step);
    }
    model.finish();
    assert!(model.plan().is_empty(), "planned again without a change");
}

pub(crate) fn stream_seeds() -> Vec<Vec<u8>> {
    let lines = peers::seeds().pop().unwrap_or_default();
    let text = String::from_utf8(lines).unwrap_or_default();
    // The same records as this cluster's copy of the peer, and as its own.
    let kvs = |from: &str, to: &str| -> Vec<KeyValue> {
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(key, value)| KeyValue {
                key: key.replace(from, to).into(),
                value: value.to_owned().into(),
                ..KeyValue::default()
            })
            .collect()
    };
    let own: Vec<KeyValue> = kvs("c2", CLUSTER)
        .into_iter()
        .map(|kv| KeyValue {
            value: String::from_utf8_lossy(&kv.value)
                .replace("c2", CLUSTER)
                .replace("\"ClusterID\":2", "\"ClusterID\":1")
                .replace("\"clusterID\":2", "\"clusterID\":1")
                .replace("\"id\":2", "\"id\":1")
                .replace("131073", "65537")
                .replace("10.2.", "10.1.")
                .into(),
            key: String::from_utf8_lossy(&kv.key)
                .replace("131073", "65537")
                .replace("10.2.", "10.1.")
                .into(),
            ..kv
        })
        .collect();
    let copied = kvs("cilium/state", "cilium/cache");
    let message = |message| AgentWatchResponse {
        message: Some(message),
    };
    let start = message(Sent::Start(StreamStart {
        store_id: 1,
        replica_id: 2,
        cluster: CLUSTER.to_owned(),
        cluster_id: 1,
        full_listing: true,
        ..StreamStart::default()
    }));
    let listing = |kvs: &[KeyValue], last| {
        message(Sent::Listing(Listing {
            revision: 9,
            kvs: kvs.to_vec(),
            last,
        }))
    };
    let events = message(Sent::Events(Events {
        revision: 10,
        events: own
            .iter()
            .take(2)
            .map(|kv| Event {
                r#type: EventType::Delete.into(),
                kv: Some(kv.clone()),
                prev_kv: None,
            })
            .collect(),
    }));
    let watermark = message(Sent::Watermark(Watermark {
        cluster: "c2".to_owned(),
        store_id: 3,
        revision: 4,
    }));
    vec![
        encoded(&[start.clone(), listing(&own, true), events.clone()]),
        encoded(&[
            start,
            listing(&own, false),
            listing(&copied, true),
            watermark,
            events,
        ]),
    ]
}

pub(crate) fn session(bytes: &[u8]) -> bool {
    let settings = peers::settings();
    let mut view = MapView::new();
    prepare(&mut view);
    let mut memo = NodeMemo::default();
    let mut any = false;
    for request in messages::<SessionRequest>(bytes) {
        any |= match request.message {
            Some(Asked::Hello(hello)) => {
                // The certificate names the node; another name in the message ends the session.
                let hello = Hello {
                    node: NODE.to_owned(),
                    ..hello
                };
                let plan = plan_hello(&view, &settings, &hello);
                commit(&mut view, plan).is_some()
            }
            Some(Asked::UpsertEndpoint(claim)) => {
                let plan = plan_upsert(&view, &settings, NODE, &mut memo, &claim);
                commit(&mut view, plan).is_some()
            }
            Some(Asked::DeleteEndpoint(claim)) => {
                let plan = plan_delete_endpoint(&view, NODE, &claim);
                commit(&mut view, plan).is_some()
            }
            Some(Asked::ReportReadiness(report)) => {
                let plan = plan_readiness(&view, NODE, &report);
                commit(&mut view, plan).is_some()
            }
            Some(Asked::SyncEndpoints(sync)) => {
                let mut progress = SyncProgress::default();
                let mut steps = 0;
                loop {
                    steps += 1;
                    assert!(steps < SYNC_STEPS_MAX, "a sync without end: {sync:?}");
                    let plan = plan_sync(&view, &settings, NODE, &mut memo, &sync, &progress);
                    match commit(&mut view, plan) {
                        Some(Step::More(more)) => progress = more,
                        Some(Step::Done(_)) => break true,
                        None => break false,
                    }
                }
            }
            Some(Asked::Heartbeat(_) | Asked::ReportApplied(_)) | None => false,
        };
    }
    any
}

fn prepare(view: &mut MapView) {
    let workload = Bytes::from_static(
        br#"{"apiVersion":"clustermesh.io/v1","kind":"Workload","metadata":{"name":"p","namespace":"shop","labels":{"app":"cart"}},"spec":{}}"#,
    );
    let plan = plan_apply(view, &peers::settings(), &[workload], 1);
    assert!(commit(view, plan).is_some(), "the workload is not taken");
}

/// What is stored of a claim can be read by everyone. `None` when the claim is refused.
pub(crate) fn commit<T, E>(view: &mut MapView, plan: Result<Plan<T>, E>) -> Option<T> {
    let plan = plan.ok()?;
    assert!(plan.txn.holds(view), "planned on another view");
    for (key, value) in plan.txn.writes() {
        let (Some(value), false) = (value, key.starts_with(b"clustermesh.io/alloc/")) else {
            continue;
        };
        let record = RecordKey::parse(key).map(|key| Record::decode(&key, value));
        assert!(matches!(record, Ok(Ok(_))), "{key:?} {value:?}: {record:?}");
    }
    view.apply(plan.txn.writes().clone());
    assert!(view.revision() > 0);
    Some(plan.result)
}

pub(crate) fn session_seeds() -> Vec<Vec<u8>> {
    let message = |message| SessionRequest {
        message: Some(message),
    };
    let hello = message(Asked::Hello(Hello {
        node: NODE.to_owned(),
        boot_id: "b".to_owned(),
        underlay_addresses: vec!["192.0.2.1".to_owned(), "2001:db8::1".to_owned()],
        labels: [("zone".to_owned(), "a".to_owned())].into(),
        agent_version: "1".to_owned(),
        pod_cidrs_held: vec!["10.1.3.0/24".to_owned()],
        instance_id: "i".to_owned(),
        ..Hello::default()
    }));
    let claim = |address: &str| UpsertEndpoint {
        request_id: 1,
        namespace: "shop".to_owned(),
        name: "p".to_owned(),
        addresses: vec![address.to_owned()],
    };
    let upsert = message(Asked::UpsertEndpoint(claim("10.1.3.5")));
    let readiness = message(Asked::ReportReadiness(ReportReadiness {
        request_id: 2,
        endpoints: vec![EndpointReadiness {
            address: "10.1.3.5".to_owned(),
            ports: vec![PortReadiness {
                port: 8080,
                protocol: "TCP".to_owned(),
                ready: true,
            }],
        }],
    }));
    let sync = message(Asked::SyncEndpoints(SyncEndpoints {
        request_id: 3,
        endpoints: vec![claim("10.1.3.6")],
    }));
    let delete = message(Asked::DeleteEndpoint(DeleteEndpoint {
        request_id: 4,
        addresses: vec!["10.1.3.6".to_owned()],
    }));
    vec![
        encoded(std::slice::from_ref(&hello)),
        encoded(&[hello, upsert, readiness, sync, delete]),
    ]
}
