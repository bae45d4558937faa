//! The model: what this node's kernel should hold, kept up to date record by record.
//!
//! A change touches only what depends on it; [`Model::plan`] looks only at keys
//! that were touched. A full listing builds the wanted state anew and compares it
//! with everything that the kernel holds, as after a restart.

mod absence;
mod addresses;
mod claims;
mod encryption;
mod gate;
mod mesh_prefixes;
mod nodes;
mod paths;
mod places;
mod services;
mod sources;

use std::collections::{BTreeSet, HashMap};

use crate::change::{
    Change, ClusterName, ServiceDeclaration, ServiceName, WorkloadDeclaration, WorkloadName,
};
use crate::plan::{Keys, Plan, Step, plan_keys};
use crate::progress::{Position, Vector};
use crate::refused::{Reason, Refusal, Refused};
use crate::settings::Settings;
use crate::tables::Tables;

use absence::Absence;
use addresses::Addresses;
use nodes::Nodes;
use services::Services;

pub use absence::ABSENCE_GRACE_MS;
pub use addresses::IPCACHE_WANTED_MAX;
pub use encryption::{PeerState, Protection, ProvableNode, WireguardPeer, WireguardState};
pub use nodes::NODE_ADDRESSES_WANTED_MAX;
pub use paths::{EMPTY_NODE, PathTarget};
pub use services::{BACKENDS_WANTED_MAX, FRONTENDS_WANTED_MAX};
use sources::Sources;

/// Wanted and actual state of the record-driven maps.
pub struct Model {
    settings: Settings,
    sources: Sources,
    nodes: Nodes,
    addresses: Addresses,
    services: Services,
    workloads: HashMap<WorkloadName, WorkloadDeclaration>,
    wanted: Tables,
    actual: Tables,
    dirty: Keys,
    held: Keys,
    absence: Absence,
    refused: Refused,
    listing: bool,
    services_changed: bool,
    workloads_changed: bool,
    pod_cidrs_changed: bool,
    /// What probes have found of paths, bytes, by cluster and node.
    measured: HashMap<Box<str>, HashMap<Box<str>, u16>>,
    /// What an earlier run has measured, as the kernel has it, is taken for true.
    keeps_measured: bool,
    mesh_changed: bool,
    configured_peers: Option<BTreeSet<ClusterName>>,
    wireguard: WireguardState,
    peers_changed: bool,
    handled: Vector,
    planned: Vector,
    applied: Vector,
}

impl Model {
    /// A model of a node whose kernel holds `actual`. It plans nothing before its first complete listing.
    #[must_use]
    pub fn new(settings: Settings, actual: Tables) -> Self {
        Self {
            sources: Sources::new(settings.cluster.clone(), settings.cluster_id),
            nodes: Nodes::default(),
            addresses: Addresses::default(),
            services: Services::new(&actual),
            workloads: HashMap::new(),
            wanted: Tables::default(),
            actual,
            dirty: Keys::default(),
            held: Keys::default(),
            absence: Absence::default(),
            refused: Refused::default(),
            listing: true,
            services_changed: false,
            workloads_changed: false,
            pod_cidrs_changed: false,
            measured: HashMap::new(),
            keeps_measured: true,
            mesh_changed: false,
            configured_peers: None,
            wireguard: WireguardState::default(),
            peers_changed: false,
            handled: Vector::default(),
            planned: Vector::default(),
            applied: Vector::default(),
            settings,
        }
    }

    /// A full listing begins: what was learnt from records is forgotten, what the kernel holds is not.
    pub fn begin_listing(&mut self) {
        self.sources = Sources::new(self.settings.cluster.clone(), self.settings.cluster_id);
        self.nodes = Nodes::default();
        self.addresses = Addresses::default();
        self.services = Services::new(&self.actual);
        self.workloads.clear();
        self.wanted = Tables::default();
        self.handled = Vector::default();
        self.absence.begin_listing();
        self.listing = true;
    }

    /// The listing is complete.
    pub fn end_listing(&mut self) {
        self.settle_services();
        self.refuse_unplaced_node_addresses();
        self.dirty = Keys::all(&self.wanted, &self.actual);
        self.held = Keys::default();
        self.listing = false;
        self.services_changed = true;
        self.workloads_changed = true;
        self.pod_cidrs_changed = true;
        self.mesh_changed = true;
        self.peers_changed = true;
    }

