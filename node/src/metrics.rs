//! Counters of the agent and of the kernel programs.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use clustermesh_ebpf::Maps;
use clustermesh_ebpf::abi::TrafficValue;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Labels of one value.
pub type Labels = Vec<(String, String)>;

/// The agent's own metrics. Clones share them.
#[derive(Clone)]
pub struct Metrics {
    /// Records that were not taken, by reason.
    pub refused_records: Family<Labels, Counter>,
    /// Map calls that failed, by map.
    pub map_failures: Family<Labels, Counter>,
    /// Applied revision, by source cluster.
    pub applied_revision: Family<Labels, Gauge>,
    /// Entries that stay although a new store does not name them.
    pub kept_entries: Gauge,
    /// 1 while the underlay cannot be used as it is: traffic goes by what it was before.
    pub underlay_unusable: Gauge,
    /// Changes of the underlay that were followed.
    pub underlay_changes: Counter,
    /// 1 while programs of an earlier build go on with their maps, because the new ones may lack something.
    pub takeover_pending: Gauge,
    /// Time of one round of map calls, seconds.
    pub apply_seconds: Histogram,
    /// Reconnects of stream and session.
    pub reconnects: Family<Labels, Counter<u64, AtomicU64>>,
    /// CNI calls, by command and code.
    pub cni_calls: Family<Labels, Counter>,
    /// 1 while the WireGuard devices are not as the records want them.
    pub encryption_fault: Gauge,
    /// Largest packet that the path to each node takes, bytes.
    pub path_mtu: Family<Labels, Gauge>,
    /// 1 for each node on the path to which larger packets vanish though the devices take them.
    pub path_black_hole: Family<Labels, Gauge>,
    /// Of the WireGuard devices.
    pub encryption: EncryptionMetrics,
}

/// Metrics of the WireGuard devices. Clones share them.
#[derive(Clone, Default)]
pub struct EncryptionMetrics {
    /// Bytes from each peer.
    pub received_bytes: Family<Labels, Gauge>,
    /// Bytes to each peer.
    pub sent_bytes: Family<Labels, Gauge>,
    /// Age of the last handshake with each peer, seconds; -1 = there was none.
    pub handshake_age: Family<Labels, Gauge>,
    /// Finished handshakes with each peer.
    pub handshakes: Family<Labels, Gauge>,
    /// What did not pass, to and from each peer.
    pub errors: Family<Labels, Gauge>,
    /// Nodes by how packets to them travel.
    pub nodes: Family<Labels, Gauge>,
    /// What did not pass, by device and reason.
    pub device_events: Family<Labels, Gauge>,
}

