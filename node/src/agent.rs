//! The agent: start over what the kernel holds, tasks, drain.

mod program_settings;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clustermesh_api::IdentitySplit as ApiSplit;
use clustermesh_client::Client;
use clustermesh_ebpf::abi::{IdentitySplit, NodeConfig};
use clustermesh_ebpf::{AttachMode, Datapath, Takeover};
use clustermesh_node_core::decode::Decoder;
use clustermesh_node_core::{ABSENCE_GRACE_MS, IPCACHE_WANTED_MAX, Model, Settings};
use clustermesh_process::{
    AdminPages, AdminServer, Drain, DrainEnd, HealthCheck, Heartbeats, Readiness, ReadyToken,
    drain, install_crypto_provider, notify_ready, notify_stopping, shutdown_signal,
};
use ipnetwork::IpNetwork;
use prometheus_client::registry::Registry;
use rtnetlink::Handle;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::encryption::{self, Encryption};
use crate::endpoints::Endpoints;
use crate::endpoints::work_off_queue;
use crate::flows::Flows;
use crate::host::{self, HostPair, Underlay};
use crate::local_api::LocalApi;
use crate::metrics::Metrics;
use crate::records::reconcile::{RETRY_AFTER, read_tables};
use crate::records::stream::Follower;
use crate::session;
use crate::shared::{Parts, Shared};
use crate::state_files::{NodeFacts, StateFiles};
use crate::strict_mode::{self, MeshGuard};
use crate::{netlink, paths, privileges, readiness};
use program_settings::{ConfigFlags, node_config};

/// The underlay is compared with what the kernel's state is made for this often; a change that two looks in a row
/// have found is followed.
const UNDERLAY_CHECKED_EVERY: Duration = Duration::from_secs(5);
/// The main loop shows this often that it goes round.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// A loop that is silent for longer is stuck.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Where nothing is encrypted any more, what others still send encrypted is taken for so long.
const LEFT_OVER_FOR: Duration = Duration::from_secs(10);
/// Tasks get so long to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT. Programs, maps and interfaces stay as they are: traffic goes on.
///
/// # Errors
/// What makes a start impossible, with object and remedy.
pub async fn run(config: Config) -> anyhow::Result<()> {
    privileges::require()?;
    install_crypto_provider();
    let files = Arc::new(StateFiles::open(&config.state_dir)?);
    let handle = netlink::connect()?;
    let underlay = Underlay::find(&handle, &config).await?;
    let options = config.datapath();
    let attach_mode = match options.attach_mode {
        AttachMode::Tcx => "tcx",
        AttachMode::Clsact => "clsact",
    };
    let encryption = Encryption::start(&config, &underlay, &handle).await?;
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
    let mesh = MeshGuard::open(&config, &files, &maps)?;
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
            underlay: underlay.clone(),
            encryption: encryption.clone(),
            mesh: mesh.clone(),
        },
        cached_workloads,
    ));
    let readiness = Readiness::new();
    let heartbeats = Heartbeats::new(SILENCE_MAX);
    let alive: HealthCheck = {
        let heartbeats = heartbeats.clone();
        Arc::new(move || heartbeats.check(Instant::now()))
    };
    let pages = AdminPages::new(Arc::new(registry), readiness.clone(), Arc::clone(&alive))
        .with_liveness(alive);
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
        underlay_next: None,
        heartbeats,
        pair,
        client: client.clone(),
        flows: flows.clone(),
        layout_changed: false,
        takeover_token: None,
        facts: None,
        server_token: Some(readiness.token("pod CIDR from the server")),
        sync_token: Some(readiness.token("first complete listing in the kernel")),
        left_over: Vec::new(),
        left_over_until: None,
        routes_written: BTreeMap::new(),
    };
    if shared.encryption.is_none() {
        node.left_over = encryption::left_over(&node.handle).await?;
    }
    if matches!(takeover, Takeover::LayoutChanged { .. }) {
        node.set_layout_changed(true);
        node.takeover_token = Some(readiness.token("switch to the new map layout"));
    }
    if let Some(facts) = cached_facts {
        node.take_facts(facts.clone(), &view).await?;
        shared.facts.send_replace(Some(facts));
    }
    tokio::spawn(admin.serve(DrainEnd::of(&view)));
    tokio::spawn(api.serve(Arc::clone(&shared), flows, view.clone()));
    tokio::spawn(readiness::run(Arc::clone(&shared), view.clone()));
    tokio::spawn(paths::run(Arc::clone(&shared), view.clone()));
    if let Some(encryption) = encryption {
        tokio::spawn(encryption::run(
            Arc::clone(&shared),
            encryption,
            node.handle.clone(),
            view.clone(),
        ));
    }
    if let Some(mesh) = mesh {
        tokio::spawn(strict_mode::run(Arc::clone(&shared), mesh, view.clone()));
    }
    let identity = session::Identity {
        boot_id: boot_id(),
        instance_id: format!("{:016x}", rand::random::<u64>()),
    };
    tokio::spawn(session::run(
        Arc::clone(&shared),
        client,
        identity,
        view.clone(),
    ));
    // Whoever waits for this unit wants to call the plugin: ADD and DEL are answered from here on, without a server
    // too. Whether the records are in the kernel is what `/readyz` says.
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
    /// A change that the last look at the underlay has found.
    underlay_next: Option<Underlay>,
    heartbeats: Heartbeats,
    pair: HostPair,
    client: Client,
    flows: Flows,
    /// Old programs run on old maps until the new ones are full.
    layout_changed: bool,
    facts: Option<NodeFacts>,
    server_token: Option<ReadyToken>,
    sync_token: Option<ReadyToken>,
    takeover_token: Option<ReadyToken>,
    /// WireGuard devices of a run that encrypted, where this one does not.
    left_over: Vec<u32>,
    left_over_until: Option<Instant>,
    /// Routes to pods as they were last written, with their MTUs.
    routes_written: BTreeMap<IpNetwork, u32>,
}

