//! What the agent's tasks share.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clustermesh_ebpf::Maps;
use clustermesh_node_core::Model;
use clustermesh_node_core::change::WorkloadName;
use clustermesh_node_core::ipam::Attachment;
use clustermesh_node_core::progress::Vector;
use tokio::sync::watch;

use crate::config::Config;
use crate::encryption::Encryption;
use crate::endpoints::DelQueue;
use crate::endpoints::Endpoints;
use crate::host::{RemoteCidrs, Underlay};
use crate::metrics::Metrics;
use crate::paths::Paths;
use crate::readiness::Prober;
use crate::state_files::{NodeFacts, StateFiles, StoredWorkload};
use crate::strict_mode::MeshGuard;

/// ADD waits so long for its workload.
pub const WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// What the kernel holds, as it is reported to the server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Revision of each source cluster.
    pub vector: Vector,
    /// Refused records by reason.
    pub refused: Vec<(&'static str, u64)>,
}

/// Shared by all tasks.
pub struct Shared {
    /// Settings.
    pub config: Config,
    /// Durable files.
    pub files: Arc<StateFiles>,
    /// Kernel maps.
    pub maps: Maps,
    /// Local endpoints.
    pub endpoints: Endpoints,
    /// Readiness of local ports.
    pub prober: Prober,
    /// What is known of the paths to other nodes.
    pub paths: Paths,
    /// Counters.
    pub metrics: Metrics,
    /// How programs are attached.
    pub attach_mode: &'static str,
    /// DELs that came while no agent answered.
    pub queue: DelQueue,
    /// Devices, addresses and MTU of the underlay that the kernel's state is made for.
    pub underlay: watch::Sender<Underlay>,
    /// `None` until the server has welcomed this node for the first time.
    pub facts: watch::Sender<Option<NodeFacts>>,
    /// True while a session is open.
    pub connected: watch::Sender<bool>,
    /// What the kernel holds.
    pub applied: watch::Sender<Applied>,
    /// True from the first time on that the kernel held everything of a complete listing.
    pub synced: watch::Sender<bool>,
    /// True if a kernel state that is filled from the records alone lacks nothing.
    pub trusted: watch::Sender<bool>,
    /// True while programs of an earlier layout go on with their maps.
    pub is_taking_over: watch::Sender<bool>,
    /// Pod CIDRs of other nodes.
    pub remote_cidrs: watch::Sender<RemoteCidrs>,
    /// Counts changes of workloads.
    pub workload_changes: watch::Sender<u64>,
    /// Counts changes of the mesh's prefixes.
    pub mesh_changes: watch::Sender<u64>,
    /// Counts changes of what the WireGuard devices should know.
    pub peer_changes: watch::Sender<u64>,
    /// Counts changes of the WireGuard devices themselves.
    pub wireguard_changes: watch::Sender<u64>,
    /// Counts changes of what other nodes are to know of this one's devices.
    pub announcements: watch::Sender<u64>,
    /// Keys and devices; `None` where nothing is encrypted.
    pub encryption: Option<Arc<Encryption>>,
    /// Prefixes of the mesh; `None` without strict mode.
    pub mesh: Option<Arc<MeshGuard>>,
    /// The last round of map calls has left something undone: whoever follows the records tries again.
    pub has_missed: AtomicBool,
    /// Endpoints that the server has stored.
    pub registered: Mutex<HashSet<Attachment>>,
    model: Mutex<Option<Model>>,
    cached_workloads: Mutex<HashMap<WorkloadName, u32>>,
}

impl Shared {
    /// Everything, with the workloads that an earlier run knew.
    #[must_use]
    pub fn new(parts: Parts, cached: Vec<StoredWorkload>) -> Self {
        let cached = cached.into_iter().map(|workload| {
            let name = WorkloadName {
                namespace: workload.namespace.into(),
                name: workload.name.into(),
            };
            (name, workload.identity)
        });
        Self {
            prober: Prober::new(parts.config.probe_interval_ms),
            queue: DelQueue::new(parts.config.queue_dir()),
            config: parts.config,
            files: parts.files,
            maps: parts.maps,
            endpoints: parts.endpoints,
            paths: Paths::default(),
            metrics: parts.metrics,
            attach_mode: parts.attach_mode,
            underlay: watch::Sender::new(parts.underlay),
            facts: watch::Sender::new(None),
            connected: watch::Sender::new(false),
            applied: watch::Sender::new(Applied::default()),
            synced: watch::Sender::new(false),
            trusted: watch::Sender::new(false),
            is_taking_over: watch::Sender::new(false),
            remote_cidrs: watch::Sender::new(RemoteCidrs::default()),
            workload_changes: watch::Sender::new(0),
            mesh_changes: watch::Sender::new(0),
            peer_changes: watch::Sender::new(0),
            wireguard_changes: watch::Sender::new(0),
            announcements: watch::Sender::new(0),
            encryption: parts.encryption,
            mesh: parts.mesh,
            has_missed: AtomicBool::new(false),
            registered: Mutex::default(),
            model: Mutex::new(None),
            cached_workloads: Mutex::new(cached.collect()),
        }
    }

    /// The model; held for short computations only.
    pub fn model(&self) -> MutexGuard<'_, Option<Model>> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The identity of a workload; from the last run's knowledge until the records have been listed.
    #[must_use]
    pub fn identity_of(&self, workload: &WorkloadName) -> Option<u32> {
        if let Some(model) = self.model().as_ref().filter(|model| model.is_listed()) {
            return model.workload(workload)?.identity;
        }
        let cached = self
            .cached_workloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        cached.get(workload).copied()
    }

    /// Waits for a workload and its identity, at most [`WORKLOAD_WAIT`].
    pub async fn wait_for_workload(&self, workload: &WorkloadName) -> Option<u32> {
        let mut changes = self.workload_changes.subscribe();
        let known = async {
            loop {
                if let Some(identity) = self.identity_of(workload) {
                    return Some(identity);
                }
                changes.changed().await.ok()?;
            }
        };
        tokio::time::timeout(WORKLOAD_WAIT, known)
            .await
            .ok()
            .flatten()
    }

    /// Stores the known workloads for the next start.
    ///
    /// # Errors
    /// The state folder cannot be written.
    pub fn store_workloads(&self) -> Result<(), crate::state_files::StateError> {
        let mut workloads: Vec<StoredWorkload> = {
            let model = self.model();
            let Some(model) = model.as_ref().filter(|model| model.is_listed()) else {
                return Ok(());
            };
            model
                .workloads()
                .filter_map(|(name, declaration)| {
                    Some(StoredWorkload {
                        namespace: name.namespace.to_string(),
                        name: name.name.to_string(),
                        labels: declaration.labels.clone(),
                        identity: declaration.identity?,
                    })
                })
                .collect()
        };
        workloads.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        self.files.store_workloads(&workloads)
    }
}

/// What [`Shared::new`] is made of.
pub struct Parts {
    /// Settings.
    pub config: Config,
    /// Durable files.
    pub files: Arc<StateFiles>,
    /// Kernel maps.
    pub maps: Maps,
    /// Local endpoints.
    pub endpoints: Endpoints,
    /// Counters.
    pub metrics: Metrics,
    /// How programs are attached.
    pub attach_mode: &'static str,
    /// The underlay as it was found.
    pub underlay: Underlay,
    /// Keys and devices.
    pub encryption: Option<Arc<Encryption>>,
    /// Prefixes of the mesh.
    pub mesh: Option<Arc<MeshGuard>>,
}
