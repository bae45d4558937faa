//! Agents: their stream has no gap, their sessions confine them.

use std::collections::BTreeMap;

use clustermesh_api::etcd::rpc::DeleteRangeRequest;
use clustermesh_api::v1::agent_watch_response::Message;
use clustermesh_api::v1::refused::Reason;
use clustermesh_api::v1::session_request::Message as Asked;
use clustermesh_api::v1::session_response::Message as Answer;
use clustermesh_api::v1::{
    DeleteEndpoint, EndpointReadiness, Hello, ObjectRef, PortReadiness, ReportApplied,
    ReportReadiness, SourceRevision, SyncEndpoints, UpsertEndpoint, Welcome, node_status,
};
use clustermesh_client::{AgentWatch, Client, NodeSession};

use crate::support::{Cluster, Pki, put, soon, until};

/// What an agent holds.
#[derive(Default)]
struct Reader {
    map: BTreeMap<Vec<u8>, Vec<u8>>,
    revision: i64,
    store_id: u64,
    full_listing: bool,
}

impl Reader {
    fn take(&mut self, message: Message) {
        match message {
            Message::Start(start) => {
                self.store_id = start.store_id;
                self.full_listing = start.full_listing;
                if start.full_listing {
                    self.map.clear();
                }
            }
            Message::Listing(listing) => {
                self.revision = listing.revision;
                for kv in listing.kvs {
                    self.map.insert(kv.key.into(), kv.value.into());
                }
            }
            Message::Events(events) => {
                for event in events.events {
                    let kv = event.kv.unwrap();
                    assert!(
                        kv.mod_revision > self.revision,
                        "an event came twice or late"
                    );
                    match event.r#type {
                        0 => self.map.insert(kv.key.into(), kv.value.into()),
                        _ => self.map.remove(&kv.key[..]),
                    };
                }
                self.revision = events.revision;
            }
            Message::Progress(progress) => self.revision = progress.revision,
            Message::Watermark(_) => {}
        }
    }

    async fn read_to(&mut self, watch: &mut AgentWatch, revision: i64) {
        while self.revision < revision {
            let response = soon("a message of the agents' stream", watch.next())
                .await
                .unwrap()
                .unwrap();
            self.take(response.message.unwrap());
        }
    }
}

async fn visible(operator: &Client) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut map = BTreeMap::new();
    for prefix in ["cilium/", "clustermesh.io/"] {
        let listing = operator.list_prefix(prefix).collect(100_000).await.unwrap();
        for kv in listing.kvs {
            if !kv.key.starts_with(b"clustermesh.io/alloc/") {
                map.insert(kv.key.into(), kv.value.into());
            }
        }
    }
    map
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_stream_has_no_gap_over_listing_events_and_resume() {
    let pki = Pki::new();
    let mut cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    for index in 0..1_500 {
        operator
            .put(put(format!("cilium/state/test/{index}"), "before"))
            .await
            .unwrap();
        if index == 1_200 {
            break;
        }
    }
    let agent = cluster.node(&pki, "w1");
    let writer = tokio::spawn({
        let operator = operator.clone();
        async move {
            let mut last = 0;
            for index in 0..300 {
                let key = format!("cilium/state/test/{}", index * 7 % 1_300);
                let header = if index % 5 == 4 {
                    let request = DeleteRangeRequest {
                        key: key.into(),
                        ..Default::default()
                    };
                    operator.delete_range(request).await.unwrap().header
                } else {
                    operator
                        .put(put(key, format!("during {index}")))
                        .await
                        .unwrap()
                        .header
                };
                last = header.unwrap().revision;
            }
            let hidden = operator
                .put(put("clustermesh.io/alloc/test", "x"))
                .await
                .unwrap();
            last.max(hidden.header.unwrap().revision)
        }
    });
    let mut reader = Reader::default();
    let mut watch = agent.agent_watch(0, 0).await.unwrap();
    reader.read_to(&mut watch, 1).await;
    assert!(reader.full_listing);
    let last = writer.await.unwrap();
    reader.read_to(&mut watch, last).await;
    assert_eq!(reader.map, visible(&operator).await);

    drop(watch);
    cluster.stop().await;
    cluster.restart(&pki).await;
    let operator = cluster.operator(&pki);
    let last = operator
        .put(put("cilium/state/test/after", "x"))
        .await
        .unwrap()
        .header
        .unwrap()
        .revision;
    let agent = cluster.node(&pki, "w1");
    let mut watch = agent
        .agent_watch(reader.store_id, reader.revision)
        .await
        .unwrap();
    reader.read_to(&mut watch, last).await;
    assert!(
        !reader.full_listing,
        "the same store goes on where the agent was"
    );
    assert_eq!(reader.map, visible(&operator).await);
}

