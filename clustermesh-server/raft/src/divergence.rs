//! Compares the replicas' data at one revision, and takes one that differs out of service.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clustermesh_core::{
    KvError, KvHash, pb,
    pb::{AlarmKind, proposal::Command},
};
use clustermesh_store::{Node, ReplicaId};
use futures_util::future::join_all;
use openraft::async_runtime::{AsyncRuntime, Watch, WatchReceiver};

use crate::{
    batcher::Proposer,
    config::{COMPARE_RETRY_PAUSE, COMPARE_TIMEOUT},
    error::ReadError,
    forward::Router,
    hashes::hash_kv,
    membership::Members,
    peer::target,
    state_machine::{Progress, Shared},
    task::Stop,
    watch::Hub,
    wire::{Compare, CompareAnswer, call_request::Call, call_response::Answer},
};

/// Who does not hold what most replicas hold.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// All that answered hold the same.
    Same,
    /// These differ from a majority.
    Differ(Vec<ReplicaId>),
    /// There are differences, and no majority.
    Open,
}

/// Hashes of other compact revisions than the first one's say nothing. A majority is one of all `members`.
fn judge(answers: &[(ReplicaId, CompareAnswer)], members: usize) -> Verdict {
    let compact = answers.first().map(|(_, answer)| answer.compact_revision);
    let mut classes: BTreeMap<(i64, u32), Vec<ReplicaId>> = BTreeMap::new();
    for (id, answer) in answers {
        if Some(answer.compact_revision) == compact {
            let class = classes.entry((answer.revision, answer.hash)).or_default();
            class.push(*id);
        }
    }
    if classes.len() <= 1 {
        return Verdict::Same;
    }
    if !classes.values().any(|class| class.len() > members / 2) {
        return Verdict::Open;
    }
    let minorities = classes.into_values().filter(|ids| ids.len() <= members / 2);
    Verdict::Differ(minorities.flatten().collect())
}

/// What this replica holds at `revision`, all of which it has applied.
pub(crate) async fn answer<R: AsyncRuntime>(
    shared: &Arc<Shared<R>>,
    revision: i64,
) -> Result<Result<CompareAnswer, KvError>, ReadError> {
    Ok(match hash_kv(shared, revision).await? {
        Ok((
            KvHash {
                hash,
                compact_revision,
                revision,
            },
            _,
        )) => Ok(CompareAnswer {
            hash,
            compact_revision,
            revision,
        }),
        // Not compacted but missing: that is a difference too.
        Err(KvError::FutureRevision) => {
            let newest = hash_kv(shared, 0).await?;
            newest.map(|(hash, _)| CompareAnswer {
                hash: hash.hash,
                compact_revision: hash.compact_revision,
                revision: hash.revision,
            })
        }
        Err(error) => Err(error),
    })
}

/// Compares.
pub(crate) struct Comparer<R: AsyncRuntime> {
    pub(crate) router: Arc<Router<R>>,
    pub(crate) shared: Arc<Shared<R>>,
    pub(crate) members: Members<R>,
    pub(crate) proposer: Proposer<R>,
    pub(crate) every: Duration,
}

impl<R: AsyncRuntime> Comparer<R> {
    /// Once when this replica is up to date, then time and again while it leads, and when it begins to lead.
    pub(crate) async fn run(self, stop: Stop<R>) {
        let mut led = None;
        let mut compared = false;
        loop {
            let term = self.leading_term();
            let due = !compared || (term.is_some() && term != led);
            let pause = if due {
                match stop.or(self.compare()).await {
                    None => return,
                    Some(Ok(true)) => {
                        compared = true;
                        led = term;
                        self.every
                    }
                    Some(Ok(false)) => COMPARE_RETRY_PAUSE,
                    Some(Err(error)) => {
                        tracing::debug!(%error, "the replicas' data is compared a little later");
                        COMPARE_RETRY_PAUSE
                    }
                }
            } else {
                self.every
            };
            // Another leader begins with a comparison; the same one goes on after the pause.
            let waited = R::timeout(pause, self.other_term(term));
            match stop.or(waited).await {
                None => return,
                Some(Ok(())) => {}
                Some(Err(_)) => led = None,
            }
        }
    }

    fn leading_term(&self) -> Option<u64> {
        let metrics = self.router.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leads = metrics.state.is_leader();
        leads.then_some(metrics.vote.leader_id.term)
    }

