//! The incremental join: each record change marks the services that it touches, and only they are rendered again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::ControlFlow;

use bytes::Bytes;
use clustermesh_api::keys::{
    ALLOC_PREFIX, Kind, LOCAL_SLICES_PREFIX, Origin, READINESS_PREFIX, RecordKey,
    STORED_SERVICES_PREFIX, Tree, WORKLOADS_PREFIX,
};
use clustermesh_api::manifest::StoredService;
use clustermesh_api::record::Record;
use clustermesh_api::records::{EndpointSlice, Readiness};

use super::render::{self, Backend};
use crate::keys::OWN_ADDRESSES_PREFIX;
use crate::settings::ClusterSettings;
use crate::view::View;

/// A `services/v1` record is written at most this often, ms: readers take it as a whole, whatever changed in it.
pub const SERVICE_RECORD_INTERVAL_MS: i64 = 1000;

/// Node label that names the zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// One key to write; `None` deletes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Full key.
    pub key: Bytes,
    /// New value.
    pub value: Option<Bytes>,
}

/// Namespace and name.
type Name = (String, String);

#[derive(Clone, Debug)]
struct Holder {
    workload: Name,
    node: String,
}

/// What the store holds under a key of ours; unknown while a write of it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Published {
    Value(Bytes),
    Unknown,
}

/// The join of one cluster. Feed it every change of the store, then take what has to be written.
///
/// What was taken counts as written; give it back with [`ServiceJoin::failed`] otherwise.
#[derive(Clone, Debug)]
pub struct ServiceJoin {
    settings: ClusterSettings,
    services: BTreeMap<Name, StoredService>,
    /// First term of each selector, to find the services of a Workload by its labels.
    selectors: BTreeMap<(String, String, String), BTreeSet<String>>,
    workloads: BTreeMap<Name, BTreeMap<String, String>>,
    /// Services that each Workload backs, and the other way round.
    backs: BTreeMap<Name, BTreeSet<Name>>,
    members: BTreeMap<Name, BTreeSet<Name>>,
    holders: BTreeMap<IpAddr, Holder>,
    addresses: BTreeMap<Name, BTreeSet<IpAddr>>,
    readiness: BTreeMap<(IpAddr, String), Readiness>,
    zones: BTreeMap<String, String>,
    on_node: BTreeMap<String, BTreeSet<IpAddr>>,
    slices: BTreeMap<Name, BTreeMap<Bytes, Published>>,
    records: BTreeMap<Name, (Published, i64)>,
    dirty_slices: BTreeSet<Name>,
    dirty_records: BTreeSet<Name>,
}

impl ServiceJoin {
    /// An empty join: no records, nothing published.
    #[must_use]
    pub fn new(settings: ClusterSettings) -> Self {
        Self {
            settings,
            services: BTreeMap::new(),
            selectors: BTreeMap::new(),
            workloads: BTreeMap::new(),
            backs: BTreeMap::new(),
            members: BTreeMap::new(),
            holders: BTreeMap::new(),
            addresses: BTreeMap::new(),
            readiness: BTreeMap::new(),
            zones: BTreeMap::new(),
            on_node: BTreeMap::new(),
            slices: BTreeMap::new(),
            records: BTreeMap::new(),
            dirty_slices: BTreeSet::new(),
            dirty_records: BTreeSet::new(),
        }
    }

    /// The join of all that a store holds, with what was published there before. Everything is dirty.
    #[must_use]
    pub fn from_view(settings: ClusterSettings, view: &dyn View) -> Self {
        let cluster = settings.name.clone();
        let mut join = Self::new(settings);
        let inputs = [
            Kind::Nodes.state_prefix(&cluster),
            STORED_SERVICES_PREFIX.to_owned(),
            WORKLOADS_PREFIX.to_owned(),
            READINESS_PREFIX.to_owned(),
            OWN_ADDRESSES_PREFIX.to_owned(),
        ];
        for prefix in inputs {
            view.scan(prefix.as_bytes(), &mut |kv| {
                join.handle(&kv.key, Some(&kv.value));
                ControlFlow::Continue(())
            });
        }
        for prefix in [
            Kind::EndpointSlices.state_prefix(&cluster),
            LOCAL_SLICES_PREFIX.to_owned(),
        ] {
            view.scan(prefix.as_bytes(), &mut |kv| {
                join.adopt_slice(kv.key, kv.value);
                ControlFlow::Continue(())
            });
        }
        view.scan(
            Kind::Services.state_prefix(&cluster).as_bytes(),
            &mut |kv| {
                if let Ok(RecordKey::Service {
                    namespace, name, ..
                }) = RecordKey::parse(&kv.key)
                {
                    let service = (namespace, name);
                    join.dirty_records.insert(service.clone());
                    join.records
                        .insert(service, (Published::Value(kv.value), i64::MIN));
                }
                ControlFlow::Continue(())
            },
        );
        join
    }

