//! Readiness of local endpoints' ports: what to probe, and what the outcomes mean.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::change::{ServiceDeclaration, ServiceName, WorkloadDeclaration, WorkloadName};
use crate::decode::PROTOCOL_TCP;

/// Outcomes in a row that make a port ready.
pub const SUCCESS_THRESHOLD: u32 = 1;
/// Outcomes in a row that make a port not ready.
pub const FAILURE_THRESHOLD: u32 = 2;
/// Shortest interval between two probes of one port, milliseconds.
pub const INTERVAL_MS_MIN: u64 = 100;
/// Interval between two probes of one port unless configured, milliseconds.
pub const INTERVAL_MS_DEFAULT: u64 = 1_000;
/// Probed ports of one node.
pub const TARGETS_MAX: usize = 1 << 14;

/// A port of a local endpoint. Only TCP ports can be probed by connecting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Address of the endpoint.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// A local endpoint, as far as probing goes.
#[derive(Clone, Copy, Debug)]
pub struct LocalEndpoint<'a> {
    /// Its workload.
    pub workload: &'a WorkloadName,
    /// Declaration of the workload.
    pub declaration: &'a WorkloadDeclaration,
    /// Its addresses.
    pub addresses: &'a [IpAddr],
}

/// The ports of local endpoints that services lead to. At most [`TARGETS_MAX`], the smallest ones.
pub fn targets<'a>(
    endpoints: impl IntoIterator<Item = LocalEndpoint<'a>>,
    services: impl Iterator<Item = (&'a ServiceName, &'a ServiceDeclaration)> + Clone,
) -> BTreeSet<Target> {
    let mut targets = BTreeSet::new();
    for endpoint in endpoints {
        let selecting = services.clone().filter(|(name, service)| {
            name.namespace == endpoint.workload.namespace && selects(service, endpoint.declaration)
        });
        for port in selecting.flat_map(|(_, service)| &service.ports) {
            for address in endpoint.addresses {
                targets.insert(Target {
                    address: *address,
                    port: port.target_port,
                    protocol: port.protocol,
                });
            }
        }
    }
    while targets.len() > TARGETS_MAX {
        targets.pop_last();
    }
    targets
}

/// A selector without terms selects nothing.
fn selects(service: &ServiceDeclaration, workload: &WorkloadDeclaration) -> bool {
    !service.selector.is_empty()
        && service
            .selector
            .iter()
            .all(|(key, value)| workload.labels.get(key) == Some(value))
}

/// State of one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Port {
    /// `None` until it was probed often enough to say.
    ready: Option<bool>,
    successes: u32,
    failures: u32,
    due_ms: u64,
    running: bool,
}

/// Probes and readiness of all local ports. Times are a monotonic clock's milliseconds.
#[derive(Debug)]
pub struct Probes {
    interval_ms: u64,
    ports: BTreeMap<Target, Port>,
    changed: BTreeSet<IpAddr>,
}

impl Probes {
    /// No targets yet; an interval below [`INTERVAL_MS_MIN`] is raised to it.
    #[must_use]
    pub fn new(interval_ms: u64) -> Self {
        Self {
            interval_ms: interval_ms.max(INTERVAL_MS_MIN),
            ports: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Replaces the set of targets. New ones are due at once; a port that cannot be probed counts as ready.
    pub fn set_targets(&mut self, targets: &BTreeSet<Target>, now_ms: u64) {
        let changed = &mut self.changed;
        self.ports.retain(|target, _| {
            let keep = targets.contains(target);
            if !keep {
                changed.insert(target.address);
            }
            keep
        });
        for target in targets {
            self.ports.entry(*target).or_insert_with(|| {
                let probed = target.protocol == PROTOCOL_TCP;
                if !probed {
                    changed.insert(target.address);
                }
                Port {
                    ready: (!probed).then_some(true),
                    due_ms: if probed { now_ms } else { u64::MAX },
                    ..Port::default()
                }
            });
        }
    }

    /// The targets to probe now; each is not due again before its outcome is known.
    pub fn take_due(&mut self, now_ms: u64) -> Vec<Target> {
        let mut due = Vec::new();
        for (target, port) in &mut self.ports {
            if !port.running && port.due_ms <= now_ms {
                port.running = true;
                due.push(*target);
            }
        }
        due
    }

    /// When the next target is due, if any is waiting.
    #[must_use]
    pub fn next_due_ms(&self) -> Option<u64> {
        self.ports
            .values()
            .filter(|port| !port.running && port.due_ms != u64::MAX)
            .map(|port| port.due_ms)
            .min()
    }

    /// The outcome of a probe. A failure is checked again after a quarter of the interval.
    pub fn outcome(&mut self, target: &Target, success: bool, now_ms: u64) {
        let Some(port) = self.ports.get_mut(target) else {
            return;
        };
        port.running = false;
        port.due_ms = now_ms.saturating_add(self.interval_ms);
        if success {
            port.failures = 0;
            port.successes = port.successes.saturating_add(1);
        } else {
            port.successes = 0;
            port.failures = port.failures.saturating_add(1);
            if port.failures < FAILURE_THRESHOLD {
                port.due_ms = now_ms.saturating_add(self.interval_ms / 4);
            }
        }
        let ready = if port.successes >= SUCCESS_THRESHOLD {
            Some(true)
        } else if port.failures >= FAILURE_THRESHOLD || port.ready.is_none() {
            // A port that never answered is not ready from its first failure on.
            Some(false)
        } else {
            port.ready
        };
        if ready != port.ready {
            port.ready = ready;
            self.changed.insert(target.address);
        }
    }

    /// Addresses of which some port's readiness changed since the last call, with all known ports of each.
    pub fn take_changes(&mut self) -> Vec<(IpAddr, Vec<(Target, bool)>)> {
        let changed = std::mem::take(&mut self.changed);
        changed
            .into_iter()
            .map(|address| (address, self.ports_of(address)))
            .collect()
    }

    /// Everything that is known, to report it to a new session.
    #[must_use]
    pub fn all(&self) -> Vec<(IpAddr, Vec<(Target, bool)>)> {
        let addresses: BTreeSet<IpAddr> = self.ports.keys().map(|target| target.address).collect();
        addresses
            .into_iter()
            .map(|address| (address, self.ports_of(address)))
            .collect()
    }

    /// Known ports of one address.
    #[must_use]
    pub fn ports_of(&self, address: IpAddr) -> Vec<(Target, bool)> {
        let first = Target {
            address,
            port: 0,
            protocol: 0,
        };
        let last = Target {
            address,
            port: u16::MAX,
            protocol: u8::MAX,
        };
        self.ports
            .range(first..=last)
            .filter_map(|(target, port)| port.ready.map(|ready| (*target, ready)))
            .collect()
    }
}

#[cfg(test)]
mod tests;
