//! What the store holds and may hold, read when the metrics are asked for.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::ClusterLabels;
use crate::store::Store;

/// Reads the store.
#[derive(Debug)]
pub(super) struct DataCollector(pub(super) Store);

impl Collector for DataCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let status = self.0.replica().status();
        let (compacted, leases, alarms, peers) = self.0.read(|state| {
            let peers: Vec<_> = state.peer_usages().collect();
            let leases = state.leases().count();
            let alarms = state.alarms().count();
            (state.compact_revision(), leases, alarms, peers)
        });
        let number = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        let gauges = [
            ("data_bytes", "Live and historic data", status.state_bytes),
            (
                "data_quota_bytes",
                "What the data may take; 0 for no limit",
                status.quota_bytes,
            ),
            (
                "revision",
                "Newest applied revision",
                status.revision.max(0).unsigned_abs(),
            ),
            (
                "compact_revision",
                "Lowest revision that can be read",
                compacted.max(0).unsigned_abs(),
            ),
            ("leases", "Leases", number(leases)),
            (
                "alarms",
                "Alarms that stand, on any replica",
                number(alarms),
            ),
        ];
        for (name, help, value) in gauges {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)?;
        }
        let families = [
            (
                "peer_copy_records",
                "Records of the copy of a peer",
                peers
                    .iter()
                    .map(|(_, usage)| usage.records)
                    .collect::<Vec<_>>(),
            ),
            (
                "peer_copy_bytes",
                "Bytes of keys and values of the copy of a peer",
                peers.iter().map(|(_, usage)| usage.bytes).collect(),
            ),
        ];
        for (name, help, values) in families {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for ((cluster, _), value) in peers.iter().zip(values) {
                let labels = ClusterLabels {
                    cluster: cluster.clone(),
                };
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
