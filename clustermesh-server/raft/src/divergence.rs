//! Compares the replicas' data at one revision, and takes one that differs out of service.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clustermesh_core::{
    KvError, KvHash,
    limits::BESIDE_KEYS_FORMAT,
    pb,
    pb::{AlarmKind, proposal::Command},
};
use clustermesh_store::{Node, ReplicaId};
use futures_util::future::join_all;
use openraft::async_runtime::{AsyncRuntime, Watch, WatchReceiver};

use crate::{
    config::{COMPARE_RETRY_PAUSE, COMPARE_TIMEOUT},
    error::ReadError,
    forward::Router,
    hash_kv::hash_kv,
    membership::{Handover, Members},
    peer::target,
    proposal::Proposer,
    shared::{Milestones, Shared},
    task::Stop,
    watch::Hub,
    wire::{BesideKeys, Compare, CompareAnswer, call_request::Call, call_response::Answer},
};

/// Times that the replicas are asked for what they hold beside keys.
const BESIDE_KEYS_ATTEMPTS: usize = 5;

type Nodes = BTreeMap<ReplicaId, Node>;

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

/// Sorts replicas by what they hold. A majority is one of all `members`.
fn judge<Held: Ord>(
    answers: impl IntoIterator<Item = (ReplicaId, Held)>,
    members: usize,
) -> Verdict {
    let mut classes: BTreeMap<Held, Vec<ReplicaId>> = BTreeMap::new();
    for (id, held) in answers {
        classes.entry(held).or_default().push(id);
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

/// Hashes of other compact revisions than the first one's say nothing.
fn keys(answers: &[(ReplicaId, CompareAnswer)]) -> Vec<(ReplicaId, (i64, u32))> {
    let compact = answers.first().map(|(_, answer)| answer.compact_revision);
    answers
        .iter()
        .filter(|(_, answer)| Some(answer.compact_revision) == compact)
        .map(|(id, answer)| (*id, (answer.revision, answer.hash)))
        .collect()
}

/// The hashes after one entry: the one that most of the answers tell of.
fn beside_keys(answers: &[(ReplicaId, BesideKeys)]) -> Vec<(ReplicaId, u64)> {
    let after = |index: u64| {
        answers
            .iter()
            .filter(move |(_, beside)| (beside.since..=beside.until).contains(&index))
            .map(|(id, beside)| (*id, beside.hash))
    };
    let best = answers
        .iter()
        .map(|(_, beside)| beside.since)
        .max_by_key(|index| after(*index).count());
    best.map(|index| after(index).collect()).unwrap_or_default()
}

fn own_beside_keys<R: AsyncRuntime>(shared: &Shared<R>) -> BesideKeys {
    let applied = shared.applied.read();
    BesideKeys {
        hash: applied.state.hash_beside_keys(),
        since: applied.beside_keys_since,
        until: applied.last.map_or(0, |last| last.index),
        format: BESIDE_KEYS_FORMAT,
    }
}

/// What this replica holds, all up to the asked entry being applied.
pub(crate) async fn answer<R: AsyncRuntime>(
    shared: &Arc<Shared<R>>,
    asked: &Compare,
) -> Result<Result<CompareAnswer, KvError>, ReadError> {
    let beside_keys = Some(own_beside_keys(shared));
    if asked.only_beside_keys {
        return Ok(Ok(CompareAnswer {
            beside_keys,
            ..CompareAnswer::default()
        }));
    }
    let told = |(hash, _): (KvHash, i64)| CompareAnswer {
        hash: hash.hash,
        compact_revision: hash.compact_revision,
        revision: hash.revision,
        beside_keys,
    };
    Ok(match hash_kv(shared, asked.revision).await? {
        // Not compacted but missing: that is a difference too.
        Err(KvError::FutureRevision) => hash_kv(shared, 0).await?.map(told),
        found => found.map(told),
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
        let (nodes, _) = self.members.nodes();
        if nodes.len() < 2 {
            return Ok(true);
        }
        let (revision, index) = {
            let applied = self.shared.applied.read();
            (
                applied.state.revision(),
                applied.last.map_or(0, |last| last.index),
            )
        };
        let asked = Compare {
            revision,
            index,
            only_beside_keys: false,
        };
        let Ok(own) = answer(&self.shared, &asked).await? else {
            // Compacted meanwhile.
            return Ok(false);
        };
        let mut answers = vec![(self.router.own, own)];
        answers.extend(self.ask_others(&nodes, asked).await);
        let held = keys(&answers);
        let comparable = held.len() > 1;
        self.settle(judge(held, nodes.len()), revision).await;
        self.compare_beside_keys(&nodes, answers, revision).await;
        Ok(comparable)
    }

    /// Where something changes all the time, no entry may be common to what the replicas tell of: then they are asked again.
    async fn compare_beside_keys(
        &self,
        nodes: &Nodes,
        mut answers: Vec<(ReplicaId, CompareAnswer)>,
        revision: i64,
    ) {
        for _ in 0..BESIDE_KEYS_ATTEMPTS {
            let told: Vec<_> = answers
                .iter()
                .filter_map(|(id, answer)| Some((*id, answer.beside_keys?)))
                .filter(|(_, beside)| beside.format == BESIDE_KEYS_FORMAT)
                .collect();
            let held = beside_keys(&told);
            if held.len() == told.len() {
                return self.settle(judge(held, nodes.len()), revision).await;
            }
            let own = own_beside_keys(&self.shared);
            let asked = Compare {
                revision: 0,
                index: own.until,
                only_beside_keys: true,
            };
            let beside_keys = Some(own);
            let own = CompareAnswer {
                beside_keys,
                ..CompareAnswer::default()
            };
            answers = vec![(self.router.own, own)];
            answers.extend(self.ask_others(nodes, asked).await);
        }
        tracing::debug!(
            "leases and users change too often to be compared, it is tried again later"
        );
    }

    async fn settle(&self, verdict: Verdict, revision: i64) {
        match verdict {
            Verdict::Same => {}
            Verdict::Differ(ids) => {
                for id in ids {
                    self.accuse(id, revision).await;
                }
            }
            Verdict::Open => self.accuse(0, revision).await,
        }
    }

    async fn ask_others(&self, nodes: &Nodes, asked: Compare) -> Vec<(ReplicaId, CompareAnswer)> {
        let others = nodes.iter().filter(|(id, _)| **id != self.router.own);
        let asked = others.map(|(id, node)| self.ask(*id, node, asked));
        join_all(asked).await.into_iter().flatten().collect()
    }

    async fn ask(
        &self,
        id: ReplicaId,
        node: &Node,
        asked: Compare,
    ) -> Option<(ReplicaId, CompareAnswer)> {
        let links = &self.router.links;
        match links
            .call(&target(id, node), Call::Compare(asked), COMPARE_TIMEOUT)
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
    mut milestones: <R::Watch as Watch>::Receiver<Milestones>,
    hub: Arc<Hub>,
    members: Members<R>,
    stop: Stop<R>,
) {
    while !shared.group.is_accused() {
        match stop.or(milestones.changed()).await {
            Some(Ok(())) => {}
            _ => return,
        }
    }
    shared.diverged.store(true, Ordering::Release);
    hub.close();
    tracing::error!(error = %ReadError::Diverged, "this replica serves nothing any more");
    // Who reads from the log leads as well as any other, but a leader is asked for more than that.
    while stop
        .or(members.hand_over())
        .await
        .is_some_and(|handover| handover != Handover::Done)
    {
        if stop.or(R::sleep(COMPARE_RETRY_PAUSE)).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(hashes: &[(u32, i64)]) -> Vec<(ReplicaId, (i64, u32))> {
        let answers: Vec<_> = (1..)
            .zip(hashes)
            .map(|(id, (hash, compact_revision))| {
                let answer = CompareAnswer {
                    hash: *hash,
                    compact_revision: *compact_revision,
                    revision: 9,
                    beside_keys: None,
                };
                (id, answer)
            })
            .collect();
        keys(&answers)
    }

    #[test]
    fn the_minority_differs_and_without_a_majority_nobody_is_named() {
        assert_eq!(judge(held(&[(1, 5), (1, 5), (1, 5)]), 3), Verdict::Same);
        assert_eq!(
            judge(held(&[(2, 5), (1, 5), (1, 5)]), 3),
            Verdict::Differ(vec![1])
        );
        assert_eq!(
            judge(held(&[(1, 5), (2, 5), (1, 5), (1, 5), (3, 5)]), 5),
            Verdict::Differ(vec![2, 5])
        );
        assert_eq!(judge(held(&[(1, 5), (2, 5)]), 3), Verdict::Open);
        assert_eq!(judge(held(&[(1, 5), (2, 5), (3, 5)]), 3), Verdict::Open);
    }

    #[test]
    fn other_compact_revisions_say_nothing() {
        assert_eq!(judge(held(&[(1, 5), (2, 6), (1, 5)]), 3), Verdict::Same);
        assert_eq!(judge(held(&[(1, 5)]), 3), Verdict::Same);
    }

    #[test]
    fn what_is_held_beside_keys_is_compared_after_the_same_entry() {
        let told = |spans: &[(u64, u64, u64)]| -> Vec<_> {
            (1..)
                .zip(spans)
                .map(|(id, &(hash, since, until))| {
                    (
                        id,
                        BesideKeys {
                            hash,
                            since,
                            until,
                            format: BESIDE_KEYS_FORMAT,
                        },
                    )
                })
                .collect()
        };
        // The third one has not seen the change at 8 yet.
        let behind = told(&[(2, 8, 9), (2, 8, 12), (1, 3, 7)]);
        assert_eq!(beside_keys(&behind), [(1, 2), (2, 2)]);
        let differs = told(&[(2, 8, 9), (7, 8, 12), (2, 3, 9)]);
        assert_eq!(judge(beside_keys(&differs), 3), Verdict::Differ(vec![2]));
        assert!(beside_keys(&[]).is_empty());
    }
}
