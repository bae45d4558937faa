//! The agent: start over what the kernel holds, tasks, drain.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use clustermesh_api::IdentitySplit as ApiSplit;
use clustermesh_client::Client;
use clustermesh_ebpf::abi::IdentitySplit;
use clustermesh_ebpf::{AttachMode, Datapath, Takeover};
use clustermesh_node_core::decode::Decoder;
use clustermesh_node_core::{Model, Settings};
use clustermesh_process::{
    AdminPages, AdminServer, Drain, DrainEnd, Readiness, ReadyToken, drain,
    install_crypto_provider, notify_ready, notify_stopping, shutdown_signal,
};
use prometheus_client::registry::Registry;
use rtnetlink::Handle;
use tracing::{info, warn};

use crate::config::Config;
use crate::endpoint::Endpoints;
use crate::flows::Flows;
use crate::host::{self, HostPair, Underlay};
use crate::local_api::{LocalApi, work_off_queue};
use crate::metrics::Metrics;
use crate::reconcile::read_tables;
use crate::session;
use crate::shared::{Parts, Shared};
use crate::state::{NodeFacts, StateFiles};
use crate::stream::Follower;
use crate::{netlink, probe};

/// The underlay is compared with what was found at the start this often.
const UNDERLAY_CHECKED_EVERY: Duration = Duration::from_secs(10);
/// Tasks get so long to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT. Programs, maps and interfaces stay as they are: traffic goes on.
///
/// # Errors
/// What makes a start impossible, with object and remedy.
pub async fn run(config: Config) -> anyhow::Result<()> {
    install_crypto_provider();
    let files = Arc::new(StateFiles::open(&config.state_dir)?);
    let handle = netlink::connect()?;
    let underlay = Underlay::find(&handle, &config).await?;
    let options = config.datapath();
    let attach_mode = match options.attach_mode {
        AttachMode::Tcx => "tcx",
        AttachMode::Clsact => "clsact",
    };
    let (datapath, takeover) = Datapath::open(&options)?;
    info!(?takeover, attach_mode, underlay = ?underlay.addresses, pod_mtu = underlay.pod_mtu, "kernel state opened");
    let maps = datapath.maps().clone();
    let datapath = Arc::new(Mutex::new(datapath));
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry, maps.clone());
    let endpoints = Endpoints::open(
        Arc::clone(&files),
        maps.clone(),
        Arc::clone(&datapath),
        handle.clone(),
    )?;
    let cached_facts = files.facts()?;
    let cached_workloads = files.workloads()?;
    let client = Client::new(&config.client())?;
    let api = LocalApi::bind(&config.socket())?;
    let flows = Flows::new(maps.clone());
    let admin_address = config.admin;
    let shared = Arc::new(Shared::new(
        Parts {
            config,
            files,
            maps,
            endpoints,
            metrics,
            attach_mode,
            underlay: underlay.addresses.clone(),
            pod_mtu: underlay.pod_mtu,
        },
        cached_workloads,
    ));
    let readiness = Readiness::new();
    let pages = AdminPages::new(
        Arc::new(registry),
        readiness.clone(),
        Arc::new(|| Ok::<(), String>(())),
    );
    let admin = AdminServer::bind(admin_address, pages)
        .await
        .with_context(|| format!("admin address {admin_address}"))?;
    let (trigger, view) = drain();
    let pair = host::ensure_pair(&handle).await?;
    if let Err(error) = host::ensure_receive_offload(&handle).await {
        warn!(error = %format!("{error:#}"), "tunnel packets are not coalesced on receive");
    }
    let mut node = Node {
        shared: Arc::clone(&shared),
        handle,
        datapath,
        underlay,
        pair,
        client: client.clone(),
        flows: flows.clone(),
        layout_changed: matches!(takeover, Takeover::LayoutChanged { .. }),
        facts: None,
        server_token: Some(readiness.token("pod CIDR from the server")),
        sync_token: Some(readiness.token("first complete listing in the kernel")),
    };
    if let Some(facts) = cached_facts {
        node.take_facts(facts.clone(), &view).await?;
        shared.facts.send_replace(Some(facts));
        work_off_queue(&shared.config.queue_dir(), &shared.endpoints).await;
    }
    tokio::spawn(admin.serve(DrainEnd::of(&view)));
    tokio::spawn(api.serve(Arc::clone(&shared), flows, view.clone()));
    tokio::spawn(probe::run(Arc::clone(&shared), view.clone()));
    let identity = session::Identity {
        underlay: node
            .underlay
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect(),
        boot_id: boot_id(),
        instance_id: format!("{:016x}", rand::random::<u64>()),
    };
    tokio::spawn(session::run(
        Arc::clone(&shared),
        client,
        identity,
        view.clone(),
    ));
    if let Err(error) = notify_ready() {
        warn!(%error, "service manager not told");
    }
    let ended = node.follow(&view).await;
    drop(view);
    drop(node);
    if let Err(error) = notify_stopping() {
        warn!(%error, "service manager not told");
    }
    if !trigger.drain(DRAIN_DEADLINE).await {
        warn!("some tasks did not end in time");
    }
    if let Err(error) = shared.store_workloads() {
        warn!(%error, "workloads not stored for the next start");
    }
    info!("stopped; programs and maps stay, traffic goes on");
    ended
}

/// The machine's side: what follows from the server's word about this node.
struct Node {
    shared: Arc<Shared>,
    handle: Handle,
    datapath: Arc<Mutex<Datapath>>,
    underlay: Underlay,
    pair: HostPair,
    client: Client,
    flows: Flows,
    /// Old programs run on old maps until the new ones are full.
    layout_changed: bool,
    facts: Option<NodeFacts>,
    server_token: Option<ReadyToken>,
    sync_token: Option<ReadyToken>,
}