    fn adopt_slice(&mut self, key: Bytes, value: Bytes) {
        let Ok(
            RecordKey::EndpointSlice { namespace, .. }
            | RecordKey::LocalEndpointSlice { namespace, .. },
        ) = RecordKey::parse(&key)
        else {
            return;
        };
        // A slice that names no service is nobody's: it goes with the service of the empty name.
        let name = EndpointSlice::decode(&value)
            .ok()
            .and_then(|slice| slice.service_name().map(str::to_owned))
            .unwrap_or_default();
        let service = (namespace, name);
        self.dirty_slices.insert(service.clone());
        self.slices
            .entry(service)
            .or_default()
            .insert(key, Published::Value(value));
    }

    /// Takes one change of the store; `None` means deleted. Keys that do not matter are ignored, and a value that
    /// cannot be read counts as absent. Session states do not matter: a lost session says nothing about a backend.
    pub fn handle(&mut self, key: &[u8], value: Option<&[u8]>) {
        // Each claim of an address writes there too.
        if key.starts_with(ALLOC_PREFIX.as_bytes()) {
            return;
        }
        let Ok(key) = RecordKey::parse(key) else {
            return;
        };
        let record = value.and_then(|value| Record::decode(&key, value).ok());
        match (key, record) {
            (RecordKey::StoredService { namespace, name }, record) => {
                let service = match record {
                    Some(Record::StoredService(service)) => Some(service),
                    _ => None,
                };
                self.set_service((namespace, name), service);
            }
            (RecordKey::Workload { namespace, name }, record) => {
                let labels = match record {
                    Some(Record::Workload(workload)) => Some(workload.object.metadata.labels),
                    _ => None,
                };
                self.set_workload((namespace, name), labels);
            }
            (
                RecordKey::Ip {
                    origin: Origin::Own,
                    address,
                },
                record,
            ) if address.prefix_bits.is_none() => {
                let holder = match record {
                    Some(Record::Ip(pair)) if !pair.k8s_pod_name.is_empty() => Some(Holder {
                        node: pair.node().unwrap_or_default().to_owned(),
                        workload: (pair.k8s_namespace, pair.k8s_pod_name),
                    }),
                    _ => None,
                };
                self.set_holder(address.address, holder);
            }
            (RecordKey::Readiness { node, address }, record) => {
                match record {
                    Some(Record::Readiness(readiness)) => {
                        self.readiness.insert((address, node), readiness)
                    }
                    _ => self.readiness.remove(&(address, node)),
                };
                self.touch_address(address);
            }
            (
                RecordKey::Node {
                    tree: Tree::State,
                    cluster,
                    name,
                },
                record,
            ) if cluster == self.settings.name => {
                let zone = match record {
                    Some(Record::Node(mut node)) => node.labels.remove(ZONE_LABEL),
                    _ => None,
                };
                self.set_zone(name, zone);
            }
            _ => {}
        }
    }