    /// True from the end of the first listing on, except while another one runs.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        !self.listing
    }

    /// True if nothing is kept that the records do not name: what is not wanted may go elsewhere too.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        !self.listing && self.held.is_empty() && self.kept_entries() == 0
    }

    /// True if what the store says is all that there is: another kernel state, filled from it alone, lacks nothing
    /// that the present one has. Not so while the store is a new one, its grace runs or a peer's copy is incomplete.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.is_settled() && !self.is_distrusted()
    }

    /// Takes one change.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Node {
                cluster,
                name,
                node,
            } => {
                self.mesh_changed = true;
                if let Some(source) = self.source(&cluster) {
                    self.apply_node(source, name, node);
                }
            }
            Change::Address {
                cluster,
                prefix,
                owner,
            } => {
                if let Some(source) = self.source(&cluster) {
                    self.apply_address(source, prefix, owner);
                }
            }
            Change::Slice {
                cluster,
                name,
                slice,
            } => {
                if let Some(source) = self.source(&cluster) {
                    self.apply_slice(source, name, slice);
                }
            }
            Change::LegacyBackends {
                cluster,
                service,
                groups,
            } => {
                if let Some(source) = self.source(&cluster) {
                    self.apply_legacy_backends(source, service, groups);
                }
            }
            Change::Cluster { name, config } => {
                self.mesh_changed = true;
                self.apply_cluster(&name, config);
            }
            Change::Service {
                service,
                declaration,
            } => self.apply_service(service, declaration),
            Change::Workload {
                workload,
                declaration,
            } => {
                match declaration {
                    Some(declaration) => self.workloads.insert(workload, *declaration),
                    None => self.workloads.remove(&workload),
                };
                self.workloads_changed = true;
            }
            Change::Nothing => {}
        }
    }

    /// Everything of `cluster` up to `position` has been applied to the model.
    pub fn progress(&mut self, cluster: &ClusterName, position: Position) {
        self.handled.advance(cluster, position);
        if self.sources.mark_synced(cluster) {
            self.mesh_changed = true;
            if let Some(cluster_id) = self.sources.id_of(cluster) {
                self.give_up(cluster_id);
            }
            self.release_protected();
        }
    }

    /// The steps that bring the kernel to the wanted state. Until [`Model::finish`] the keys in it are not looked at again.
    pub fn plan(&mut self) -> Plan {
        self.planned = self.handled.clone();
        if self.listing {
            return Plan::default();
        }
        self.place_waiting_nodes();
        self.settle_services();
        if self.dirty.is_empty() {
            return Plan::default();
        }
        let keys = std::mem::take(&mut self.dirty);
        let mut plan = plan_keys(&keys, &self.wanted, &self.actual);
        self.hold_protected(&mut plan);
        self.keep_absent(&keys, &mut plan);
        plan
    }

    /// The kernel took this step.
    pub fn commit(&mut self, step: &Step<'_>) {
        self.actual.commit(step);
    }

    /// The kernel did not take this step: its keys are planned again.
    pub fn reject(&mut self, step: &Step<'_>) {
        match step {
            Step::UpsertNodes(e) => self.dirty.nodes.extend(e.iter().map(|(k, _)| *k)),
            Step::DeleteNodes(k) => self.dirty.nodes.extend(k.iter()),
            Step::UpsertNodeAddresses(e) => {
                self.dirty.node_addresses.extend(e.iter().map(|(k, _)| *k));
            }
            Step::DeleteNodeAddresses(k) => self.dirty.node_addresses.extend(k.iter()),
            Step::UpsertIpcache(e) => self.dirty.ipcache.extend(e.iter().map(|(k, _)| *k)),
            Step::DeleteIpcache(k) => self.dirty.ipcache.extend(k.iter()),
            Step::UpsertFrontends(e) => self.dirty.frontends.extend(e.iter().map(|(k, _)| *k)),
            Step::DeleteFrontends(k) => self.dirty.frontends.extend(k.iter()),
            Step::UpsertBackends(e) => self.dirty.lists.extend(e.iter().map(|(k, _)| k.list_id)),
            Step::DeleteBackends(keys) => {
                self.dirty.lists.extend(keys.iter().map(|k| k.list_id));
                self.dirty.loose_backends.extend(keys.iter());
            }
        }
    }

    /// The last plan was carried out in full: its revisions count as applied.
    pub fn finish(&mut self) {
        self.applied.clone_from(&self.planned);
    }

    /// The revisions that the kernel holds.
    #[must_use]
    pub fn applied(&self) -> &Vector {
        &self.applied
    }

    /// What the kernel holds.
    #[must_use]
    pub fn actual(&self) -> &Tables {
        &self.actual
    }

    /// What the kernel should hold.
    #[must_use]
    pub fn wanted(&self) -> &Tables {
        &self.wanted
    }

    /// The kernel's maps were replaced or read anew: everything is compared again.
    pub fn replace_actual(&mut self, actual: Tables) {
        self.services.adopt(&actual);
        self.actual = actual;
        self.dirty = Keys::all(&self.wanted, &self.actual);
    }

    /// Records that were not taken.
    pub fn refused(&mut self) -> &mut Refused {
        &mut self.refused
    }

    /// Counts a record that could not be decoded.
    pub fn refuse(&mut self, reason: Reason, object: String, detail: String) {
        self.refused.record(Refusal {
            reason,
            object,
            detail,
        });
    }

    /// A workload of this cluster.
    #[must_use]
    pub fn workload(&self, name: &WorkloadName) -> Option<&WorkloadDeclaration> {
        self.workloads.get(name)
    }

    /// All workloads of this cluster.
    pub fn workloads(&self) -> impl Iterator<Item = (&WorkloadName, &WorkloadDeclaration)> {
        self.workloads.iter()
    }

    /// Services declared in this cluster.
    pub fn declared_services(&self) -> impl Iterator<Item = (&ServiceName, &ServiceDeclaration)> {
        self.services.declared()
    }

    /// True once after the declaration of any service changed.
    pub fn take_services_changed(&mut self) -> bool {
        std::mem::take(&mut self.services_changed)
    }

    /// True once after any workload changed.
    pub fn take_workloads_changed(&mut self) -> bool {
        std::mem::take(&mut self.workloads_changed)
    }

    fn source(&mut self, cluster: &ClusterName) -> Option<sources::SourceId> {
        let source = self.sources.intern(cluster);
        if source.is_none() {
            self.refuse(
                Reason::MapFull,
                cluster.to_string(),
                format!("more than {} source clusters", sources::SOURCES_MAX),
            );
        }
        source
    }
}

#[cfg(test)]
mod tests;
