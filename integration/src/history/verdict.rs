//! The judgement: what every replica has in the end, and whether that and the answers fit together.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::{HashKvRequest, HashKvResponse, WatchCreateRequest};
use clustermesh_client::Client;
use clustermesh_oracle::{Answer, Committed, Operation};

use super::Shared;
use super::watcher::by_revision;
use crate::lab::cluster::Cluster;
use crate::lab::replica::Replica;

/// Longest that a replica may take to catch up and tell all that it has.
const READ_ALL_SECONDS_MAX: u64 = 30;
/// Errors that are shown, the most frequent ones.
const ERRORS_SHOWN_MAX: usize = 6;
/// Pause between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What came of a load.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Operations of all clients.
    pub operations: usize,
    /// Writes acknowledged.
    pub acknowledged: usize,
    /// Operations without a known outcome.
    pub unknown: usize,
    /// Operations refused.
    pub refused: usize,
    /// Revisions that the store made.
    pub revisions: usize,
    /// The longest time without an acknowledged write, of all clients together.
    pub longest_gap: Duration,
    /// When it began, since the start of the load.
    pub gap_at: Duration,
    /// What must not have happened.
    pub faults: Vec<String>,
    /// What clients were told instead of an answer, and how often.
    pub errors: BTreeMap<String, usize>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} operations ({} without a known outcome, {} refused), {} writes acknowledged, {} revisions, longest gap {} ms at {:.1} s",
            self.operations,
            self.unknown,
            self.refused,
            self.acknowledged,
            self.revisions,
            self.longest_gap.as_millis(),
            self.gap_at.as_secs_f64(),
        )?;
        let mut errors: Vec<_> = self.errors.iter().collect();
        errors.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (error, count) in errors.into_iter().take(ERRORS_SHOWN_MAX) {
            write!(f, "\n    {count} × {error}")?;
        }
        Ok(())
    }
}

impl Verdict {
    /// Prints the figures, and fails if anything was wrong.
    ///
    /// # Errors
    /// The faults.
    pub fn check(&self, scenario: &str) -> Result<()> {
        println!("{scenario}: {self}");
        ensure!(
            self.faults.is_empty(),
            "{scenario}: {}",
            self.faults.join("\n")
        );
        Ok(())
    }
}