    fn set_service(&mut self, name: Name, service: Option<StoredService>) {
        if let Some(old) = self.services.remove(&name)
            && let Some((key, value)) = old.object.spec.selector.first_key_value()
        {
            let entry = (name.0.clone(), key.clone(), value.clone());
            if let Some(services) = self.selectors.get_mut(&entry) {
                services.remove(&name.1);
                if services.is_empty() {
                    self.selectors.remove(&entry);
                }
            }
        }
        for workload in self.members.remove(&name).unwrap_or_default() {
            if let Some(services) = self.backs.get_mut(&workload) {
                services.remove(&name);
            }
        }
        self.touch(name.clone());
        let Some(service) = service else { return };
        if let Some((key, value)) = service.object.spec.selector.first_key_value() {
            let entry = (name.0.clone(), key.clone(), value.clone());
            self.selectors
                .entry(entry)
                .or_default()
                .insert(name.1.clone());
        }
        let selector = &service.object.spec.selector;
        let first = (name.0.clone(), String::new());
        let members: BTreeSet<Name> = self
            .workloads
            .range(first..)
            .take_while(|(workload, _)| workload.0 == name.0)
            .filter(|(_, labels)| selects(selector, labels))
            .map(|(workload, _)| workload.clone())
            .collect();
        for workload in &members {
            self.backs
                .entry(workload.clone())
                .or_default()
                .insert(name.clone());
        }
        self.members.insert(name.clone(), members);
        self.services.insert(name, service);
    }

    fn set_workload(&mut self, name: Name, labels: Option<BTreeMap<String, String>>) {
        for service in self.backs.remove(&name).unwrap_or_default() {
            if let Some(members) = self.members.get_mut(&service) {
                members.remove(&name);
            }
            self.touch(service);
        }
        let Some(labels) = labels else {
            self.workloads.remove(&name);
            return;
        };
        let mut backs = BTreeSet::new();
        for (key, value) in &labels {
            let Some(services) = self
                .selectors
                .get(&(name.0.clone(), key.clone(), value.clone()))
            else {
                continue;
            };
            for service in services {
                let service = (name.0.clone(), service.clone());
                if self
                    .services
                    .get(&service)
                    .is_some_and(|found| selects(&found.object.spec.selector, &labels))
                {
                    backs.insert(service);
                }
            }
        }
        for service in &backs {
            self.members
                .entry(service.clone())
                .or_default()
                .insert(name.clone());
            self.touch(service.clone());
        }
        self.workloads.insert(name.clone(), labels);
        self.backs.insert(name, backs);
    }

    fn set_holder(&mut self, address: IpAddr, holder: Option<Holder>) {
        self.touch_address(address);
        if let Some(old) = self.holders.remove(&address) {
            remove_from(&mut self.addresses, &old.workload, address);
            remove_from(&mut self.on_node, &old.node, address);
        }
        if let Some(holder) = holder {
            self.addresses
                .entry(holder.workload.clone())
                .or_default()
                .insert(address);
            self.on_node
                .entry(holder.node.clone())
                .or_default()
                .insert(address);
            self.holders.insert(address, holder);
            self.touch_address(address);
        }
    }

    fn set_zone(&mut self, node: String, zone: Option<String>) {
        if self.zones.get(&node) == zone.as_ref() {
            return;
        }
        for address in self.on_node.get(&node).cloned().unwrap_or_default() {
            self.touch_address(address);
        }
        match zone {
            Some(zone) => self.zones.insert(node, zone),
            None => self.zones.remove(&node),
        };
    }

    fn touch_address(&mut self, address: IpAddr) {
        let Some(holder) = self.holders.get(&address) else {
            return;
        };
        for service in self
            .backs
            .get(&holder.workload)
            .cloned()
            .unwrap_or_default()
        {
            self.touch(service);
        }
    }

    fn touch(&mut self, service: Name) {
        self.dirty_records.insert(service.clone());
        self.dirty_slices.insert(service);
    }

    /// Endpoints of a service in the order of their addresses.
    fn backends(&self, name: &Name, service: &StoredService) -> Vec<Backend> {
        let members = self.members.get(name).into_iter().flatten();
        let addresses: BTreeSet<IpAddr> = members
            .filter_map(|workload| self.addresses.get(workload))
            .flatten()
            .copied()
            .collect();
        addresses
            .into_iter()
            .filter_map(|address| {
                let holder = self.holders.get(&address)?;
                // Only the word of the node that holds the address counts.
                let readiness = self.readiness.get(&(address, holder.node.clone()));
                Some(Backend {
                    address,
                    node: holder.node.clone(),
                    zone: self.zones.get(&holder.node).cloned(),
                    ready: render::is_ready(&service.object.spec.ports, readiness),
                })
            })
            .collect()
    }