impl EncryptionMetrics {
    /// Forgets all peers: those that are gone are not to be shown.
    pub fn clear_peers(&self) {
        self.received_bytes.clear();
        self.sent_bytes.clear();
        self.handshake_age.clear();
        self.handshakes.clear();
        self.errors.clear();
    }

    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("wireguard");
        for (name, help, family) in [
            (
                "peer_received_bytes",
                "Bytes from a peer, since its device knows it",
                &self.received_bytes,
            ),
            (
                "peer_sent_bytes",
                "Bytes to a peer, since its device knows it",
                &self.sent_bytes,
            ),
            (
                "peer_last_handshake_seconds",
                "Time since the last handshake with a peer; -1 if there was none",
                &self.handshake_age,
            ),
            (
                "peer_handshakes",
                "Finished handshakes with a peer, since its device knows it",
                &self.handshakes,
            ),
            (
                "peer_errors",
                "Packets to and datagrams from a peer that did not pass, since its device knows it",
                &self.errors,
            ),
            (
                "nodes",
                "Other nodes, by how packets to them travel: encrypted, clear or withheld",
                &self.nodes,
            ),
            (
                "device_events",
                "Packets and handshakes that did not pass, by device and reason",
                &self.device_events,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
    }
}

/// One label.
#[must_use]
pub fn label(name: &str, value: &str) -> Labels {
    vec![(name.to_owned(), value.to_owned())]
}

impl Metrics {
    /// Registers everything.
    #[must_use]
    pub fn register(registry: &mut Registry, maps: Maps) -> Self {
        let metrics = Self {
            refused_records: Family::default(),
            map_failures: Family::default(),
            applied_revision: Family::default(),
            kept_entries: Gauge::default(),
            underlay_unusable: Gauge::default(),
            underlay_changes: Counter::default(),
            takeover_pending: Gauge::default(),
            apply_seconds: Histogram::new(exponential_buckets(0.000_05, 2.0, 16)),
            reconnects: Family::default(),
            cni_calls: Family::default(),
            encryption_fault: Gauge::default(),
            path_mtu: Family::default(),
            path_black_hole: Family::default(),
            encryption: EncryptionMetrics::default(),
        };
        let registry = registry.sub_registry_with_prefix("clustermesh_node");
        registry.register(
            "refused_records",
            "Records that were not taken, by reason",
            metrics.refused_records.clone(),
        );
        registry.register(
            "map_failures",
            "Map calls that failed, by map",
            metrics.map_failures.clone(),
        );
        registry.register(
            "applied_revision",
            "Revision that the kernel holds, by source cluster",
            metrics.applied_revision.clone(),
        );
        registry.register(
            "kept_entries",
            "Entries of the kernel that stay although a new store does not name them",
            metrics.kept_entries.clone(),
        );
        registry.register(
            "underlay_unusable",
            "1 while the underlay's devices or addresses cannot be used as they are; see the log",
            metrics.underlay_unusable.clone(),
        );
        registry.register(
            "underlay_changes",
            "Changes of the underlay's devices, addresses or MTU that were followed",
            metrics.underlay_changes.clone(),
        );
        registry.register(
            "takeover_pending",
            "1 while programs and maps of an earlier layout are in use",
            metrics.takeover_pending.clone(),
        );
        registry.register(
            "path_mtu_bytes",
            "Largest packet of pods that the path to each node takes",
            metrics.path_mtu.clone(),
        );
        registry.register(
            "path_black_hole",
            "1 for each node on the path to which packets vanish that the devices take; see the log",
            metrics.path_black_hole.clone(),
        );
        registry.register(
            "apply_seconds",
            "Time of one round of map calls",
            metrics.apply_seconds.clone(),
        );
        registry.register(
            "reconnects",
            "Connections made again, by stream",
            metrics.reconnects.clone(),
        );
        registry.register(
            "cni_calls",
            "CNI calls, by command and error code (0 = success)",
            metrics.cni_calls.clone(),
        );
        registry.register(
            "encryption_fault",
            "1 while the WireGuard devices are not as the records want them; see the log",
            metrics.encryption_fault.clone(),
        );
        metrics.encryption.register(registry);
        registry.register_collector(Box::new(Kernel(Arc::new(maps))));
        metrics
    }
}

/// Packets and bytes by name.
fn traffic(
    key: &'static str,
    values: impl Iterator<Item = (&'static str, TrafficValue)>,
) -> (Family<Labels, Counter>, Family<Labels, Counter>) {
    let packets = Family::<Labels, Counter>::default();
    let bytes = Family::<Labels, Counter>::default();
    for (name, value) in values {
        let labels = label(key, name);
        packets.get_or_create(&labels).inc_by(value.packets);
        bytes.get_or_create(&labels).inc_by(value.bytes);
    }
    (packets, bytes)
}

/// Reads the kernel's counters when somebody asks.
#[derive(Debug)]
struct Kernel(Arc<Maps>);

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let drops = Family::<Labels, Counter>::default();
        for (reason, count) in self.0.drops().unwrap_or_default() {
            drops
                .get_or_create(&label("reason", reason.name()))
                .inc_by(count);
        }
        let descriptor = encoder.encode_descriptor(
            "dropped_packets",
            "Packets that the kernel programs dropped, by reason",
            None,
            prometheus_client::metrics::MetricType::Counter,
        )?;
        drops.encode(descriptor)?;
        let paths = self.0.traffic().unwrap_or_default();
        let paths = paths.into_iter().map(|(path, value)| (path.name(), value));
        let (packets, bytes) = traffic("path", paths);
        let ways = self.0.wire_traffic().unwrap_or_default();
        let ways = ways.into_iter().map(|(way, value)| (way.name(), value));
        let (wire_packets, wire_bytes) = traffic("way", ways);
        for (name, help, family) in [
            ("packets", "Packets by path", packets),
            ("bytes", "Bytes by path", bytes),
            (
                "wire_packets",
                "Packets to and from other nodes, encrypted and in clear",
                wire_packets,
            ),
            (
                "wire_bytes",
                "Bytes to and from other nodes, encrypted and in clear",
                wire_bytes,
            ),
        ] {
            let descriptor = encoder.encode_descriptor(
                name,
                help,
                None,
                prometheus_client::metrics::MetricType::Counter,
            )?;
            family.encode(descriptor)?;
        }
        let entries = ConstGauge::new(
            self.0
                .ipcache
                .len()
                .map_or(0, |n| i64::try_from(n).unwrap_or(i64::MAX)),
        );
        let descriptor = encoder.encode_descriptor(
            "ipcache_entries",
            "Entries of the ipcache",
            None,
            entries.metric_type(),
        )?;
        entries.encode(descriptor)
    }
}
