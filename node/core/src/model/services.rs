//! Services: declarations joined with the backends of every accepted cluster.

mod frontends;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use clustermesh_ebpf_abi::{BACKENDS_MAX, BackendValue, FRONTENDS_MAX, FrontendKey};
use smallvec::SmallVec;

use super::Model;
use super::sources::{OWN, SourceId};
use crate::change::{Condition, EndpointGroup, ServiceDeclaration, ServiceName, SliceRecord};
use crate::select::Candidate;
use crate::tables::{LIST_ID_NONE, Tables};

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
}

#[cfg(test)]
mod tests;
