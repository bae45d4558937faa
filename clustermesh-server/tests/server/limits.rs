//! Too much of everything, each by itself: etcd's error, or a clear one of ours, and nobody beside it is slowed.

use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::lease_client::LeaseClient;
use clustermesh_api::etcd::rpc::request_op::Request;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, PutRequest, PutResponse, RangeRequest, RequestOp, TxnRequest,
    WatchCreateRequest,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::bystander::Bystander;
use crate::support::{Cluster, Pki, client, http, put, soon, tls_stream};

/// What a request may have, and a little more.
const TOO_LARGE_BYTES: usize = 1_600_000;
/// What the gRPC library takes, and a little more.
const FAR_TOO_LARGE_BYTES: usize = 2_200_000;

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.unwrap_err();
    (status.code(), status.message().to_owned())
}

fn op(request: Request) -> RequestOp {
    RequestOp {
        request: Some(request),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_too_large_get_etcds_error() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let bystander = Bystander::new(cluster.operator(&pki));
    let mut kv = KvClient::new(cluster.operator(&pki).channel());
    let too_large = (
        Code::InvalidArgument,
        "etcdserver: request is too large".to_owned(),
    );
    let long = "x".repeat(TOO_LARGE_BYTES);
    assert_eq!(refused(kv.put(put(&long, "v")).await), too_large);
    assert_eq!(refused(kv.put(put("k", &long)).await), too_large);
    let half = || {
        op(Request::RequestPut(put(
            "half",
            "x".repeat(TOO_LARGE_BYTES / 2),
        )))
    };
    let other = || {
        op(Request::RequestPut(put(
            "other",
            "x".repeat(TOO_LARGE_BYTES / 2),
        )))
    };
    let txn = TxnRequest {
        success: vec![half(), other()],
        ..TxnRequest::default()
    };
    assert_eq!(refused(kv.txn(txn).await), too_large);
    // The gRPC library's limit: etcd's has another code for it.
    let huge = put("k", "x".repeat(FAR_TOO_LARGE_BYTES));
    assert_eq!(refused(kv.put(huge).await).0, Code::OutOfRange);

    let many = |count: usize| TxnRequest {
        success: (0..count)
            .map(|index| op(Request::RequestPut(put(format!("k{index}"), "v"))))
            .collect(),
        ..TxnRequest::default()
    };
    assert!(kv.txn(many(128)).await.is_ok());
    let too_many = (
        Code::InvalidArgument,
        "etcdserver: too many operations in txn request".to_owned(),
    );
    assert_eq!(refused(kv.txn(many(129)).await), too_many);
    let mut nested = TxnRequest::default();
    for _ in 0..40 {
        nested = TxnRequest {
            success: vec![op(Request::RequestTxn(nested))],
            ..TxnRequest::default()
        };
    }
    assert_eq!(refused(kv.txn(nested).await), too_many);
    let twice = TxnRequest {
        success: vec![
            op(Request::RequestPut(put("k", "1"))),
            op(Request::RequestPut(put("k", "2"))),
        ],
        ..TxnRequest::default()
    };
    let duplicate = refused(kv.txn(twice).await);
    assert_eq!(
        duplicate.1,
        "etcdserver: duplicate key given in txn request"
    );

    let tls = pki.issue("operator", "c1", "admin-c1");
    let json = format!(r#"{{"key":"YQ==","value":"{}"}}"#, "A".repeat(3 << 20));
    let answer = http(cluster.address(), &tls, "POST", "/v3/kv/put", &json).await;
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
    assert!(answer.contains("send smaller ones"), "{answer}");
    bystander.was_not_disturbed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_larger_than_any_request_is_answered_whole_or_in_parts() {
    const VALUES: usize = 24;
    const VALUE_BYTES: usize = 1 << 20;
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    for number in 0..VALUES {
        let large = put(format!("large/{number:02}"), "x".repeat(VALUE_BYTES));
        operator.put(large).await.unwrap();
    }
    let bystander = Bystander::new(cluster.operator(&pki));
    let all = RangeRequest {
        key: "large/".into(),
        range_end: "large0".into(),
        ..RangeRequest::default()
    };
    let mut kv =
        KvClient::new(operator.channel()).max_decoding_message_size(2 * VALUES * VALUE_BYTES);
    let whole = kv.range(all.clone()).await.unwrap().into_inner();
    assert_eq!((whole.kvs.len(), whole.count), (VALUES, 24));
    // A client with gRPC's usual limit takes it in parts.
    let mut parts = KvClient::new(operator.channel())
        .range_stream(all)
        .await
        .unwrap()
        .into_inner();
    let mut found = 0;
    while let Some(part) = soon("a part", parts.message()).await.unwrap() {
        found += part.range_response.unwrap().kvs.len();
    }
    assert_eq!(found, VALUES);
    bystander.was_not_disturbed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revisions_and_leases_that_are_not_there_get_etcds_errors() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    let mut kv = KvClient::new(operator.channel());
    let mut lease = LeaseClient::new(operator.channel());
    let mut revisions = Vec::new();
    for value in ["1", "2"] {
        let written = operator.put(put("k", value)).await.unwrap();
        revisions.push(written.header.unwrap().revision);
    }
    let (first, newest) = (revisions[0], revisions[1]);
    let at = |revision| RangeRequest {
        key: "k".into(),
        revision,
        ..RangeRequest::default()
    };
    let compact = |revision| CompactionRequest {
        revision,
        physical: false,
    };
    let future = (
        Code::OutOfRange,
        "etcdserver: mvcc: required revision is a future revision".to_owned(),
    );
    let compacted = (
        Code::OutOfRange,
        "etcdserver: mvcc: required revision has been compacted".to_owned(),
    );
    assert_eq!(refused(kv.range(at(newest + 1_000)).await), future);
    assert_eq!(refused(kv.range(at(i64::MAX)).await), future);
    assert_eq!(refused(kv.compact(compact(i64::MAX)).await), future);
    kv.compact(compact(newest)).await.unwrap();
    assert_eq!(refused(kv.compact(compact(newest)).await), compacted);
    assert_eq!(refused(kv.range(at(first)).await), compacted);
    let mut watch = operator
        .watch([WatchCreateRequest {
            key: "k".into(),
            start_revision: first,
            ..WatchCreateRequest::default()
        }])
        .await
        .unwrap();
    let ended = soon("the end of the watch", async {
        loop {
            let response = watch.next().await.unwrap().unwrap();
            if response.canceled {
                return response;
            }
        }
    })
    .await;
    assert_eq!(ended.compact_revision, newest);

    let not_found = (
        Code::NotFound,
        "etcdserver: requested lease not found".to_owned(),
    );
    let with_lease = PutRequest {
        lease: 4_242,
        ..put("k", "3")
    };
    assert_eq!(refused(kv.put(with_lease).await), not_found);
    let revoke = LeaseRevokeRequest { id: 4_242 };
    assert_eq!(refused(lease.lease_revoke(revoke).await), not_found);
    let asked = LeaseTimeToLiveRequest {
        id: 4_242,
        keys: true,
    };
    let left = lease.lease_time_to_live(asked).await.unwrap().into_inner();
    assert_eq!(left.ttl, -1);
    let beat = tokio_stream::once(LeaseKeepAliveRequest { id: 4_242 });
    let mut beats = lease.lease_keep_alive(beat).await.unwrap().into_inner();
    assert_eq!(beats.message().await.unwrap().unwrap().ttl, 0);
    let grant = |id, ttl| LeaseGrantRequest { id, ttl };
    let too_long = refused(lease.lease_grant(grant(1, i64::MAX)).await);
    assert_eq!(
        too_long,
        (
            Code::OutOfRange,
            "etcdserver: too large lease TTL".to_owned()
        )
    );
    lease.lease_grant(grant(1, 60)).await.unwrap();
    let exists = refused(lease.lease_grant(grant(1, 60)).await);
    assert_eq!(
        exists,
        (
            Code::FailedPrecondition,
            "etcdserver: lease already exists".to_owned()
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_the_limit_are_closed_and_those_before_them_go_on() {
    const LIMIT: usize = 16;
    let pki = Pki::new();
    let limits = "[limits]\nmax_connections = 16\n";
    let cluster = Cluster::start_with(&pki, 1, &[], limits).await;
    let bystander = Bystander::new(cluster.operator(&pki));
    let tls = pki.issue("operator", "c1", "admin-c1");
    // One place is the bystander's.
    let mut held = Vec::new();
    for _ in 1..LIMIT {
        let mut stream = tls_stream(cluster.address(), &tls, b"http/1.1").await;
        stream
            .write_all(b"GET /version HTTP/1.1\r\n")
            .await
            .unwrap();
        held.push(stream);
    }
    for _ in 0..4 {
        let mut surplus = tokio::net::TcpStream::connect(cluster.address())
            .await
            .unwrap();
        let mut byte = [0];
        let ended = soon("the end of a connection", surplus.read(&mut byte)).await;
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    }
    drop(held);
    // A place is free again.
    let late = client(cluster.address(), tls);
    soon("a place", async {
        while late.put(put("late", "x")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    bystander.was_not_disturbed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_over_the_limit_wait_and_other_connections_go_on() {
    const LIMIT: usize = 8;
    const LONG_ENOUGH_TO_BE_ANSWERED: Duration = Duration::from_millis(500);
    let pki = Pki::new();
    let limits = "[limits]\nmax_streams_per_connection = 8\n";
    let cluster = Cluster::start_with(&pki, 1, &[], limits).await;
    let bystander = Bystander::new(cluster.operator(&pki));
    let greedy = cluster.operator(&pki);
    let watch = || WatchCreateRequest {
        key: "w".into(),
        ..WatchCreateRequest::default()
    };
    let mut streams = Vec::new();
    for _ in 0..LIMIT {
        let mut stream = greedy.watch([watch()]).await.unwrap();
        assert!(
            soon("a watch", stream.next())
                .await
                .unwrap()
                .unwrap()
                .created
        );
        streams.push(stream);
    }
    let mut kv = KvClient::new(greedy.channel());
    let waits = timeout(LONG_ENOUGH_TO_BE_ANSWERED, kv.put(put("k", "v"))).await;
    assert!(waits.is_err(), "{waits:?}");
    streams.pop();
    let put = soon("a stream", kv.put(put("k", "v"))).await;
    assert!(put.is_ok(), "{put:?}");
    bystander.was_not_disturbed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_never_end_are_given_up() {
    const CALLS: usize = 64;
    const WITHIN: Duration = Duration::from_millis(1500);
    let pki = Pki::new();
    let cluster = Cluster::start_with(&pki, 1, &[], "limits.request_timeout_ms = 1500").await;
    let bystander = Bystander::new(cluster.operator(&pki));
    let slow = cluster.operator(&pki);
    let begun = std::time::Instant::now();
    // The head of a call, and never its message.
    let calls = (0..CALLS).map(|_| {
        let mut grpc = tonic::client::Grpc::new(slow.channel());
        async move {
            grpc.ready().await.unwrap();
            let codec = tonic_prost::ProstCodec::<PutRequest, PutResponse>::default();
            let path = http::uri::PathAndQuery::from_static("/etcdserverpb.KV/Put");
            let never = tonic::Request::new(tokio_stream::pending());
            grpc.client_streaming(never, path, codec).await
        }
    });
    let grpc = futures_util::future::join_all(calls);
    // A body of which a byte comes now and then.
    let tls = pki.issue("operator", "c1", "admin-c1");
    let mut drip = tls_stream(cluster.address(), &tls, b"http/1.1").await;
    drip.write_all(b"POST /v3/kv/put HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
        .await
        .unwrap();
    let json = async {
        let mut answer = Vec::new();
        let mut buffer = [0; 1024];
        loop {
            tokio::select! {
                read = drip.read(&mut buffer) => match read {
                    Ok(count @ 1..) => answer.extend_from_slice(&buffer[..count]),
                    _ => break,
                },
                () = tokio::time::sleep(Duration::from_millis(300)) => {
                    let _closed = drip.write_all(b" ").await;
                }
            }
            if answer.windows(4).any(|end| end == b"\r\n\r\n") {
                break;
            }
        }
        Bytes::from(answer)
    };
    let both = async { tokio::join!(grpc, json) };
    let (ended, json) = soon("the end of them all", both).await;
    assert!(begun.elapsed() >= WITHIN, "{:?}", begun.elapsed());
    for call in ended {
        let (code, text) = refused(call);
        assert_eq!(code, Code::DeadlineExceeded, "{text}");
        assert!(text.contains("did not arrive within 1.5s"), "{text}");
    }
    let json = String::from_utf8_lossy(&json);
    assert!(json.starts_with("HTTP/1.1 504 "), "{json}");
    bystander.was_not_disturbed().await;
}
