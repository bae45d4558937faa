//! What a connected node said of itself and of its kernel.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clustermesh_api::v1::{EncryptionReport, SourceRevision};

/// What is known of one connected node.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Version of the agent.
    pub agent_version: String,
    /// Layout of its pinned maps.
    pub map_layout_version: u32,
    /// Its addresses on the underlay.
    pub underlay_addresses: Vec<String>,
    /// Of each source cluster, what its kernel holds.
    pub applied: Vec<SourceRevision>,
    /// When it last said so.
    pub reported: Option<Instant>,
    /// Records that the agent could not take, by reason.
    pub refused_records: BTreeMap<String, u64>,
    /// How its packets to others travel; `None`: it does not encrypt.
    pub encryption: Option<EncryptionReport>,
}

impl Report {
    /// Whether the kernel holds `target` of its cluster. Another store id is no statement about this one.
    #[must_use]
    pub fn has_applied(&self, target: &SourceRevision) -> bool {
        self.applied.iter().any(|source| {
            source.cluster == target.cluster
                && source.store_id == target.store_id
                && source.revision >= target.revision
        })
    }

    /// Time since the last report.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        self.reported.map(|reported| reported.elapsed())
    }
}
