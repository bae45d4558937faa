use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::*;

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    Authority {
        issuer: Issuer::new(params, key),
        pem,
    }
}

fn write(dir: &Path, authority: &Authority) -> TlsPaths {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let cert = params.signed_by(&key, &authority.issuer).unwrap();
    let paths = TlsPaths {
        ca: dir.join("ca.pem"),
        cert: dir.join("cert.pem"),
        key: dir.join("key.pem"),
    };
    std::fs::write(&paths.ca, &authority.pem).unwrap();
    std::fs::write(&paths.cert, cert.pem()).unwrap();
    std::fs::write(&paths.key, key.serialize_pem()).unwrap();
    paths
}

async fn handshake(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> bool {
    let (left, right) = tokio::io::duplex(64 * 1024);
    let name = rustls_pki_types::ServerName::try_from("localhost").unwrap();
    let (server, client) = tokio::join!(
        tokio_rustls::TlsAcceptor::from(server).accept(left),
        tokio_rustls::TlsConnector::from(client).connect(name, right)
    );
    server.is_ok() && client.is_ok()
}

#[tokio::test]
async fn both_sides_meet_over_mutual_tls_and_strangers_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let paths = write(dir.path(), &authority());
    let server = ServerTls::load(paths.clone()).unwrap();
    let client = ClientTls::load(paths).unwrap();
    assert!(handshake(server.config(), client.config()).await);
    let stranger = ClientTls::load(write(other.path(), &authority())).unwrap();
    assert!(!handshake(server.config(), stranger.config()).await);
}

#[tokio::test]
async fn changed_files_are_used_and_a_broken_file_keeps_the_old() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority();
    let paths = write(dir.path(), &authority);
    let tls = Reloading::load(paths.clone(), server_config).unwrap();
    let first = tls.current(Duration::ZERO);
    assert!(
        Arc::ptr_eq(&first, &tls.current(Duration::ZERO)),
        "unchanged files are not read again"
    );
    std::fs::write(&paths.cert, "nothing").unwrap();
    assert!(Arc::ptr_eq(&first, &tls.current(Duration::ZERO)));
    write(dir.path(), &authority);
    let second = tls.current(Duration::ZERO);
    assert!(!Arc::ptr_eq(&first, &second));
    let client = ClientTls::load(paths).unwrap();
    assert!(handshake(second, client.config()).await);
}

#[tokio::test]
async fn an_expired_certificate_does_not_replace_one_that_works() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority();
    let paths = write(dir.path(), &authority);
    let tls = Reloading::load(paths.clone(), server_config).unwrap();
    let first = tls.current(Duration::ZERO);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let cert = params.signed_by(&key, &authority.issuer).unwrap();
    std::fs::write(&paths.cert, cert.pem()).unwrap();
    std::fs::write(&paths.key, key.serialize_pem()).unwrap();
    assert!(Arc::ptr_eq(&first, &tls.current(Duration::ZERO)));
    let told = tls.state.lock().unwrap().refused.clone().unwrap();
    assert!(told.contains("cert.pem") && told.contains("2020"), "{told}");
    write(dir.path(), &authority);
    assert!(!Arc::ptr_eq(&first, &tls.current(Duration::ZERO)));
    assert_eq!(tls.state.lock().unwrap().refused, None);
}

#[test]
fn errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write(dir.path(), &authority());
    std::fs::remove_file(&paths.key).unwrap();
    let error = ServerTls::load(paths.clone()).unwrap_err().to_string();
    assert!(error.contains("key.pem"), "{error}");
    std::fs::write(&paths.ca, "").unwrap();
    let error = ClientTls::load(paths).unwrap_err().to_string();
    assert!(error.contains("ca.pem"), "{error}");
}
