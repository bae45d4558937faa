//! Clients that are slower than anybody in earnest: cut off in time, bounded in number, counted, and nobody else notices.

use std::time::{Duration, Instant};

use clustermesh_api::etcd::rpc::WatchCreateRequest;
use clustermesh_client::Client;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::http2::{HTTP2_PREFACE, closed, frame, http2};
use crate::support::{Cluster, Pki, http_get, put, soon, tls_stream};

/// Between two bytes of a client that drips.
const DRIP: Duration = Duration::from_millis(50);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// HPACK: `:method: GET`, as often as one likes.
const METHOD_GET: u8 = 0x82;

/// A frame of stream 1.
fn frame_of(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    let mut bytes = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
    bytes.extend_from_slice(payload);
    bytes
}

/// HPACK of a call of `Watch`, nothing indexed but names.
fn watch_headers() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut text = |start: &[u8], text: &str| {
        bytes.extend_from_slice(start);
        bytes.push(u8::try_from(text.len()).unwrap());
        bytes.extend_from_slice(text.as_bytes());
    };
    // `:method: POST` and `:scheme: https`, `:path`, `:authority`, `content-type`, `te`.
    text(&[0x83, 0x87, 0x04], "/etcdserverpb.Watch/Watch");
    text(&[0x01], "c1");
    text(&[0x0f, 0x10], "application/grpc");
    text(&[0x00], "te");
    text(&[], "trailers");
    bytes
}

async fn assert_serves(client: &Client) {
    soon("a put beside it", client.put(put("beside", "x")))
        .await
        .unwrap();
}

/// A counter of the server.
async fn metric(cluster: &Cluster, pki: &Pki, name: &str) -> u64 {
    let tls = pki.issue("operator", "c1", "admin-c1");
    let page = http_get(cluster.address(), &tls, "/metrics").await;
    let name = format!("clustermesh_server_{name}_total ");
    let line = page.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("{name} is not in {page}"))
        .parse()
        .unwrap()
}

