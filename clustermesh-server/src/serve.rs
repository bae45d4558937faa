//! The client port: accept loop, mutual TLS, HTTP/1.1 and HTTP/2, gRPC services beside plain HTTP pages.

mod preface;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_process::{Drain, PeerIdentity, ServerTls};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::service::Routes;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::auth::Caller;
use crate::config::LimitsConfig;
use crate::etcd::answers::hold_until_sent;
use crate::etcd::needs_leader;
use crate::gateway::{self, Gateway};
use crate::metrics::ServeMetrics;
use crate::pages::Pages;
use crate::store::Store;

/// A client must have finished its TLS handshake by then.
pub const TLS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// After the handshake the first bytes of HTTP must have come by then; a client may be quiet after them.
pub const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// A quiet connection is pinged this often.
pub const HTTP2_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A ping must be answered by then, or the connection is closed.
pub const HTTP2_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Receive window of one stream.
const HTTP2_STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Receive window of one connection.
const HTTP2_CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// After a failed accept (no file descriptors, say) the loop rests so long.
const ACCEPT_ERROR_PAUSE: Duration = Duration::from_millis(100);

/// The port and what it serves.
#[derive(Debug)]
pub struct ClientPort {
    listener: TcpListener,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tls: ServerTls,
    routes: Routes,
    gateway: Gateway,
    pages: Pages,
    store: Store,
    cluster: Option<String>,
    limits: LimitsConfig,
    metrics: ServeMetrics,
}

/// What a [`ClientPort`] is made of.
#[derive(Debug)]
pub struct ClientPortParts {
    /// Certificate and client CA.
    pub tls: ServerTls,
    /// The gRPC services.
    pub routes: Routes,
    /// etcd's JSON gateway to them.
    pub gateway: Gateway,
    /// Plain HTTP pages.
    pub pages: Pages,
    /// Whose leader clients ask for.
    pub store: Store,
    /// Name of the own cluster: decides the callers' roles.
    pub cluster: Option<String>,
    /// Bounds of connections.
    pub limits: LimitsConfig,
    /// Counters of connections.
    pub metrics: ServeMetrics,
}

impl ClientPort {
    /// Binds `address`.
    ///
    /// # Errors
    /// When the address is taken or not of this machine.
    pub async fn bind(address: SocketAddr, parts: ClientPortParts) -> std::io::Result<Self> {
        Ok(Self {
            listener: TcpListener::bind(address).await?,
            shared: Arc::new(Shared {
                tls: parts.tls,
                routes: parts.routes.prepare(),
                gateway: parts.gateway,
                pages: parts.pages,
                store: parts.store,
                cluster: parts.cluster,
                limits: parts.limits,
                metrics: parts.metrics,
            }),
        })
    }

    /// The bound address.
    ///
    /// # Errors
    /// When the socket cannot say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts until the drain begins; connections then finish their calls.
    pub async fn serve(self, drain: Drain) {
        let slots = Arc::new(Semaphore::new(self.shared.limits.max_connections));
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = drain.draining() => return,
            };
            let (stream, remote) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "accept on the client port");
                    tokio::time::sleep(ACCEPT_ERROR_PAUSE).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                self.shared.metrics.connections_refused.inc();
                debug!(%remote, "connection limit reached");
                continue;
            };
            let shared = Arc::clone(&self.shared);
            let drain = drain.clone();
            tokio::spawn(async move {
                shared.metrics.connections.inc();
                serve_connection(&shared, stream, remote, &drain).await;
                shared.metrics.connections.dec();
                drop(slot);
            });
        }
    }
}

async fn serve_connection(
    shared: &Arc<Shared>,
    stream: TcpStream,
    remote: SocketAddr,
    drain: &Drain,
) {
    // Small messages (events, acknowledgements) must not wait for more.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%remote, %error, "TCP_NODELAY");
    }
    let handshake = TlsAcceptor::from(shared.tls.config()).accept(stream);
    let tls = match tokio::time::timeout(TLS_HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            shared.metrics.handshakes_failed.inc();
            debug!(%remote, %error, "TLS handshake");
            return;
        }
        Err(_) => {
            shared.metrics.handshakes_failed.inc();
            debug!(%remote, "TLS handshake timed out");
            return;
        }
    };
    let caller = Arc::new(caller(shared, &tls, remote));
    let service = service_fn(|request: Request<Incoming>| {
        let shared = Arc::clone(shared);
        let caller = Arc::clone(&caller);
        async move { Ok::<_, Infallible>(answer(&shared, caller, request).await) }
    });
    let builder = builder(&shared.limits);
    let (tls, preface) = preface::counted(tls);
    let connection = builder.serve_connection(TokioIo::new(tls), service);
    let mut connection = std::pin::pin!(connection);
    let late = async {
        tokio::time::sleep(PREFACE_TIMEOUT).await;
        if preface.is_complete() {
            std::future::pending::<()>().await;
        }
    };
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = late => {
            shared.metrics.handshakes_failed.inc();
            debug!(%remote, "no HTTP after the TLS handshake");
            return;
        }
        () = drain.draining() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                outcome = connection.as_mut() => outcome,
                () = drain.forced() => return,
            }
        }
    };
    if let Err(error) = outcome {
        debug!(%remote, %error, "connection ended");
    }
}

fn builder(limits: &LimitsConfig) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(TLS_HANDSHAKE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.max_streams_per_connection)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(HTTP2_KEEPALIVE_INTERVAL)
        .keep_alive_timeout(HTTP2_KEEPALIVE_TIMEOUT);
    builder
}

/// Once per connection: the certificate cannot change within it.
fn caller(
    shared: &Shared,
    tls: &tokio_rustls::server::TlsStream<TcpStream>,
    remote: SocketAddr,
) -> Caller {
    let leaf = tls
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first());
    match leaf.map(PeerIdentity::from_certificate) {
        Some(Ok(identity)) => Caller::new(&identity, shared.cluster.as_deref()),
        Some(Err(error)) => {
            warn!(%remote, %error, "a client's certificate gives no role");
            Caller::nobody(error.to_string())
        }
        None => Caller::nobody("no client certificate".to_owned()),
    }
}

async fn answer(
    shared: &Shared,
    caller: Arc<Caller>,
    mut request: Request<Incoming>,
) -> Response<Body> {
    if let Some(response) = shared.pages.respond(&caller, &request).await {
        return response.map(Body::new);
    }
    if request.uri().path().starts_with(gateway::PREFIX) {
        let response = shared.gateway.answer(&shared.routes, caller, request);
        return hold_until_sent(response.await);
    }
    if needs_leader(request.headers())
        && let Err(status) = shared.store.check_leader()
    {
        return status.into_http();
    }
    request.extensions_mut().insert(caller);
    match shared.routes.clone().oneshot(request.map(Body::new)).await {
        Ok(response) => hold_until_sent(response),
        Err(never) => match never {},
    }
}