impl Node {
    async fn follow(&mut self, drain: &Drain) -> anyhow::Result<()> {
        let mut facts = self.shared.facts.subscribe();
        let mut cidrs = self.shared.remote_cidrs.subscribe();
        let mut synced = self.shared.synced.subscribe();
        let mut trusted = self.shared.trusted.subscribe();
        let mut wireguard = self.shared.wireguard_changes.subscribe();
        let heartbeat = self.heartbeats.watch("the main loop");
        let mut beats = tokio::time::interval(BEAT_EVERY);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
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
                _ = beats.tick() => {
                    heartbeat.beat();
                    if self.left_over_until.is_some_and(|until| Instant::now() >= until) {
                        self.drop_left_over().await;
                    }
                }
                _ = underlay_checks.tick() => self.check_underlay().await,
                Ok(()) = facts.changed() => {
                    let new = facts.borrow_and_update().clone();
                    if let Some(new) = new && self.facts.as_ref() != Some(&new) {
                        self.take_facts(new, drain).await?;
                    }
                }
                Ok(()) = wireguard.changed() => {
                    wireguard.mark_unchanged();
                    if let Err(error) = self.follow_wireguard().await {
                        warn!(error = %format!("{error:#}"), "the new WireGuard device has no programs yet");
                        tokio::time::sleep(RETRY_AFTER).await;
                        wireguard.mark_changed();
                    }
                }
                Ok(()) = cidrs.changed() => {
                    cidrs.mark_unchanged();
                    if let Err(error) = self.ensure_routes().await {
                        warn!(error = %format!("{error:#}"), "routes to other nodes' pods not brought up to date, trying again");
                        tokio::time::sleep(RETRY_AFTER).await;
                        cidrs.mark_changed();
                    }
                }
                Ok(_) = synced.wait_for(|synced| *synced), if self.sync_token.is_some() => {
                    self.sync_token = None;
                    if !self.left_over.is_empty() {
                        self.left_over_until = Some(Instant::now() + LEFT_OVER_FOR);
                    }
                    if self.layout_changed && !*self.shared.trusted.borrow() {
                        warn!(
                            "the new map layout waits: the server's store is not the one that filled the old one, and \
                             has not got everything yet; the programs of before go on with their maps for {} s, and \
                             until every peer is synced or removed from the server's configuration",
                            ABSENCE_GRACE_MS / 1000
                        );
                    }
                }
                Ok(_) = trusted.wait_for(|trusted| *trusted), if self.layout_changed => {
                    self.activate().await?;
                    self.lock_datapath().finish_takeover()?;
                    self.set_layout_changed(false);
                    self.takeover_token = None;
                    info!("the new map layout is full and in use");
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
        let split = split_of(&facts);
        tokio::task::block_in_place(|| self.shared.files.store_facts(&facts))?;
        self.facts = Some(facts.clone());
        self.routes_written.clear();
        self.ensure_routes().await?;
        // Before the programs and the settings that ask for them.
        if let Some(mesh) = &self.shared.mesh {
            mesh.fill(&self.shared, &facts)?;
        }
        self.shared.maps.set_config(&self.node_config(&facts))?;
        self.shared.endpoints.restore(&facts, self.pair).await?;
        if first {
            // Before the plugin is answered: what ended while no agent ran must not be met by an ADD.
            self.shared.queue.work_off(&self.shared.endpoints).await;
            tokio::spawn(work_off_queue(Arc::clone(&self.shared), drain.clone()));
            let bits = split.local_bits();
            let model = self.model(&facts, bits)?;
            let over_entries = self.layout_changed || !model.actual().is_empty();
            *self.shared.model() = Some(model);
            if !self.layout_changed {
                self.activate().await?;
            }
            // With another layout the programs of before guard the node until the new maps are full.
            if let Some(mesh) = &self.shared.mesh {
                mesh.set_attached();
            }
            let decoder = Decoder::new(self.shared.config.cluster.as_str().into(), split);
            let follower = Follower::new(
                Arc::clone(&self.shared),
                self.client.clone(),
                decoder,
                self.shared.files.store_id()?,
                over_entries,
                self.heartbeats.watch("the record stream"),
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
            ipcache_wanted_max: IPCACHE_WANTED_MAX,
            cluster: self.shared.config.cluster.as_str().into(),
            cluster_id: facts.cluster_id,
            node: self.shared.config.node.as_str().into(),
            underlay: self.underlay.addresses.clone(),
            split,
            direct_routing: self.shared.config.routing == crate::config::Routing::Direct,
            path_v4: self.underlay.path_v4,
            path_v6: self.underlay.path_v6,
            encryption: self.shared.config.encryption.for_model(),
        };
        let mut model = Model::new(settings, read_tables(&self.shared.maps)?);
        if self.shared.config.path_probe_seconds == 0 {
            model.forget_measured();
        }
        // Before the first listing: what is encrypted stays so.
        if let Some(encryption) = &self.shared.encryption {
            model.set_wireguard(encryption.state());
        }
        Ok(model)
    }

    /// Looks at the underlay, and follows a change that lasts. What cannot be used is said once, and tried again.
    async fn check_underlay(&mut self) {
        let found = match Underlay::find(&self.handle, &self.shared.config).await {
            Ok(found) => found,
            Err(error) => return self.underlay_fault(&error),
        };
        if found == self.underlay {
            self.underlay_next = None;
            if self.shared.metrics.underlay_unusable.set(0) != 0 {
                info!("the underlay is as it was again");
            }
            return;
        }
        if self.underlay_next.as_ref() != Some(&found) {
            self.underlay_next = Some(found);
            return;
        }
        let before = std::mem::replace(&mut self.underlay, found);
        if let Err(error) = self.follow_underlay().await {
            self.underlay = before;
            return self.underlay_fault(&error);
        }
        self.underlay_next = None;
        self.shared.metrics.underlay_unusable.set(0);
        self.shared.metrics.underlay_changes.inc();
        info!(now = ?self.underlay, ?before, "the underlay has changed, and traffic with it");
    }

    fn underlay_fault(&mut self, error: &anyhow::Error) {
        self.underlay_next = None;
        if self.shared.metrics.underlay_unusable.set(1) == 0 {
            error!(
                fault = format!("{error:#}"),
                "the underlay cannot be used as it is now: traffic goes by what it was; give the devices a usable \
                 address, or change underlay_devices and underlay_addresses and restart the agent"
            );
        }
    }

    /// Makes everything that depends on the underlay agree with it: programs first, so that what others send to the
    /// new address is taken; then routes and paths; last the session, by which others learn of it.
    async fn follow_underlay(&mut self) -> anyhow::Result<()> {
        if let Some(facts) = &self.facts {
            self.shared.maps.set_config(&self.node_config(facts))?;
            if !self.layout_changed {
                self.activate().await?;
            }
            self.routes_written.clear();
            self.ensure_routes().await?;
        }
        if let Some(model) = self.shared.model().as_mut() {
            let Underlay {
                addresses,
                path_v4,
                path_v6,
                ..
            } = &self.underlay;
            model.change_underlay(addresses.clone(), *path_v4, *path_v6);
        }
        self.shared.underlay.send_replace(self.underlay.clone());
        if let (Some(mesh), Some(facts)) = (&self.shared.mesh, &self.facts) {
            mesh.fill(&self.shared, facts)?;
        }
        Ok(())
    }

    /// Everybody knows by now that this node has no key any more.
    async fn drop_left_over(&mut self) {
        self.left_over_until = None;
        self.left_over.clear();
        let dropped = async {
            self.activate().await?;
            encryption::remove_devices(&self.handle).await
        };
        match dropped.await {
            Ok(()) => info!("the WireGuard devices of an earlier run are removed"),
            Err(error) => {
                let fault = format!("{error:#}");
                warn!(fault, "WireGuard devices of an earlier run stay");
            }
        }
    }

    /// Makes the programs know the WireGuard devices as they are now.
    async fn follow_wireguard(&mut self) -> anyhow::Result<()> {
        if let Some(facts) = &self.facts {
            self.shared.maps.set_config(&self.node_config(facts))?;
            if !self.layout_changed {
                self.activate().await?;
            }
        }
        self.shared
            .announcements
            .send_modify(|n| *n = n.wrapping_add(1));
        Ok(())
    }

    fn node_config(&self, facts: &NodeFacts) -> NodeConfig {
        node_config(
            facts,
            &self.underlay,
            self.pair,
            split_of(facts).local_bits(),
            ConfigFlags {
                flows: self.flows.are_on(),
                direct: self.shared.config.routing == crate::config::Routing::Direct,
                encryption: self
                    .shared
                    .encryption
                    .as_deref()
                    .map(|encryption| (&self.shared.config.encryption, encryption)),
            },
        )
    }

    fn set_layout_changed(&mut self, changed: bool) {
        self.layout_changed = changed;
        self.shared.is_taking_over.send_replace(changed);
        self.shared.metrics.takeover_pending.set(i64::from(changed));
    }

    fn lock_datapath(&self) -> std::sync::MutexGuard<'_, Datapath> {
        self.datapath.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn activate(&self) -> anyhow::Result<()> {
        self.lock_datapath()
            .activate(self.pair.net_ifindex, &self.underlay.devices)
            .context("attach the kernel programs")?;
        let settings = &self.shared.config.encryption;
        let devices = self.shared.encryption.as_ref();
        let wireguard = devices.map_or_else(|| self.left_over.clone(), |e| e.ifindexes());
        let is_guarded = settings.strict || settings.nodes;
        let guarded = if is_guarded {
            self.underlay.devices.as_slice()
        } else {
            &[]
        };
        self.lock_datapath()
            .set_encryption_devices(&wireguard, guarded)
            .context("attach the kernel programs for WireGuard devices")?;
        self.shared.endpoints.attach_all().await?;
        Ok(())
    }

    async fn ensure_routes(&mut self) -> anyhow::Result<()> {
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
            &mut self.routes_written,
        )
        .await
    }
}

/// How the cluster's identities are split.
fn split_of(facts: &NodeFacts) -> ApiSplit {
    match facts.max_connected_clusters {
        511 => ApiSplit::Clusters511,
        _ => ApiSplit::Clusters255,
    }
}

/// Distinguishes boots of the machine; empty where the kernel does not say.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}
