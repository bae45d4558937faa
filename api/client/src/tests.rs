use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use clustermesh_api::{
    etcd::{
        mvcc::KeyValue,
        rpc::{
            CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
            PutRequest, PutResponse, RangeRequest, RangeResponse, RangeStreamResponse,
            ResponseHeader, TxnRequest, TxnResponse,
            kv_server::{Kv, KvServer},
        },
    },
    limits::LIST_PAGE_KEYS,
};
use clustermesh_process::ServerTls;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, transport::Server};

use super::*;

/// A store that is written to behind the reader's back: every Range moves its revision.
#[derive(Clone)]
struct MovingStore {
    keys: usize,
    /// It answers nothing.
    has_leader: bool,
    seen: Arc<Mutex<Vec<RangeRequest>>>,
}

impl MovingStore {
    fn new(keys: usize) -> Self {
        Self {
            keys,
            has_leader: true,
            seen: Arc::default(),
        }
    }
}

#[tonic::async_trait]
impl Kv for MovingStore {
    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        if !self.has_leader {
            return Err(Status::unavailable("etcdserver: no leader"));
        }
        let request = request.into_inner();
        let mut seen = self.seen.lock().unwrap();
        seen.push(request.clone());
        let present = 100 + i64::try_from(seen.len()).unwrap();
        let limit = usize::try_from(request.limit).unwrap();
        let all = (0..self.keys).map(|index| Bytes::from(format!("k/{index:05}")));
        let mut left = all.filter(|key| *key >= request.key && *key < request.range_end);
        let kvs: Vec<KeyValue> = left
            .by_ref()
            .take(limit)
            .map(|key| KeyValue {
                key,
                ..KeyValue::default()
            })
            .collect();
        Ok(Response::new(RangeResponse {
            header: Some(ResponseHeader {
                cluster_id: 7,
                revision: present,
                ..ResponseHeader::default()
            }),
            kvs,
            more: left.next().is_some(),
            count: 0,
        }))
    }

    type RangeStreamStream = ReceiverStream<Result<RangeStreamResponse, Status>>;

    async fn range_stream(
        &self,
        _: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn put(&self, _: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        Err(Status::permission_denied("etcdserver: permission denied"))
    }

    async fn delete_range(
        &self,
        _: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn txn(&self, _: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn compact(
        &self,
        _: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        Err(Status::unimplemented("no"))
    }
}

struct Running {
    address: SocketAddr,
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Running {
    fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}", self.address)
    }

    /// Stops the server; its port takes no connection and its connections are closed when this returns.
    async fn stop(self) {
        let _ = self.shutdown.send(());
        self.task.await.unwrap();
    }
}

async fn serve(store: MovingStore) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (shutdown, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let router = Server::builder().add_service(KvServer::new(store));
        let until = async { drop(stopped.await) };
        let incoming = TcpListenerStream::new(listener);
        router
            .serve_with_incoming_shutdown(incoming, until)
            .await
            .unwrap();
    });
    Running {
        address,
        shutdown,
        task,
    }
}

/// The same behind TLS, which is taken off before the server sees the connection.
async fn serve_tls(store: MovingStore, tls: ServerTls) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (shutdown, stopped) = oneshot::channel::<()>();
    let (sender, receiver) = mpsc::channel(8);
    let task = tokio::spawn(async move {
        let accept = async {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = tokio_rustls::TlsAcceptor::from(tls.config());
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let (mut near, far) = tokio::io::duplex(65_536);
                    tokio::spawn(async move {
                        tokio::io::copy_bidirectional(&mut stream, &mut near).await
                    });
                    sender.send(Ok::<_, std::io::Error>(far)).await.unwrap();
                }
            }
        };
        let router = Server::builder().add_service(KvServer::new(store));
        tokio::select! {
            () = accept => {}
            _ = stopped => {}
            served = router.serve_with_incoming(ReceiverStream::new(receiver)) => served.unwrap(),
        }
    });
    Running {
        address,
        shutdown,
        task,
    }
}

fn plain(endpoints: Vec<String>) -> ClientConfig {
    ClientConfig {
        endpoints,
        ..ClientConfig::default()
    }
}

/// A port that nothing listens on.
async fn closed_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn authority(dir: &Path) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    std::fs::write(dir.join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
    Issuer::new(params, key)
}

