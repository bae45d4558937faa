//! The model of the records and the rounds of map calls that follow it: the only place where records reach the kernel.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clustermesh_api::v1::SourceRevision;
use clustermesh_ebpf::{Error, Maps};
use clustermesh_node_core::Model;
use clustermesh_node_core::plan::{Plan, Step};
use clustermesh_node_core::progress::Vector;
use clustermesh_node_core::tables::Tables;
use tokio::sync::watch;
use tracing::{error, warn};

use crate::host::RemoteCidrs;
use crate::metrics::{Metrics, label};

/// After a map call that failed the next try waits so long.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Refused records that are named in the log for one round.
const REFUSALS_LOGGED_MAX: usize = 8;

/// What the kernel holds now.
///
/// # Errors
/// A map cannot be read.
pub fn read_tables(maps: &Maps) -> Result<Tables, Error> {
    Ok(Tables::from_entries(
        maps.nodes.entries()?,
        maps.node_addresses.entries()?,
        maps.ipcache.entries()?,
        maps.frontends.entries()?,
        maps.backends.entries()?,
    ))
}

/// What the kernel holds, as it is reported to the server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Revision of each source cluster.
    pub vector: Vector,
    /// Refused records by reason.
    pub refused: Vec<(&'static str, u64)>,
}

impl Applied {
    /// The wire form of the revisions.
    #[must_use]
    pub fn source_revisions(&self) -> Vec<SourceRevision> {
        self.vector
            .iter()
            .map(|(cluster, position)| SourceRevision {
                cluster: cluster.to_string(),
                store_id: position.store_id,
                revision: position.revision,
            })
            .collect()
    }

    /// The wire form of the refusals.
    #[must_use]
    pub fn refused_records(&self) -> BTreeMap<String, u64> {
        self.refused
            .iter()
            .map(|(reason, count)| ((*reason).to_owned(), *count))
            .collect()
    }
}

/// Keeps the kernel's maps equal to the model, in rounds that any task may ask for, and says what follows from them.
pub struct Reconciler {
    maps: Maps,
    metrics: Metrics,
    model: Mutex<Option<Model>>,
    /// The last round has left something undone.
    has_missed: AtomicBool,
    /// What the kernel holds. It is reported to the server whenever this is sent.
    pub applied: watch::Sender<Applied>,
    /// True from the first time on that the kernel held everything of a complete listing.
    pub synced: watch::Sender<bool>,
    /// True if a kernel state that is filled from the records alone lacks nothing.
    pub trusted: watch::Sender<bool>,
    /// Pod CIDRs of other nodes.
    pub remote_cidrs: watch::Sender<RemoteCidrs>,
    /// Workloads have changed.
    pub workload_changes: watch::Sender<()>,
    /// Services or workloads have changed, and with them perhaps the ports that are probed.
    pub service_changes: watch::Sender<()>,
    /// The mesh's prefixes have changed.
    pub mesh_changes: watch::Sender<()>,
    /// Other nodes have changed, or how they are reached: what WireGuard devices should know, whose path is probed.
    pub peer_changes: watch::Sender<()>,
}

impl Reconciler {
    /// Without a model: rounds do nothing.
    #[must_use]
    pub fn new(maps: Maps, metrics: Metrics) -> Self {
        Self {
            maps,
            metrics,
            model: Mutex::new(None),
            has_missed: AtomicBool::new(false),
            applied: watch::Sender::new(Applied::default()),
            synced: watch::Sender::new(false),
            trusted: watch::Sender::new(false),
            remote_cidrs: watch::Sender::new(RemoteCidrs::default()),
            workload_changes: watch::Sender::new(()),
            service_changes: watch::Sender::new(()),
            mesh_changes: watch::Sender::new(()),
            peer_changes: watch::Sender::new(()),
        }
    }

    /// The model, `None` until the server's word about this node is known; held for short computations only.
    pub fn model(&self) -> MutexGuard<'_, Option<Model>> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the last round, of whichever task, has left something undone: whoever follows the records tries again.
    #[must_use]
    pub fn has_missed(&self) -> bool {
        self.has_missed.load(Ordering::Relaxed)
    }

    /// Brings the kernel to what the model wants, and publishes what follows. False if something must be tried again:
    /// [`Self::has_missed`] says so too.
    pub fn round(&self) -> bool {
        let started = Instant::now();
        let mut guard = self.model();
        let Some(model) = guard.as_mut() else {
            return true;
        };
        let plan = model.plan();
        let listed = model.is_listed();
        let complete = plan.is_empty() || self.carry_out(model, &plan);
        self.has_missed.store(!complete, Ordering::Relaxed);
        if complete && listed {
            model.finish();
        }
        self.publish_refusals(model);
        let applied = Applied {
            vector: model.applied().clone(),
            refused: model
                .refused()
                .counts()
                .map(|(reason, count)| (reason.name(), count))
                .collect(),
        };
        let cidrs = model
            .take_pod_cidrs_changed()
            .then(|| model.remote_pod_cidrs());
        let settled = complete && model.is_settled();
        let trusted = complete && model.is_trusted();
        let services = model.take_services_changed();
        let workloads = model.take_workloads_changed();
        let peers = model.take_peers_changed();
        let mesh = model.has_mesh_changed();
        drop(guard);
        if !plan.is_empty() {
            self.metrics
                .apply_seconds
                .observe(started.elapsed().as_secs_f64());
        }
        self.publish(applied);
        if listed {
            self.remote_cidrs.send_if_modified(|held| {
                let new = RemoteCidrs {
                    cidrs: cidrs.unwrap_or_else(|| held.cidrs.clone()),
                    complete: settled,
                };
                let changed = *held != new;
                *held = new;
                changed
            });
        }
        if mesh && listed {
            self.mesh_changes.send_replace(());
        }
        if peers && listed {
            self.peer_changes.send_replace(());
        }
        if workloads && listed {
            self.workload_changes.send_replace(());
        }
        if (services || workloads) && listed {
            self.service_changes.send_replace(());
        }
        self.trusted
            .send_if_modified(|held| std::mem::replace(held, trusted) != trusted);
        if complete && listed {
            self.synced
                .send_if_modified(|synced| !std::mem::replace(synced, true));
        }
        complete
    }

