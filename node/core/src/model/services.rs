//! Services: declarations joined with the backends of every accepted cluster.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use clustermesh_ebpf_abi::{
    BACKENDS_MAX, BACKENDS_PER_LIST_MAX, BackendValue, FRONTENDS_MAX, FrontendKey, FrontendValue,
};
use smallvec::SmallVec;

use super::Model;
use super::sources::{OWN, SourceId, Sources};
use crate::change::{
    Condition, EndpointGroup, ServiceDeclaration, ServiceName, ServicePort, SliceRecord,
};
use crate::refused::Reason;
use crate::select::{Candidate, select};
use crate::tables::{LIST_ID_NONE, Tables, address, ip};

/// Frontends that are wanted at most.
pub const FRONTENDS_WANTED_MAX: usize = FRONTENDS_MAX as usize / 8 * 7;
/// Backends that are wanted at most: a list that changes is in the map twice for a moment.
pub const BACKENDS_WANTED_MAX: usize = BACKENDS_MAX as usize / 4 * 3;

type ServiceId = u32;

/// Which record of a service and cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Slice(Box<str>),
    Legacy,
}

struct Origin {
    source: SourceId,
    part: Part,
    groups: Vec<EndpointGroup>,
}

struct Service {
    name: ServiceName,
    declaration: Option<Box<ServiceDeclaration>>,
    origins: Vec<Origin>,
    frontends: Vec<FrontendKey>,
    dirty: bool,
}

pub(super) struct Services {
    by_name: HashMap<ServiceName, ServiceId>,
    list: HashMap<ServiceId, Service>,
    next_service: ServiceId,
    /// Which service a slice belongs to: its key does not say.
    slices: HashMap<(SourceId, Box<str>), ServiceId>,
    /// Services with a remote backend at this address.
    by_address: HashMap<IpAddr, SmallVec<[ServiceId; 2]>>,
    dirty: Vec<ServiceId>,
    owners: HashMap<FrontendKey, ServiceId>,
    contested: HashMap<FrontendKey, BTreeSet<ServiceId>>,
    next_list: u32,
    backends_wanted: usize,
    /// Services that found no room; looked at again when another gives some up.
    unplaced: BTreeSet<ServiceId>,
}

/// A backend on its way into a list.
#[derive(Clone, Copy)]
struct Choice {
    value: BackendValue,
    local: bool,
    condition: Condition,
}

impl Candidate for Choice {
    fn is_local(&self) -> bool {
        self.local
    }
    fn condition(&self) -> Condition {
        self.condition
    }
}

impl Services {
    pub(super) fn new(actual: &Tables) -> Self {
        let mut services = Self {
            by_name: HashMap::new(),
            list: HashMap::new(),
            next_service: 0,
            slices: HashMap::new(),
            by_address: HashMap::new(),
            dirty: Vec::new(),
            owners: HashMap::new(),
            contested: HashMap::new(),
            next_list: LIST_ID_NONE,
            backends_wanted: 0,
            unplaced: BTreeSet::new(),
        };
        services.adopt(actual);
        services
    }

    /// New list numbers start beyond all that the kernel has.
    pub(super) fn adopt(&mut self, actual: &Tables) {
        let lists = actual.lists.keys().copied();
        let loose = actual.loose_backends.iter().map(|key| key.list_id);
        let named = actual.frontends.values().map(|value| value.list_id);
        let highest = lists.chain(loose).chain(named).max().unwrap_or_default();
        self.next_list = self.next_list.max(highest);
    }

    pub(super) fn declared(&self) -> impl Iterator<Item = (&ServiceName, &ServiceDeclaration)> {
        self.list.values().filter_map(|service| {
            service
                .declaration
                .as_deref()
                .map(|declaration| (&service.name, declaration))
        })
    }

    fn id(&mut self, name: ServiceName) -> ServiceId {
        if let Some(id) = self.by_name.get(&name) {
            return *id;
        }
        while self.list.contains_key(&self.next_service) {
            self.next_service = self.next_service.wrapping_add(1);
        }
        let id = self.next_service;
        self.next_service = self.next_service.wrapping_add(1);
        self.by_name.insert(name.clone(), id);
        self.list.insert(
            id,
            Service {
                name,
                declaration: None,
                origins: Vec::new(),
                frontends: Vec::new(),
                dirty: false,
            },
        );
        id
    }