    /// Takes the slices that have to be written or deleted: to be proposed at once.
    pub fn take_slices(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for name in std::mem::take(&mut self.dirty_slices) {
            let wanted = self
                .services
                .get(&name)
                .map(|service| {
                    render::slices(&self.settings, service, &self.backends(&name, service))
                })
                .unwrap_or_default();
            let published = self.slices.remove(&name).unwrap_or_default();
            for key in published.keys().filter(|key| !wanted.contains_key(*key)) {
                changes.push(Change {
                    key: key.clone(),
                    value: None,
                });
            }
            for (key, value) in &wanted {
                if published.get(key) != Some(&Published::Value(value.clone())) {
                    changes.push(Change {
                        key: key.clone(),
                        value: Some(value.clone()),
                    });
                }
            }
            if !wanted.is_empty() {
                let now = wanted
                    .into_iter()
                    .map(|(key, value)| (key, Published::Value(value)))
                    .collect();
                self.slices.insert(name, now);
            }
        }
        changes
    }

    /// Takes the `services/v1` records that have to be written or deleted and whose last write is
    /// [`SERVICE_RECORD_INTERVAL_MS`] ago; the others wait. `now_ms` is any clock that never goes back.
    pub fn take_services(&mut self, now_ms: i64) -> Vec<Change> {
        let mut changes = Vec::new();
        for name in std::mem::take(&mut self.dirty_records) {
            if self.due_ms(&name) > now_ms {
                self.dirty_records.insert(name);
                continue;
            }
            let wanted = self.services.get(&name).and_then(|service| {
                render::service(&self.settings, service, &self.backends(&name, service))
                    .map(|record| record.encode())
            });
            let published = self.records.get(&name).map(|(published, _)| published);
            if published == wanted.clone().map(Published::Value).as_ref() {
                continue;
            }
            changes.push(Change {
                key: render::service_key(&self.settings, &name.0, &name.1),
                value: wanted.clone(),
            });
            match wanted {
                Some(value) => self.records.insert(name, (Published::Value(value), now_ms)),
                None => self.records.remove(&name),
            };
        }
        changes
    }

    /// When [`ServiceJoin::take_services`] has something to do next, on the clock given to it; `None`: nothing waits.
    #[must_use]
    pub fn services_due_ms(&self) -> Option<i64> {
        self.dirty_records
            .iter()
            .map(|name| self.due_ms(name))
            .min()
    }

    /// True when [`ServiceJoin::take_slices`] has something to look at.
    #[must_use]
    pub fn slices_due(&self) -> bool {
        !self.dirty_slices.is_empty()
    }

    fn due_ms(&self, name: &Name) -> i64 {
        self.records.get(name).map_or(i64::MIN, |(_, written)| {
            written.saturating_add(SERVICE_RECORD_INTERVAL_MS)
        })
    }

    /// Gives back changes that were not written: they are made again, from what is true then.
    pub fn failed(&mut self, changes: &[Change]) {
        for change in changes {
            match RecordKey::parse(&change.key) {
                Ok(RecordKey::Service {
                    namespace, name, ..
                }) => {
                    let service = (namespace, name);
                    self.records
                        .insert(service.clone(), (Published::Unknown, i64::MIN));
                    self.dirty_records.insert(service);
                }
                Ok(
                    RecordKey::EndpointSlice {
                        namespace, name, ..
                    }
                    | RecordKey::LocalEndpointSlice { namespace, name },
                ) => {
                    let service = (namespace, service_of_slice(&name).to_owned());
                    self.slices
                        .entry(service.clone())
                        .or_default()
                        .insert(change.key.clone(), Published::Unknown);
                    self.dirty_slices.insert(service);
                }
                _ => {}
            }
        }
    }
}

/// The service in the name of a slice of ours: `<service>[.local]-<family>-<index>`.
fn service_of_slice(slice: &str) -> &str {
    let name = slice.rsplitn(3, '-').nth(2).unwrap_or_default();
    name.strip_suffix(".local").unwrap_or(name)
}

fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    !selector.is_empty()
        && selector
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
}

fn remove_from<K: Ord + Clone>(
    index: &mut BTreeMap<K, BTreeSet<IpAddr>>,
    key: &K,
    address: IpAddr,
) {
    if let Some(addresses) = index.get_mut(key) {
        addresses.remove(&address);
        if addresses.is_empty() {
            index.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
