//! What is known of encryption, for the local API and the metrics.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, SystemTime};

use clustermesh_api::v1::{
    EncryptionReport, EncryptionStatusResponse, WireguardDevice, WireguardPeerStatus,
};
use clustermesh_encryption::{Backend, DeviceStatus};
use clustermesh_encryption_core::control::PeerStatus;
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_node_core::change::ClusterName;
use clustermesh_node_core::{Protection, WireguardPeer, WireguardState};

use crate::metrics::{EncryptionMetrics, Labels};

/// A device's sessions are renewed every two minutes while there is traffic; one that is older than this has ended
/// (`REJECT_AFTER_TIME` of the protocol).
const SESSION_SECONDS_MAX: u64 = 180;

/// Devices, peers and nodes without a key.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What the model is told.
    pub state: WireguardState,
    /// The devices.
    pub devices: Vec<DeviceReport>,
    /// Why the devices are not as they should be; empty: they are.
    pub fault: String,
    peers: Vec<WireguardPeer>,
    without_key: Vec<(ClusterName, Box<str>, Protection)>,
}

/// One device.
#[derive(Clone, Debug)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Who runs it.
    pub backend: Backend,
    /// Epoch of its key.
    pub epoch: u32,
    /// What it says.
    pub status: DeviceStatus,
}

fn protection_name(protection: Protection) -> &'static str {
    match protection {
        Protection::Clear => "clear",
        Protection::Withheld => "withheld",
        Protection::Encrypted { .. } => "encrypted",
    }
}

