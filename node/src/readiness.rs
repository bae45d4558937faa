//! Readiness of local pods' ports, found by TCP connections from the host's namespace.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clustermesh_api::v1::PortReadiness;
use clustermesh_node_core::change::{WorkloadDeclaration, WorkloadName};
use clustermesh_node_core::decode::PROTOCOL_UDP;
use clustermesh_node_core::probes::{LocalEndpoint, Probes, Target, targets};
use clustermesh_process::Drain;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::endpoints::Endpoints;
use crate::records::Reconciler;

/// Probes that run at once.
const PROBES_RUNNING_MAX: usize = 256;
/// Longest wait for a connection, milliseconds.
const PROBE_TIMEOUT_MS_MAX: u64 = 1_000;

/// The known readiness, and its changes.
pub struct Prober {
    probes: Mutex<Probes>,
    started: Instant,
    timeout: Duration,
    targets_changed: Notify,
    /// Some port's readiness changed.
    pub changed: Notify,
}

/// Ports of one address with their readiness.
pub type AddressReadiness = (IpAddr, Vec<(Target, bool)>);

impl Prober {
    /// No targets yet.
    #[must_use]
    pub fn new(interval_ms: u64) -> Self {
        Self {
            probes: Mutex::new(Probes::new(interval_ms)),
            started: Instant::now(),
            timeout: Duration::from_millis(interval_ms.min(PROBE_TIMEOUT_MS_MAX)),
            targets_changed: Notify::new(),
            changed: Notify::new(),
        }
    }

    fn probes(&self) -> MutexGuard<'_, Probes> {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// What changed since the last call.
    pub fn take_changes(&self) -> Vec<AddressReadiness> {
        self.probes().take_changes()
    }

    /// Everything that is known.
    #[must_use]
    pub fn all(&self) -> Vec<AddressReadiness> {
        self.probes().all()
    }

    /// Ports of one address.
    #[must_use]
    pub fn ports_of(&self, address: IpAddr) -> Vec<(Target, bool)> {
        self.probes().ports_of(address)
    }

    fn set_targets(&self, targets: &BTreeSet<Target>) {
        let now = self.now_ms();
        self.probes().set_targets(targets, now);
        self.targets_changed.notify_one();
        self.changed.notify_one();
    }
}

/// The wire form of ports' readiness.
#[must_use]
pub fn port_readiness(ports: &[(Target, bool)]) -> Vec<PortReadiness> {
    ports
        .iter()
        .map(|(target, ready)| PortReadiness {
            port: u32::from(target.port),
            protocol: match target.protocol {
                PROTOCOL_UDP => "UDP".to_owned(),
                _ => "TCP".to_owned(),
            },
            ready: *ready,
        })
        .collect()
}

/// The ports to probe by the present endpoints, workloads and services; `None` until the records have been listed.
fn wanted_targets(reconciler: &Reconciler, endpoints: &Endpoints) -> Option<BTreeSet<Target>> {
    let endpoints = endpoints.watch().borrow().clone();
    let model = reconciler.model();
    let model = model.as_ref().filter(|model| model.is_listed())?;
    let locals: Vec<(WorkloadName, &WorkloadDeclaration, &[IpAddr])> = endpoints
        .iter()
        .filter_map(|endpoint| {
            let name = WorkloadName {
                namespace: endpoint.namespace.as_str().into(),
                name: endpoint.name.as_str().into(),
            };
            let declaration = model.workload(&name)?;
            Some((name, declaration, endpoint.addresses.as_slice()))
        })
        .collect();
    let services: Vec<_> = model.declared_services().collect();
    Some(targets(
        locals
            .iter()
            .map(|(workload, declaration, addresses)| LocalEndpoint {
                workload,
                declaration,
                addresses,
            }),
        services.iter().copied(),
    ))
}

