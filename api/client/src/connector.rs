//! One connection at a time, to the first endpoint in turn that takes it.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use clustermesh_process::ClientTls;
use http::Uri;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint as ChannelSettings};
use tracing::{debug, info};

use crate::{
    ClientError,
    config::{ClientConfig, Endpoint},
};

/// Time for one endpoint: resolve, connect, handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// First delay after a round in which no endpoint took the connection; doubled with every further one.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest delay: a healed link is used again this soon.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// An endpoint that cannot serve is left no sooner than this after it was connected to.
const ABANDON_AGE_MIN: Duration = Duration::from_millis(200);
/// A silent connection is asked for a sign of life.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// And given up without one.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 window of one stream, and of the connection: a listing must not wait for round trips of a WAN.
const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// Opens connections for one [`Client`](crate::Client).
pub(crate) struct Connector {
    endpoints: Vec<Endpoint>,
    tls: Option<ClientTls>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The endpoint that the next round starts with.
    next: usize,
    /// The endpoint of the last connection.
    current: Option<usize>,
    /// Ends the last connection.
    abandon: Option<oneshot::Sender<()>>,
    /// When it was made.
    since: Option<Instant>,
    failed_rounds: u32,
    not_before: Option<Instant>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("endpoint", &self.current())
            .finish_non_exhaustive()
    }
}

/// Why each endpoint did not take the connection.
#[derive(Debug)]
struct NoEndpoint(Vec<(String, String)>);

impl fmt::Display for NoEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (endpoint, reason)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{endpoint}: {reason}")?;
        }
        Ok(())
    }
}

impl std::error::Error for NoEndpoint {}

impl Connector {
    pub(crate) fn new(config: &ClientConfig) -> Result<Self, ClientError> {
        let endpoints = config.check()?;
        let needs_tls = endpoints.iter().any(|endpoint| endpoint.tls_name.is_some());
        let tls = match &config.tls {
            Some(paths) if needs_tls => Some(ClientTls::load(paths.clone())?),
            _ => None,
        };
        Ok(Self {
            endpoints,
            tls,
            state: Mutex::default(),
        })
    }

    /// The endpoint of the last connection, or all of them.
    pub(crate) fn current(&self) -> String {
        let current = self.state.lock().current;
        match current.and_then(|index| self.endpoints.get(index)) {
            Some(endpoint) => endpoint.url.clone(),
            None => {
                let urls: Vec<&str> = self
                    .endpoints
                    .iter()
                    .map(|endpoint| endpoint.url.as_str())
                    .collect();
                urls.join(", ")
            }
        }
    }

    /// Ends the connection, if another endpoint may serve better; the next call goes to that one. A connection that was
    /// just made stays: the complaint may be about the one before.
    pub(crate) fn abandon(&self) {
        let mut state = self.state.lock();
        let young = state
            .since
            .is_none_or(|since| since.elapsed() < ABANDON_AGE_MIN);
        if self.endpoints.len() > 1
            && !young
            && let Some(abandon) = state.abandon.take()
        {
            debug!(endpoint = ?state.current, "the endpoint cannot serve, another one is tried");
            // It may have ended already.
            let _ = abandon.send(());
        }
    }

    async fn connect(&self) -> Result<Connection, NoEndpoint> {
        let (first, not_before) = {
            let state = self.state.lock();
            (state.next, state.not_before)
        };
        if let Some(instant) = not_before {
            sleep_until(instant).await;
        }
        let mut reasons = Vec::new();
        let count = self.endpoints.len();
        for (index, endpoint) in self
            .endpoints
            .iter()
            .enumerate()
            .cycle()
            .skip(first % count)
            .take(count)
        {
            let attempt = timeout(CONNECT_TIMEOUT, self.connect_to(endpoint)).await;
            match attempt.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => {
                    let (abandon, abandoned) = oneshot::channel();
                    let mut state = self.state.lock();
                    // When this connection fails, the next endpoint has its turn.
                    *state = State {
                        next: index + 1,
                        current: Some(index),
                        abandon: Some(abandon),
                        since: Some(Instant::now()),
                        ..State::default()
                    };
                    info!(endpoint = %endpoint.url, "connected");
                    return Ok(Connection {
                        stream,
                        abandoned: Some(abandoned),
                    });
                }
                Err(error) => {
                    debug!(endpoint = %endpoint.url, %error, "no connection");
                    reasons.push((endpoint.url.clone(), error.to_string()));
                }
            }
        }
        let mut state = self.state.lock();
        let delay = BACKOFF_MIN
            .saturating_mul(1 << state.failed_rounds.min(10))
            .min(BACKOFF_MAX);
        state.failed_rounds = state.failed_rounds.saturating_add(1);
        state.not_before = Some(Instant::now() + delay);
        Err(NoEndpoint(reasons))
    }

    async fn connect_to(&self, endpoint: &Endpoint) -> io::Result<Stream> {
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
        stream.set_nodelay(true)?;
        match (&endpoint.tls_name, &self.tls) {
            (Some(name), Some(tls)) => {
                let connector = TlsConnector::from(tls.config());
                let stream = connector.connect(name.clone(), stream).await?;
                Ok(Stream::Tls(Box::new(stream)))
            }
            _ => Ok(Stream::Plain(stream)),
        }
    }
}

fn settings(connector: &Connector) -> Result<ChannelSettings, ClientError> {
    // The address that tonic sees is only a label: the connector decides. `http` keeps tonic's own TLS out.
    let (scheme, host) = match connector.endpoints.first() {
        Some(endpoint) if endpoint.tls_name.is_some() => ("https", endpoint.url.as_str()),
        _ => ("http", "http://localhost"),
    };
    let authority = host
        .split_once("://")
        .map_or(host, |(_, authority)| authority)
        .trim_end_matches('/');
    let invalid = |_| ClientError::Config(crate::ConfigError::Malformed(host.to_owned()));
    let origin: Uri = format!("{scheme}://{authority}").parse().map_err(invalid)?;
    Ok(ChannelSettings::from_static("http://clustermesh")
        .origin(origin)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A channel that connects with its first call.
pub(crate) fn channel(connector: &Arc<Connector>) -> Result<Channel, ClientError> {
    Ok(settings(connector)?.connect_with_connector_lazy(Dial(Arc::clone(connector))))
}

/// A channel that is connected.
pub(crate) async fn connected_channel(connector: &Arc<Connector>) -> Result<Channel, ClientError> {
    settings(connector)?
        .connect_with_connector(Dial(Arc::clone(connector)))
        .await
        .map_err(|error| ClientError::Connect(crate::error::chain(&error)))
}

struct Dial(Arc<Connector>);

impl tower::Service<Uri> for Dial {
    type Response = TokioIo<Connection>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connector = Arc::clone(&self.0);
        Box::pin(async move { Ok(TokioIo::new(connector.connect().await?)) })
    }
}

/// A stream that the connector can end.
struct Connection {
    stream: Stream,
    abandoned: Option<oneshot::Receiver<()>>,
}

impl Connection {
    fn poll_abandoned(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(abandoned) = &mut self.abandoned else {
            return Ok(());
        };
        match Pin::new(abandoned).poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => {
                self.abandoned = None;
                Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    "left for another endpoint",
                ))
            }
            // The connector has a newer connection; this one ends by itself.
            Poll::Ready(Err(_)) => {
                self.abandoned = None;
                Ok(())
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.poll_abandoned(cx)?;
        Pin::new(&mut this.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// A connection, in clear or not.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}
