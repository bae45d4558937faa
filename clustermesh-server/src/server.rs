//! Puts the process together: replica, services, controllers, ports; and takes it down in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clustermesh_api::limits::MAX_GRPC_RECV_BYTES;
use clustermesh_api::v1::agent_stream_server::AgentStreamServer;
use clustermesh_api::v1::mesh_server::MeshServer;
use clustermesh_api::v1::node_session_server::NodeSessionServer;
use clustermesh_mesh::ClusterSettings;
use clustermesh_process::{
    AdminPages, AdminServer, ClientTls, Drain, DrainEnd, DrainTrigger, Readiness, ServerTls, drain,
    install_crypto_provider,
};
use clustermesh_raft::{Data, Node, PeerHandler, Replica, ReplicaConfig};
use tokio::task::JoinSet;
use tonic::service::{Routes, RoutesBuilder};
use tracing::{debug, info, warn};

use crate::agents::session::NodeSessionService;
use crate::agents::stream::AgentStreamService;
use crate::answers::AnswerBudget;
use crate::config::Config;
use crate::controllers::{identities, own_records, services, sessions};
use crate::etcd;
use crate::gateway::Gateway;
use crate::memory;
use crate::mesh_api::MeshService;
use crate::metrics::{Metrics, PeerPortMetrics};
use crate::news::News;
use crate::pages::Pages;
use crate::peering::Peering;
use crate::planner::Planner;
use crate::ports::not_bound;
use crate::replication::{GrpcTransport, PeerPort};
use crate::serve::{ClientPort, ClientPortParts};
use crate::store::{Store, TokioReplica};

/// A server that answers.
#[derive(Debug)]
pub struct Server {
    store: Store,
    client_address: SocketAddr,
    clear_address: Option<SocketAddr>,
    admin_address: SocketAddr,
    /// Ends the port of the other replicas.
    peer_port: Option<tokio::task::AbortHandle>,
    /// Until the drain.
    trigger: Option<DrainTrigger>,
    drain_deadline: Duration,
    tasks: JoinSet<()>,
}

/// Pause before the own records are written again, while the group has no leader.
const OWN_RECORDS_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What a server of a cluster has beyond a plain store.
#[derive(Clone)]
struct ClusterParts {
    settings: Arc<ClusterSettings>,
    planner: Planner,
    news: News,
    peers: Vec<String>,
}

