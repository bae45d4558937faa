//! etcd's services as clients see them.

use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::watch_create_request::FilterType;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, StatusRequest,
    TxnRequest, WatchCreateRequest, WatchResponse, request_op,
};
use clustermesh_client::WatchStream;
use tonic::Code;

use crate::support::{Cluster, Pki, put, soon};

async fn next(stream: &mut WatchStream) -> WatchResponse {
    let response = soon("a watch response", stream.next())
        .await
        .unwrap()
        .unwrap();
    assert_ne!(
        response.header.unwrap().cluster_id,
        0,
        "every message has a header"
    );
    response
}

fn watch(key: &str, range_end: &str) -> WatchCreateRequest {
    WatchCreateRequest {
        key: key.to_owned().into(),
        range_end: range_end.to_owned().into(),
        ..WatchCreateRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_written_read_and_compared_with_etcds_errors() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let first = client.put(put("a", "1")).await.unwrap().header.unwrap();
    let second = client.put(put("a", "2")).await.unwrap().header.unwrap();
    assert_eq!(second.revision, first.revision + 1);
    assert_eq!(second.cluster_id, cluster.server().store().cluster_id());
    let kv = client.get("a").await.unwrap().unwrap();
    assert_eq!((&kv.value[..], kv.version), (&b"2"[..], 2));
    let old = client
        .range(RangeRequest {
            key: "a".into(),
            revision: first.revision,
            ..Default::default()
        })
        .await
        .unwrap();
    assert_eq!(&old.kvs[0].value[..], b"1");

    let mut kv = KvClient::new(client.channel());
    kv.compact(CompactionRequest {
        revision: second.revision,
        physical: false,
    })
    .await
    .unwrap();
    let error = client
        .range(RangeRequest {
            key: "a".into(),
            revision: first.revision,
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert!(error.is_compacted());
    assert!(
        error
            .to_string()
            .contains("etcdserver: mvcc: required revision has been compacted"),
        "{error}"
    );
    let error = kv.put(PutRequest::default()).await.unwrap_err();
    assert_eq!(error.message(), "etcdserver: key is not provided");
    let large = kv
        .put(put("large", "x".repeat(1_600_000)))
        .await
        .unwrap_err();
    assert_eq!(
        (large.code(), large.message()),
        (Code::InvalidArgument, "etcdserver: request is too large")
    );
    let operation = |index: usize| RequestOp {
        request: Some(request_op::Request::RequestPut(put(
            format!("k{index}"),
            "x",
        ))),
    };
    let many = kv
        .txn(TxnRequest {
            success: (0..129).map(operation).collect(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(
        many.message(),
        "etcdserver: too many operations in txn request"
    );
    let status = MaintenanceClient::new(client.channel())
        .status(StatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(status.version, "3.7.3");
    assert_eq!(status.leader, status.header.unwrap().member_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_share_a_stream_and_begin_and_end_as_etcds_do() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let first = client
        .put(put("w/a", "1"))
        .await
        .unwrap()
        .header
        .unwrap()
        .revision;
    client.put(put("w/a", "2")).await.unwrap();
    let past = WatchCreateRequest {
        start_revision: first,
        prev_kv: true,
        ..watch("w/", "w0")
    };
    let deletes = WatchCreateRequest {
        filters: vec![FilterType::Noput.into()],
        watch_id: 7,
        ..watch("w/", "w0")
    };
    let mut stream = client.watch([past, deletes]).await.unwrap();
    let created = next(&mut stream).await;
    assert!(created.created && created.watch_id == 0);
    let mut events = Vec::new();
    let mut created_second = false;
    while events.len() < 2 || !created_second {
        let response = next(&mut stream).await;
        created_second |= response.created && response.watch_id == 7;
        events.extend(response.events);
    }
    assert_eq!(&events[0].kv.as_ref().unwrap().value[..], b"1");
    assert_eq!(&events[1].prev_kv.as_ref().unwrap().value[..], b"1");

    client
        .delete_range(DeleteRangeRequest {
            key: "w/a".into(),
            ..Default::default()
        })
        .await
        .unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let response = next(&mut stream).await;
        assert_eq!(response.events.len(), 1);
        assert_eq!(response.events[0].r#type, 1);
        seen.push(response.watch_id);
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 7]);

    let quiet = client
        .put(put("elsewhere", "1"))
        .await
        .unwrap()
        .header
        .unwrap()
        .revision;
    stream.request_progress().await.unwrap();
    let progress = next(&mut stream).await;
    assert_eq!((progress.watch_id, progress.events.len()), (-1, 0));
    assert!(progress.header.unwrap().revision >= quiet);

    stream.cancel(7).await.unwrap();
    let cancelled = next(&mut stream).await;
    assert!(cancelled.canceled && cancelled.watch_id == 7 && cancelled.compact_revision == 0);

    let duplicate = WatchCreateRequest {
        watch_id: 9,
        ..watch("x", "")
    };
    stream.create(duplicate.clone()).await.unwrap();
    assert!(next(&mut stream).await.created);
    stream.create(duplicate).await.unwrap();
    let refused = next(&mut stream).await;
    assert!(refused.created && refused.canceled && refused.watch_id == -1);

    KvClient::new(client.channel())
        .compact(CompactionRequest {
            revision: quiet,
            physical: false,
        })
        .await
        .unwrap();
    let compacted = WatchCreateRequest {
        start_revision: first,
        ..watch("w/", "w0")
    };
    stream.create(compacted).await.unwrap();
    assert!(next(&mut stream).await.created);
    let ended = next(&mut stream).await;
    assert!(ended.canceled);
    assert_eq!(ended.compact_revision, quiet);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_quiet_watch_that_wants_it_tells_its_revision_by_itself() {
    let pki = Pki::new();
    let often = "watch_progress_notify_interval_ms = 100\n";
    let cluster = Cluster::start_with(&pki, 1, &[], often).await;
    let client = cluster.operator(&pki);
    let asks = WatchCreateRequest {
        progress_notify: true,
        ..watch("w/", "w0")
    };
    let mut stream = client.watch([asks, watch("v/", "v0")]).await.unwrap();
    let mut created = Vec::new();
    for _ in 0..2 {
        created.push(next(&mut stream).await.watch_id);
    }
    let written = client.put(put("elsewhere", "1")).await.unwrap();
    let written = written.header.unwrap().revision;
    for _ in 0..3 {
        let progress = soon("a progress notification", next(&mut stream)).await;
        assert_eq!(progress.watch_id, created[0]);
        assert!(progress.events.is_empty() && !progress.canceled);
    }
    let progress = next(&mut stream).await;
    assert!(progress.header.unwrap().revision >= written);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_progress_request_is_answered_while_others_write_elsewhere() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let mut stream = client
        .watch([watch("w/", "w0"), watch("v/", "v0")])
        .await
        .unwrap();
    for _ in 0..2 {
        assert!(next(&mut stream).await.created);
    }
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..16 {
        let client = client.clone();
        writers.spawn(async move {
            loop {
                client
                    .put(put(format!("elsewhere/{writer}"), "1"))
                    .await
                    .unwrap();
            }
        });
    }
    let (mut known, mut rounds) = (0, 0);
    while rounds < 500 || known < 100 {
        rounds += 1;
        stream.request_progress().await.unwrap();
        let progress = next(&mut stream).await;
        assert!(progress.events.is_empty());
        let revision = progress.header.unwrap().revision;
        assert!(revision >= known, "progress went back");
        known = revision;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_expire_with_their_keys_and_keepalives_hold_them() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let lease = client.lease_grant(2, 0).await.unwrap();
    let held = client.lease_grant(2, 0).await.unwrap();
    let mut keepalive = client.lease_keep_alive(held.id).await.unwrap();
    assert_eq!(
        soon("a keepalive", keepalive.next())
            .await
            .unwrap()
            .unwrap()
            .ttl,
        2
    );
    for (key, id) in [("short", lease.id), ("held", held.id)] {
        let request = PutRequest {
            lease: id,
            ..put(key, "x")
        };
        client.put(request).await.unwrap();
    }
    let remaining = client.lease_time_to_live(lease.id, true).await.unwrap();
    assert_eq!((remaining.granted_ttl, remaining.keys.len()), (2, 1));
    let mut stream = client.watch([watch("short", "")]).await.unwrap();
    assert!(next(&mut stream).await.created);
    let expired = loop {
        keepalive.keep_alive(held.id).await.unwrap();
        keepalive.next().await.unwrap();
        match tokio::time::timeout(std::time::Duration::from_millis(300), stream.next()).await {
            Ok(response) => break response.unwrap().unwrap(),
            Err(_) => continue,
        }
    };
    assert_eq!(expired.events[0].r#type, 1);
    assert!(client.get("held").await.unwrap().is_some());
    assert_eq!(
        client
            .lease_time_to_live(lease.id, false)
            .await
            .unwrap()
            .ttl,
        -1
    );
    let request = PutRequest {
        lease: lease.id,
        ..put("late", "x")
    };
    let error = client.put(request).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("etcdserver: requested lease not found"),
        "{error}"
    );
    let error = client.lease_revoke(lease.id).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_confine_every_call() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let node = cluster.node(&pki, "w1");
    let peer = cluster.client(pki.issue("peer", "c2", "remote"));
    let stranger = cluster.client(pki.issue("operator", "c2", "admin-c2"));
    assert!(
        node.get("cilium/cluster-config/c1")
            .await
            .unwrap()
            .is_some()
    );
    assert!(
        peer.get("cilium/cluster-config/c1")
            .await
            .unwrap()
            .is_some()
    );
    for (client, key) in [
        (&node, "registry/a"),
        (&peer, "cilium/cache/nodes/v1/c3/w1"),
        (&peer, "clustermesh.io/services/v1/a/b"),
        (&stranger, "cilium/.heartbeat"),
    ] {
        let error = client.get(key).await.unwrap_err();
        assert_eq!(error.code(), Some(Code::PermissionDenied), "{key}");
        assert!(
            error.to_string().contains("etcdserver: permission denied"),
            "{error}"
        );
    }
    for client in [&node, &peer, &stranger] {
        let error = client
            .put(put("cilium/state/nodes/v1/c1/x", "{}"))
            .await
            .unwrap_err();
        assert_eq!(error.code(), Some(Code::PermissionDenied));
        assert_eq!(
            client.lease_grant(10, 0).await.unwrap_err().code(),
            Some(Code::PermissionDenied)
        );
    }
    assert_eq!(
        peer.agent_watch(0, 0).await.err().unwrap().code(),
        Some(Code::PermissionDenied)
    );
    assert_eq!(
        node.mesh_status().await.unwrap_err().code(),
        Some(Code::PermissionDenied)
    );
    let mut stream = peer.watch([watch("cilium/", "cilium0")]).await.unwrap();
    let refused = next(&mut stream).await;
    assert!(refused.created && refused.canceled && refused.watch_id == -1);
    assert_eq!(
        refused.cancel_reason,
        "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
    );
}