    fn mark(&mut self, id: ServiceId) {
        if let Some(service) = self.list.get_mut(&id)
            && !std::mem::replace(&mut service.dirty, true)
        {
            self.dirty.push(id);
        }
    }

    fn offer_room(&mut self) {
        for id in std::mem::take(&mut self.unplaced) {
            self.mark(id);
        }
    }

    pub(super) fn mark_address(&mut self, address: IpAddr) {
        for id in self.by_address.get(&address).cloned().into_iter().flatten() {
            self.mark(id);
        }
    }

    pub(super) fn mark_frontend(&mut self, key: &FrontendKey) {
        if let Some(id) = self.owners.get(key).copied() {
            self.mark(id);
        }
    }

    pub(super) fn mark_source(&mut self, source: SourceId) {
        let ids: Vec<ServiceId> = self
            .list
            .iter()
            .filter(|(_, service)| service.origins.iter().any(|o| o.source == source))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.mark(id);
        }
    }

    /// Replaces one record's backends; `None` removes it.
    fn set_origin(
        &mut self,
        id: ServiceId,
        source: SourceId,
        part: Part,
        groups: Option<Vec<EndpointGroup>>,
    ) {
        let Some(service) = self.list.get_mut(&id) else {
            return;
        };
        let place = service
            .origins
            .iter()
            .position(|o| o.source == source && o.part == part);
        if let (Some(place), Some(groups)) = (place, &groups)
            && service.origins.get(place).map(|o| &o.groups) == Some(groups)
        {
            return;
        }
        let added: Vec<IpAddr> = addresses(groups.as_deref().unwrap_or_default()).collect();
        let old = place.map(|place| service.origins.swap_remove(place));
        if let Some(groups) = groups {
            service.origins.push(Origin {
                source,
                part,
                groups,
            });
        }
        if source != OWN {
            for ip in &added {
                let ids = self.by_address.entry(*ip).or_default();
                if !ids.contains(&id) {
                    ids.push(id);
                }
            }
            if let Some(old) = old {
                self.forget_addresses(id, &old.groups, &added);
            }
        }
        self.mark(id);
    }

    /// Unlinks addresses that no other record of the service names.
    fn forget_addresses(&mut self, id: ServiceId, groups: &[EndpointGroup], kept: &[IpAddr]) {
        let Some(service) = self.list.get(&id) else {
            return;
        };
        for gone in addresses(groups).filter(|ip| !kept.contains(ip)) {
            let still = service
                .origins
                .iter()
                .any(|o| o.source != OWN && addresses(&o.groups).any(|ip| ip == gone));
            if still {
                continue;
            }
            if let Some(ids) = self.by_address.get_mut(&gone) {
                ids.retain(|held| *held != id);
                if ids.is_empty() {
                    self.by_address.remove(&gone);
                }
            }
        }
    }

    fn forget_if_empty(&mut self, id: ServiceId) {
        let empty = self.list.get(&id).is_some_and(|service| {
            service.declaration.is_none()
                && service.origins.is_empty()
                && service.frontends.is_empty()
        });
        if empty && let Some(service) = self.list.remove(&id) {
            self.by_name.remove(&service.name);
        }
    }

    fn new_list(&mut self, wanted: &Tables, actual: &Tables) -> u32 {
        loop {
            self.next_list = self.next_list.wrapping_add(1);
            let id = self.next_list;
            if id != LIST_ID_NONE
                && !wanted.lists.contains_key(&id)
                && !actual.lists.contains_key(&id)
            {
                return id;
            }
        }
    }
}

fn addresses(groups: &[EndpointGroup]) -> impl Iterator<Item = IpAddr> + '_ {
    groups
        .iter()
        .flat_map(|group| group.endpoints.iter().map(|endpoint| endpoint.address))
}

impl Model {
    pub(super) fn apply_service(
        &mut self,
        name: ServiceName,
        declaration: Option<Box<ServiceDeclaration>>,
    ) {
        let id = self.services.id(name);
        if let Some(service) = self.services.list.get_mut(&id)
            && service.declaration != declaration
        {
            service.declaration = declaration;
            self.services_changed = true;
        }
        self.services.mark(id);
    }

