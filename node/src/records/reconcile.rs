//! Plans into map calls: the only place where records reach the kernel.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clustermesh_ebpf::{Error, Maps};
use clustermesh_node_core::Model;
use clustermesh_node_core::plan::{Plan, Step};
use clustermesh_node_core::tables::Tables;
use tracing::{error, warn};

use crate::host::RemoteCidrs;
use crate::metrics::label;
use crate::readiness;
use crate::shared::{Applied, Shared};

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

/// Brings the kernel to what the model wants, and publishes what follows. False if something must be tried again:
/// [`Shared::has_missed`] says so to whoever follows the records, whichever task made the round.
pub fn round(shared: &Shared) -> bool {
    let started = Instant::now();
    let mut guard = shared.model();
    let Some(model) = guard.as_mut() else {
        return true;
    };
    let plan = model.plan();
    let listed = model.is_listed();
    let complete = plan.is_empty() || carry_out(shared, model, &plan);
    shared.has_missed.store(!complete, Ordering::Relaxed);
    if complete && listed {
        model.finish();
    }
    publish_refusals(shared, model);
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
        shared
            .metrics
            .apply_seconds
            .observe(started.elapsed().as_secs_f64());
    }
    publish(shared, applied);
    if listed {
        shared.remote_cidrs.send_if_modified(|held| {
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
        shared.mesh_changes.send_modify(|n| *n = n.wrapping_add(1));
    }
    if peers && listed {
        shared.peer_changes.send_modify(|n| *n = n.wrapping_add(1));
    }
    if workloads && listed {
        shared
            .workload_changes
            .send_modify(|n| *n = n.wrapping_add(1));
    }
    if (services || workloads) && listed {
        readiness::refresh_targets(shared);
    }
    shared
        .trusted
        .send_if_modified(|held| std::mem::replace(held, trusted) != trusted);
    if complete && listed {
        shared
            .synced
            .send_if_modified(|synced| !std::mem::replace(synced, true));
    }
    complete
}

fn publish(shared: &Shared, applied: Applied) {
    for (cluster, position) in applied.vector.iter() {
        shared
            .metrics
            .applied_revision
            .get_or_create(&label("source", cluster))
            .set(position.revision);
    }
    shared.applied.send_if_modified(|held| {
        let changed = *held != applied;
        *held = applied;
        changed
    });
}

fn publish_refusals(shared: &Shared, model: &mut Model) {
    let refused = model.refused().take_newest();
    for refusal in &refused {
        shared
            .metrics
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
fn carry_out(shared: &Shared, model: &mut Model, plan: &Plan) -> bool {
    let mut missed: Vec<Step<'_>> = Vec::new();
    for step in plan.steps() {
        if !missed.iter().all(|missed| step.may_follow_missed(missed)) {
            model.reject(&step);
            missed.push(step);
            continue;
        }
        match take(&shared.maps, &step) {
            Ok(()) => model.commit(&step),
            Err(cause) => {
                error!(map = step.map(), entries = step.len(), error = %cause, "map not brought up to date, trying again");
                shared
                    .metrics
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
        match read_tables(&shared.maps) {
            Ok(actual) => model.replace_actual(actual),
            Err(cause) => error!(error = %cause, "maps cannot be read"),
        }
    }
    !failed
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

    use super::*;
    use crate::fixture::Fixture;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_round_of_any_task_has_missed_is_known_until_it_is_made_up_for() {
        let fixture = Fixture::new("");
        let shared = &fixture.shared;
        fixture.know_all();
        assert!(round(shared) && !shared.has_missed.load(Ordering::Relaxed));
        // Somebody else fills the map, behind the model's back.
        let foreign = |number: u32| {
            let [_, b, c, d] = number.to_be_bytes();
            (
                v4_mapped([100, b, c, d]),
                NodeAddressValue { node_index: 7 },
            )
        };
        let foreign: Vec<_> = (0..NODES_MAX).map(foreign).collect();
        shared.maps.node_addresses.upsert(&foreign).unwrap();
        fixture.add_node(2);
        assert!(!round(shared), "there is no room");
        assert!(shared.has_missed.load(Ordering::Relaxed));
        assert!(!round(shared), "there is still none");
        // Whoever it was makes room again.
        let keys: Vec<_> = foreign.iter().map(|(address, _)| *address).collect();
        shared.maps.node_addresses.delete(&keys).unwrap();
        assert!(round(shared));
        assert!(!shared.has_missed.load(Ordering::Relaxed));
        let held = shared.maps.node_addresses.entries().unwrap();
        assert!(
            held.iter()
                .any(|(address, _)| *address == v4_mapped([192, 0, 2, 2]))
        );
    }
}
