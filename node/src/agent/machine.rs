//! The main loop: the machine's side of the agent, which follows from the server's word about this node, its underlay and
//! the devices of encryption: programs and their settings, addresses and routes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clustermesh_api::IdentitySplit as ApiSplit;
use clustermesh_client::Client;
use clustermesh_ebpf::abi::{IdentitySplit, NodeConfig};
use clustermesh_ebpf::{Datapath, Maps};
use clustermesh_node_core::change::ClusterName;
use clustermesh_node_core::decode::Decoder;
use clustermesh_node_core::{ABSENCE_GRACE_MS, IPCACHE_WANTED_MAX, Model, Settings};
use clustermesh_process::{Drain, Heartbeats, Readiness, ReadyToken, shutdown_signal};
use ipnetwork::IpNetwork;
use rtnetlink::Handle;
use tracing::{error, info, warn};

use super::program_settings::{ConfigFlags, node_config};
use crate::config::{Config, Routing};
use crate::encryption::{self, Encryption};
use crate::endpoints::{DelQueue, Endpoints, work_off_queue};
use crate::host::{self, HostPair, Underlay};
use crate::metrics::Metrics;
use crate::records::{Follower, RETRY_AFTER, Reconciler, Sinks, Workloads, read_tables};
use crate::settings_map::SettingsMap;
use crate::signals::Signals;
use crate::state_files::{NodeFacts, StateFiles};
use crate::strict_mode::MeshGuard;

/// The underlay is compared with what the kernel's state is made for this often; a change that two looks in a row
/// have found is followed.
const UNDERLAY_CHECKED_EVERY: Duration = Duration::from_secs(5);
/// The main loop shows this often that it goes round.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Where nothing is encrypted any more, what others still send encrypted is taken for so long.
const LEFT_OVER_FOR: Duration = Duration::from_secs(10);

/// What the main loop works with.
pub(super) struct Handles {
    pub(super) config: Arc<Config>,
    pub(super) files: Arc<StateFiles>,
    pub(super) maps: Maps,
    pub(super) datapath: Arc<Mutex<Datapath>>,
    pub(super) netlink: Handle,
    pub(super) client: Client,
    pub(super) signals: Arc<Signals>,
    pub(super) reconciler: Arc<Reconciler>,
    pub(super) workloads: Arc<Workloads>,
    pub(super) endpoints: Arc<Endpoints>,
    pub(super) queue: Arc<DelQueue>,
    pub(super) guard: Option<Arc<MeshGuard>>,
    pub(super) encryption: Option<Arc<Encryption>>,
    pub(super) settings: SettingsMap,
    pub(super) metrics: Metrics,
}

impl Handles {
    fn sinks(&self) -> Sinks {
        Sinks {
            reconciler: Arc::clone(&self.reconciler),
            workloads: Arc::clone(&self.workloads),
            endpoints: Arc::clone(&self.endpoints),
            files: Arc::clone(&self.files),
            metrics: self.metrics.clone(),
        }
    }
}

/// The machine's side, and what is still missing before the agent is ready.
pub(super) struct Machine {
    handles: Handles,
    underlay: Underlay,
    /// A change that the last look at the underlay has found.
    underlay_next: Option<Underlay>,
    heartbeats: Heartbeats,
    pair: HostPair,
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

impl Machine {
    /// Before the server's word: nothing follows from it yet. `layout_changed`: programs of before run on other maps.
    ///
    /// # Errors
    /// The kernel does not say which devices there are.
    pub(super) async fn new(
        handles: Handles,
        pair: HostPair,
        heartbeats: Heartbeats,
        readiness: &Readiness,
        layout_changed: bool,
    ) -> anyhow::Result<Self> {
        let left_over = match &handles.encryption {
            Some(_) => Vec::new(),
            None => encryption::left_over(&handles.netlink).await?,
        };
        let underlay = handles.signals.underlay.borrow().clone();
        let mut machine = Self {
            handles,
            underlay,
            underlay_next: None,
            heartbeats,
            pair,
            layout_changed: false,
            facts: None,
            server_token: Some(readiness.token("pod CIDR from the server")),
            sync_token: Some(readiness.token("first complete listing in the kernel")),
            takeover_token: None,
            left_over,
            left_over_until: None,
            routes_written: BTreeMap::new(),
        };
        if layout_changed {
            machine.set_layout_changed(true);
            machine.takeover_token = Some(readiness.token("switch to the new map layout"));
        }
        Ok(machine)
    }

