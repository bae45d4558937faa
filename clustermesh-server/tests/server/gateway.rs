//! What plain HTTP clients see on the client port: pages, and etcd's JSON gateway.

use clustermesh_client::{Client, ClientConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Cluster, Pki, http, http_get, http_open, put, soon};

#[tokio::test(flavor = "multi_thread")]
async fn version_health_and_metrics_share_the_port() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let node = pki.issue("node", "c1", "w1");
    let operator = pki.issue("operator", "c1", "admin-c1");
    let version = http_get(cluster.address(), &node, "/version").await;
    assert!(
        version.contains(r#""etcdserver":"3.7.3""#)
            && version.contains(r#""storage":"3.7.0""#)
            && version.contains("clustermesh"),
        "{version}"
    );
    for path in ["/health", "/health?serializable=true&exclude=NOSPACE"] {
        let health = http_get(cluster.address(), &node, path).await;
        assert!(
            health.ends_with(r#"{"health":"true","reason":""}"#),
            "{health}"
        );
    }
    for path in [
        "/readyz",
        "/livez",
        "/readyz/linearizable_read",
        "/livez/serializable_read",
        "/readyz?exclude=startup",
    ] {
        let answer = http_get(cluster.address(), &node, path).await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nok\n"),
            "{path}: {answer}"
        );
    }
    let verbose = http_get(cluster.address(), &node, "/readyz?verbose").await;
    assert!(verbose.contains("[+]linearizable_read ok\n"), "{verbose}");
    let posted = http(cluster.address(), &node, "POST", "/health", "").await;
    assert!(posted.starts_with("HTTP/1.1 405"), "{posted}");

    let refused = http_get(cluster.address(), &node, "/metrics").await;
    assert!(
        refused.starts_with("HTTP/1.1 403") && refused.contains("operator"),
        "{refused}"
    );
    let metrics = http_get(cluster.address(), &operator, "/metrics").await;
    for name in [
        "clustermesh_server_raft_entries_applied_total",
        "clustermesh_server_client_port_connections 1",
        "clustermesh_server_answers_refused_total 0",
        "clustermesh_server_data_quota_bytes 2147483648",
        "clustermesh_server_compact_revision 0",
        "clustermesh_server_alarms 0",
    ] {
        assert!(metrics.contains(name), "{name}: {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_in_clear_is_there_when_asked_for_and_not_for_web_pages() {
    let pki = Pki::new();
    let plain = Cluster::start(&pki, 1, &[]).await;
    assert_eq!(plain.server().clear_address(), None);
    let cluster = Cluster::start_with(&pki, 1, &[], "listen_client_clear = \"127.0.0.1:0\"").await;
    let address = cluster.server().clear_address().unwrap();
    let client = Client::new(&ClientConfig {
        endpoints: vec![format!("http://{address}")],
        tls: None,
        server_name: None,
    })
    .unwrap();
    client.put(put("foo", "in clear")).await.unwrap();
    let seen = cluster.operator(&pki).get("foo").await.unwrap().unwrap();
    assert_eq!(&seen.value[..], b"in clear");
    let ask = async |headers: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request =
            format!("GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon("an answer", stream.read_to_string(&mut answer))
            .await
            .unwrap();
        answer
    };
    let version = ask("").await;
    assert!(version.contains("etcdserver"), "{version}");
    let refused = ask("Origin: http://evil.example\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
}

fn body(answer: &str) -> serde_json::Value {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("application/json"), "{head}");
    serde_json::from_str(body).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn json_calls_are_answered_with_etcds_names_and_errors() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = pki.issue("operator", "c1", "admin-c1");
    let node = pki.issue("node", "c1", "w1");
    let call = async |tls, path: &str, json: &str| {
        http(cluster.address(), tls, "POST", &format!("/v3/{path}"), json).await
    };
    // "foo" and "bar".
    let put = call(&operator, "kv/put", r#"{"key":"Zm9v","value":"YmFy"}"#).await;
    let revision: i64 = body(&put)["header"]["revision"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(revision > 1);
    let range = body(&call(&operator, "kv/range", r#"{"key":"Zm9v"}"#).await);
    assert_eq!(range["kvs"][0]["value"], "YmFy");
    assert_eq!(range["kvs"][0]["mod_revision"], revision.to_string());
    assert_eq!(range["count"], "1");
    let txn = r#"{"compare":[{"key":"Zm9v","target":"CREATE","createRevision":"0"}],
        "success":[{"request_put":{"key":"YQ=="}}],"failure":[{"requestRange":{"key":"Zm9v"}}]}"#;
    let txn = body(&call(&operator, "kv/txn", txn).await);
    assert!(txn.get("succeeded").is_none(), "{txn}");
    assert_eq!(
        txn["responses"][0]["response_range"]["kvs"][0]["key"],
        "Zm9v"
    );
    let grant = body(&call(&operator, "lease/grant", r#"{"TTL":60,"ID":"77"}"#).await);
    assert_eq!((&grant["ID"], &grant["TTL"]), (&"77".into(), &"60".into()));
    let alive = call(&operator, "lease/keepalive", r#"{"ID":"77"}"#).await;
    assert!(alive.contains(r#""TTL":"60""#), "{alive}");
    let status = body(&call(&operator, "maintenance/status", "").await);
    assert_eq!(status["version"], "3.7.3");

    for (tls, path, json, start, code, message) in [
        (
            &operator,
            "kv/put",
            "{}",
            "HTTP/1.1 400",
            3,
            "etcdserver: key is not provided",
        ),
        (
            &operator,
            "kv/lease/revoke",
            r#"{"ID":"5"}"#,
            "HTTP/1.1 404",
            5,
            "etcdserver: requested lease not found",
        ),
        (
            &operator,
            "kv/range",
            r#"{"key":"Zm9v","revision":"99999"}"#,
            "HTTP/1.1 400",
            11,
            "etcdserver: mvcc: required revision is a future revision",
        ),
        (&operator, "nothing", "{}", "HTTP/1.1 404", 5, "Not Found"),
        (
            &node,
            "kv/put",
            r#"{"key":"Zm9v"}"#,
            "HTTP/1.1 403",
            7,
            "etcdserver: permission denied",
        ),
    ] {
        let answer = call(tls, path, json).await;
        assert!(answer.starts_with(start), "{answer}");
        let error = body(&answer);
        assert_eq!(error["code"], code, "{error}");
        assert_eq!(error["message"], message);
        assert_eq!(error["error"], message);
    }
    let broken = call(&operator, "kv/put", r#"{"key":"#).await;
    assert!(broken.starts_with("HTTP/1.1 400"), "{broken}");
    let get = http_get(cluster.address(), &operator, "/v3/kv/range").await;
    assert!(get.starts_with("HTTP/1.1 501"), "{get}");
    let large = format!(r#"{{"key":"Zm9v","value":"{}"}}"#, "A".repeat(3 << 20));
    let large = call(&operator, "kv/put", &large).await;
    assert!(large.starts_with("HTTP/1.1 429"), "{large}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_by_json_gets_one_line_for_each_response() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let tls = pki.issue("operator", "c1", "admin-c1");
    let request = r#"{"create_request":{"key":"Zm9v"}} {"create_request":{"key":"YmFy"}}"#;
    let mut stream = http_open(cluster.address(), &tls, "POST", "/v3/watch", request).await;
    let mut seen = String::new();
    let mut until = async |text: &str| {
        soon("a line", async {
            let mut buffer = [0; 4096];
            while !seen.contains(text) {
                let read = stream.read(&mut buffer).await.unwrap();
                assert_ne!(read, 0, "{seen}");
                seen += std::str::from_utf8(&buffer[..read]).unwrap();
            }
        })
        .await;
    };
    until(r#""watch_id":"1","created":true"#).await;
    let client = cluster.operator(&pki);
    client.put(put("foo", "x")).await.unwrap();
    until(r#""events":[{"kv":{"key":"Zm9v""#).await;
    client.put(put("bar", "x")).await.unwrap();
    until(r#""events":[{"kv":{"key":"YmFy""#).await;
    assert!(seen.contains(r#"{"result":{"header":"#), "{seen}");
}