pub fn hello(node: &str, instance: &str, address: &str) -> Hello {
    Hello {
        node: node.to_owned(),
        underlay_addresses: vec![address.to_owned()],
        agent_version: "0.1.0".to_owned(),
        session_ttl_seconds: 5,
        instance_id: instance.to_owned(),
        ..Hello::default()
    }
}

async fn answer(session: &mut NodeSession) -> Answer {
    let response = soon("an answer", session.responses.next())
        .await
        .unwrap()
        .unwrap();
    response.message.unwrap()
}

pub async fn welcome(client: &Client, hello: Hello) -> (NodeSession, Welcome) {
    let mut session = client.node_session(hello).await.unwrap();
    match answer(&mut session).await {
        Answer::Welcome(welcome) => (session, welcome),
        other => panic!("{other:?}"),
    }
}

fn workload(name: &str) -> bytes::Bytes {
    format!(
        r#"{{"apiVersion":"clustermesh.io/v1","kind":"Workload","metadata":{{"namespace":"shop","name":"{name}","labels":{{"app":"cart"}}}},"spec":{{}}}}"#
    )
    .into()
}

fn service() -> bytes::Bytes {
    r#"{"apiVersion":"clustermesh.io/v1","kind":"Service","metadata":{"namespace":"shop","name":"cart","annotations":{"service.cilium.io/global":"true"}},"spec":{"selector":{"app":"cart"},"ports":[{"name":"http","port":80,"targetPort":8080,"protocol":"TCP"}]}}"#.into()
}