    pub(super) fn apply_slice(
        &mut self,
        source: SourceId,
        name: Box<str>,
        slice: Option<Box<SliceRecord>>,
    ) {
        let key = (source, name.clone());
        let held = self.services.slices.get(&key).copied();
        let Some(slice) = slice else {
            if let Some(id) = held {
                self.services.slices.remove(&key);
                self.services
                    .set_origin(id, source, Part::Slice(name), None);
            }
            return;
        };
        let id = self.services.id(slice.service);
        if let Some(before) = held
            && before != id
        {
            self.services
                .set_origin(before, source, Part::Slice(name.clone()), None);
        }
        self.services.slices.insert(key, id);
        self.services
            .set_origin(id, source, Part::Slice(name), Some(vec![slice.group]));
    }

    pub(super) fn apply_legacy_backends(
        &mut self,
        source: SourceId,
        name: ServiceName,
        groups: Option<Vec<EndpointGroup>>,
    ) {
        let id = self.services.id(name);
        self.services.set_origin(id, source, Part::Legacy, groups);
        self.services.mark(id);
    }

    /// Computes the frontends of every service that a change touched.
    pub(super) fn settle_services(&mut self) {
        while !self.services.dirty.is_empty() {
            // A service that gives a frontend up may let another have it: that one is marked and settled next.
            for id in std::mem::take(&mut self.services.dirty) {
                self.settle(id);
            }
        }
    }

    fn settle(&mut self, id: ServiceId) {
        let Some(service) = self.services.list.get_mut(&id) else {
            return;
        };
        service.dirty = false;
        let old = std::mem::take(&mut service.frontends);
        let declaration = service.declaration.take();
        let mut kept = Vec::new();
        for (key, port) in declaration
            .iter()
            .flat_map(|declaration| frontends(declaration))
        {
            if *self.services.owners.entry(key).or_insert(id) != id {
                self.services.contested.entry(key).or_default().insert(id);
                self.refuse_frontend(id, key);
                continue;
            }
            let global = declaration.as_ref().is_some_and(|d| d.global);
            let mut choices = self.candidates(id, port, &key, global);
            let affinity = declaration.as_ref().map(|d| d.affinity).unwrap_or_default();
            select(&mut choices, global, affinity);
            let mut list: Vec<BackendValue> = choices.iter().map(|c| c.value).collect();
            self.absence.complete(&key, &mut list);
            list.sort_unstable();
            list.dedup();
            if self.set_frontend(id, key, list) {
                kept.push(key);
            } else {
                self.services.owners.remove(&key);
            }
        }
        for key in old {
            if !kept.contains(&key) {
                self.drop_frontend(id, &key);
            }
        }
        if let Some(service) = self.services.list.get_mut(&id) {
            service.frontends = kept;
            service.declaration = declaration;
        }
        self.services.forget_if_empty(id);
    }

    /// All backends for one port and family, before the choice.
    fn candidates(
        &mut self,
        id: ServiceId,
        port: &ServicePort,
        key: &FrontendKey,
        global: bool,
    ) -> Vec<Choice> {
        let Some(service) = self.services.list.get(&id) else {
            return Vec::new();
        };
        let v4 = ip(&key.address).is_ipv4();
        let mut choices = Vec::new();
        let mut foreign = None;
        for origin in &service.origins {
            let local = origin.source == OWN;
            if !local && !global {
                continue;
            }
            let Some(cluster_id) = usable(&self.sources, origin) else {
                continue;
            };
            for group in &origin.groups {
                let Some(target) = group
                    .ports
                    .iter()
                    .find(|p| p.name == port.name && p.protocol == port.protocol)
                else {
                    continue;
                };
                for endpoint in &group.endpoints {
                    if endpoint.address.is_ipv4() != v4 {
                        continue;
                    }
                    if !local && !self.accepted_from(origin.source, endpoint.address) {
                        foreign = Some((origin.source, endpoint.address));
                        continue;
                    }
                    choices.push(Choice {
                        value: BackendValue {
                            address: address(endpoint.address),
                            port_be: target.port.to_be_bytes(),
                            cluster_id,
                            reserved: 0,
                        },
                        local,
                        condition: endpoint.condition,
                    });
                }
            }
        }
        if let Some((source, address)) = foreign
            && !self.listing
        {
            let object = format!(
                "backend {address} of service {} in cluster {}",
                service.name,
                self.sources.name(source)
            );
            self.refuse(
                Reason::ForeignBackend,
                object,
                "no address record of that cluster names it".to_owned(),
            );
        }
        choices
    }

