//! The records of one service, out of its declaration and its endpoints.

use std::collections::BTreeMap;
use std::net::IpAddr;

use bytes::Bytes;
use clustermesh_api::keys::{RecordKey, Tree};
use clustermesh_api::limits::{
    ENDPOINTS_PER_SLICE, MAX_BACKENDS_PER_SERVICE, MAX_FRONTENDS_PER_SERVICE,
};
use clustermesh_api::manifest::{Protocol, ServicePort, StoredService};
use clustermesh_api::records::{
    BackendZone, ClusterService, Endpoint, EndpointConditions, EndpointPort, EndpointSlice,
    PortMap, Readiness, SERVICE_NAME_LABEL, ServicePortNumber,
};

use crate::address::{FAMILIES, Family};
use crate::keys;
use crate::settings::ClusterSettings;

/// Annotations that say something about the mesh; others stay at home.
const PUBLISHED_ANNOTATIONS: [&str; 3] = ["service.cilium.io/", "io.cilium/", "clustermesh.io/"];

/// One endpoint of a service, as the records show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Backend {
    pub(super) address: IpAddr,
    pub(super) node: String,
    pub(super) zone: Option<String>,
    pub(super) ready: bool,
}

/// An endpoint takes traffic once every TCP port of the service was probed and answers. UDP cannot be probed
/// in general: a port of it counts unless a probe says otherwise.
pub(super) fn is_ready(ports: &[ServicePort], readiness: Option<&Readiness>) -> bool {
    readiness.is_some_and(|readiness| {
        ports.iter().all(|port| {
            let probed = readiness.is_ready(port.target(), port.protocol.name());
            match port.protocol {
                Protocol::Tcp => probed == Some(true),
                Protocol::Udp => probed != Some(false),
            }
        })
    })
}

/// All slices of a service, by key. Backends must be in the order of their addresses.
///
/// Slices of a service that is not shared stand where no peer looks, and under names of their own, so that a service
/// that becomes shared replaces them without two records of one name.
pub(super) fn slices(
    settings: &ClusterSettings,
    service: &StoredService,
    backends: &[Backend],
) -> BTreeMap<Bytes, Bytes> {
    let metadata = &service.object.metadata;
    let shared = service.object.service_annotations().shared;
    let annotations: BTreeMap<_, _> = metadata
        .annotations
        .iter()
        .filter(|(key, _)| {
            PUBLISHED_ANNOTATIONS
                .iter()
                .any(|prefix| key.starts_with(prefix))
        })
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let ports: Vec<_> = service.object.spec.ports.iter().map(slice_port).collect();
    let mut slices = BTreeMap::new();
    for family in FAMILIES {
        if !service
            .status
            .cluster_ips
            .iter()
            .any(|address| Family::of(*address) == family)
        {
            continue;
        }
        let of_family: Vec<_> = backends
            .iter()
            .filter(|backend| Family::of(backend.address) == family)
            .collect();
        for (index, chunk) in of_family.chunks(ENDPOINTS_PER_SLICE).enumerate() {
            // No service has a dot in its name, so no two services have a slice of one name.
            let place = if shared { "" } else { ".local" };
            let name = format!(
                "{}{place}-{}-{index}",
                metadata.name,
                family.name().to_lowercase()
            );
            let key = slice_key(settings, shared, &metadata.namespace, &name);
            let slice = EndpointSlice {
                cluster: settings.name.clone(),
                cluster_id: settings.id,
                namespace: metadata.namespace.clone(),
                name,
                labels: BTreeMap::from([(SERVICE_NAME_LABEL.to_owned(), metadata.name.clone())]),
                annotations: annotations.clone(),
                address_type: family.name().to_owned(),
                endpoints: chunk.iter().map(|backend| endpoint(backend)).collect(),
                ports: ports.clone(),
            };
            slices.insert(key, slice.encode());
        }
    }
    slices
}

fn slice_key(settings: &ClusterSettings, shared: bool, namespace: &str, name: &str) -> Bytes {
    let (namespace, name) = (namespace.to_owned(), name.to_owned());
    keys::bytes(&if shared {
        RecordKey::EndpointSlice {
            tree: Tree::State,
            cluster: settings.name.clone(),
            namespace,
            name,
        }
    } else {
        RecordKey::LocalEndpointSlice { namespace, name }
    })
}

fn slice_port(port: &ServicePort) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone()),
        protocol: Some(port.protocol.name().to_owned()),
        port: Some(port.target().into()),
        app_protocol: None,
    }
}

fn endpoint(backend: &Backend) -> Endpoint {
    Endpoint {
        addresses: vec![backend.address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(backend.ready),
            serving: Some(backend.ready),
            terminating: Some(false),
        }),
        node_name: Some(backend.node.clone()),
        zone: backend.zone.clone(),
        ..Default::default()
    }
}

/// The `services/v1` record of a service that is shared with other clusters; `None` for all others.
/// It has no conditions, so only endpoints that are ready are in it.
pub(super) fn service(
    settings: &ClusterSettings,
    service: &StoredService,
    backends: &[Backend],
) -> Option<ClusterService> {
    if !service.object.service_annotations().shared {
        return None;
    }
    let metadata = &service.object.metadata;
    let ports = |number: fn(&ServicePort) -> u16| -> PortMap {
        let number = |port: &ServicePort| ServicePortNumber {
            protocol: port.protocol.name().to_owned(),
            port: number(port),
        };
        service
            .object
            .spec
            .ports
            .iter()
            .map(|port| (port.name.clone(), number(port)))
            .collect()
    };
    let (frontend_ports, backend_ports) = (ports(|port| port.port), ports(ServicePort::target));
    let ready = || {
        backends
            .iter()
            .filter(|backend| backend.ready)
            .take(MAX_BACKENDS_PER_SERVICE)
    };
    let frontends = service
        .status
        .cluster_ips
        .iter()
        .take(MAX_FRONTENDS_PER_SERVICE);
    Some(ClusterService {
        cluster: settings.name.clone(),
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        frontends: frontends
            .map(|address| (address.to_string(), frontend_ports.clone()))
            .collect(),
        backends: ready()
            .map(|backend| (backend.address.to_string(), backend_ports.clone()))
            .collect(),
        hostnames: BTreeMap::new(),
        zones: ready()
            .filter_map(|backend| {
                let zone = BackendZone {
                    zone: backend.zone.clone()?,
                    for_zones: Vec::new(),
                };
                Some((backend.address.to_string(), zone))
            })
            .collect(),
        labels: metadata.labels.clone(),
        selector: service.object.spec.selector.clone(),
        include_external: true,
        shared: true,
        cluster_id: settings.id,
    })
}

pub(super) fn service_key(settings: &ClusterSettings, namespace: &str, name: &str) -> Bytes {
    keys::bytes(&RecordKey::Service {
        tree: Tree::State,
        cluster: settings.name.clone(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}