    fn publish(&self, applied: Applied) {
        for (cluster, position) in applied.vector.iter() {
            self.metrics
                .applied_revision
                .get_or_create(&label("source", cluster))
                .set(position.revision);
        }
        self.applied.send_if_modified(|held| {
            let changed = *held != applied;
            *held = applied;
            changed
        });
    }

    fn publish_refusals(&self, model: &mut Model) {
        let refused = model.refused().take_newest();
        for refusal in &refused {
            self.metrics
                .refused_records
                .get_or_create(&label("reason", refusal.reason.name()))
                .inc();
        }
        for refusal in refused.iter().take(REFUSALS_LOGGED_MAX) {
            warn!(
                reason = refusal.reason.name(),
                object = refusal.object,
                detail = refusal.detail,
                "record refused"
            );
        }
        if refused.len() > REFUSALS_LOGGED_MAX {
            warn!(
                more = refused.len() - REFUSALS_LOGGED_MAX,
                "records refused"
            );
        }
    }

    /// False if a step failed; it, and those after it that are not safe without it, are planned again.
    fn carry_out(&self, model: &mut Model, plan: &Plan) -> bool {
        let mut missed: Vec<Step<'_>> = Vec::new();
        for step in plan.steps() {
            if !missed.iter().all(|missed| step.may_follow_missed(missed)) {
                model.reject(&step);
                missed.push(step);
                continue;
            }
            match take(&self.maps, &step) {
                Ok(()) => model.commit(&step),
                Err(cause) => {
                    error!(map = step.map(), entries = step.len(), error = %cause, "map not brought up to date, trying again");
                    self.metrics
                        .map_failures
                        .get_or_create(&label("map", step.map()))
                        .inc();
                    model.reject(&step);
                    missed.push(step);
                }
            }
        }
        let failed = !missed.is_empty();
        if failed {
            // Part of a failed step may have been taken: what is there is read, not assumed.
            match read_tables(&self.maps) {
                Ok(actual) => model.replace_actual(actual),
                Err(cause) => error!(error = %cause, "maps cannot be read"),
            }
        }
        !failed
    }
}

fn take(maps: &Maps, step: &Step<'_>) -> Result<(), Error> {
    match step {
        Step::UpsertNodes(entries) => maps.nodes.upsert(entries),
        Step::UpsertNodeAddresses(entries) => maps.node_addresses.upsert(entries),
        Step::UpsertIpcache(entries) => maps.ipcache.upsert(entries),
        Step::UpsertBackends(entries) => maps.backends.upsert(entries),
        Step::UpsertFrontends(entries) => maps.frontends.upsert(entries),
        Step::DeleteFrontends(keys) => maps.frontends.delete(keys),
        Step::DeleteBackends(keys) => maps.backends.delete(keys),
        Step::DeleteIpcache(keys) => maps.ipcache.delete(keys),
        Step::DeleteNodeAddresses(keys) => maps.node_addresses.delete(keys),
        Step::DeleteNodes(keys) => maps.nodes.clear(keys),
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_ebpf::abi::{NODES_MAX, NodeAddressValue, v4_mapped};

    use crate::fixture::Fixture;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_round_of_any_task_has_missed_is_known_until_it_is_made_up_for() {
        let fixture = Fixture::new("");
        let reconciler = &fixture.reconciler;
        fixture.know_all();
        assert!(reconciler.round() && !reconciler.has_missed());
        // Somebody else fills the map, behind the model's back.
        let foreign = |number: u32| {
            let [_, b, c, d] = number.to_be_bytes();
            (
                v4_mapped([100, b, c, d]),
                NodeAddressValue { node_index: 7 },
            )
        };
        let foreign: Vec<_> = (0..NODES_MAX).map(foreign).collect();
        fixture.maps.node_addresses.upsert(&foreign).unwrap();
        fixture.add_node(2);
        assert!(!reconciler.round(), "there is no room");
        assert!(reconciler.has_missed());
        assert!(!reconciler.round(), "there is still none");
        // Whoever it was makes room again.
        let keys: Vec<_> = foreign.iter().map(|(address, _)| *address).collect();
        fixture.maps.node_addresses.delete(&keys).unwrap();
        assert!(reconciler.round());
        assert!(!reconciler.has_missed());
        let held = fixture.maps.node_addresses.entries().unwrap();
        assert!(
            held.iter()
                .any(|(address, _)| *address == v4_mapped([192, 0, 2, 2]))
        );
    }
}
