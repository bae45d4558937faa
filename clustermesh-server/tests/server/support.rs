//! A certificate authority, clusters with running servers, clients of each role.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clustermesh_api::etcd::rpc::PutRequest;
use clustermesh_client::{Client, ClientConfig};
use clustermesh_process::TlsPaths;
use clustermesh_server::config::Config;
use clustermesh_server::server::Server;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair,
};
use tempfile::TempDir;

/// Longest wait for anything that a test expects.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for `future`, with a name for the failure.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// One CA with the certificates of all parties, in a folder.
pub struct Pki {
    pub dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        std::fs::write(
            dir.path().join("ca.crt"),
            params.self_signed(&key).unwrap().pem(),
        )
        .unwrap();
        Self {
            dir,
            issuer: Issuer::new(params, key),
        }
    }

    pub fn issue(&self, organisation: &str, cluster: &str, name: &str) -> TlsPaths {
        self.issue_with(organisation, cluster, name, |_| {})
    }

    /// With other dates, say.
    pub fn issue_with(
        &self,
        organisation: &str,
        cluster: &str,
        name: &str,
        adjust: impl FnOnce(&mut CertificateParams),
    ) -> TlsPaths {
        let stem = format!("{organisation}-{cluster}-{name}");
        let path = |end: &str| self.dir.path().join(format!("{stem}.{end}"));
        let paths = TlsPaths {
            ca: self.dir.path().join("ca.crt"),
            cert: path("crt"),
            key: path("key"),
        };
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(
            DnType::OrganizationName,
            format!("clustermesh:{organisation}"),
        );
        params
            .distinguished_name
            .push(DnType::OrganizationalUnitName, cluster);
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        adjust(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(&paths.cert, cert.pem()).unwrap();
        std::fs::write(&paths.key, key.serialize_pem()).unwrap();
        paths
    }
}

/// One cluster whose server can be started again with its data and its port.
pub struct Cluster {
    pub name: String,
    id: u32,
    pub dir: TempDir,
    port: u16,
    peers: Vec<(String, u16)>,
    /// `settle_seconds` of the configuration.
    pub settle_seconds: u32,
    /// Further top-level keys of the configuration.
    pub extra: &'static str,
    server: Option<Server>,
}

impl Cluster {
    /// Starts `c<id>`.
    pub async fn start(pki: &Pki, id: u32, peers: &[&Cluster]) -> Self {
        Self::start_with(pki, id, peers, "").await
    }

    /// With further top-level keys in the configuration.
    pub async fn start_with(pki: &Pki, id: u32, peers: &[&Cluster], extra: &'static str) -> Self {
        let mut cluster = Self {
            name: format!("c{id}"),
            id,
            dir: tempfile::tempdir().unwrap(),
            port: 0,
            peers: peers
                .iter()
                .map(|peer| (peer.name.clone(), peer.port))
                .collect(),
            settle_seconds: 0,
            extra,
            server: None,
        };
        cluster.restart(pki).await;
        cluster
    }

