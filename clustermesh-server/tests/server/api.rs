//! Services beside keys, watches and leases: streams of ranges and snapshots, locks, elections, maintenance, reflection.

use clustermesh_api::etcd::election::election_client::ElectionClient;
use clustermesh_api::etcd::election::{
    CampaignRequest, LeaderRequest, LeaderResponse, ProclaimRequest, ResignRequest,
};
use clustermesh_api::etcd::lock::lock_client::LockClient;
use clustermesh_api::etcd::lock::{LockRequest, UnlockRequest};
use clustermesh_api::etcd::rpc::downgrade_request::DowngradeAction;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::range_request::SortOrder;
use clustermesh_api::etcd::rpc::watch_client::WatchClient;
use clustermesh_api::etcd::rpc::watch_request::RequestUnion;
use clustermesh_api::etcd::rpc::{
    DowngradeRequest, HashRequest, MoveLeaderRequest, RangeRequest, SnapshotRequest,
    WatchCreateRequest, WatchRequest,
};
use clustermesh_client::Client;
use sha2::{Digest, Sha256};
use tonic::{Code, Streaming};

use crate::support::{Cluster, Pki, put, soon};

fn all(prefix: &str) -> RangeRequest {
    RangeRequest {
        key: format!("{prefix}/").into(),
        range_end: format!("{prefix}0").into(),
        ..RangeRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_is_streamed_in_order_at_one_revision() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    for index in 0..40 {
        client
            .put(put(format!("s/{index:02}"), "x".repeat(150_000)))
            .await
            .unwrap();
    }
    let mut kv = KvClient::new(client.channel()).max_decoding_message_size(64 << 20);
    let whole = kv.range(all("s")).await.unwrap().into_inner();
    for limit in [0, 25, 40, 41] {
        let request = RangeRequest { limit, ..all("s") };
        let mut stream = kv.range_stream(request).await.unwrap().into_inner();
        let mut messages = Vec::new();
        while let Some(message) = soon("a piece", stream.message()).await.unwrap() {
            if messages.is_empty() {
                // Not seen by a stream that has begun.
                client.put(put("s/39", "late")).await.unwrap();
            }
            messages.push(message.range_response.unwrap());
        }
        assert!(messages.len() > 1, "{} messages", messages.len());
        let last = messages.pop().unwrap();
        assert!(
            messages
                .iter()
                .all(|message| message.header.is_none() && !message.more)
        );
        let expected = if limit == 0 {
            40
        } else {
            40.min(usize::try_from(limit).unwrap())
        };
        assert_eq!(
            (last.count, last.more),
            (40, expected < 40),
            "limit {limit}"
        );
        assert!(last.header.is_some());
        messages.push(last);
        let keys: Vec<_> = messages
            .into_iter()
            .flat_map(|message| message.kvs)
            .map(|kv| kv.key)
            .collect();
        let wanted: Vec<_> = whole.kvs[..expected]
            .iter()
            .map(|kv| kv.key.clone())
            .collect();
        assert_eq!(keys, wanted, "limit {limit}");
    }
    let sorted = RangeRequest {
        sort_order: SortOrder::Descend.into(),
        ..all("s")
    };
    let refused = kv.range_stream(sorted).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (
            Code::Unimplemented,
            "RangeStream does not support custom sort orders"
        )
    );
    let counted = RangeRequest {
        count_only: true,
        ..all("s")
    };
    let mut stream = kv.range_stream(counted).await.unwrap().into_inner();
    let counted = stream
        .message()
        .await
        .unwrap()
        .unwrap()
        .range_response
        .unwrap();
    assert_eq!((counted.count, counted.kvs.len()), (40, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn maintenance_gives_a_snapshot_with_its_digest_and_refuses_as_etcd_does() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    client.put(put("a", "needle")).await.unwrap();
    let mut maintenance = MaintenanceClient::new(client.channel());
    let mut stream = maintenance
        .snapshot(SnapshotRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut bytes = Vec::new();
    let mut left = u64::MAX;
    while let Some(piece) = soon("a piece", stream.message()).await.unwrap() {
        assert!(piece.remaining_bytes <= left);
        left = piece.remaining_bytes;
        bytes.extend_from_slice(&piece.blob);
    }
    assert_eq!((left, bytes.len() % 512), (0, 32));
    let (content, digest) = bytes.split_at(bytes.len() - 32);
    assert_eq!(digest, Sha256::digest(content).as_slice());
    assert!(content.windows(6).any(|window| window == b"needle"));

    let hash = maintenance.hash(HashRequest {}).await.unwrap().into_inner();
    client.put(put("a", "other")).await.unwrap();
    let other = maintenance.hash(HashRequest {}).await.unwrap().into_inner();
    assert_ne!(hash.hash, other.hash);
    let downgrade = DowngradeRequest {
        version: "3.5".into(),
        ..DowngradeRequest::default()
    };
    let refused = maintenance.downgrade(downgrade).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (
            Code::InvalidArgument,
            "etcdserver: invalid downgrade target version"
        )
    );
    // Where etcd would go down one minor release, ours has nothing to go down to.
    let downgrade = DowngradeRequest {
        action: DowngradeAction::Enable.into(),
        version: "3.6".into(),
    };
    let refused = maintenance.downgrade(downgrade).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("an older clustermesh-server"),
        "{refused}"
    );
    let refused = maintenance
        .move_leader(MoveLeaderRequest { target_id: 1 })
        .await
        .unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (
            Code::FailedPrecondition,
            "etcdserver: bad leader transferee"
        )
    );
    let node = cluster.node(&pki, "w1");
    let refused = MaintenanceClient::new(node.channel())
        .snapshot(SnapshotRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_goes_to_those_who_wait_in_their_order() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let lock = |lease: i64| {
        let mut service = LockClient::new(client.channel());
        async move {
            let request = LockRequest {
                name: "door".into(),
                lease,
            };
            service.lock(request).await.map(tonic::Response::into_inner)
        }
    };
    let mut leases = Vec::new();
    for _ in 0..3 {
        leases.push(client.lease_grant(60, 0).await.unwrap().id);
    }
    let held = lock(leases[0]).await.unwrap();
    assert_eq!(held.key, format!("door/{:x}", leases[0]));
    let again = lock(leases[0]).await.unwrap();
    assert_eq!(again.key, held.key, "a session that has it gets it again");
    let waiting = async |count: usize| {
        soon("contenders", async {
            while client.range(all("door")).await.unwrap().kvs.len() != count {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    let given_up = tokio::spawn(lock(leases[1]));
    waiting(2).await;
    let last = tokio::spawn(lock(leases[2]));
    waiting(3).await;
    // Who gives up leaves the queue.
    given_up.abort();
    waiting(2).await;
    assert!(!last.is_finished());
    LockClient::new(client.channel())
        .unlock(UnlockRequest { key: held.key })
        .await
        .unwrap();
    let got = soon("the lock", last).await.unwrap().unwrap();
    assert_eq!(got.key, format!("door/{:x}", leases[2]));
    let error = lock(12345).await.unwrap_err();
    assert_eq!(error.message(), "etcdserver: requested lease not found");
}

async fn next(stream: &mut Streaming<LeaderResponse>) -> String {
    let response = soon("a leader", stream.message()).await.unwrap().unwrap();
    String::from_utf8(response.kv.unwrap().value.to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_election_has_one_leader_whom_observers_follow() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client: Client = cluster.operator(&pki);
    let mut election = ElectionClient::new(client.channel());
    let name = || LeaderRequest {
        name: "seat".into(),
    };
    let error = election.leader(name()).await.unwrap_err();
    assert_eq!(error.message(), "election: no leader");
    let mut observed = election.observe(name()).await.unwrap().into_inner();
    let mut leases = Vec::new();
    for _ in 0..2 {
        leases.push(client.lease_grant(60, 0).await.unwrap().id);
    }
    let campaign = |value: &'static str, lease: i64| {
        let mut election = ElectionClient::new(client.channel());
        tokio::spawn(async move {
            let request = CampaignRequest {
                name: "seat".into(),
                lease,
                value: value.into(),
            };
            election
                .campaign(request)
                .await
                .unwrap()
                .into_inner()
                .leader
                .unwrap()
        })
    };
    let first = soon("the seat", campaign("first", leases[0]))
        .await
        .unwrap();
    assert_eq!(next(&mut observed).await, "first");
    let second = campaign("second", leases[1]);
    let proclaim = ProclaimRequest {
        leader: Some(first.clone()),
        value: "news".into(),
    };
    election.proclaim(proclaim.clone()).await.unwrap();
    assert_eq!(next(&mut observed).await, "news");
    let leader = election
        .leader(name())
        .await
        .unwrap()
        .into_inner()
        .kv
        .unwrap();
    assert_eq!(
        (leader.key, &leader.value[..]),
        (first.key.clone(), &b"news"[..])
    );
    election
        .resign(ResignRequest {
            leader: Some(first),
        })
        .await
        .unwrap();
    let second = soon("the seat", second).await.unwrap();
    assert_eq!(next(&mut observed).await, "second");
    let error = election.proclaim(proclaim).await.unwrap_err();
    assert_eq!(error.message(), "election: not leader");
    assert!(second.rev > 0);
    let error = election
        .resign(ResignRequest { leader: None })
        .await
        .unwrap_err();
    assert_eq!(error.message(), "\"leader\" field must be provided");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_no_more_keeps_its_watches() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let create = |create: WatchCreateRequest| WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(create)),
    };
    let requests = [
        create(WatchCreateRequest {
            key: "a".into(),
            ..WatchCreateRequest::default()
        }),
        create(WatchCreateRequest {
            key: "a".into(),
            start_revision: -1,
            ..WatchCreateRequest::default()
        }),
        create(WatchCreateRequest {
            key: "b".into(),
            range_end: "a".into(),
            ..WatchCreateRequest::default()
        }),
    ];
    let mut request = tonic::Request::new(tokio_stream::iter(requests));
    request
        .metadata_mut()
        .insert("hasleader", "true".parse().unwrap());
    let mut stream = WatchClient::new(client.channel())
        .watch(request)
        .await
        .unwrap()
        .into_inner();
    assert!(stream.message().await.unwrap().unwrap().created);
    for reason in [
        "etcdserver: mvcc: required revision has been compacted",
        "mvcc: watcher range is empty",
    ] {
        let refused = stream.message().await.unwrap().unwrap();
        assert!(refused.created && refused.canceled && refused.watch_id == -1);
        assert_eq!(refused.cancel_reason, reason);
    }
    client.put(put("a", "1")).await.unwrap();
    let event = soon("an event", stream.message()).await.unwrap().unwrap();
    assert_eq!(event.events.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_listed_by_reflection_and_are_healthy() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let health = HealthClient::new(client.channel())
        .check(HealthCheckRequest::default())
        .await
        .unwrap();
    assert_eq!(health.into_inner().status, 1);
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    let mut answers = ServerReflectionClient::new(client.channel())
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<String> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for name in [
        "etcdserverpb.KV",
        "etcdserverpb.Maintenance",
        "v3lockpb.Lock",
        "v3electionpb.Election",
        "grpc.health.v1.Health",
    ] {
        assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
    }
}