/// The newest revision that was acknowledged to anybody: by a linearizable read.
pub(super) async fn last_revision(cluster: &Cluster) -> Result<i64> {
    let begun = Instant::now();
    loop {
        match cluster.store()?.revision().await {
            Ok(revision) => return Ok(revision),
            Err(error) if begun.elapsed() > Duration::from_secs(READ_ALL_SECONDS_MAX) => {
                return Err(error.context("no linearizable read at the end"));
            }
            Err(_) => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}

/// Reads what every replica has and judges the history by it.
pub(super) async fn judge(cluster: &Cluster, shared: &Shared, last: i64) -> Result<Verdict> {
    let records = std::mem::take(&mut *shared.records());
    let mut verdict = Verdict {
        operations: records.operations.len(),
        acknowledged: records.acknowledged_at.len(),
        faults: records.faults,
        errors: records.errors,
        ..Verdict::default()
    };
    let count = |wanted: Answer| {
        let is = |operation: &&Operation| operation.answer == wanted;
        records.operations.iter().filter(is).count()
    };
    verdict.unknown = count(Answer::Unknown);
    verdict.refused = count(Answer::Refused);
    (verdict.longest_gap, verdict.gap_at) = longest_gap(records.acknowledged_at);

    let mut first: Option<(&str, BTreeMap<i64, Committed>, HashKvResponse)> = None;
    let running = |(_, replica): &(usize, &Replica)| replica.is_started();
    for (index, replica) in cluster.replicas().iter().enumerate().filter(running) {
        let name = replica.name();
        let (history, hash) = cluster
            .store_at(index)?
            .call(move |client| all_of(client, last))
            .await
            .with_context(|| format!("what {name} has"))?;
        let Some((first_name, first_history, first_hash)) = &first else {
            first = Some((name, history, hash));
            continue;
        };
        if hash.hash != first_hash.hash || hash.compact_revision != first_hash.compact_revision {
            verdict.faults.push(format!(
                "at revision {last} HashKV of {name} is {:08x} (compacted at {}), of {first_name} {:08x} ({})",
                hash.hash, hash.compact_revision, first_hash.hash, first_hash.compact_revision
            ));
        }
        if let Some(fault) = difference((first_name, first_history), (name, &history)) {
            verdict.faults.push(fault);
        }
    }
    let (_, committed, _) = first.context("a cluster without replicas")?;
    verdict.revisions = committed.len();
    let compaction = 0;
    verdict.faults.extend(clustermesh_oracle::check(
        &records.operations,
        &records.watched,
        &committed,
        compaction,
    ));
    if verdict.acknowledged == 0 || records.watched.is_empty() {
        bail!("a load without writes or watchers proves nothing: {verdict}");
    }
    Ok(verdict)
}

/// The longest time between two acknowledgements, and when it began.
fn longest_gap(mut acknowledged_at: Vec<Duration>) -> (Duration, Duration) {
    acknowledged_at.sort_unstable();
    acknowledged_at
        .windows(2)
        .map(|pair| (pair[1] - pair[0], pair[0]))
        .max()
        .unwrap_or_default()
}

/// Where two replicas have different histories.
fn difference(
    (one_name, one): (&str, &BTreeMap<i64, Committed>),
    (other_name, other): (&str, &BTreeMap<i64, Committed>),
) -> Option<String> {
    let revisions = one.keys().chain(other.keys());
    let at = revisions
        .copied()
        .filter(|revision| {
            let changes = |of: &BTreeMap<i64, Committed>| {
                let group = of.get(revision);
                group.map(|group| group.changes.clone())
            };
            changes(one) != changes(other)
        })
        .min()?;
    Some(format!(
        "at revision {at} {one_name} has {:?}, {other_name} has {:?}",
        one.get(&at),
        other.get(&at)
    ))
}

/// Every revision that the replica behind `client` has, up to `last`, as a watch from the beginning tells it; and its hash.
async fn all_of(client: Client, last: i64) -> Result<(BTreeMap<i64, Committed>, HashKvResponse)> {
    let limit = Duration::from_secs(READ_ALL_SECONDS_MAX);
    let history = tokio::time::timeout(limit, history(&client, last))
        .await
        .with_context(|| format!("not up to revision {last} after {READ_ALL_SECONDS_MAX} s"))??;
    let hash = MaintenanceClient::new(client.channel())
        .hash_kv(HashKvRequest { revision: last })
        .await
        .context("HashKV")?;
    Ok((history, hash.into_inner()))
}

async fn history(client: &Client, last: i64) -> Result<BTreeMap<i64, Committed>> {
    let mut all = BTreeMap::new();
    let mut stream = client
        .watch([WatchCreateRequest {
            key: bytes::Bytes::from_static(b"\0"),
            range_end: bytes::Bytes::from_static(b"\0"),
            start_revision: 1,
            ..WatchCreateRequest::default()
        }])
        .await?;
    while all.last_key_value().is_none_or(|(at, _)| *at < last) {
        let response = stream.next().await?.context("the watch ended")?;
        ensure!(
            !response.canceled,
            "the watch was ended: {}",
            response.cancel_reason
        );
        for (revision, changes) in by_revision(response.events) {
            if revision <= last {
                let seen_at = Duration::ZERO;
                let group = Committed { changes, seen_at };
                let twice = all.insert(revision, group).is_some();
                ensure!(!twice, "revision {revision} came twice");
            } else {
                // More is being written; it is of no interest.
                return Ok(all);
            }
        }
    }
    Ok(all)
}