    /// The configuration file.
    pub fn configure(&self, pki: &Pki) -> PathBuf {
        let Self {
            name,
            id,
            port,
            settle_seconds,
            extra,
            ..
        } = self;
        let server = pki.issue("server", name, "server");
        let paths = |paths: &TlsPaths| {
            format!(
                "ca = {:?}\ncert = {:?}\nkey = {:?}\n",
                paths.ca, paths.cert, paths.key
            )
        };
        let mut text = format!(
            "data_dir = \"data\"\nlisten_client = \"127.0.0.1:{port}\"\nlisten_admin = \"127.0.0.1:0\"\ndrain_seconds = 5\n{extra}\n\
             [cluster]\nname = \"{name}\"\nid = {id}\nsettle_seconds = {settle_seconds}\npod_cidr_v4 = \"10.{id}.0.0/16\"\npod_cidr_v6 = \"fd00:{id}::/48\"\n\
             service_cidr_v4 = \"10.10{id}.0.0/16\"\n[tls]\n{}",
            paths(&server)
        );
        for (peer, port) in &self.peers {
            let tls = pki.issue("peer", name, &format!("remote-{peer}"));
            text += &format!(
                "[[peers]]\nname = \"{peer}\"\nendpoints = [\"127.0.0.1:{port}\"]\n{}",
                paths(&tls)
            );
        }
        let path = self.dir.path().join("server.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Starts the server, with the data and the port that it had.
    pub async fn restart(&mut self, pki: &Pki) {
        let config = Config::load(&self.configure(pki)).unwrap();
        let server = soon("the server's start", async {
            loop {
                match Server::start(&config).await {
                    Ok(server) => return server,
                    // A connection of another test has our port as its own end; it will not for long.
                    Err(error) if self.port != 0 && format!("{error:#}").contains("in use") => {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    Err(error) => panic!("{error:#}"),
                }
            }
        })
        .await;
        if self.settle_seconds == 0 {
            // Written beside the start: a test that counts revisions begins after it.
            let canary = format!("cilium/synced/{}/cilium/state/nodes/v1", self.name);
            let written = || {
                let store = server.store();
                store.read(|state| state.get(canary.as_bytes()).is_some())
            };
            soon("the canaries", async {
                while !written() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
        self.port = server.client_address().port();
        self.server = Some(server);
    }

    pub async fn stop(&mut self) {
        self.server.take().unwrap().shutdown().await;
    }

    pub fn add_peer(&mut self, peer: &Cluster) {
        self.peers.push((peer.name.clone(), peer.port));
    }

    /// A peer that is reached through `gate`.
    pub fn add_peer_behind(&mut self, peer: &Cluster, gate: &Gate) {
        self.peers.push((peer.name.clone(), gate.port));
    }

    pub fn forget_peers(&mut self) {
        self.peers.clear();
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn client(&self, tls: TlsPaths) -> Client {
        client(self.address(), tls)
    }

    pub fn operator(&self, pki: &Pki) -> Client {
        self.client(pki.issue("operator", &self.name, &format!("admin-{}", self.name)))
    }

    pub fn node(&self, pki: &Pki, name: &str) -> Client {
        self.client(pki.issue("node", &self.name, name))
    }
}

/// A link that can be cut: forwards a port while it is open.
pub struct Gate {
    port: u16,
    open: tokio::sync::watch::Sender<bool>,
}

impl Gate {
    pub async fn before(target: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (open, state) = tokio::sync::watch::channel(true);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut state = state.clone();
                tokio::spawn(async move {
                    if !*state.borrow() {
                        return;
                    }
                    let Ok(mut far) = tokio::net::TcpStream::connect(target).await else {
                        return;
                    };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut stream, &mut far) => {}
                        _ = state.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { port, open }
    }

    pub fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

pub fn client(address: SocketAddr, tls: TlsPaths) -> Client {
    Client::new(&ClientConfig {
        endpoints: vec![format!("https://{address}")],
        tls: Some(tls),
        server_name: None,
    })
    .unwrap()
}

pub fn put(key: impl Into<String>, value: impl Into<String>) -> PutRequest {
    PutRequest {
        key: key.into().into(),
        value: value.into().into(),
        ..PutRequest::default()
    }
}

/// Reads a key until `wanted` holds of its value.
pub async fn until(client: &Client, key: &str, wanted: impl Fn(Option<&str>) -> bool) {
    soon(&format!("{key} as wanted"), async {
        loop {
            let kv = client.get(key.to_owned()).await.unwrap();
            let value = kv
                .as_ref()
                .map(|kv| String::from_utf8_lossy(&kv.value).into_owned());
            if wanted(value.as_deref()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// One HTTP/1.1 GET on the client port.
pub async fn http_get(address: SocketAddr, tls: &TlsPaths, path: &str) -> String {
    http(address, tls, "GET", path, "").await
}

/// One HTTP/1.1 request on the client port, and the whole answer.
pub async fn http(
    address: SocketAddr,
    tls: &TlsPaths,
    method: &str,
    path: &str,
    body: &str,
) -> String {
    use tokio::io::AsyncReadExt;
    let mut stream = http_open(address, tls, method, path, body).await;
    let mut answer = Vec::new();
    // A peer that closes without TLS's own goodbye is no failure here.
    let _ = soon("an answer", stream.read_to_end(&mut answer)).await;
    String::from_utf8(answer).unwrap()
}

/// Sends an HTTP/1.1 request; the answer is left to be read.
pub async fn http_open(
    address: SocketAddr,
    tls: &TlsPaths,
    method: &str,
    path: &str,
    body: &str,
) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
    use tokio::io::AsyncWriteExt;
    let mut tls = tls_stream(address, tls, b"http/1.1").await;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    tls.write_all(request.as_bytes()).await.unwrap();
    tls
}

/// A connection after its handshake, for `protocol` (ALPN).
pub async fn tls_stream(
    address: SocketAddr,
    tls: &TlsPaths,
    protocol: &[u8],
) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
    let config = clustermesh_process::ClientTls::load(tls.clone())
        .unwrap()
        .config();
    let mut config = (*config).clone();
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
        .connect(rustls_name(address.ip()), stream)
        .await
        .unwrap()
}

fn rustls_name(address: std::net::IpAddr) -> tokio_rustls::rustls::pki_types::ServerName<'static> {
    tokio_rustls::rustls::pki_types::ServerName::IpAddress(address.into())
}

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_clustermesh-server"))
}