fn issue(dir: &Path, issuer: &Issuer<'static, KeyPair>, name: &str) -> TlsPaths {
    let mut params = CertificateParams::new(vec!["server.example".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, issuer).unwrap();
    let paths = TlsPaths {
        ca: dir.join("ca.crt"),
        cert: dir.join(format!("{name}.crt")),
        key: dir.join(format!("{name}.key")),
    };
    std::fs::write(&paths.cert, certificate.pem()).unwrap();
    std::fs::write(&paths.key, key.serialize_pem()).unwrap();
    paths
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let check = |url: &str| plain(vec![url.to_owned()]).check().unwrap_err();
    assert_eq!(
        plain(vec![]).check().unwrap_err(),
        ConfigError::EndpointCount(0)
    );
    assert!(matches!(
        check("https://10.0.0.1:2379"),
        ConfigError::MissingTls(_)
    ));
    for url in [
        "http://10.0.0.1:2379",
        "http://example.org:2379",
        "http://[2001:db8::1]:2379",
    ] {
        assert!(matches!(check(url), ConfigError::Plaintext(_)), "{url}");
    }
    for url in [
        "",
        "10.0.0.1:2379",
        "https://host",
        "https://host:2379/path",
        "ftp://127.0.0.1:1",
    ] {
        assert!(matches!(check(url), ConfigError::Malformed(_)), "{url}");
    }
    for url in [
        "http://127.0.0.1:1",
        "http://[::1]:1/",
        "http://localhost:1",
    ] {
        plain(vec![url.to_owned()]).check().unwrap();
    }
}

#[tokio::test]
async fn all_pages_of_a_listing_are_of_the_first_pages_revision() {
    let store = MovingStore::new(LIST_PAGE_KEYS * 2 + 1);
    let server = serve(store.clone()).await;
    let client = Client::connect(&plain(vec![server.url("http")]))
        .await
        .unwrap();
    let listing = client.list_prefix("k/").collect(10_000).await.unwrap();
    assert_eq!((listing.revision, listing.store_id), (101, 7));
    assert_eq!(listing.kvs.len(), LIST_PAGE_KEYS * 2 + 1);
    assert!(
        listing.kvs.windows(2).all(|pair| pair[0].key < pair[1].key),
        "each key once, in order"
    );
    let revisions: Vec<i64> = store
        .seen
        .lock()
        .unwrap()
        .iter()
        .map(|request| request.revision)
        .collect();
    assert_eq!(revisions, [0, 101, 101]);

    let error = client.list_prefix("k/").collect(300).await.unwrap_err();
    assert!(
        matches!(error, ClientError::TooMany { limit: 300, .. }),
        "{error}"
    );
    server.stop().await;
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over_and_a_lost_one_replaced() {
    let (first, second) = (
        serve(MovingStore::new(1)).await,
        serve(MovingStore::new(1)).await,
    );
    let dead = closed_port().await;
    let config = plain(vec![dead, first.url("http"), second.url("http")]);
    let client = Client::connect(&config).await.unwrap();
    assert_eq!(client.endpoint(), first.url("http"));
    client.get("k/00000").await.unwrap();
    let second_url = second.url("http");
    first.stop().await;
    // The call that finds the connection broken may fail; the one after it must not.
    let answer = match client.get("k/00000").await {
        Err(error) if error.is_transient() => client.get("k/00000").await,
        other => other,
    };
    answer.unwrap();
    assert_eq!(client.endpoint(), second_url);
    second.stop().await;
}

#[tokio::test]
async fn without_any_endpoint_the_error_names_all_of_them() {
    let (one, two) = (closed_port().await, closed_port().await);
    let config = plain(vec![one.clone(), two.clone()]);
    let error = Client::connect(&config).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&one) && text.contains(&two) && text.contains("refused"),
        "{text}"
    );
    assert!(error.is_transient());

    let error = Client::new(&config).unwrap().get("k").await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Unavailable));
    assert!(error.to_string().contains(&format!("{two}: ")), "{error}");
}

#[tokio::test]
async fn an_error_of_the_server_names_the_endpoint() {
    let server = serve(MovingStore::new(1)).await;
    let client = Client::new(&plain(vec![server.url("http")])).unwrap();
    let error = client.put(PutRequest::default()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{}: permission denied: etcdserver: permission denied",
            server.url("http")
        )
    );
    assert!(!error.is_transient());
    server.stop().await;
}

#[tokio::test]
async fn certificates_are_checked_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let issuer = authority(dir);
    let tls = ServerTls::load(issue(dir, &issuer, "server")).unwrap();
    let server = serve_tls(MovingStore::new(1), tls).await;
    let config = ClientConfig {
        endpoints: vec![server.url("https")],
        tls: Some(issue(dir, &issuer, "client")),
        server_name: Some("server.example".to_owned()),
    };
    let client = Client::connect(&config).await.unwrap();
    client.get("k/00000").await.unwrap();

    let unnamed = ClientConfig {
        server_name: None,
        ..config.clone()
    };
    let error = Client::connect(&unnamed).await.unwrap_err().to_string();
    assert!(
        error.contains("127.0.0.1") && error.contains("certificate"),
        "{error}"
    );

    let other = tempfile::tempdir().unwrap();
    let stranger = issue(other.path(), &authority(other.path()), "client");
    let foreign = ClientConfig {
        tls: Some(TlsPaths {
            ca: dir.join("ca.crt"),
            ..stranger
        }),
        ..config
    };
    // TLS 1.3 tells the client of a refusal only after its side of the handshake.
    if let Ok(client) = Client::connect(&foreign).await {
        client.get("k/00000").await.unwrap_err();
    }
    server.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_says_it_cannot_serve_is_left_for_the_next() {
    let mut leaderless = MovingStore::new(1);
    leaderless.has_leader = false;
    let (first, second) = (serve(leaderless).await, serve(MovingStore::new(1)).await);
    let client = Client::connect(&plain(vec![first.url("http"), second.url("http")]))
        .await
        .unwrap();
    let error = client.get("k/00000").await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
    assert!(client.endpoint().contains(&first.address.to_string()));
    let answered = async {
        // One that has just taken the connection is given a moment.
        while client.get("k/00000").await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), answered)
        .await
        .unwrap();
    assert!(client.endpoint().contains(&second.address.to_string()));
}
