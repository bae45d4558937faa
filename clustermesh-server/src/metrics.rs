//! Metrics of the server process, in Prometheus' text format.

mod data;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use self::data::DataCollector;
use crate::store::Store;

/// Of the metrics that are this server's own.
const PREFIX: &str = "clustermesh_server";

/// Everything that the server counts; clones share the numbers.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// The client port.
    pub serve: ServeMetrics,
    /// The replicas' port.
    pub peer_port: PeerPortMetrics,
    /// Answers that clients have not taken yet.
    pub answers: AnswerMetrics,
    /// Watches and agents' streams.
    pub watch: WatchMetrics,
    /// Node sessions.
    pub sessions: SessionMetrics,
    /// Copies of peers.
    pub peering: PeeringMetrics,
    /// Controllers.
    pub controllers: ControllerMetrics,
}

/// The client port.
#[derive(Debug, Clone, Default)]
pub struct ServeMetrics {
    /// Open connections.
    pub connections: Gauge,
    /// Connections closed at once because of the limit.
    pub connections_refused: Counter,
    /// TLS handshakes that failed or took too long, and connections that did not begin with HTTP.
    pub handshakes_failed: Counter,
    /// Connections that ended unfinished, to make room for others.
    pub unfinished_evicted: Counter,
    /// Connections closed because a frame did not end, or the client took nothing.
    pub stuck_closed: Counter,
    /// Requests given up because they did not arrive whole in time.
    pub requests_late: Counter,
    /// gRPC calls by method and outcome.
    pub handled: HandledCounters,
}

/// The replicas' port.
#[derive(Debug, Clone, Default)]
pub struct PeerPortMetrics {
    /// Connections that failed or took too long to prove whose they are.
    pub handshakes_failed: Counter,
    /// Connections that ended unfinished, to make room for others.
    pub unfinished_evicted: Counter,
    /// Connections closed because of the limit.
    pub connections_refused: Counter,
}

/// Answers that clients have not taken yet.
#[derive(Debug, Clone, Default)]
pub struct AnswerMetrics {
    /// Bytes of answers under way.
    pub bytes: Gauge,
    /// Answers refused because the budget was used up.
    pub refused: Counter,
}

/// Watches and agents' streams.
#[derive(Debug, Clone, Default)]
pub struct WatchMetrics {
    /// Open etcd watches.
    pub watches: Gauge,
    /// Open agents' streams.
    pub agent_streams: Gauge,
    /// Events sent.
    pub events_sent: Counter,
}

/// Node sessions.
#[derive(Debug, Clone, Default)]
pub struct SessionMetrics {
    /// Open sessions.
    pub open: Gauge,
    /// Claims that were refused, by reason.
    pub refused: Family<ReasonLabels, Counter>,
    /// Sessions that were lost and left their node stale.
    pub lost: Counter,
}

/// Copies of peers.
#[derive(Debug, Clone, Default)]
pub struct PeeringMetrics {
    /// 1 while the copy of the peer is in step with it.
    pub synced: Family<ClusterLabels, Gauge>,
    /// The peer's revision that our copy equals.
    pub revision: Family<ClusterLabels, Gauge>,
    /// Connections begun again.
    pub reconnects: Family<ClusterLabels, Counter>,
    /// Records that were refused, by reason.
    pub refused: Family<ClusterReasonLabels, Counter>,
    /// Records whose values were read in listings.
    pub values_read: Family<ClusterLabels, Counter>,
    /// Records written or deleted.
    pub changes: Family<ClusterLabels, Counter>,
}

/// Controllers.
#[derive(Debug, Clone, Default)]
pub struct ControllerMetrics {
    /// Records written by the service join.
    pub service_writes: Counter,
    /// Failed runs, by controller.
    pub failures: Family<ControllerLabels, Counter>,
}

/// `grpc_server_handled_total`; clones share the numbers.
pub type HandledCounters = Family<HandledLabels, Counter>;

/// Labels of a method's outcome, under the names that gRPC servers commonly use, etcd among them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandledLabels {
    /// `unary`, `client_stream`, `server_stream` or `bidi_stream`.
    pub grpc_type: &'static str,
    /// `package.Service`.
    pub grpc_service: String,
    /// Name of the method.
    pub grpc_method: String,
    /// Name of the status.
    pub grpc_code: String,
}

/// Label `reason`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    /// Why.
    pub reason: String,
}

/// Label `cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ClusterLabels {
    /// The peer.
    pub cluster: String,
}

/// Labels `cluster` and `reason`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ClusterReasonLabels {
    /// The peer.
    pub cluster: String,
    /// Why.
    pub reason: String,
}

/// Label `controller`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ControllerLabels {
    /// Which one.
    pub controller: String,
}

impl Metrics {
    /// Fresh metrics and the registry that shows them.
    #[must_use]
    pub fn registered() -> (Self, Registry) {
        let metrics = Self::default();
        let mut all = Registry::default();
        // Dashboards for any gRPC server know it by this name.
        all.register(
            "grpc_server_handled",
            "gRPC calls by method and outcome",
            metrics.serve.handled.clone(),
        );
        let registry = all.sub_registry_with_prefix(PREFIX);
        metrics
            .serve
            .register(registry.sub_registry_with_prefix("client_port"));
        metrics
            .peer_port
            .register(registry.sub_registry_with_prefix("peer_port"));
        metrics
            .answers
            .register(registry.sub_registry_with_prefix("answers"));
        metrics
            .watch
            .register(registry.sub_registry_with_prefix("watch"));
        metrics
            .sessions
            .register(registry.sub_registry_with_prefix("node_sessions"));
        metrics
            .peering
            .register(registry.sub_registry_with_prefix("peer"));
        metrics
            .controllers
            .register(registry.sub_registry_with_prefix("controllers"));
        (metrics, all)
    }
}

