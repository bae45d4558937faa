//! Frontends of each service: who owns them, which backends they lead to, and where their lists stand.

use clustermesh_ebpf_abi::{BACKENDS_PER_LIST_MAX, BackendValue, FrontendKey, FrontendValue};

use super::{BACKENDS_WANTED_MAX, Choice, FRONTENDS_WANTED_MAX, Model, Origin, Part, ServiceId};
use crate::change::{ServiceDeclaration, ServicePort};
use crate::model::sources::{OWN, Sources};
use crate::refused::Reason;
use crate::select::select;
use crate::tables::{LIST_ID_NONE, address, ip};

impl Model {
    /// Computes the frontends of every service that a change touched.
    pub(in crate::model) fn settle_services(&mut self) {
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
                            frontend_tag: key.tag(),
                            address: address(endpoint.address),
                            port_be: target.port.to_be_bytes(),
                            cluster_id,
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