    async fn other_term(&self, term: Option<u64>) {
        let mut metrics = self.router.raft.server_metrics();
        while self.leading_term() == term {
            if metrics.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// False when there are others, and none of them could be compared with.
    async fn compare(&self) -> Result<bool, ReadError> {
        self.members.readers.linearize().await?;
        let (revision, index) = {
            let applied = self.shared.applied.read();
            (
                applied.state.revision(),
                applied.last.map_or(0, |last| last.index),
            )
        };
        let (nodes, _) = self.members.nodes();
        if nodes.len() < 2 {
            return Ok(true);
        }
        let Ok(own) = answer(&self.shared, revision).await? else {
            // Compacted meanwhile.
            return Ok(false);
        };
        let others = nodes.iter().filter(|(id, _)| **id != self.router.own);
        let asked = others.map(|(id, node)| self.ask(*id, node, revision, index));
        let mut answers = vec![(self.router.own, own)];
        answers.extend(join_all(asked).await.into_iter().flatten());
        let comparable = answers
            .iter()
            .filter(|(_, answer)| answer.compact_revision == own.compact_revision)
            .count();
        match judge(&answers, nodes.len()) {
            Verdict::Same => {}
            Verdict::Differ(ids) => {
                for id in ids {
                    self.accuse(id, revision).await;
                }
            }
            Verdict::Open => self.accuse(0, revision).await,
        }
        Ok(comparable > 1)
    }

    async fn ask(
        &self,
        id: ReplicaId,
        node: &Node,
        revision: i64,
        index: u64,
    ) -> Option<(ReplicaId, CompareAnswer)> {
        let question = Call::Compare(Compare { revision, index });
        let links = &self.router.links;
        match links
            .call(&target(id, node), question, COMPARE_TIMEOUT)
            .await
        {
            Ok(Answer::Compare(answer)) => Some((id, answer)),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(replica = %format_args!("{id:016x}"), %error, "not compared");
                None
            }
        }
    }

    /// Raises the CORRUPT alarm of a replica; 0 for "one of them", as in etcd.
    async fn accuse(&self, id: ReplicaId, revision: i64) {
        let alarm = pb::MemberAlarm {
            member_id: id,
            kind: AlarmKind::Corrupt.into(),
        };
        let stands = |alarm: &pb::MemberAlarm| {
            let state = &self.shared.applied.read().state;
            state.alarms().any(|standing| standing == *alarm)
        };
        if stands(&alarm) {
            return;
        }
        if id == 0 {
            tracing::error!(
                revision,
                "the replicas' data differs and no majority agrees: compare them by hand (etcdctl endpoint hashkv), writes are refused until the alarm is disarmed"
            );
        } else {
            tracing::error!(
                revision,
                replica = %format_args!("{id:016x}"),
                "this replica's data differs from the majority's: remove it from the group, empty its data folder and let it join again"
            );
        }
        let change = pb::AlarmChange {
            active: true,
            alarm: Some(alarm),
        };
        let proposal = pb::Proposal::system(Command::Alarm(change));
        if let Err(error) = self.proposer.propose(proposal).await {
            tracing::error!(%error, "the CORRUPT alarm could not be raised");
        }
    }
}

/// Ends the service of this replica once the group holds that its data differs.
pub(crate) async fn stand_aside<R: AsyncRuntime>(
    shared: Arc<Shared<R>>,
    mut progress: <R::Watch as Watch>::Receiver<Progress>,
    hub: Arc<Hub>,
    members: Members<R>,
    stop: Stop<R>,
) {
    while !shared.group.is_accused() {
        match stop.or(progress.changed()).await {
            Some(Ok(())) => {}
            _ => return,
        }
    }
    shared.diverged.store(true, Ordering::Release);
    hub.close();
    tracing::error!(error = %ReadError::Diverged, "this replica serves nothing any more");
    // Who reads from the log leads as well as any other, but a leader is asked for more than that.
    while stop.or(members.hand_over()).await == Some(false) {
        if stop.or(R::sleep(COMPARE_RETRY_PAUSE)).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(hashes: &[(u32, i64)]) -> Vec<(ReplicaId, CompareAnswer)> {
        (1..)
            .zip(hashes)
            .map(|(id, (hash, compact_revision))| {
                let answer = CompareAnswer {
                    hash: *hash,
                    compact_revision: *compact_revision,
                    revision: 9,
                };
                (id, answer)
            })
            .collect()
    }

    #[test]
    fn the_minority_differs_and_without_a_majority_nobody_is_named() {
        assert_eq!(judge(&answers(&[(1, 5), (1, 5), (1, 5)]), 3), Verdict::Same);
        assert_eq!(
            judge(&answers(&[(2, 5), (1, 5), (1, 5)]), 3),
            Verdict::Differ(vec![1])
        );
        assert_eq!(
            judge(&answers(&[(1, 5), (2, 5), (1, 5), (1, 5), (3, 5)]), 5),
            Verdict::Differ(vec![2, 5])
        );
        assert_eq!(judge(&answers(&[(1, 5), (2, 5)]), 3), Verdict::Open);
        assert_eq!(judge(&answers(&[(1, 5), (2, 5), (3, 5)]), 3), Verdict::Open);
    }

    #[test]
    fn other_compact_revisions_say_nothing() {
        assert_eq!(judge(&answers(&[(1, 5), (2, 6), (1, 5)]), 3), Verdict::Same);
        assert_eq!(judge(&answers(&[(1, 5)]), 3), Verdict::Same);
    }
}
