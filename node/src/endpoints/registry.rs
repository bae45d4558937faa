//! All endpoints of the node: durable, in the kernel maps, and attached.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use clustermesh_ebpf::abi::{
    ENDPOINT_HOST, EndpointValue, IDENTITY_HEALTH, IDENTITY_REMOTE_NODE, InterfaceValue,
};
use clustermesh_ebpf::{Datapath, Maps};
use clustermesh_node_core::change::WorkloadName;
use clustermesh_node_core::ipam::{Attachment, IpamError};
use clustermesh_node_core::tables::address;
use rtnetlink::Handle;
use tokio::sync::watch;
use tracing::{info, warn};

use super::pod::{self, PodPlan, interface_name};
use crate::host::HostPair;
use crate::netlink::{self, NetlinkError};
use crate::state_files::{NodeFacts, StateError, StateFiles, StoredEndpoint, StoredEndpoints};

/// Why an endpoint could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// No address.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// The network of host or container.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The kernel programs or maps.
    #[error(transparent)]
    Datapath(#[from] clustermesh_ebpf::Error),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// The container is not attached.
    #[error("container {0} has no interface of ours")]
    Unknown(String),
    /// The container is not as ADD left it.
    #[error("{0}")]
    Changed(String),
}

/// What ADD asks for.
#[derive(Clone, Debug)]
pub struct AddRequest {
    /// The attachment.
    pub attachment: Attachment,
    /// Path of the container's namespace.
    pub netns: String,
    /// The workload.
    pub workload: WorkloadName,
    /// Its identity.
    pub identity: u32,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Most segments in one packet that the pod sends; `None` = as many as the kernel likes.
    pub segments_max: Option<u32>,
}

/// The endpoints of this node. All changes go through one lock: an ADD takes milliseconds.
pub struct Endpoints {
    files: Arc<StateFiles>,
    maps: Maps,
    datapath: Arc<Mutex<Datapath>>,
    handle: Handle,
    stored: tokio::sync::Mutex<StoredEndpoints>,
    /// What others see; replaced after each change.
    view: watch::Sender<Arc<Vec<StoredEndpoint>>>,
}

