//! Compaction of old revisions by the leader.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use clustermesh_api::etcd::rpc::CompactionRequest;
use clustermesh_core::{pb, pb::proposal::Command};
use openraft::async_runtime::{AsyncRuntime, Instant};

use crate::{
    config::AutoCompaction, error::ProposeError, metrics::add, proposal::Proposer, shared::Shared,
    task::Stop,
};

/// Samples of the revision over the kept age.
const AGE_SAMPLES: u32 = 10;

/// Which revision may be compacted, from what was seen.
struct Samples<I> {
    keep: Duration,
    seen: VecDeque<(I, i64)>,
}

impl<I: Instant> Samples<I> {
    fn add(&mut self, now: I, revision: i64) -> Option<i64> {
        self.seen.push_back((now, revision));
        let mut old = None;
        while let Some((_, revision)) = self
            .seen
            .pop_front_if(|(at, _)| now.saturating_duration_since(*at) >= self.keep)
        {
            old = Some(revision);
        }
        old
    }
}

/// Proposes compactions while this replica leads.
pub(crate) async fn run<R: AsyncRuntime>(
    policy: AutoCompaction,
    shared: Arc<Shared<R>>,
    proposer: Proposer<R>,
    stop: Stop<R>,
) {
    let every = match policy {
        AutoCompaction::Off => return,
        AutoCompaction::Revisions { every, .. } => every,
        AutoCompaction::Age { keep } => keep / AGE_SAMPLES,
    }
    .max(Duration::from_millis(1));
    let mut samples = Samples {
        keep: Duration::ZERO,
        seen: VecDeque::new(),
    };
    while stop.or(R::sleep(every)).await.is_some() {
        let (revision, compacted) = {
            let applied = shared.applied.read();
            (applied.state.revision(), applied.state.compact_revision())
        };
        let target = match policy {
            AutoCompaction::Off => None,
            AutoCompaction::Revisions { keep, .. } => {
                Some(revision.saturating_sub(i64::try_from(keep).unwrap_or(i64::MAX)))
            }
            AutoCompaction::Age { keep } => {
                samples.keep = keep;
                samples.add(R::Instant::now(), revision)
            }
        };
        let Some(target) = target.filter(|target| *target > compacted) else {
            continue;
        };
        if !shared.leases.is_leader() {
            continue;
        }
        let request = CompactionRequest {
            revision: target,
            ..CompactionRequest::default()
        };
        let proposal = pb::Proposal::system(Command::Compact(request));
        match stop.or(proposer.propose_as_leader(proposal)).await {
            Some(Ok(committed)) => {
                if let Err(error) = committed.outcome {
                    tracing::debug!(%error, revision = target, "automatic compaction refused");
                } else {
                    add(&shared.metrics.auto_compactions_total, 1);
                }
            }
            Some(Err(ProposeError::Stopped)) | None => return,
            Some(Err(error)) => tracing::debug!(%error, "automatic compaction is tried again"),
        }
    }
}
