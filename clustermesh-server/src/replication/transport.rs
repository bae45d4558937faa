//! The sending end: one connection per replica and kind of traffic, so that a snapshot delays no heartbeat.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use clustermesh_process::{ClientTls, said_once};
use clustermesh_raft::wire::{
    AppendRequest, AppendResponse, CallRequest, CallResponse, SnapshotPart,
};
use clustermesh_raft::{Target, Transport, TransportError};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use http::Uri;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::generated::peer_client::PeerClient;
use super::{
    CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MAX_PEER_MESSAGE_BYTES,
    STREAM_WINDOW_BYTES,
};
use crate::tcp;

/// Time to resolve, connect and shake hands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Calls,
    Entries,
    Snapshots,
}

type Slot = Arc<tokio::sync::Mutex<Option<PeerClient<Channel>>>>;

/// Connections to the other replicas; clones share them.
#[derive(Clone)]
pub struct GrpcTransport {
    tls: ClientTls,
    slots: Arc<Mutex<HashMap<(String, Kind), Slot>>>,
}

impl std::fmt::Debug for GrpcTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GrpcTransport")
    }
}

impl GrpcTransport {
    /// Shows the certificate in `tls` to the other replicas, and takes those that its CA signed.
    #[must_use]
    pub fn new(tls: ClientTls) -> Self {
        Self {
            tls,
            slots: Arc::default(),
        }
    }

    fn slot(&self, url: &str, kind: Kind) -> Slot {
        let mut slots = self.slots.lock();
        slots.entry((url.to_owned(), kind)).or_default().clone()
    }

    async fn client(
        &self,
        target: &Target,
        kind: Kind,
    ) -> Result<PeerClient<Channel>, TransportError> {
        let slot = self.slot(&target.peer_url, kind);
        if let Ok(connected) = slot.try_lock()
            && let Some(client) = &*connected
        {
            return Ok(client.clone());
        }
        // Goes on when whoever asked has no more time, a heartbeat say: the next one finds the connection made.
        let connecting = Self::connect(self.tls.clone(), slot, target.peer_url.clone());
        tokio::spawn(connecting)
            .await
            .unwrap_or_else(|error| Err(unreachable(&target.peer_url, error.to_string())))
    }

    async fn connect(
        tls: ClientTls,
        slot: Slot,
        url: String,
    ) -> Result<PeerClient<Channel>, TransportError> {
        let mut connected = slot.lock().await;
        if let Some(client) = &*connected {
            return Ok(client.clone());
        }
        let unreachable = |reason: String| unreachable(&url, reason);
        let dial = Dial::new(&url, tls).map_err(unreachable)?;
        let endpoint = Endpoint::from_static("http://replica")
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let connecting =
            tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(dial));
        let channel = connecting
            .await
            .map_err(|_| unreachable(format!("no connection within {CONNECT_TIMEOUT:?}")))?
            .map_err(|error| unreachable(said_once(&error)))?;
        let client = PeerClient::new(channel)
            .max_decoding_message_size(MAX_PEER_MESSAGE_BYTES)
            .max_encoding_message_size(usize::MAX);
        *connected = Some(client.clone());
        Ok(client)
    }

    /// The next message gets a new connection: the channel's own would hide whether anything was delivered.
    fn broken(&self, target: &Target, kind: Kind, status: &Status) -> TransportError {
        self.slots.lock().remove(&(target.peer_url.clone(), kind));
        TransportError::Broken {
            peer: target.peer_url.clone(),
            reason: status.message().to_owned(),
        }
    }
}

fn unreachable(url: &str, reason: String) -> TransportError {
    TransportError::Unreachable {
        peer: url.to_owned(),
        reason,
    }
}

impl Transport for GrpcTransport {
    fn call(
        &self,
        target: Target,
        request: CallRequest,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        let this = self.clone();
        Box::pin(async move {
            let mut client = this.client(&target, Kind::Calls).await?;
            match client.call(request).await {
                Ok(response) => Ok(response.into_inner()),
                Err(status) => Err(this.broken(&target, Kind::Calls, &status)),
            }
        })
    }

    fn append(
        &self,
        target: Target,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxFuture<
        'static,
        Result<BoxStream<'static, Result<AppendResponse, TransportError>>, TransportError>,
    > {
        let this = self.clone();
        Box::pin(async move {
            let mut client = this.client(&target, Kind::Entries).await?;
            let responses = client
                .append(SyncStream::new(requests))
                .await
                .map_err(|status| this.broken(&target, Kind::Entries, &status))?
                .into_inner();
            let responses = responses.map(move |response| {
                response.map_err(|status| this.broken(&target, Kind::Entries, &status))
            });
            Ok(responses.boxed())
        })
    }

    fn install_snapshot(
        &self,
        target: Target,
        parts: BoxStream<'static, SnapshotPart>,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        let this = self.clone();
        Box::pin(async move {
            let mut client = this.client(&target, Kind::Snapshots).await?;
            match client.install_snapshot(SyncStream::new(parts)).await {
                Ok(response) => Ok(response.into_inner()),
                Err(status) => Err(this.broken(&target, Kind::Snapshots, &status)),
            }
        })
    }
}

/// gRPC wants a stream that may be looked at from several threads; one lock that nobody contends for makes it so.
struct SyncStream<T>(Mutex<BoxStream<'static, T>>);

impl<T> SyncStream<T> {
    fn new(stream: BoxStream<'static, T>) -> Self {
        Self(Mutex::new(stream))
    }
}

impl<T> futures_util::Stream for SyncStream<T> {
    type Item = T;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.get_mut().0.get_mut().as_mut().poll_next(cx)
    }
}

struct Dial {
    host: String,
    port: u16,
    name: ServerName<'static>,
    tls: ClientTls,
}

impl Dial {
    fn new(url: &str, tls: ClientTls) -> Result<Self, String> {
        let malformed = || format!("{url:?} is not https://HOST:PORT");
        let uri: Uri = url.parse().map_err(|_| malformed())?;
        let host = uri.host().ok_or_else(malformed)?.trim_matches(['[', ']']);
        Ok(Self {
            host: host.to_owned(),
            port: uri.port_u16().ok_or_else(malformed)?,
            name: ServerName::try_from(host.to_owned()).map_err(|_| malformed())?,
            tls,
        })
    }
}

impl tower::Service<Uri> for Dial {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let (host, port, name) = (self.host.clone(), self.port, self.name.clone());
        let tls = self.tls.clone();
        Box::pin(async move {
            let stream = TcpStream::connect((host.as_str(), port)).await?;
            tcp::prepare(&stream)?;
            let connecting = TlsConnector::from(tls.config()).connect(name, stream);
            let stream = connecting.await.inspect_err(|error| {
                let place = "connection to another replica";
                tls.refused(place, &format_args!("{host}:{port}"), error);
            })?;
            Ok(TokioIo::new(stream))
        })
    }
}
