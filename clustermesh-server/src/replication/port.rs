//! The receiving end: accept loop, mutual TLS, and the certificate's role before anything is read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_process::{Organisation, PeerIdentity, ServerTls};
use clustermesh_raft::PeerHandler;
use clustermesh_raft::wire::{
    AppendRequest, AppendResponse, CallRequest, CallResponse, SnapshotPart,
};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use openraft_rt_tokio::TokioRuntime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, warn};

use super::generated::peer_server::{Peer, PeerServer};
use super::{
    CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MAX_PEER_MESSAGE_BYTES,
    STREAM_WINDOW_BYTES,
};
use crate::metrics::PeerPortMetrics;
use crate::openings::Openings;
use crate::tcp;

/// Connections of other replicas.
const MAX_CONNECTIONS: usize = 256;
/// Connections that have not shown yet whose they are; past it the oldest of the address that has most ends.
const MAX_UNFINISHED_CONNECTIONS: usize = 1_024;
/// A replica must have finished its TLS handshake by then.
const TLS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// After a failed accept (no file descriptors, say) the loop rests so long.
const ACCEPT_ERROR_PAUSE: Duration = Duration::from_millis(100);

/// The port that other replicas reach.
#[derive(Debug)]
pub struct PeerPort {
    listener: TcpListener,
    tls: ServerTls,
    /// Replicas of this cluster only; `None` for a plain store.
    cluster: Option<String>,
    routes: Routes,
    metrics: PeerPortMetrics,
}

impl PeerPort {
    /// Binds `address`; what comes in goes to `handler`.
    ///
    /// # Errors
    /// When the address is taken or not of this machine.
    pub async fn bind(
        address: SocketAddr,
        tls: ServerTls,
        cluster: Option<String>,
        handler: PeerHandler<TokioRuntime>,
        metrics: PeerPortMetrics,
    ) -> std::io::Result<Self> {
        let service = PeerServer::new(PeerService { handler })
            .max_decoding_message_size(MAX_PEER_MESSAGE_BYTES)
            .max_encoding_message_size(usize::MAX);
        Ok(Self {
            listener: TcpListener::bind(address).await?,
            tls,
            cluster,
            routes: Routes::new(service).prepare(),
            metrics,
        })
    }

    /// The bound address.
    ///
    /// # Errors
    /// When the socket cannot say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts until it is dropped.
    pub async fn serve(self) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let openings = Openings::new(
            "peer port",
            MAX_UNFINISHED_CONNECTIONS,
            self.metrics.unfinished_evicted.clone(),
        );
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let (stream, remote) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "accept on the peer port");
                    tokio::time::sleep(ACCEPT_ERROR_PAUSE).await;
                    continue;
                }
            };
            let (opening, mut evicted) = openings.begin(remote.ip());
            let (tls, cluster, routes) =
                (self.tls.clone(), self.cluster.clone(), self.routes.clone());
            let (metrics, places) = (self.metrics.clone(), Arc::clone(&places));
            connections.spawn(async move {
                let opened = tokio::select! {
                    opened = open(stream, remote, &tls, cluster.as_deref()) => opened,
                    () = evicted.told() => return,
                };
                drop(opening);
                let stream = match opened {
                    Ok(stream) => stream,
                    Err(reason) => {
                        metrics.handshakes_failed.inc();
                        debug!(%remote, reason, "not a connection of a replica");
                        return;
                    }
                };
                // Only replicas come so far.
                let Ok(_place) = places.try_acquire_owned() else {
                    metrics.connections_refused.inc();
                    warn!(%remote, limit = MAX_CONNECTIONS, "too many connections on the peer port");
                    return;
                };
                if let Err(reason) = serve_one(stream, routes).await {
                    debug!(%remote, reason, "connection of a replica ended");
                }
            });
        }
    }
}

/// Shakes hands; the other end is a replica of the cluster.
async fn open(
    stream: TcpStream,
    remote: SocketAddr,
    tls: &ServerTls,
    cluster: Option<&str>,
) -> Result<TlsStream<TcpStream>, String> {
    tcp::prepare(&stream).map_err(|error| error.to_string())?;
    let handshake = TlsAcceptor::from(tls.config()).accept(stream);
    let stream = tokio::time::timeout(TLS_HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| "TLS handshake timed out".to_owned())?
        .inspect_err(|error| tls.refused("peer port", &remote, error))
        .map_err(|error| format!("TLS handshake: {error}"))?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first());
    let identity = certificate
        .ok_or_else(|| "no certificate".to_owned())
        .and_then(|leaf| PeerIdentity::from_certificate(leaf).map_err(|error| error.to_string()));
    check(&identity?, cluster).inspect_err(|reason| warn!(reason, "refused on the peer port"))?;
    Ok(stream)
}

async fn serve_one(stream: TlsStream<TcpStream>, routes: Routes) -> Result<(), String> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
        .await
        .map_err(|error| error.to_string())
}

/// Only servers of the own cluster are replicas.
fn check(identity: &PeerIdentity, cluster: Option<&str>) -> Result<(), String> {
    if identity.organisation != Organisation::Server {
        return Err(format!(
            "the certificate of {:?} is of {}; replicas need {}",
            identity.common_name,
            identity.organisation.as_str(),
            Organisation::Server.as_str()
        ));
    }
    match cluster {
        Some(cluster) if identity.cluster != cluster => Err(format!(
            "the certificate of {:?} is of cluster {:?}, this replica of {cluster:?}",
            identity.common_name, identity.cluster
        )),
        _ => Ok(()),
    }
}

#[derive(Debug)]
struct PeerService {
    handler: PeerHandler<TokioRuntime>,
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn call(&self, request: Request<CallRequest>) -> Result<Response<CallResponse>, Status> {
        Ok(Response::new(self.handler.call(request.into_inner()).await))
    }

    type AppendStream = BoxStream<'static, Result<AppendResponse, Status>>;

    async fn append(
        &self,
        request: Request<Streaming<AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let responses = self.handler.append(until_error(request.into_inner()));
        Ok(Response::new(responses.map(Ok).boxed()))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<CallResponse>, Status> {
        let parts = until_error(request.into_inner());
        Ok(Response::new(self.handler.install_snapshot(parts).await))
    }
}

/// A broken stream ends: what is missing shows at its end.
fn until_error<T: Send + 'static>(stream: Streaming<T>) -> BoxStream<'static, T> {
    stream
        .take_while(|message| std::future::ready(message.is_ok()))
        .filter_map(|message| std::future::ready(message.ok()))
        .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(organisation: Organisation, cluster: &str) -> PeerIdentity {
        PeerIdentity {
            organisation,
            cluster: cluster.into(),
            common_name: "x".into(),
        }
    }

    #[test]
    fn only_servers_of_the_own_cluster_are_replicas() {
        assert_eq!(
            check(&identity(Organisation::Server, "c1"), Some("c1")),
            Ok(())
        );
        assert_eq!(check(&identity(Organisation::Server, "c1"), None), Ok(()));
        assert!(check(&identity(Organisation::Server, "c2"), Some("c1")).is_err());
        for other in [
            Organisation::Operator,
            Organisation::Node,
            Organisation::Peer,
        ] {
            assert!(check(&identity(other, "c1"), Some("c1")).is_err());
        }
    }
}