impl Metrics {
    /// Also shows what the replica counts and holds.
    pub fn register_store(&self, registry: &mut Registry, store: Store) {
        let registry = registry.sub_registry_with_prefix(PREFIX);
        let counted = ReplicaCollector(store.replica().metrics());
        registry.register_collector(Box::new(counted));
        registry.register_collector(Box::new(DataCollector(store)));
    }
}

/// The replica counts in plain atomics.
#[derive(Debug)]
struct ReplicaCollector(Arc<clustermesh_raft::Metrics>);

impl Collector for ReplicaCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let metrics = &self.0;
        let counters: [(&str, &str, &AtomicU64); 13] = [
            (
                "raft_proposals",
                "Proposals taken",
                &metrics.proposals_total,
            ),
            (
                "raft_proposals_queue_full",
                "Proposals refused because too many wait",
                &metrics.proposals_queue_full_total,
            ),
            (
                "raft_proposals_unknown",
                "Proposals of unknown outcome",
                &metrics.proposals_unknown_total,
            ),
            (
                "raft_entries_proposed",
                "Log entries proposed",
                &metrics.entries_proposed_total,
            ),
            (
                "raft_entries_applied",
                "Log entries applied",
                &metrics.entries_applied_total,
            ),
            (
                "raft_entry_applied_bytes",
                "Bytes of applied commands",
                &metrics.entry_bytes_applied_total,
            ),
            (
                "linearizable_reads",
                "Linearizable reads",
                &metrics.linearizable_reads_total,
            ),
            (
                "read_index_rounds",
                "ReadIndex rounds that served them",
                &metrics.read_index_rounds_total,
            ),
            (
                "watch_groups",
                "Event groups handed to watchers",
                &metrics.watch_groups_total,
            ),
            (
                "watch_fallbacks",
                "Watchers that fell back to history",
                &metrics.watch_fallbacks_total,
            ),
            (
                "leases_expired",
                "Leases expired",
                &metrics.leases_expired_total,
            ),
            ("snapshots", "Snapshots taken", &metrics.snapshots_total),
            (
                "snapshot_failures",
                "Snapshots that failed",
                &metrics.snapshot_failures_total,
            ),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value.load(Ordering::Relaxed));
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        let gauges = [
            (
                "raft_proposals_waiting",
                "Proposals waiting",
                &metrics.proposals_waiting,
            ),
            ("watchers", "Watchers", &metrics.watchers),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value.load(Ordering::Relaxed));
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

impl ServeMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register("connections", "Open connections", self.connections.clone());
        registry.register(
            "connections_refused",
            "Connections closed at once because of the limit",
            self.connections_refused.clone(),
        );
        registry.register(
            "tls_handshakes_failed",
            "Failed TLS handshakes",
            self.handshakes_failed.clone(),
        );
        registry.register(
            "unfinished_connections_evicted",
            "Connections that ended before they had begun with HTTP, to make room for others",
            self.unfinished_evicted.clone(),
        );
        registry.register(
            "stuck_connections_closed",
            "Connections closed because a frame did not end, or the client took nothing",
            self.stuck_closed.clone(),
        );
        registry.register(
            "requests_late",
            "Requests given up because they did not arrive whole in time",
            self.requests_late.clone(),
        );
    }
}

impl PeerPortMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "handshakes_failed",
            "Connections that failed or took too long to prove whose they are",
            self.handshakes_failed.clone(),
        );
        registry.register(
            "unfinished_connections_evicted",
            "Connections that ended before they had proved whose they are, to make room for others",
            self.unfinished_evicted.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections closed because of the limit",
            self.connections_refused.clone(),
        );
    }
}

impl AnswerMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "under_way_bytes",
            "Bytes of answers that clients have not taken yet",
            self.bytes.clone(),
        );
        registry.register(
            "refused",
            "Answers refused because too many bytes wait for clients",
            self.refused.clone(),
        );
    }
}

impl WatchMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register("watches", "Open etcd watches", self.watches.clone());
        registry.register(
            "agent_streams",
            "Open streams of agents",
            self.agent_streams.clone(),
        );
        registry.register(
            "events_sent",
            "Events sent to watchers and agents",
            self.events_sent.clone(),
        );
    }
}

impl SessionMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register("open", "Open node sessions", self.open.clone());
        registry.register(
            "claims_refused",
            "Refused claims by reason",
            self.refused.clone(),
        );
        registry.register("lost", "Sessions that were lost", self.lost.clone());
    }
}

impl PeeringMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "synced",
            "1 while the copy is in step with the peer",
            self.synced.clone(),
        );
        registry.register(
            "revision",
            "The peer's revision that the copy equals",
            self.revision.clone(),
        );
        registry.register(
            "reconnects",
            "Connections begun again",
            self.reconnects.clone(),
        );
        registry.register(
            "records_refused",
            "Refused records by reason",
            self.refused.clone(),
        );
        registry.register(
            "listing_values_read",
            "Records whose values were read in listings",
            self.values_read.clone(),
        );
        registry.register(
            "records_changed",
            "Records written or deleted",
            self.changes.clone(),
        );
    }
}

impl ControllerMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "service_records_written",
            "Records of the service join",
            self.service_writes.clone(),
        );
        registry.register(
            "failures",
            "Failed runs by controller",
            self.failures.clone(),
        );
    }
}