impl Server {
    /// Starts everything and returns once the server is ready.
    ///
    /// # Errors
    /// When data, certificates or addresses cannot be used.
    pub async fn start(config: &Config) -> anyhow::Result<Self> {
        install_crypto_provider();
        let tls = ServerTls::load(config.server_tls_paths())?;
        let settings = config
            .cluster
            .as_ref()
            .map(|cluster| cluster.settings())
            .transpose()?;
        let (metrics, mut registry) = Metrics::registered();
        let readiness = Readiness::new();
        let store_token = readiness.token("store");
        let records_token = readiness.token("records");
        let (trigger, drain) = drain();
        let mut tasks = JoinSet::new();

        let news = News::default();
        let (replica, peer_port) = start_replica(config, &news, metrics.peer_port.clone()).await?;
        let store = Store::new(replica, config.auth_token_ttl_seconds);
        drop(store_token);
        metrics.register_store(&mut registry, store.clone());

        let health = {
            let store = store.clone();
            Arc::new(move || store.health())
        };
        let pages = AdminPages::new(Arc::new(registry), readiness.clone(), health);
        let admin = AdminServer::bind(config.listen_admin, pages.clone())
            .await
            .map_err(|error| not_bound("listen_admin", config.listen_admin, &error))?;
        let admin_address = admin.local_addr()?;
        // Metrics and health outlast the drain.
        tokio::spawn(admin.serve(DrainEnd::of(&drain)));

        let mut routes = Routes::builder();
        let answers = AnswerBudget::new(metrics.answers.clone());
        let progress = Duration::from_millis(config.watch_progress_notify_interval_ms);
        etcd::add_services(&mut routes, &store, &answers, &metrics, &drain, progress);
        etcd::add_reflection(&mut routes)?;
        if let Some(settings) = settings {
            let parts = ClusterParts {
                planner: Planner::start(store.clone(), &settings.name),
                news,
                peers: config.peers.iter().map(|peer| peer.name.clone()).collect(),
                settings: Arc::new(settings),
            };
            let written = match store.check_leader() {
                Ok(()) => write_own(&store, &parts).await,
                Err(status) => Err(status),
            };
            match written {
                Ok(()) => drop(records_token),
                // The others of the group are not up, or change their leader: what is there is served meanwhile.
                Err(status) if may_pass(&status) || store.check_leader().is_err() => {
                    warn!(
                        error = status.message(),
                        "the group has no leader: only serializable reads are served, the server is ready later"
                    );
                    let (store, parts) = (store.clone(), parts.clone());
                    tasks.spawn(async move {
                        while let Err(status) = write_own(&store, &parts).await {
                            debug!(error = status.message(), "still no leader");
                            tokio::time::sleep(OWN_RECORDS_RETRY_PAUSE).await;
                        }
                        info!("the group has a leader, the server is ready");
                        drop(records_token);
                    });
                }
                Err(status) => anyhow::bail!("own records: {}", status.message()),
            }
            add_cluster_services(&mut routes, &parts, &store, &metrics, &drain);
            start_controllers(&mut tasks, &parts, &store, &metrics, &drain);
            let settle = config
                .cluster
                .as_ref()
                .map_or(0, |cluster| cluster.settle_seconds);
            tasks.spawn(own_records::announce(
                store.clone(),
                parts.planner.clone(),
                Arc::clone(&parts.settings),
                Duration::from_secs(settle.into()),
                metrics.controllers.clone(),
                drain.clone(),
            ));
            let peering = Peering::new(
                config,
                &parts.settings,
                &store,
                &parts.news.peers,
                &metrics.peering,
            )?;
            tasks.spawn(peering.run(drain.clone()));
        } else {
            drop(records_token);
        }
        let port = ClientPort::bind(
            config.listen_client,
            config.listen_client_clear,
            ClientPortParts {
                tls,
                routes: routes.routes(),
                gateway: Gateway::new(answers, config.limits.request_timeout())?,
                pages: Pages::new(store.clone(), pages),
                store: store.clone(),
                cluster: config.cluster.as_ref().map(|cluster| cluster.name.clone()),
                limits: config.limits.clone(),
                metrics: metrics.serve.clone(),
            },
        )
        .await?;
        let client_address = port.local_addr()?;
        let clear_address = port.clear_addr()?;
        if let Some(address) = clear_address {
            warn!(%address, "listen_client_clear: every process of this machine may read and write everything");
        }
        tokio::task::spawn_blocking(memory::give_back);
        tasks.spawn(port.serve(drain));
        // Otherwise this is said when it is true.
        if store.check_leader().is_ok() {
            info!(client = %client_address, admin = %admin_address, cluster_id = %format_args!("{:016x}", store.cluster_id()), "server is ready");
        }
        Ok(Self {
            store,
            client_address,
            clear_address,
            admin_address,
            peer_port,
            trigger: Some(trigger),
            drain_deadline: Duration::from_secs(config.drain_seconds),
            tasks,
        })
    }

    /// Address of the client port.
    #[must_use]
    pub fn client_address(&self) -> SocketAddr {
        self.client_address
    }

    /// Address of the client port in clear.
    #[must_use]
    pub fn clear_address(&self) -> Option<SocketAddr> {
        self.clear_address
    }

    /// Address of metrics and health.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Resolves when the replica has stopped by itself.
    pub async fn failed(&self) {
        self.store.replica().stopped().await;
    }

    /// Ends calls and streams, then the tasks. The replica goes on.
    pub async fn drain(&mut self) {
        // Another replica leads before this one takes no more calls.
        self.store.replica().resign().await;
        if let Some(trigger) = self.trigger.take() {
            trigger.drain(self.drain_deadline).await;
        }
        self.tasks.shutdown().await;
    }

    /// Ends calls and streams, then the tasks, then the replica.
    pub async fn shutdown(mut self) {
        self.drain().await;
        self.store.replica().shutdown().await;
        if let Some(port) = self.peer_port {
            port.abort();
        }
    }
}

/// Whether the group may take the same a little later: it had no leader, or lost it over it.
fn may_pass(status: &tonic::Status) -> bool {
    use tonic::Code;
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded)
}

/// What a cluster's server writes before it is ready.
async fn write_own(store: &Store, parts: &ClusterParts) -> Result<(), tonic::Status> {
    store
        .seed_auth(crate::auth::seed(&parts.settings.name))
        .await?;
    own_records::write(&parts.planner, &parts.settings).await
}

/// How this replica is reached.
fn own_node(config: &Config) -> Node {
    let cluster = config.cluster.as_ref();
    // "Every address" is none that a client could use.
    let client_url = Some(config.listen_client)
        .filter(|address| !address.ip().is_unspecified())
        .map(|address| format!("https://{address}"));
    let mut node = Node {
        name: cluster
            .map_or("default", |cluster| &cluster.name)
            .to_owned(),
        client_urls: client_url.into_iter().collect(),
        ..Node::default()
    };
    if let Some(section) = &config.replica {
        node.name.clone_from(&section.name);
        node.peer_url = section.own_peer_url();
        if !section.client_urls.is_empty() {
            node.client_urls.clone_from(&section.client_urls);
        }
    }
    node
}