/// Probes until the drain.
pub async fn run(
    prober: Arc<Prober>,
    reconciler: Arc<Reconciler>,
    endpoints: Arc<Endpoints>,
    drain: Drain,
) {
    let refresh = || {
        if let Some(targets) = wanted_targets(&reconciler, &endpoints) {
            prober.set_targets(&targets);
        }
    };
    let slots = Arc::new(Semaphore::new(PROBES_RUNNING_MAX));
    let mut endpoint_changes = endpoints.watch();
    let mut service_changes = reconciler.service_changes.subscribe();
    // What was listed before this task began.
    refresh();
    loop {
        let due = {
            let now = prober.now_ms();
            prober.probes().take_due(now)
        };
        for target in due {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let prober = Arc::clone(&prober);
            tokio::spawn(async move {
                let address = SocketAddr::new(target.address, target.port);
                let connection = TcpStream::connect(address);
                let success = tokio::time::timeout(prober.timeout, connection)
                    .await
                    .is_ok_and(|connected| connected.is_ok());
                let now = prober.now_ms();
                prober.probes().outcome(&target, success, now);
                prober.changed.notify_one();
                prober.targets_changed.notify_one();
                drop(slot);
            });
        }
        let next = {
            let next = prober.probes().next_due_ms();
            next.map(|due| prober.started + Duration::from_millis(due))
        };
        let until = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = until => {}
            () = prober.targets_changed.notified() => {}
            changed = endpoint_changes.changed() => {
                if changed.is_err() {
                    return;
                }
                refresh();
            }
            Ok(()) = service_changes.changed() => refresh(),
            () = drain.draining() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use clustermesh_node_core::change::{
        Affinity, Change, ServiceDeclaration, ServiceName, ServicePort,
    };
    use clustermesh_node_core::decode::PROTOCOL_TCP;
    use clustermesh_node_core::ipam::Attachment;
    use tokio::net::TcpListener;

    use super::*;
    use crate::fixture::Fixture;
    use crate::state_files::{StoredEndpoint, StoredEndpoints};

    const ADDRESS: Ipv4Addr = Ipv4Addr::LOCALHOST;
    const WAIT: Duration = Duration::from_secs(30);

    fn endpoint() -> StoredEndpoints {
        let endpoint = StoredEndpoint {
            attachment: Attachment {
                container_id: "c".to_owned(),
                ifname: "eth0".to_owned(),
            },
            namespace: "shop".to_owned(),
            name: "cart-0".to_owned(),
            netns: String::new(),
            addresses: vec![ADDRESS.into()],
            identity: 70_000,
            host_interface: String::new(),
            ifindex: 9,
            host_mac: [0; 6],
            pod_mac: [0; 6],
            mtu: 1_450,
        };
        StoredEndpoints {
            endpoints: vec![endpoint],
            ..StoredEndpoints::default()
        }
    }

    fn apply(fixture: &Fixture, change: Change) {
        fixture.reconciler.model().as_mut().unwrap().apply(change);
        fixture.reconciler.round();
    }

    fn workload() -> Change {
        Change::Workload {
            workload: WorkloadName {
                namespace: "shop".into(),
                name: "cart-0".into(),
            },
            declaration: Some(Box::new(WorkloadDeclaration {
                labels: [("app".to_owned(), "cart".to_owned())].into(),
                identity: Some(70_000),
            })),
        }
    }

    fn service(port: u16) -> Change {
        Change::Service {
            service: ServiceName {
                namespace: "shop".into(),
                name: "cart".into(),
            },
            declaration: Some(Box::new(ServiceDeclaration {
                addresses: Vec::new(),
                ports: vec![ServicePort {
                    name: "".into(),
                    protocol: PROTOCOL_TCP,
                    port: 80,
                    target_port: port,
                }],
                selector: [("app".to_owned(), "cart".to_owned())].into(),
                global: false,
                affinity: Affinity::default(),
            })),
        }
    }

    async fn until_readiness_is(prober: &Prober, port: u16, expected: bool) {
        let known = async {
            loop {
                let ports = prober.ports_of(ADDRESS.into());
                if let [(target, ready)] = ports[..]
                    && (target.port, ready) == (port, expected)
                {
                    return;
                }
                prober.changed.notified().await;
            }
        };
        tokio::time::timeout(WAIT, known).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn ports_are_probed_whether_they_were_known_before_or_are_learnt_from_a_round() {
        let fixture = Fixture::new("");
        let endpoints = fixture.endpoints(&endpoint());
        let listener = TcpListener::bind((ADDRESS, 0)).await.unwrap();
        let open = listener.local_addr().unwrap().port();
        // Before anybody probes.
        apply(&fixture, workload());
        apply(&fixture, service(open));
        let prober = Arc::new(Prober::new(100));
        let (_trigger, drain) = clustermesh_process::drain();
        tokio::spawn(run(
            Arc::clone(&prober),
            Arc::clone(&fixture.reconciler),
            endpoints,
            drain,
        ));
        until_readiness_is(&prober, open, true).await;
        let closed = {
            let other = TcpListener::bind((ADDRESS, 0)).await.unwrap();
            other.local_addr().unwrap().port()
        };
        apply(&fixture, service(closed));
        until_readiness_is(&prober, closed, false).await;
        drop(listener);
        apply(&fixture, service(open));
        until_readiness_is(&prober, open, false).await;
    }
}