    /// Follows signals, the underlay and the records until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// What cannot be tried again: the node must be cleaned up or restarted.
    pub(super) async fn follow(&mut self, drain: &Drain) -> anyhow::Result<()> {
        let mut facts = self.handles.signals.facts.subscribe();
        let mut cidrs = self.handles.reconciler.remote_cidrs.subscribe();
        let mut synced = self.handles.reconciler.synced.subscribe();
        let mut trusted = self.handles.reconciler.trusted.subscribe();
        let mut wireguard = self.handles.signals.wireguard_changes.subscribe();
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
                    if self.layout_changed && !*self.handles.reconciler.trusted.borrow() {
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
    pub(super) async fn take_facts(
        &mut self,
        facts: NodeFacts,
        drain: &Drain,
    ) -> anyhow::Result<()> {
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
        tokio::task::block_in_place(|| self.handles.files.store_facts(&facts))?;
        self.facts = Some(facts.clone());
        self.routes_written.clear();
        self.ensure_routes().await?;
        // Before the programs and the settings that ask for them.
        if let Some(guard) = &self.handles.guard {
            guard.fill(&facts)?;
        }
        self.handles.settings.set_node(self.node_config(&facts))?;
        self.handles.endpoints.restore(&facts, self.pair).await?;
        if first {
            // Before the plugin is answered: what ended while no agent ran must not be met by an ADD.
            self.handles.queue.work_off(&self.handles.endpoints).await;
            tokio::spawn(work_off_queue(
                Arc::clone(&self.handles.queue),
                Arc::clone(&self.handles.endpoints),
                drain.clone(),
            ));
            let bits = split.local_bits();
            let model = self.model(&facts, bits)?;
            let over_entries = self.layout_changed || !model.actual().is_empty();
            *self.handles.reconciler.model() = Some(model);
            if !self.layout_changed {
                self.activate().await?;
            }
            // With another layout the programs of before guard the node until the new maps are full.
            if let Some(guard) = &self.handles.guard {
                guard.set_attached();
            }
            let cluster: ClusterName = self.handles.config.cluster.as_str().into();
            let decoder = Decoder::new(cluster.clone(), split);
            let follower = Follower::new(
                self.handles.sinks(),
                self.handles.client.clone(),
                cluster,
                decoder,
                self.handles.files.store_id()?,
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
            cluster: self.handles.config.cluster.as_str().into(),
            cluster_id: facts.cluster_id,
            node: self.handles.config.node.as_str().into(),
            underlay: self.underlay.addresses.clone(),
            split,
            direct_routing: self.handles.config.routing == Routing::Direct,
            path_v4: self.underlay.path_v4,
            path_v6: self.underlay.path_v6,
            encryption: self.handles.config.encryption.for_model(),
        };
        let mut model = Model::new(settings, read_tables(&self.handles.maps)?);
        if self.handles.config.path_probe_seconds == 0 {
            model.forget_measured();
        }
        // Before the first listing: what is encrypted stays so.
        if let Some(encryption) = &self.handles.encryption {
            model.set_wireguard(encryption.state());
        }
        Ok(model)
    }

    /// Looks at the underlay, and follows a change that lasts. What cannot be used is said once, and tried again.
    async fn check_underlay(&mut self) {
        let found = match Underlay::find(&self.handles.netlink, &self.handles.config).await {
            Ok(found) => found,
            Err(error) => return self.underlay_fault(&error),
        };
        if found == self.underlay {
            self.underlay_next = None;
            if self.handles.metrics.underlay_unusable.set(0) != 0 {
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
        self.handles.metrics.underlay_unusable.set(0);
        self.handles.metrics.underlay_changes.inc();
        info!(now = ?self.underlay, ?before, "the underlay has changed, and traffic with it");
    }

    fn underlay_fault(&mut self, error: &anyhow::Error) {
        self.underlay_next = None;
        if self.handles.metrics.underlay_unusable.set(1) == 0 {
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
            self.handles.settings.set_node(self.node_config(facts))?;
            if !self.layout_changed {
                self.activate().await?;
            }
            self.routes_written.clear();
            self.ensure_routes().await?;
        }
        if let Some(model) = self.handles.reconciler.model().as_mut() {
            let Underlay {
                addresses,
                path_v4,
                path_v6,
                ..
            } = &self.underlay;
            model.change_underlay(addresses.clone(), *path_v4, *path_v6);
        }
        self.handles
            .signals
            .underlay
            .send_replace(self.underlay.clone());
        if let (Some(guard), Some(facts)) = (&self.handles.guard, &self.facts) {
            guard.fill(facts)?;
        }
        Ok(())
    }

    /// Everybody knows by now that this node has no key any more.
    async fn drop_left_over(&mut self) {
        self.left_over_until = None;
        self.left_over.clear();
        let dropped = async {
            self.activate().await?;
            encryption::remove_devices(&self.handles.netlink).await
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
            self.handles.settings.set_node(self.node_config(facts))?;
            if !self.layout_changed {
                self.activate().await?;
            }
        }
        self.handles.signals.announcements.send_replace(());
        Ok(())
    }

    fn node_config(&self, facts: &NodeFacts) -> NodeConfig {
        node_config(
            facts,
            &self.underlay,
            self.pair,
            split_of(facts).local_bits(),
            ConfigFlags {
                direct: self.handles.config.routing == Routing::Direct,
                encryption: self
                    .handles
                    .encryption
                    .as_deref()
                    .map(|encryption| (&self.handles.config.encryption, encryption)),
            },
        )
    }

    fn set_layout_changed(&mut self, changed: bool) {
        self.layout_changed = changed;
        self.handles.signals.is_taking_over.send_replace(changed);
        self.handles
            .metrics
            .takeover_pending
            .set(i64::from(changed));
    }

    fn lock_datapath(&self) -> std::sync::MutexGuard<'_, Datapath> {
        self.handles
            .datapath
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn activate(&self) -> anyhow::Result<()> {
        self.lock_datapath()
            .activate(self.pair.net_ifindex, &self.underlay.devices)
            .context("attach the kernel programs")?;
        let settings = &self.handles.config.encryption;
        let devices = self.handles.encryption.as_ref();
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
        self.handles.endpoints.attach_all().await?;
        Ok(())
    }

    async fn ensure_routes(&mut self) -> anyhow::Result<()> {
        let Some(facts) = &self.facts else {
            return Ok(());
        };
        let remote = self.handles.reconciler.remote_cidrs.borrow().clone();
        host::ensure_addresses_and_routes(
            &self.handles.netlink,
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