/// Makes a group of one of this replica's data; see [`Replica::force_new_cluster`].
///
/// # Errors
/// When the data folder holds no replica or cannot be changed.
pub async fn force_new_cluster(config: &Config) -> anyhow::Result<()> {
    let cluster = config.cluster.as_ref();
    let name = cluster.map_or("", |cluster| cluster.name.as_str());
    TokioReplica::force_new_cluster(&config.data_dir, name, own_node(config))
        .await
        .with_context(|| format!("data_dir {}", config.data_dir.display()))
}

/// Starts the replica, and before it the port that the others of its group reach.
async fn start_replica(
    config: &Config,
    news: &News,
    metrics: PeerPortMetrics,
) -> anyhow::Result<(TokioReplica, Option<tokio::task::AbortHandle>)> {
    let cluster = config.cluster.as_ref().map(|cluster| cluster.name.clone());
    let name = cluster.as_deref().unwrap_or("");
    let mut replica = ReplicaConfig::new(Data::Folder(config.data_dir.clone()), name);
    replica.node = own_node(config);
    replica.auto_compaction = config
        .compaction
        .policy()
        .map_err(|(key, reason)| anyhow::anyhow!("{key}: {reason}"))?;
    replica.quota_bytes = config.quota_bytes;
    replica.snapshot_log_bytes = config.snapshot_log_bytes;
    let context = || format!("data_dir {}", config.data_dir.display());
    let Some(section) = &config.replica else {
        let started = Replica::start(replica).await.with_context(context)?;
        return Ok((started, None));
    };
    replica.start = section.start();
    replica.heartbeat = section.heartbeat();
    replica.election_timeout = section.election_timeout();
    let paths = section.tls_paths(&config.tls);
    let handler = PeerHandler::default();
    let news = news.clone();
    handler.on_aside(move |from, message| news.take(from, message));
    let server_tls = ServerTls::load(paths.clone())?;
    let port = PeerPort::bind(
        section.listen_peer,
        server_tls,
        cluster,
        handler.clone(),
        metrics,
    )
    .await
    .map_err(|error| not_bound("replica.listen_peer", section.listen_peer, &error))?;
    info!(peers = %port.local_addr()?, name = section.name, "waiting for the group");
    let serving = tokio::spawn(port.serve()).abort_handle();
    let transport = Arc::new(GrpcTransport::new(ClientTls::load(paths)?));
    match Replica::start_with(replica, transport, &handler).await {
        Ok(started) => Ok((started, Some(serving))),
        Err(error) => {
            serving.abort();
            Err(error).with_context(context)
        }
    }
}

fn add_cluster_services(
    routes: &mut RoutesBuilder,
    parts: &ClusterParts,
    store: &Store,
    metrics: &Metrics,
    drain: &Drain,
) {
    let stream = AgentStreamService::new(
        store.clone(),
        parts.settings.name.clone(),
        parts.settings.id,
        parts.peers.clone(),
        metrics.watch.clone(),
        drain.clone(),
    );
    let session = NodeSessionService::new(
        store.clone(),
        Arc::clone(&parts.settings),
        parts.planner.clone(),
        parts.news.sessions.clone(),
        metrics.sessions.clone(),
        drain.clone(),
    );
    let mesh = MeshService::new(
        store.clone(),
        Arc::clone(&parts.settings),
        parts.planner.clone(),
        parts.news.sessions.clone(),
        parts.news.peers.clone(),
        drain.clone(),
    );
    routes
        .add_service(AgentStreamServer::new(stream).max_encoding_message_size(usize::MAX))
        .add_service(NodeSessionServer::new(session).max_decoding_message_size(MAX_GRPC_RECV_BYTES))
        .add_service(MeshServer::new(mesh).max_decoding_message_size(MAX_GRPC_RECV_BYTES));
}

fn start_controllers(
    tasks: &mut JoinSet<()>,
    parts: &ClusterParts,
    store: &Store,
    metrics: &Metrics,
    drain: &Drain,
) {
    tasks.spawn(own_records::beat(
        store.clone(),
        parts.planner.clone(),
        metrics.controllers.clone(),
        drain.clone(),
    ));
    tasks.spawn(identities::release(
        store.clone(),
        parts.planner.clone(),
        Arc::clone(&parts.settings),
        metrics.controllers.clone(),
        drain.clone(),
    ));
    tasks.spawn(services::run(
        store.clone(),
        Arc::clone(&parts.settings),
        metrics.controllers.clone(),
        drain.clone(),
    ));
    let news = parts.news.clone();
    tasks.spawn(news.tell_others(store.clone(), drain.clone()));
    tasks.spawn(sessions::keep_true(
        store.clone(),
        parts.planner.clone(),
        parts.news.sessions.clone(),
        metrics.sessions.clone(),
        drain.clone(),
    ));
}
