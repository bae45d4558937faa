//! Counters of a replica, for the process to export.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the start; gauges where named so.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Proposals taken.
    pub proposals_total: AtomicU64,
    /// Proposals refused because too many were waiting.
    pub proposals_queue_full_total: AtomicU64,
    /// Proposals whose outcome stayed unknown.
    pub proposals_unknown_total: AtomicU64,
    /// Proposals waiting for an answer (gauge).
    pub proposals_waiting: AtomicU64,
    /// Log entries proposed.
    pub entries_proposed_total: AtomicU64,
    /// Log entries applied.
    pub entries_applied_total: AtomicU64,
    /// Bytes of applied commands.
    pub entry_bytes_applied_total: AtomicU64,
    /// Batches forwarded to the leader.
    pub forwards_total: AtomicU64,
    /// Linearizable reads asked for.
    pub linearizable_reads_total: AtomicU64,
    /// Rounds of ReadIndex that served them.
    pub read_index_rounds_total: AtomicU64,
    /// Watchers (gauge).
    pub watchers: AtomicU64,
    /// Event groups handed to watchers.
    pub watch_groups_total: AtomicU64,
    /// Times that a watcher was too slow and fell back to history.
    pub watch_fallbacks_total: AtomicU64,
    /// Leases that this leader expired.
    pub leases_expired_total: AtomicU64,
    /// Snapshots taken.
    pub snapshots_total: AtomicU64,
    /// Snapshots that failed.
    pub snapshot_failures_total: AtomicU64,
    /// Compactions that this leader proposed by itself.
    pub auto_compactions_total: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

pub(crate) fn sub(gauge: &AtomicU64, count: usize) {
    gauge.fetch_sub(count as u64, Ordering::Relaxed);
}
