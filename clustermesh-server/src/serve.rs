//! The client port: accept loop, mutual TLS (in clear where asked for), HTTP/1.1 and HTTP/2, gRPC services beside plain HTTP pages.

mod arrival;
mod handled;
mod progress;
mod taking;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clustermesh_process::{Drain, PeerIdentity, ServerTls};
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::service::Routes;
use tower::ServiceExt;
use tracing::{debug, warn};

use self::arrival::Arrivals;
use self::handled::{Call, Handled};
use self::progress::Stuck;
use self::taking::{OverTcp, Taking};
use crate::answers::hold_until_sent;
use crate::auth::Caller;
use crate::config::LimitsConfig;
use crate::etcd::needs_leader;
use crate::gateway::{self, Gateway};
use crate::metrics::ServeMetrics;
use crate::openings::{Evicted, Opening, Openings};
use crate::pages::Pages;
use crate::ports::not_bound;
use crate::store::Store;
use crate::tcp;

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
    /// On loopback, without certificates.
    clear: Option<TcpListener>,
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
    handled: Handled,
    openings: Openings,
    arrivals: Arrivals,
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
    /// Binds `address`, and `clear` for calls without TLS.
    ///
    /// # Errors
    /// When an address is taken or not of this machine.
    pub async fn bind(
        address: SocketAddr,
        clear: Option<SocketAddr>,
        parts: ClientPortParts,
    ) -> anyhow::Result<Self> {
        let bind = async |key: &str, address: SocketAddr| {
            TcpListener::bind(address)
                .await
                .map_err(|error| not_bound(key, address, &error))
        };
        Ok(Self {
            listener: bind("listen_client", address).await?,
            clear: match clear {
                Some(address) => Some(bind("listen_client_clear", address).await?),
                None => None,
            },
            shared: Arc::new(Shared {
                handled: Handled::new(&parts.metrics.handled)?,
                openings: Openings::new(
                    "client port",
                    parts.limits.max_unfinished_connections,
                    parts.metrics.unfinished_evicted.clone(),
                ),
                arrivals: Arrivals {
                    within: parts.limits.request_timeout(),
                    late: parts.metrics.requests_late.clone(),
                },
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

    /// The bound address for calls in clear.
    ///
    /// # Errors
    /// When the socket cannot say.
    pub fn clear_addr(&self) -> std::io::Result<Option<SocketAddr>> {
        self.clear.as_ref().map(TcpListener::local_addr).transpose()
    }

    /// Accepts until the drain begins; connections then finish their calls.
    pub async fn serve(self, drain: Drain) {
        let acceptor = Acceptor {
            slots: Arc::new(Semaphore::new(self.shared.limits.max_connections)),
            shared: self.shared,
            drain,
        };
        let clear = async {
            if let Some(listener) = &self.clear {
                acceptor.run(listener, Security::Clear).await;
            }
        };
        tokio::join!(acceptor.run(&self.listener, Security::Tls), clear);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Security {
    Tls,
    Clear,
}

struct Acceptor {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
    drain: Drain,
}

impl Acceptor {
    async fn run(&self, listener: &TcpListener, security: Security) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.drain.draining() => return,
            };
            let (stream, remote) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "accept on the client port");
                    tokio::time::sleep(ACCEPT_ERROR_PAUSE).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
                self.shared.metrics.connections_refused.inc();
                debug!(%remote, "connection limit reached");
                continue;
            };
            if let Err(error) = tcp::prepare(&stream) {
                debug!(%remote, %error, "TCP options");
            }
            let shared = Arc::clone(&self.shared);
            let drain = self.drain.clone();
            tokio::spawn(async move {
                shared.metrics.connections.inc();
                let begun = shared.openings.begin(remote.ip());
                match security {
                    Security::Tls => serve_tls(&shared, stream, remote, begun, &drain).await,
                    Security::Clear => {
                        let caller = Arc::new(Caller::local());
                        serve_http(&shared, stream, remote, caller, security, begun, &drain).await;
                    }
                }
                shared.metrics.connections.dec();
                drop(slot);
            });
        }
    }
}

async fn serve_tls(
    shared: &Arc<Shared>,
    stream: TcpStream,
    remote: SocketAddr,
    (opening, mut evicted): (Opening, Evicted),
    drain: &Drain,
) {
    let handshake = TlsAcceptor::from(shared.tls.config()).accept(stream);
    let handshake = tokio::time::timeout(shared.limits.tls_handshake_timeout(), handshake);
    let shaken = tokio::select! {
        shaken = handshake => shaken,
        () = evicted.told() => return,
    };
    let tls = match shaken {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            shared.metrics.handshakes_failed.inc();
            shared.tls.refused("client port", &remote, &error);
            return;
        }
        Err(_) => {
            shared.metrics.handshakes_failed.inc();
            debug!(%remote, "TLS handshake timed out");
            return;
        }
    };
    let caller = Arc::new(caller(shared, &tls, remote));
    let begun = (opening, evicted);
    serve_http(shared, tls, remote, caller, Security::Tls, begun, drain).await;
}

async fn serve_http<S>(
    shared: &Arc<Shared>,
    stream: S,
    remote: SocketAddr,
    caller: Arc<Caller>,
    security: Security,
    (opening, mut evicted): (Opening, Evicted),
    drain: &Drain,
) where
    S: AsyncRead + AsyncWrite + OverTcp + Unpin + Send + 'static,
{
    let service = service_fn(|request: Request<Incoming>| {
        let shared = Arc::clone(shared);
        let caller = Arc::clone(&caller);
        async move {
            if security == Security::Clear && request.headers().contains_key(header::ORIGIN) {
                return Ok(from_a_page());
            }
            Ok::<_, Infallible>(answer(&shared, caller, request).await)
        }
    });
    let limits = &shared.limits;
    let builder = builder(limits);
    let stream = Taking::new(
        stream,
        limits.keepalive(),
        shared.metrics.stuck_closed.clone(),
    );
    let (stream, progress) = progress::followed(stream, opening);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        stuck = progress.stuck(limits.http_start_timeout(), limits.keepalive()) => {
            match stuck {
                Stuck::NoHttp => shared.metrics.handshakes_failed.inc(),
                Stuck::InFrame => shared.metrics.stuck_closed.inc(),
            };
            debug!(%remote, ?stuck, "connection given up");
            return;
        }
        () = evicted.told() => return,
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

/// Any page that a browser of this machine shows could reach the port in clear: what browsers send, they mark.
fn from_a_page() -> Response<Body> {
    let mut response = Response::new(Body::new(Full::new(Bytes::from_static(
        b"calls from web pages are not taken in clear; use listen_client\n",
    ))));
    *response.status_mut() = StatusCode::FORBIDDEN;
    response
}

fn builder(limits: &LimitsConfig) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.http1_head_timeout());
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.max_streams_per_connection)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(limits.keepalive())
        .keep_alive_timeout(limits.keepalive());
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
    let call = shared.handled.counted(request.uri().path());
    request.extensions_mut().insert(caller);
    let one_message = call.as_ref().is_some_and(Call::takes_one_message);
    let request = request.map(|body| shared.arrivals.body(body, one_message));
    let response = match shared.routes.clone().oneshot(request).await {
        Ok(response) => hold_until_sent(response),
        Err(never) => match never {},
    };
    match call {
        Some(call) => call.follow(response),
        None => response,
    }
}
