//! Who comes with a wrong certificate, or with none: no call of theirs is answered, and nobody else notices.

use clustermesh_client::Client;
use clustermesh_process::TlsPaths;
use rcgen::{CertificateParams, DnType, KeyPair, date_time_ymd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bystander::Bystander;
use crate::support::{Cluster, Pki, client, http_get, put, soon};

const COUNTER: &str = "clustermesh_server_client_port_tls_handshakes_failed_total";

async fn handshakes_failed(cluster: &Cluster, tls: &TlsPaths) -> u64 {
    let page = http_get(cluster.address(), tls, "/metrics").await;
    page.lines()
        .find_map(|line| line.strip_prefix(COUNTER)?.trim().parse().ok())
        .unwrap()
}

async fn is_refused(stranger: &Client) -> String {
    let answer = soon("an answer", stranger.put(put("stolen", "x"))).await;
    answer.unwrap_err().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_are_wrong_expired_or_missing_give_nothing() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let bystander = Bystander::new(cluster.operator(&pki));
    let admin = pki.issue("operator", "c1", "admin-c1");
    let before = handshakes_failed(&cluster, &admin).await;

    let with_dates = |name: &str, from: i32, to: i32| {
        let dates = |params: &mut CertificateParams| {
            params.not_before = date_time_ymd(from, 1, 1);
            params.not_after = date_time_ymd(to, 1, 1);
        };
        pki.issue_with("operator", "c1", name, dates)
    };
    let other = Pki::new();
    let mut foreign = other.issue("operator", "c1", "admin-c1");
    // It trusts the server, which does not trust it.
    foreign.ca = pki.dir.path().join("ca.crt");
    let self_signed = self_signed(&pki);
    let strangers = [
        ("expired", with_dates("expired", 2001, 2002)),
        ("not valid yet", with_dates("early", 4001, 4002)),
        ("of another authority", foreign),
        ("signed by itself", self_signed),
    ];
    let count = strangers.len();
    for (what, tls) in strangers {
        let said = is_refused(&client(cluster.address(), tls)).await;
        assert!(!said.contains("etcdserver"), "{what} got an answer: {said}");
    }
    let after = handshakes_failed(&cluster, &admin).await;
    assert!(after >= before + count as u64, "{before}, then {after}");

    // Without a certificate the handshake ends too, and so does clear text.
    let mut clear = tokio::net::TcpStream::connect(cluster.address())
        .await
        .unwrap();
    clear
        .write_all(b"GET /version HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let mut said = Vec::new();
    let _closed = soon("the end", clear.read_to_end(&mut said)).await;
    assert!(!said.starts_with(b"HTTP"), "{said:?}");

    // A good certificate of no role, or of another cluster's: a connection, and no rights.
    for tls in [
        pki.issue("stranger", "c1", "x"),
        pki.issue("operator", "c9", "admin-c9"),
        pki.issue("node", "c9", "n"),
    ] {
        let said = is_refused(&client(cluster.address(), tls)).await;
        assert!(said.contains("permission denied"), "{said}");
    }
    let operator = cluster.operator(&pki);
    assert!(operator.get("stolen").await.unwrap().is_none());
    bystander.was_not_disturbed().await;
}

fn self_signed(pki: &Pki) -> TlsPaths {
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params
        .distinguished_name
        .push(DnType::OrganizationName, "clustermesh:operator");
    let key = KeyPair::generate().unwrap();
    let cert = params.self_signed(&key).unwrap();
    let path = |name: &str| pki.dir.path().join(name);
    let paths = TlsPaths {
        ca: path("ca.crt"),
        cert: path("self.crt"),
        key: path("self.key"),
    };
    std::fs::write(&paths.cert, cert.pem()).unwrap();
    std::fs::write(&paths.key, key.serialize_pem()).unwrap();
    paths
}