/// Writes `piece` again and again until the server closes.
async fn dripping(stream: impl AsyncRead + AsyncWrite + Unpin, piece: &[u8]) {
    let (reader, mut writer) = tokio::io::split(stream);
    let drip = async {
        while writer.write_all(piece).await.is_ok() && writer.flush().await.is_ok() {
            tokio::time::sleep(DRIP).await;
        }
    };
    tokio::select! {
        () = drip => {}
        () = closed(reader) => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_too_slow_to_ask_is_cut_off() {
    const LIMIT: Duration = Duration::from_secs(1);
    const LIMITS: &str = "limits = { tls_handshake_timeout_ms = 1000, http_start_timeout_ms = 1000, http1_head_timeout_ms = 1000 }";
    let pki = Pki::new();
    let cluster = Cluster::start_with(&pki, 1, &[], LIMITS).await;
    let client = cluster.operator(&pki);
    let address = cluster.address();
    let tls = pki.issue("operator", "c1", "admin-c1");
    let begun = Instant::now();
    let silent = TcpStream::connect(address).await.unwrap();
    let mut half_hello = TcpStream::connect(address).await.unwrap();
    half_hello
        .write_all(&[0x16, 3, 1, 0, 200, 1])
        .await
        .unwrap();
    let quiet = tls_stream(address, &tls, b"h2").await;
    let mut half_preface = tls_stream(address, &tls, b"h2").await;
    half_preface.write_all(&HTTP2_PREFACE[..10]).await.unwrap();
    let mut half_head = tls_stream(address, &tls, b"http/1.1").await;
    half_head
        .write_all(b"GET /version HTTP/1.1\r\nHost: a\r\n")
        .await
        .unwrap();
    // A byte now and then helps no one.
    let mut drip = tls_stream(address, &tls, b"http/1.1").await;
    drip.write_all(b"GET /version HTTP/1.1\r\nX: ")
        .await
        .unwrap();
    let dripping = async {
        while drip.write_all(b"x").await.is_ok() && drip.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    soon("the end of them all", async {
        tokio::join!(
            closed(silent),
            closed(half_hello),
            closed(quiet),
            closed(half_preface),
            closed(half_head),
            dripping,
            assert_serves(&client),
        )
    })
    .await;
    let took = begun.elapsed();
    assert!(took >= LIMIT, "{took:?}");
    let failed = metric(&cluster, &pki, "client_port_tls_handshakes_failed").await;
    assert!(failed >= 4, "{failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_never_ends_costs_its_own_connection() {
    const STEP: Duration = Duration::from_secs(2);
    let pki = Pki::new();
    // A frame is looked at after one second and three; an unanswered ping ends the connection after four.
    let limits = "limits = { http_start_timeout_ms = 1000, keepalive_ms = 2000 }";
    let cluster = Cluster::start_with(&pki, 1, &[], limits).await;
    let client = cluster.operator(&pki);
    let tls = pki.issue("operator", "c1", "admin-c1");
    let begun = Instant::now();
    // HEADERS of 16 KiB, a byte at a time.
    let mut headers = http2(cluster.address(), &tls).await;
    headers
        .write_all(&[0, 64, 0, HEADERS, 4, 0, 0, 0, 1])
        .await
        .unwrap();
    // HEADERS that go on and on in frames of a byte.
    let mut continued = http2(cluster.address(), &tls).await;
    continued
        .write_all(&[0, 0, 1, HEADERS, 0, 0, 0, 0, 1, METHOD_GET])
        .await
        .unwrap();
    let more = [0, 0, 1, CONTINUATION, 0, 0, 0, 0, 1, METHOD_GET];
    // A client that says nothing at all any more.
    let silent = http2(cluster.address(), &tls).await;
    soon("the end of them all", async {
        tokio::join!(
            dripping(headers, &[METHOD_GET]),
            dripping(continued, &more),
            closed(silent),
            assert_serves(&client),
        )
    })
    .await;
    assert!(begun.elapsed() >= STEP);
    let stuck = metric(&cluster, &pki, "client_port_stuck_connections_closed").await;
    assert!(stuck >= 1, "{stuck}");
    assert_serves(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_message_of_a_stream_is_given_up_and_a_quiet_stream_is_not() {
    const WITHIN: Duration = Duration::from_millis(700);
    let pki = Pki::new();
    let cluster = Cluster::start_with(&pki, 1, &[], "limits.request_timeout_ms = 700").await;
    let client = cluster.operator(&pki);
    let create = WatchCreateRequest {
        key: "w".into(),
        ..WatchCreateRequest::default()
    };
    let mut quiet = client.watch([create]).await.unwrap();
    assert!(quiet.next().await.unwrap().unwrap().created);
    let begun = Instant::now();
    let tls = pki.issue("operator", "c1", "admin-c1");
    let mut half = http2(cluster.address(), &tls).await;
    half.write_all(&frame_of(HEADERS, END_HEADERS, &watch_headers()))
        .await
        .unwrap();
    // A message's prefix and its first byte, then nothing.
    half.write_all(&frame_of(DATA, 0, &[0, 0, 0, 0, 9, 10]))
        .await
        .unwrap();
    soon("the end of the stream", async {
        loop {
            let (kind, flags, _) = frame(&mut half).await.unwrap();
            if kind == RST_STREAM || (kind == HEADERS && flags & END_STREAM != 0) {
                break;
            }
        }
    })
    .await;
    assert!(begun.elapsed() >= WITHIN, "{:?}", begun.elapsed());
    assert_eq!(metric(&cluster, &pki, "client_port_requests_late").await, 1);
    client.put(put("w", "x")).await.unwrap();
    let event = soon("an event", quiet.next()).await.unwrap().unwrap();
    assert_eq!(event.events.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_never_begin_keep_nobody_out() {
    const MOST: usize = 16;
    let pki = Pki::new();
    // No time limit helps within this test.
    let limits = "limits = { tls_handshake_timeout_ms = 600000, http_start_timeout_ms = 600000, max_unfinished_connections = 16 }";
    let cluster = Cluster::start_with(&pki, 1, &[], limits).await;
    let tls = pki.issue("operator", "c1", "admin-c1");
    let mut unfinished = Vec::new();
    for number in 0..4 * MOST {
        // Some say nothing, some stop within the preface.
        if number % 4 == 0 {
            let mut half = tls_stream(cluster.address(), &tls, b"h2").await;
            half.write_all(&HTTP2_PREFACE[..10]).await.unwrap();
            unfinished.push(tokio::spawn(closed(half)));
        } else {
            let silent = TcpStream::connect(cluster.address()).await.unwrap();
            unfinished.push(tokio::spawn(closed(silent)));
        }
    }
    // Who is in earnest comes in, and stays.
    let client = cluster.operator(&pki);
    for _ in 0..MOST {
        assert_serves(&cluster.operator(&pki)).await;
    }
    assert_serves(&client).await;
    let evicted = metric(&cluster, &pki, "client_port_unfinished_connections_evicted").await;
    assert!(evicted >= 3 * 16, "{evicted}");
    for oldest in unfinished.drain(..2 * MOST) {
        soon("the end of the oldest", oldest).await.unwrap();
    }
    for rest in unfinished {
        rest.abort();
    }
    assert_serves(&client).await;
}

/// Reads 1.3 MB values as JSON, in a receive buffer that holds little of them.
async fn large_answer(cluster: &Cluster) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    let address = cluster.server().clear_address().unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let body = r#"{"key":"bGFyZ2Uv","range_end":"bGFyZ2Uw"}"#;
    let head = format!(
        "POST /v3/kv/range HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_takes_nothing_is_cut_off_and_whoever_takes_little_is_not() {
    const STEP: Duration = Duration::from_millis(1500);
    /// Of about 100 KB a second.
    const PIECE_BYTES: usize = 5_000;
    let pki = Pki::new();
    let extra = "listen_client_clear = \"127.0.0.1:0\"\nlimits.keepalive_ms = 1500";
    let cluster = Cluster::start_with(&pki, 1, &[], extra).await;
    let client = cluster.operator(&pki);
    for number in 0..8 {
        let key = format!("large/{number}");
        client.put(put(key, "x".repeat(1_300_000))).await.unwrap();
    }
    let begun = Instant::now();
    let nothing = large_answer(&cluster).await;
    let mut little = large_answer(&cluster).await;
    let taking = async {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            little.read_exact(&mut piece).await.unwrap();
            tokio::time::sleep(DRIP).await;
        }
    };
    let cut = async {
        while metric(&cluster, &pki, "client_port_stuck_connections_closed").await == 0 {
            tokio::time::sleep(DRIP).await;
        }
        assert!(begun.elapsed() >= STEP, "{:?}", begun.elapsed());
        // As long again as the other one had at most.
        tokio::time::sleep(2 * STEP).await;
    };
    tokio::select! {
        () = taking => unreachable!(),
        () = soon("the end of who takes nothing", cut) => {}
    }
    let closed = metric(&cluster, &pki, "client_port_stuck_connections_closed").await;
    assert_eq!(closed, 1);
    drop(nothing);
    assert_serves(&client).await;
}