impl Node {
    async fn follow(&mut self, drain: &Drain) -> anyhow::Result<()> {
        let mut facts = self.shared.facts.subscribe();
        let mut cidrs = self.shared.remote_cidrs.subscribe();
        let mut synced = self.shared.synced.subscribe();
        if self.facts.is_none() {
            facts.mark_changed();
        }
        let mut underlay_checks = tokio::time::interval(UNDERLAY_CHECKED_EVERY);
        underlay_checks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let stop = shutdown_signal();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                signal = &mut stop => return signal.context("signals"),
                _ = underlay_checks.tick() => self.check_underlay().await,
                Ok(()) = facts.changed() => {
                    let new = facts.borrow_and_update().clone();
                    if let Some(new) = new && self.facts.as_ref() != Some(&new) {
                        let first = self.facts.is_none();
                        self.take_facts(new, drain).await?;
                        if first {
                            work_off_queue(&self.shared.config.queue_dir(), &self.shared.endpoints).await;
                        }
                    }
                }
                Ok(()) = cidrs.changed() => {
                    cidrs.mark_unchanged();
                    if let Err(error) = self.ensure_routes(false).await {
                        warn!(error = %format!("{error:#}"), "routes to other nodes' pods not brought up to date");
                    }
                }
                Ok(_) = synced.wait_for(|synced| *synced), if self.sync_token.is_some() => {
                    if self.layout_changed {
                        self.activate().await?;
                        self.lock_datapath().finish_takeover()?;
                        self.layout_changed = false;
                        info!("the new map layout is full and in use");
                    }
                    self.sync_token = None;
                }
            }
        }
    }

    /// Takes the server's word: addresses, routes, settings, endpoints; the first time also programs and records.
    async fn take_facts(&mut self, facts: NodeFacts, drain: &Drain) -> anyhow::Result<()> {
        let first = self.facts.is_none();
        if let Some(held) = &self.facts
            && (held.cluster_id, held.max_connected_clusters)
                != (facts.cluster_id, facts.max_connected_clusters)
        {
            bail!(
                "the server says cluster id {} of {}, before it was {} of {}: run `clustermesh-node cleanup`, then start again",
                facts.cluster_id,
                facts.max_connected_clusters,
                held.cluster_id,
                held.max_connected_clusters
            );
        }
        let split = match facts.max_connected_clusters {
            511 => ApiSplit::Clusters511,
            _ => ApiSplit::Clusters255,
        };
        self.shared.files.store_facts(&facts)?;
        self.facts = Some(facts.clone());
        self.ensure_routes(true).await?;
        let config = host::node_config(
            &facts,
            &self.underlay,
            self.pair,
            split.local_bits(),
            self.flows.are_on(),
        );
        self.shared.maps.set_config(&config)?;
        self.shared.endpoints.restore(&facts, self.pair).await?;
        if first {
            let bits = split.local_bits();
            let model = self.model(&facts, bits)?;
            *self.shared.model() = Some(model);
            if !self.layout_changed {
                self.activate().await?;
            }
            let decoder = Decoder::new(self.shared.config.cluster.as_str().into(), split);
            let follower = Follower::new(
                Arc::clone(&self.shared),
                self.client.clone(),
                decoder,
                self.shared.files.store_id()?,
            );
            tokio::spawn(follower.run(drain.clone()));
            self.server_token = None;
        }
        Ok(())
    }

    fn model(&self, facts: &NodeFacts, local_bits: u8) -> anyhow::Result<Model> {
        let split =
            IdentitySplit::from_local_bits(local_bits).context("identity split of the cluster")?;
        let settings = Settings {
            cluster: self.shared.config.cluster.as_str().into(),
            cluster_id: facts.cluster_id,
            node: self.shared.config.node.as_str().into(),
            underlay: self.underlay.addresses.clone(),
            split,
            direct_routing: self.shared.config.routing == crate::config::Routing::Direct,
            path_v4: self.underlay.path_v4,
            path_v6: self.underlay.path_v6,
        };
        Ok(Model::new(settings, read_tables(&self.shared.maps)?))
    }

    /// Says so when the underlay is not what the kernel's state was made for.
    async fn check_underlay(&self) {
        let gauge = &self.shared.metrics.underlay_changed;
        let found = Underlay::find(&self.handle, &self.shared.config).await;
        let fault = match found {
            Ok(found) if found == self.underlay => None,
            Ok(found) => Some(format!("{:?}, before {:?}", found, self.underlay)),
            Err(error) => Some(format!("{error:#}")),
        };
        let changed_before = gauge.set(i64::from(fault.is_some())) != 0;
        match fault {
            Some(fault) if !changed_before => warn!(
                fault,
                "the underlay has changed: restart the agent to use it; traffic goes on as before"
            ),
            None if changed_before => info!("the underlay is as it was at the start again"),
            _ => {}
        }
    }

    fn lock_datapath(&self) -> std::sync::MutexGuard<'_, Datapath> {
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn activate(&self) -> anyhow::Result<()> {
        self.lock_datapath()
            .activate(self.pair.net_ifindex, &self.underlay.devices)
            .context("attach the kernel programs")?;
        self.shared.endpoints.attach_all().await?;
        Ok(())
    }

    async fn ensure_routes(&self, renew: bool) -> anyhow::Result<()> {
        let Some(facts) = &self.facts else {
            return Ok(());
        };
        let remote = self.shared.remote_cidrs.borrow().clone();
        host::ensure_addresses_and_routes(
            &self.handle,
            self.pair,
            facts,
            &self.underlay,
            &remote,
            renew,
        )
        .await
    }
}

/// Distinguishes boots of the machine; empty where the kernel does not say.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}