/// Time since the last handshake; `None`: there was none.
fn age(status: &PeerStatus, now: Duration) -> Option<Duration> {
    status.last_handshake.map(|time| now.saturating_sub(time))
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

impl Report {
    /// Takes what the records say.
    pub fn set_nodes(
        &mut self,
        peers: Vec<WireguardPeer>,
        without_key: Vec<(ClusterName, Box<str>, Protection)>,
    ) {
        self.peers = peers;
        self.without_key = without_key;
    }

    fn statuses(&self) -> HashMap<PublicKey, (&DeviceReport, PeerStatus)> {
        self.devices
            .iter()
            .flat_map(|device| {
                let peers = device.status.peers.iter();
                peers.map(move |(key, status)| (*key, (device, *status)))
            })
            .collect()
    }

    /// For the local API.
    #[must_use]
    pub fn to_message(&self, mode: &str, strict: bool, nodes: bool) -> EncryptionStatusResponse {
        let (statuses, now) = (self.statuses(), now());
        let with_key = self.peers.iter().map(|peer| {
            let key = PublicKey(peer.key.key);
            let found = statuses.get(&key);
            let status = found.map(|(_, status)| *status).unwrap_or_default();
            let age = age(&status, now);
            let device = found.map(|(device, _)| device.name.clone());
            let endpoint = status
                .endpoint
                .unwrap_or_else(|| super::peers::endpoint(peer));
            WireguardPeerStatus {
                cluster: peer.cluster.to_string(),
                node: peer.node.to_string(),
                public_key: key.to_string(),
                epoch: peer.key.epoch,
                endpoint: endpoint.to_string(),
                allowed_ips: peer.allowed_ips.iter().map(ToString::to_string).collect(),
                device: device.unwrap_or_default(),
                last_handshake_age_seconds: age.map(|age| age.as_secs()),
                received_bytes: status.rx_bytes,
                sent_bytes: status.tx_bytes,
                traffic: protection_name(peer.protection).to_owned(),
                session: session_name(found.is_some(), age).to_owned(),
            }
        });
        let without =
            self.without_key
                .iter()
                .map(|(cluster, node, protection)| WireguardPeerStatus {
                    cluster: cluster.to_string(),
                    node: node.to_string(),
                    traffic: protection_name(*protection).to_owned(),
                    session: "no-key".to_owned(),
                    ..Default::default()
                });
        EncryptionStatusResponse {
            mode: mode.to_owned(),
            strict,
            nodes,
            devices: self
                .devices
                .iter()
                .map(|device| WireguardDevice {
                    name: device.name.clone(),
                    backend: device.backend.name().to_owned(),
                    public_key: device
                        .status
                        .public_key
                        .map(|key| key.to_string())
                        .unwrap_or_default(),
                    port: device.status.listen_port.into(),
                    epoch: device.epoch,
                    counters: device.status.counters.iter().cloned().collect(),
                })
                .collect(),
            peers: with_key.chain(without).collect(),
            fault: self.fault.clone(),
            ..Default::default()
        }
    }

    /// Other nodes by how packets to them travel.
    fn nodes_by_traffic(&self) -> BTreeMap<&'static str, u32> {
        let mut nodes: BTreeMap<&'static str, u32> = ["clear", "withheld", "encrypted"]
            .map(|name| (name, 0))
            .into();
        let mut named = BTreeSet::new();
        let with_key = self
            .peers
            .iter()
            .map(|p| (&*p.cluster, &*p.node, p.protection));
        let without = self.without_key.iter().map(|(c, n, p)| (&**c, &**n, *p));
        for (cluster, node, protection) in with_key.chain(without) {
            if named.insert((cluster, node)) {
                *nodes.entry(protection_name(protection)).or_default() += 1;
            }
        }
        nodes
    }

    /// For the server.
    #[must_use]
    pub fn summary(&self) -> EncryptionReport {
        let nodes = self.nodes_by_traffic();
        let of = |name| nodes.get(name).copied().unwrap_or(0);
        let backend = self.devices.first().map(|device| device.backend.name());
        EncryptionReport {
            backend: backend.unwrap_or_default().to_owned(),
            encrypted: of("encrypted"),
            clear: of("clear"),
            withheld: of("withheld"),
            fault: !self.fault.is_empty(),
        }
    }

    /// For the metrics.
    pub fn publish(&self, metrics: &EncryptionMetrics) {
        let (statuses, now) = (self.statuses(), now());
        for peer in &self.peers {
            let labels: Labels = vec![
                ("cluster".to_owned(), peer.cluster.to_string()),
                ("node".to_owned(), peer.node.to_string()),
                ("epoch".to_owned(), peer.key.epoch.to_string()),
            ];
            let Some((_, status)) = statuses.get(&PublicKey(peer.key.key)) else {
                continue;
            };
            let age =
                age(status, now).map_or(-1, |age| i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
            let gauge = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
            metrics
                .received_bytes
                .get_or_create(&labels)
                .set(gauge(status.rx_bytes));
            metrics
                .sent_bytes
                .get_or_create(&labels)
                .set(gauge(status.tx_bytes));
            metrics.handshake_age.get_or_create(&labels).set(age);
            for (family, number) in [
                (&metrics.handshakes, status.handshakes),
                (&metrics.errors, status.errors),
            ] {
                if let Some(number) = number {
                    family.get_or_create(&labels).set(gauge(number));
                }
            }
        }
        for (name, count) in self.nodes_by_traffic() {
            let traffic = crate::metrics::label("traffic", name);
            metrics.nodes.get_or_create(&traffic).set(count.into());
        }
        for device in &self.devices {
            for (name, number) in &device.status.counters {
                let labels = vec![
                    ("device".to_owned(), device.name.clone()),
                    ("event".to_owned(), name.clone()),
                ];
                let number = i64::try_from(*number).unwrap_or(i64::MAX);
                metrics.device_events.get_or_create(&labels).set(number);
            }
        }
    }
}

/// What the peer and this node have between them.
fn session_name(is_programmed: bool, age: Option<Duration>) -> &'static str {
    match age {
        _ if !is_programmed => "not-programmed",
        None => "no-handshake",
        Some(age) if age.as_secs() > SESSION_SECONDS_MAX => "idle",
        Some(_) => "established",
    }
}