impl Endpoints {
    /// Reads the endpoints of earlier runs.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn open(
        files: Arc<StateFiles>,
        maps: Maps,
        datapath: Arc<Mutex<Datapath>>,
        handle: Handle,
    ) -> Result<Self, StateError> {
        let stored = files.endpoints()?;
        let view = watch::Sender::new(Arc::new(stored.endpoints.clone()));
        Ok(Self {
            files,
            maps,
            datapath,
            handle,
            stored: tokio::sync::Mutex::new(stored),
            view,
        })
    }

    /// The present endpoints, and notice of changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Vec<StoredEndpoint>>> {
        self.view.subscribe()
    }

    /// Pod CIDRs that this node used before, textual.
    pub async fn cidrs_held(&self) -> Vec<String> {
        let stored = self.stored.lock().await;
        [stored.ipam.cidr_v4, stored.ipam.cidr_v6]
            .into_iter()
            .flatten()
            .map(|cidr| cidr.to_string())
            .collect()
    }

    /// Takes the node's ranges, drops endpoints whose interface is gone, and makes the kernel maps say
    /// exactly what is left and the host's own addresses. Programs are attached by [`Endpoints::attach_all`].
    ///
    /// # Errors
    /// The kernel or the state folder refused something.
    pub async fn restore(&self, facts: &NodeFacts, pair: HostPair) -> Result<(), EndpointError> {
        let mut stored = self.stored.lock().await;
        let mut next = stored.clone();
        next.ipam.set_ranges(facts.pod_cidr_v4, facts.pod_cidr_v6);
        let mut kept = Vec::new();
        for endpoint in std::mem::take(&mut next.endpoints) {
            let link = netlink::link_by_name(&self.handle, &endpoint.host_interface).await?;
            match link {
                Some(link) if link.index == endpoint.ifindex => kept.push(endpoint),
                _ => {
                    info!(
                        workload = %format!("{}/{}", endpoint.namespace, endpoint.name),
                        interface = endpoint.host_interface,
                        "endpoint is gone: its interface was removed while no agent ran"
                    );
                    next.ipam.release(&endpoint.attachment, now_ms());
                }
            }
        }
        next.endpoints = kept;
        // An ADD that was cut off between allocation and end.
        let attached: HashSet<&Attachment> = next.endpoints.iter().map(|e| &e.attachment).collect();
        let dangling: Vec<Attachment> = next
            .ipam
            .allocations()
            .map(|(attachment, _)| attachment.clone())
            .filter(|attachment| !attached.contains(attachment))
            .collect();
        for attachment in dangling {
            netlink::delete_link(&self.handle, &interface_name(&attachment)).await?;
            next.ipam.release(&attachment, now_ms());
        }
        self.store(&next).await?;
        self.fill_maps(&next, pair)?;
        *stored = next;
        self.publish(&stored);
        Ok(())
    }

    /// Attaches the programs to every endpoint, and detaches them from interfaces that are none. After a change
    /// of the map layout this must wait until the new maps are full: until then the old programs forward.
    ///
    /// # Errors
    /// The kernel refused something.
    pub async fn attach_all(&self) -> Result<(), EndpointError> {
        let stored = self.stored.lock().await;
        let mut datapath = self.datapath.lock().unwrap_or_else(PoisonError::into_inner);
        for endpoint in &stored.endpoints {
            datapath.attach_pod(endpoint.ifindex)?;
        }
        let known: HashSet<u32> = stored.endpoints.iter().map(|e| e.ifindex).collect();
        for ifindex in datapath.attached_pods()? {
            if !known.contains(&ifindex) {
                datapath.detach_pod(ifindex)?;
            }
        }
        Ok(())
    }

    fn fill_maps(&self, stored: &StoredEndpoints, pair: HostPair) -> Result<(), EndpointError> {
        let mut wanted = BTreeMap::new();
        let mut interfaces = BTreeMap::new();
        for (ips, identity) in [
            (stored.ipam.routers(), IDENTITY_REMOTE_NODE),
            (stored.ipam.health(), IDENTITY_HEALTH),
        ] {
            for ip in ips {
                let value = EndpointValue {
                    ifindex: pair.host_ifindex,
                    identity,
                    pod_mac: pair.host_mac,
                    host_mac: pair.host_mac,
                    flags: ENDPOINT_HOST,
                };
                wanted.insert(address(ip), value);
            }
        }
        for endpoint in &stored.endpoints {
            for ip in &endpoint.addresses {
                wanted.insert(address(*ip), endpoint_value(endpoint));
            }
            interfaces.insert(endpoint.ifindex, interface_value(endpoint));
        }
        self.maps.interfaces.replace_all(&interfaces)?;
        self.maps.endpoints.replace_all(&wanted)?;
        Ok(())
    }

    /// Attaches a container. The same attachment gets the same addresses; after an error nothing is left of it.
    ///
    /// # Errors
    /// No address, no such namespace, or a refusal of the kernel or the state folder.
    pub async fn add(&self, request: AddRequest) -> Result<StoredEndpoint, EndpointError> {
        let mut stored = self.stored.lock().await;
        let held = stored
            .endpoints
            .iter()
            .find(|e| e.attachment == request.attachment)
            .cloned();
        if let Some(held) = held {
            let link = netlink::link_by_name(&self.handle, &held.host_interface).await?;
            let same = link.is_some_and(|link| link.index == held.ifindex)
                && held.netns == request.netns
                && held.identity == request.identity;
            if same {
                return Ok(held);
            }
            netlink::delete_link(&self.handle, &held.host_interface).await?;
            self.unmap(&held)?;
            stored
                .endpoints
                .retain(|e| e.attachment != request.attachment);
        }
        let mut next = stored.clone();
        if let Err(error) = next.ipam.allocate(&request.attachment, now_ms()) {
            // It has learnt how long released addresses must still rest.
            stored.ipam = next.ipam;
            return Err(error.into());
        }
        self.store(&next).await?;
        match self.attach(&request, &next).await {
            Ok(endpoint) => {
                next.endpoints.push(endpoint.clone());
                self.store(&next).await?;
                *stored = next;
                self.publish(&stored);
                Ok(endpoint)
            }
            Err(error) => {
                next.ipam.release(&request.attachment, now_ms());
                if let Err(state) = self.store(&next).await {
                    warn!(error = %state, "an address of a failed ADD stays allocated until the next start");
                }
                *stored = next;
                self.publish(&stored);
                Err(error)
            }
        }
    }

    async fn attach(
        &self,
        request: &AddRequest,
        stored: &StoredEndpoints,
    ) -> Result<StoredEndpoint, EndpointError> {
        let namespace = netlink::open_namespace(Path::new(&request.netns))?;
        let addresses = stored
            .ipam
            .addresses(&request.attachment)
            .unwrap_or_default()
            .to_vec();
        let plan = PodPlan {
            host_interface: interface_name(&request.attachment),
            ifname: request.attachment.ifname.clone(),
            addresses: addresses.clone(),
            routers: stored.ipam.routers(),
            mtu: request.mtu,
            segments_max: request.segments_max,
        };
        let host_interface = plan.host_interface.clone();
        let link = pod::create(&self.handle, namespace, plan).await?;
        let endpoint = StoredEndpoint {
            attachment: request.attachment.clone(),
            namespace: request.workload.namespace.to_string(),
            name: request.workload.name.to_string(),
            netns: request.netns.clone(),
            addresses,
            identity: request.identity,
            host_interface,
            ifindex: link.ifindex,
            host_mac: link.host_mac,
            pod_mac: link.pod_mac,
            mtu: request.mtu,
        };
        let ready = match self.map(&endpoint) {
            Ok(()) => pod::set_up(&self.handle, link, request.mtu)
                .await
                .map_err(EndpointError::from),
            Err(error) => Err(error),
        };
        if let Err(error) = ready {
            if let Err(left) = netlink::delete_link(&self.handle, &endpoint.host_interface).await {
                warn!(error = %left, "an interface of a failed ADD is left");
            }
            if let Err(left) = self.unmap(&endpoint) {
                warn!(error = %left, "map entries of a failed ADD are left until the next start");
            }
            return Err(error);
        }
        Ok(endpoint)
    }

    /// Source check first, then delivery, then the program that needs both.
    fn map(&self, endpoint: &StoredEndpoint) -> Result<(), EndpointError> {
        self.maps
            .interfaces
            .upsert(&[(endpoint.ifindex, interface_value(endpoint))])?;
        let entries: Vec<_> = endpoint
            .addresses
            .iter()
            .map(|ip| (address(*ip), endpoint_value(endpoint)))
            .collect();
        self.maps.endpoints.upsert(&entries)?;
        self.datapath
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .attach_pod(endpoint.ifindex)?;
        Ok(())
    }

    fn unmap(&self, endpoint: &StoredEndpoint) -> Result<(), EndpointError> {
        let keys: Vec<_> = endpoint.addresses.iter().map(|ip| address(*ip)).collect();
        self.maps.endpoints.delete(&keys)?;
        self.datapath
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .detach_pod(endpoint.ifindex)?;
        self.maps.interfaces.delete(&[endpoint.ifindex])?;
        Ok(())
    }

    /// Detaches a container; one that is not attached is fine.
    ///
    /// # Errors
    /// The kernel or the state folder refused something; DEL may be repeated.
    pub async fn del(&self, attachment: &Attachment) -> Result<(), EndpointError> {
        let mut stored = self.stored.lock().await;
        self.remove(&mut stored, attachment).await
    }

    async fn remove(
        &self,
        stored: &mut StoredEndpoints,
        attachment: &Attachment,
    ) -> Result<(), EndpointError> {
        let held = stored
            .endpoints
            .iter()
            .find(|e| &e.attachment == attachment)
            .cloned();
        // The link goes before its program: without one the host would route what the pod still sends.
        netlink::delete_link(&self.handle, &interface_name(attachment)).await?;
        if let Some(held) = &held {
            self.unmap(held)?;
        }
        if held.is_none() && stored.ipam.addresses(attachment).is_none() {
            return Ok(());
        }
        let mut next = stored.clone();
        next.endpoints.retain(|e| &e.attachment != attachment);
        next.ipam.release(attachment, now_ms());
        self.store(&next).await?;
        *stored = next;
        self.publish(stored);
        Ok(())
    }

    /// Verifies an attachment.
    ///
    /// # Errors
    /// [`EndpointError::Unknown`] or [`EndpointError::Changed`], or the check itself failed.
    pub async fn check(
        &self,
        attachment: &Attachment,
        netns: &str,
        expected: &[IpAddr],
    ) -> Result<(), EndpointError> {
        let held = self
            .view
            .borrow()
            .iter()
            .find(|e| &e.attachment == attachment)
            .cloned();
        let held = held.ok_or_else(|| EndpointError::Unknown(attachment.container_id.clone()))?;
        let mut faults = Vec::new();
        if let Some(other) = expected.iter().find(|ip| !held.addresses.contains(ip)) {
            faults.push(format!("{other} is not the container's address"));
        }
        match netlink::link_by_name(&self.handle, &held.host_interface).await? {
            Some(link) if link.index == held.ifindex && link.up => {}
            _ => faults.push(format!(
                "interface {} is missing or down",
                held.host_interface
            )),
        }
        for ip in &held.addresses {
            if self.maps.endpoints.get(&address(*ip))? != Some(endpoint_value(&held)) {
                faults.push(format!("the kernel map endpoints does not lead to {ip}"));
            }
        }
        let namespace = netlink::open_namespace(Path::new(netns))?;
        let ifname = attachment.ifname.clone();
        faults.extend(pod::check(namespace, ifname, held.addresses.clone(), held.pod_mac).await?);
        if faults.is_empty() {
            Ok(())
        } else {
            Err(EndpointError::Changed(faults.join("; ")))
        }
    }

    /// Removes every attachment that is not listed; gives how many there were.
    ///
    /// # Errors
    /// As [`Endpoints::del`]; those before the error are removed.
    pub async fn gc(&self, valid: &HashSet<Attachment>) -> Result<u32, EndpointError> {
        let mut stored = self.stored.lock().await;
        let gone: Vec<Attachment> = stored
            .ipam
            .allocations()
            .map(|(attachment, _)| attachment.clone())
            .filter(|attachment| !valid.contains(attachment))
            .collect();
        let mut removed = 0;
        for attachment in gone {
            self.remove(&mut stored, &attachment).await?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Gives endpoints the identity that their workload has now.
    ///
    /// # Errors
    /// The kernel or the state folder refused something.
    pub async fn refresh_identities(
        &self,
        identity_of: impl Fn(&WorkloadName) -> Option<u32>,
    ) -> Result<(), EndpointError> {
        let mut stored = self.stored.lock().await;
        let mut next = stored.clone();
        let mut changed = false;
        for endpoint in &mut next.endpoints {
            let workload = WorkloadName {
                namespace: endpoint.namespace.as_str().into(),
                name: endpoint.name.as_str().into(),
            };
            if let Some(identity) = identity_of(&workload)
                && identity != endpoint.identity
            {
                endpoint.identity = identity;
                self.map(endpoint)?;
                changed = true;
            }
        }
        if changed {
            self.store(&next).await?;
            *stored = next;
            self.publish(&stored);
        }
        Ok(())
    }

    /// Writes the file on a thread that may wait for the disk. The caller holds the lock on the endpoints until it
    /// is written, so writes keep their order.
    async fn store(&self, next: &StoredEndpoints) -> Result<(), StateError> {
        let (files, next) = (Arc::clone(&self.files), next.clone());
        match tokio::task::spawn_blocking(move || files.store_endpoints(&next)).await {
            Ok(result) => result,
            Err(ended) => Err(StateError::Io {
                action: "write",
                path: "endpoints.json".into(),
                source: std::io::Error::other(ended),
            }),
        }
    }

    fn publish(&self, stored: &StoredEndpoints) {
        self.view.send_if_modified(|view| {
            let changed = **view != stored.endpoints;
            if changed {
                *view = Arc::new(stored.endpoints.clone());
            }
            changed
        });
    }
}

fn endpoint_value(endpoint: &StoredEndpoint) -> EndpointValue {
    EndpointValue {
        ifindex: endpoint.ifindex,
        identity: endpoint.identity,
        pod_mac: endpoint.pod_mac,
        host_mac: endpoint.host_mac,
        flags: 0,
    }
}

fn interface_value(endpoint: &StoredEndpoint) -> InterfaceValue {
    let own = |v4| {
        let ip = endpoint.addresses.iter().find(|ip| ip.is_ipv4() == v4);
        ip.map_or([0; 16], |ip| address(*ip))
    };
    InterfaceValue {
        address_v4: own(true),
        address_v6: own(false),
        identity: endpoint.identity,
        reserved: 0,
    }
}

/// Wall clock, milliseconds since 1970: rests of addresses outlive the process.
fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