fn upsert(request_id: u64, name: &str, address: &str) -> UpsertEndpoint {
    UpsertEndpoint {
        request_id,
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        addresses: vec![address.to_owned()],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_gets_pod_cidrs_and_writes_only_what_its_node_owns() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    let applied = operator
        .apply(vec![workload("cart-0"), service()], false)
        .await
        .unwrap();
    let identity = applied.objects[0].identity;
    assert!((65_536..131_072).contains(&identity), "{applied:?}");
    assert_eq!(applied.objects[1].addresses.len(), 1);

    let node = cluster.node(&pki, "w1");
    let (mut session, welcome) = welcome(&node, hello("w1", "one", "192.0.2.11")).await;
    assert_eq!(
        (
            welcome.cluster.as_str(),
            welcome.cluster_id,
            welcome.session_ttl_seconds
        ),
        ("c1", 1, 5)
    );
    let base = welcome
        .pod_cidr_v4
        .strip_suffix(".0/24")
        .unwrap()
        .to_owned();
    let record = operator
        .get("cilium/state/nodes/v1/c1/w1")
        .await
        .unwrap()
        .unwrap();
    let record = String::from_utf8(record.value.to_vec()).unwrap();
    assert!(
        record.contains(&format!("{base}.1")) && record.contains("192.0.2.11"),
        "{record}"
    );

    let address = format!("{base}.4");
    session
        .sender
        .send(Asked::UpsertEndpoint(upsert(1, "cart-0", &address)))
        .await
        .unwrap();
    session
        .sender
        .send(Asked::UpsertEndpoint(upsert(2, "cart-0", "10.1.200.9")))
        .await
        .unwrap();
    session
        .sender
        .send(Asked::UpsertEndpoint(upsert(
            3,
            "unknown",
            &format!("{base}.5"),
        )))
        .await
        .unwrap();
    let Answer::Ack(ack) = answer(&mut session).await else {
        panic!()
    };
    assert_eq!(ack.request_id, 1);
    assert!(ack.revision > applied.revision);
    for (id, reason) in [(2, Reason::NotOwned), (3, Reason::UnknownWorkload)] {
        let Answer::Refused(refused) = answer(&mut session).await else {
            panic!()
        };
        assert_eq!(
            (refused.request_id, refused.reason()),
            (id, reason),
            "{refused:?}"
        );
    }
    let key = format!("cilium/state/ip/v1/default/{address}");
    let pair = operator.get(key.clone()).await.unwrap().unwrap();
    let pair = String::from_utf8(pair.value.to_vec()).unwrap();
    assert!(
        pair.contains(&format!("\"ID\":{identity}")) && pair.contains("\"HostIP\":\"192.0.2.11\""),
        "{pair}"
    );

    let readiness = ReportReadiness {
        request_id: 4,
        endpoints: vec![EndpointReadiness {
            address: address.clone(),
            ports: vec![PortReadiness {
                port: 8080,
                protocol: "TCP".to_owned(),
                ready: true,
            }],
        }],
    };
    session
        .sender
        .send(Asked::ReportReadiness(readiness))
        .await
        .unwrap();
    assert!(matches!(answer(&mut session).await, Answer::Ack(ack) if ack.request_id == 4));
    until(
        &operator,
        "cilium/state/services/v1/c1/shop/cart",
        |value| value.is_some_and(|value| value.contains(&address)),
    )
    .await;
    let slices = operator
        .list_prefix("cilium/state/endpointslices/v1/c1/shop/")
        .collect(10)
        .await
        .unwrap();
    assert!(!slices.kvs.is_empty());

    let other = session.sender.send(Asked::SyncEndpoints(SyncEndpoints {
        request_id: 5,
        endpoints: vec![],
    }));
    other.await.unwrap();
    assert!(matches!(answer(&mut session).await, Answer::Ack(ack) if ack.request_id == 5));
    assert!(
        operator.get(key).await.unwrap().is_none(),
        "what the node does not have is gone"
    );
    session
        .sender
        .send(Asked::DeleteEndpoint(DeleteEndpoint {
            request_id: 6,
            addresses: vec![address],
        }))
        .await
        .unwrap();
    assert!(matches!(answer(&mut session).await, Answer::Ack(ack) if ack.request_id == 6));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_belongs_to_its_certificate_and_to_one_instance_at_a_time() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let node = cluster.node(&pki, "w1");
    let refusal = |answer: Answer| match answer {
        Answer::Refused(refused) => refused,
        other => panic!("{other:?}"),
    };
    let mut wrong = node
        .node_session(hello("w2", "one", "192.0.2.11"))
        .await
        .unwrap();
    assert_eq!(refusal(answer(&mut wrong).await).reason(), Reason::NotOwned);
    let (first, _) = welcome(&node, hello("w1", "one", "192.0.2.11")).await;
    let mut second = node
        .node_session(hello("w1", "two", "192.0.2.11"))
        .await
        .unwrap();
    let refused = refusal(answer(&mut second).await);
    assert_eq!(refused.reason(), Reason::Conflict);
    assert!(
        refused.message.contains("instance one"),
        "{}",
        refused.message
    );
    let other = cluster.node(&pki, "w2");
    let mut same_address = other
        .node_session(hello("w2", "three", "192.0.2.11"))
        .await
        .unwrap();
    assert_eq!(
        refusal(answer(&mut same_address).await).reason(),
        Reason::Conflict
    );
    drop(first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_makes_the_node_stale_and_deletes_nothing() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    let node = cluster.node(&pki, "w1");
    let (session, _) = welcome(&node, hello("w1", "one", "192.0.2.11")).await;
    let key = "clustermesh.io/sessions/v1/w1";
    until(&operator, key, |value| {
        value.is_some_and(|value| value.contains("connected"))
    })
    .await;
    let before = visible(&operator).await;
    drop(session);
    until(&operator, key, |value| {
        value.is_some_and(|value| value.contains("stale"))
    })
    .await;
    let mut after = visible(&operator).await;
    for (key, value) in before {
        let kept = after.remove(&key);
        assert!(
            kept.as_ref() == Some(&value) || key.ends_with(b"sessions/v1/w1"),
            "{}",
            String::from_utf8_lossy(&key)
        );
    }
    let status = operator.mesh_status().await.unwrap();
    assert_eq!(status.nodes[0].state(), node_status::State::Stale);

    let (session, _) = welcome(&node, hello("w1", "two", "192.0.2.11")).await;
    until(&operator, key, |value| {
        value.is_some_and(|value| value.contains("connected"))
    })
    .await;
    let objects = || {
        vec![ObjectRef {
            kind: "Node".to_owned(),
            name: "w1".to_owned(),
            ..Default::default()
        }]
    };
    assert!(
        operator
            .delete(objects())
            .await
            .unwrap_err()
            .to_string()
            .contains("stop its agent")
    );
    drop(session);
    until(&operator, key, |value| {
        value.is_some_and(|value| value.contains("stale"))
    })
    .await;
    operator.delete(objects()).await.unwrap();
    assert!(
        operator
            .get("cilium/state/nodes/v1/c1/w1")
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_successor_is_refused_is_lost_too() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    let (_w2, _) = welcome(&cluster.node(&pki, "w2"), hello("w2", "two", "192.0.2.12")).await;
    let node = cluster.node(&pki, "w1");
    let (_first, _) = welcome(&node, hello("w1", "one", "192.0.2.11")).await;
    // The same agent comes again, with an address that it may not have.
    let mut again = node
        .node_session(hello("w1", "one", "192.0.2.12"))
        .await
        .unwrap();
    assert!(matches!(answer(&mut again).await, Answer::Refused(_)));
    until(&operator, "clustermesh.io/sessions/v1/w1", |value| {
        value.is_some_and(|value| value.contains("stale"))
    })
    .await;
    // A node that never was connected gets no record by a refusal.
    let stranger = cluster.node(&pki, "w3");
    let mut refused = stranger
        .node_session(hello("w3", "three", "192.0.2.12"))
        .await
        .unwrap();
    assert!(matches!(answer(&mut refused).await, Answer::Refused(_)));
    assert!(
        operator
            .get("clustermesh.io/sessions/v1/w3")
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_when_the_last_node_reports_the_revision_and_names_who_lags() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    let node = cluster.node(&pki, "w1");
    let (session, welcome) = welcome(&node, hello("w1", "one", "192.0.2.11")).await;
    let mut wait = operator.wait(crate::support::PATIENCE).await.unwrap();
    let first = soon("progress", wait.next()).await.unwrap().unwrap();
    assert!(!first.done);
    assert_eq!((first.nodes_total, first.nodes_applied), (1, 0));
    assert_eq!(first.laggards[0].node, "w1");
    let target = first.targets[0].clone();
    let report = |revision| {
        Asked::ReportApplied(ReportApplied {
            sources: vec![SourceRevision {
                cluster: "c1".to_owned(),
                store_id: welcome.store_id,
                revision,
            }],
            ..Default::default()
        })
    };
    session
        .sender
        .send(report(target.revision - 1))
        .await
        .unwrap();
    let lagging = soon("progress", wait.next()).await.unwrap().unwrap();
    assert!(!lagging.done);
    session.sender.send(report(target.revision)).await.unwrap();
    loop {
        let progress = soon("progress", wait.next()).await.unwrap().unwrap();
        if progress.done {
            assert_eq!(progress.nodes_applied, 1);
            break;
        }
    }
}
