//! Clients that are broken or want too much: they get an answer or lose their connection, and nobody else notices.

use clustermesh_api::etcd::rpc::lease_client::LeaseClient;
use clustermesh_api::etcd::rpc::{
    LeaseGrantRequest, LeaseRevokeRequest, PutRequest, PutResponse, WatchCreateRequest,
};
use clustermesh_api::limits::MAX_WATCHES_PER_STREAM;
use clustermesh_client::Client;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::Code;

use crate::http2::{HTTP2_ACK, HTTP2_PING, closed, frame, http2};
use crate::support::{Cluster, Pki, put, soon, tls_stream};

async fn assert_serves(client: &Client) {
    soon("a put beside it", client.put(put("beside", "x")))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_its_own_connection_only() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let tls = pki.issue("operator", "c1", "admin-c1");
    let frames: [&[u8]; 5] = [
        // Longer than any frame may be.
        &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1],
        // DATA and WINDOW_UPDATE on a stream that is not open, then one of a wrong size.
        &[0, 0, 1, 0, 0, 0, 0, 0, 9, 7],
        &[0, 0, 2, 8, 0, 0, 0, 0, 0, 1, 2],
        // HEADERS that are no HPACK.
        &[0, 0, 4, 1, 4, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff],
        // SETTINGS of half a setting.
        &[0, 0, 3, 4, 0, 0, 0, 0, 0, 1, 2, 3],
    ];
    for bytes in frames {
        let mut stream = http2(cluster.address(), &tls).await;
        stream.write_all(bytes).await.unwrap();
        soon("the end of the connection", closed(stream)).await;
        assert_serves(&client).await;
    }
    for bytes in [&[0; 64][..], &[0xff; 200], b"HELO example.org\r\n\r\n"] {
        let mut stream = tls_stream(cluster.address(), &tls, b"http/1.1").await;
        stream.write_all(bytes).await.unwrap();
        soon("the end of the connection", closed(stream)).await;
        let mut stream = TcpStream::connect(cluster.address()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        soon("the end of the connection", closed(stream)).await;
        assert_serves(&client).await;
    }

    // A well-formed message of another kind: its first field is a number where bytes belong.
    let mut grpc = tonic::client::Grpc::new(client.channel());
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<LeaseRevokeRequest, PutResponse>::default();
    let path = http::uri::PathAndQuery::from_static("/etcdserverpb.KV/Put");
    let request = tonic::Request::new(LeaseRevokeRequest { id: 7 });
    let error = grpc.unary(request, path, codec).await.unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    assert_serves(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_of_an_idle_client_are_answered_and_never_held_against_it() {
    const PINGS: u8 = 100;
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let tls = pki.issue("operator", "c1", "admin-c1");
    // Clients ping every 15 s or so; that it is no call, or too often, ends connections of other servers.
    let mut stream = http2(cluster.address(), &tls).await;
    let mut answered = 0;
    for number in 0..PINGS {
        stream
            .write_all(&[
                0, 0, 8, HTTP2_PING, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number,
            ])
            .await
            .unwrap();
        while answered <= number {
            let (kind, flags, payload) = soon("a frame", frame(&mut stream)).await.unwrap();
            assert_ne!(kind, 7, "GOAWAY after {answered} pings: {payload:?}");
            if kind == HTTP2_PING && flags == HTTP2_ACK {
                assert_eq!(payload[7], number);
                answered += 1;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_watch_too_many_is_refused_and_the_others_go_on() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let client = cluster.operator(&pki);
    let watch = WatchCreateRequest {
        key: "w".into(),
        ..WatchCreateRequest::default()
    };
    let mut stream = client.watch([watch.clone()]).await.unwrap();
    for number in 0..=MAX_WATCHES_PER_STREAM {
        let response = soon("a watch response", stream.next())
            .await
            .unwrap()
            .unwrap();
        assert!(response.created);
        if number == MAX_WATCHES_PER_STREAM {
            assert!(response.canceled && response.watch_id == -1);
            assert!(
                response.cancel_reason.contains("another stream"),
                "{response:?}"
            );
        } else {
            assert!(!response.canceled, "{number}: {response:?}");
            stream.create(watch.clone()).await.unwrap();
        }
    }
    client.put(put("w", "x")).await.unwrap();
    let event = soon("an event", stream.next()).await.unwrap().unwrap();
    assert_eq!(event.events.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_count_against_the_quota_and_end_with_etcds_error() {
    const AT_ONCE: i64 = 64;
    let pki = Pki::new();
    let cluster = Cluster::start_with(&pki, 1, &[], "quota_bytes = 100000").await;
    let client = cluster.operator(&pki);
    let grant = async |id| {
        let request = LeaseGrantRequest { ttl: 600, id };
        LeaseClient::new(client.channel())
            .lease_grant(request)
            .await
    };
    let error = 'refused: {
        for first in (1..4_000).step_by(64) {
            let grants = (first..first + AT_ONCE).map(&grant);
            for answer in futures_util::future::join_all(grants).await {
                if let Err(error) = answer {
                    break 'refused error;
                }
            }
        }
        panic!("4,000 leases were granted within a quota of 100,000 bytes");
    };
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert_eq!(error.message(), "etcdserver: mvcc: database space exceeded");
    // What frees space goes on.
    LeaseClient::new(client.channel())
        .lease_revoke(LeaseRevokeRequest { id: 1 })
        .await
        .unwrap();
    let large = PutRequest {
        key: "k".into(),
        value: vec![b'x'; 2_000].into(),
        ..PutRequest::default()
    };
    let error = client.put(large).await.unwrap_err();
    assert!(error.to_string().contains("space exceeded"), "{error}");
}
