//! The agent put together: what it starts with over what the kernel holds, its tasks, and its end.

mod machine;
mod program_settings;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use clustermesh_client::Client;
use clustermesh_ebpf::{AttachMode, Datapath, Takeover};
use clustermesh_process::{
    AdminPages, AdminServer, DrainEnd, HealthCheck, Heartbeats, Readiness, drain,
    install_crypto_provider, notify_ready, notify_stopping,
};
use prometheus_client::registry::Registry;
use tracing::{info, warn};

use crate::config::Config;
use crate::encryption::{self, Encryption};
use crate::endpoints::{DelQueue, Endpoints};
use crate::flows::Flows;
use crate::host::{self, Underlay};
use crate::local_api::{AgentService, CniService, LocalApi};
use crate::metrics::Metrics;
use crate::paths::{self, Paths};
use crate::readiness::{self, Prober};
use crate::records::{Reconciler, Workloads};
use crate::session;
use crate::settings_map::SettingsMap;
use crate::signals::Signals;
use crate::state_files::StateFiles;
use crate::strict_mode::{self, MeshGuard};
use crate::{netlink, privileges};
use machine::Machine;

/// A loop that is silent for longer is stuck.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Tasks get so long to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT. Programs, maps and interfaces stay as they are: traffic goes on.
///
/// # Errors
/// What makes a start impossible, with object and remedy.
pub async fn run(config: Config) -> anyhow::Result<()> {
    privileges::require()?;
    install_crypto_provider();
    let config = Arc::new(config);
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
    let endpoints = Arc::new(Endpoints::open(
        Arc::clone(&files),
        maps.clone(),
        Arc::clone(&datapath),
        handle.clone(),
    )?);
    let signals = Arc::new(Signals::new(underlay));
    let reconciler = Arc::new(Reconciler::new(maps.clone(), metrics.clone()));
    let guard = MeshGuard::open(strict_mode::Handles {
        config: Arc::clone(&config),
        files: Arc::clone(&files),
        maps: maps.clone(),
        reconciler: Arc::clone(&reconciler),
        signals: Arc::clone(&signals),
        metrics: metrics.clone(),
    })?;
    let cached_facts = files.facts()?;
    let workloads = Arc::new(Workloads::open(&files, &reconciler)?);
    let prober = Arc::new(Prober::new(config.probe_interval_ms));
    let paths = Arc::new(Paths::default());
    let queue = Arc::new(DelQueue::new(config.queue_dir()));
    let client = Client::new(&config.client())?;
    let api = LocalApi::bind(&config.socket())?;
    let settings = SettingsMap::new(maps.clone());
    let flows = Flows::new(maps.clone(), settings.clone());
    let readiness = Readiness::new();
    let heartbeats = Heartbeats::new(SILENCE_MAX);
    let alive: HealthCheck = {
        let heartbeats = heartbeats.clone();
        Arc::new(move || heartbeats.check(Instant::now()))
    };
    let pages = AdminPages::new(Arc::new(registry), readiness.clone(), Arc::clone(&alive))
        .with_liveness(alive);
    let admin = AdminServer::bind(config.admin, pages)
        .await
        .with_context(|| format!("admin address {}", config.admin))?;
    let (trigger, view) = drain();
    let pair = host::ensure_pair(&handle).await?;
    if let Err(error) = host::ensure_receive_offload(&handle).await {
        warn!(error = %format!("{error:#}"), "tunnel packets are not coalesced on receive");
    }
    let handles = machine::Handles {
        config: Arc::clone(&config),
        files: Arc::clone(&files),
        maps: maps.clone(),
        datapath,
        netlink: handle.clone(),
        client: client.clone(),
        signals: Arc::clone(&signals),
        reconciler: Arc::clone(&reconciler),
        workloads: Arc::clone(&workloads),
        endpoints: Arc::clone(&endpoints),
        queue: Arc::clone(&queue),
        guard: guard.clone(),
        encryption: encryption.clone(),
        settings,
        metrics: metrics.clone(),
    };
    let layout_changed = matches!(takeover, Takeover::LayoutChanged { .. });
    let mut machine = Machine::new(handles, pair, heartbeats, &readiness, layout_changed).await?;
    if let Some(facts) = cached_facts {
        machine.take_facts(facts.clone(), &view).await?;
        signals.facts.send_replace(Some(facts));
    }
    tokio::spawn(admin.serve(DrainEnd::of(&view)));
    let cni = CniService {
        config: Arc::clone(&config),
        signals: Arc::clone(&signals),
        workloads: Arc::clone(&workloads),
        endpoints: Arc::clone(&endpoints),
        queue,
        guard: guard.clone(),
        metrics: metrics.clone(),
    };
    let agent = AgentService {
        config: Arc::clone(&config),
        attach_mode,
        maps,
        reconciler: Arc::clone(&reconciler),
        signals: Arc::clone(&signals),
        endpoints: Arc::clone(&endpoints),
        prober: Arc::clone(&prober),
        paths: Arc::clone(&paths),
        encryption: encryption.clone(),
        flows,
        drain: view.clone(),
    };
    tokio::spawn(api.serve(cni, agent, view.clone()));
    tokio::spawn(readiness::run(
        Arc::clone(&prober),
        Arc::clone(&reconciler),
        Arc::clone(&endpoints),
        view.clone(),
    ));
    let probes = paths::Handles {
        config: Arc::clone(&config),
        paths,
        reconciler: Arc::clone(&reconciler),
        signals: Arc::clone(&signals),
        metrics: metrics.clone(),
    };
    tokio::spawn(paths::run(probes, view.clone()));
    if let Some(encryption) = &encryption {
        let devices = encryption::Handles {
            config: Arc::clone(&config),
            encryption: Arc::clone(encryption),
            reconciler: Arc::clone(&reconciler),
            signals: Arc::clone(&signals),
            metrics: metrics.clone(),
            netlink: handle,
        };
        tokio::spawn(encryption::run(devices, view.clone()));
    }
    if let Some(guard) = guard {
        tokio::spawn(strict_mode::run(guard, view.clone()));
    }
    let subjects = session::Handles {
        config,
        signals,
        reconciler,
        endpoints,
        prober,
        encryption,
        metrics,
    };
    let identity = session::Identity {
        boot_id: boot_id(),
        instance_id: format!("{:016x}", rand::random::<u64>()),
    };
    tokio::spawn(session::run(subjects, client, identity, view.clone()));
    // Whoever waits for this unit wants to call the plugin: ADD and DEL are answered from here on, without a server
    // too. Whether the records are in the kernel is what `/readyz` says.
    if let Err(error) = notify_ready() {
        warn!(%error, "service manager not told");
    }
    let ended = machine.follow(&view).await;
    drop(view);
    drop(machine);
    if let Err(error) = notify_stopping() {
        warn!(%error, "service manager not told");
    }
    if !trigger.drain(DRAIN_DEADLINE).await {
        warn!("some tasks did not end in time");
    }
    if let Err(error) = workloads.store() {
        warn!(%error, "workloads not stored for the next start");
    }
    info!("stopped; programs and maps stay, traffic goes on");
    ended
}

/// Distinguishes boots of the machine; empty where the kernel does not say.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}