    /// Makes a frontend use this list; false if the maps have no room for it.
    fn set_frontend(
        &mut self,
        id: ServiceId,
        key: FrontendKey,
        mut list: Vec<BackendValue>,
    ) -> bool {
        let most = usize::from(BACKENDS_PER_LIST_MAX);
        if list.len() > most {
            let detail = format!("{} backends, {most} are used", list.len());
            self.refuse(Reason::TooManyBackends, self.service_object(id), detail);
            list.truncate(most);
        }
        let held = self
            .wanted
            .list_of(&key)
            .map(|(list_id, l)| (list_id, l.len()));
        if self.wanted.list_of(&key).is_some_and(|(_, l)| l == &*list) {
            return true;
        }
        let held_len = held.map_or(0, |(_, len)| len);
        let backends = self.services.backends_wanted - held_len + list.len();
        if backends > BACKENDS_WANTED_MAX
            || (held.is_none() && self.wanted.frontends.len() >= FRONTENDS_WANTED_MAX)
        {
            let detail = format!(
                "the maps take {FRONTENDS_WANTED_MAX} frontends and {BACKENDS_WANTED_MAX} backends"
            );
            self.refuse(Reason::MapFull, self.service_object(id), detail);
            self.services.unplaced.insert(id);
            return held.is_some();
        }
        self.services.backends_wanted = backends;
        if list.len() < held_len {
            self.services.offer_room();
        }
        if let Some((old, _)) = held {
            self.drop_list(old);
        }
        let in_kernel = self
            .actual
            .list_of(&key)
            .filter(|(list_id, l)| *l == &*list && !self.wanted.lists.contains_key(list_id))
            .map(|(list_id, _)| list_id);
        let list_id = match in_kernel {
            Some(list_id) => list_id,
            None if list.is_empty() => LIST_ID_NONE,
            None => self.services.new_list(&self.wanted, &self.actual),
        };
        let value = FrontendValue {
            list_id,
            backend_count: u16::try_from(list.len()).unwrap_or(BACKENDS_PER_LIST_MAX),
            flags: 0,
        };
        if !list.is_empty() {
            self.wanted.lists.insert(list_id, list.into_boxed_slice());
            self.dirty.lists.insert(list_id);
        }
        self.wanted.frontends.insert(key, value);
        self.dirty.frontends.insert(key);
        true
    }

    fn drop_list(&mut self, list_id: u32) {
        if self.wanted.lists.remove(&list_id).is_some() {
            self.dirty.lists.insert(list_id);
        }
    }

    fn drop_frontend(&mut self, id: ServiceId, key: &FrontendKey) {
        if let Some((list_id, list)) = self.wanted.list_of(key) {
            self.services.backends_wanted -= list.len();
            self.drop_list(list_id);
        }
        self.wanted.frontends.remove(key);
        self.dirty.frontends.insert(*key);
        self.absence.forget_frontend(key);
        if self.services.owners.get(key) == Some(&id) {
            self.services.owners.remove(key);
        }
        for next in self.services.contested.remove(key).into_iter().flatten() {
            self.services.mark(next);
        }
        self.services.offer_room();
    }

    fn service_object(&self, id: ServiceId) -> String {
        self.services
            .list
            .get(&id)
            .map_or_else(String::new, |service| format!("service {}", service.name))
    }

    fn refuse_frontend(&mut self, id: ServiceId, key: FrontendKey) {
        let owner = self.services.owners.get(&key).copied().unwrap_or(id);
        let detail = format!(
            "{} has {} port {}",
            self.service_object(owner),
            ip(&key.address),
            u16::from_be_bytes(key.port_be)
        );
        self.refuse(Reason::FrontendConflict, self.service_object(id), detail);
    }
}

/// The cluster id of backends that count: ours; a peer's slices, or its service records where it has no slices.
fn usable(sources: &Sources, origin: &Origin) -> Option<u16> {
    let cluster_id = sources.cluster_id(origin.source)?;
    let is_slice = matches!(origin.part, Part::Slice(_));
    (sources.has_slices(origin.source) == is_slice).then_some(cluster_id)
}

/// Every virtual address and port of a service.
fn frontends(
    declaration: &ServiceDeclaration,
) -> impl Iterator<Item = (FrontendKey, &ServicePort)> {
    declaration.addresses.iter().flat_map(|vip| {
        declaration.ports.iter().map(|port| {
            let key = FrontendKey {
                address: address(*vip),
                port_be: port.port.to_be_bytes(),
                protocol: port.protocol,
                reserved: 0,
            };
            (key, port)
        })
    })
}

#[cfg(test)]
mod tests;
