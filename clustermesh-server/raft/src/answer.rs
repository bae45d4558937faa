//! What came of entries and of the proposals in them.

use clustermesh_core::{KvError, Outcome, ProposalResult};

/// What applying one entry answers: one result for each proposal of a batch, none for other entries.
#[derive(Debug, Default)]
pub struct Answer {
    /// In the order of the proposals.
    pub results: Vec<ProposalResult>,
    /// Compact revision afterwards.
    pub compact_revision: i64,
}

/// A proposal that was committed and applied here.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// What came of it: apply may refuse it, which changes nothing.
    pub outcome: Result<Outcome, KvError>,
    /// Main revision after it.
    pub revision: i64,
    /// Compact revision after its entry.
    pub compact_revision: i64,
    /// Raft term in which it was proposed.
    pub term: u64,
    /// Place of its entry in the log.
    pub index: u64,
}
