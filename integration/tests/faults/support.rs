//! What the scenarios share: a group of three replicas, who leads, and that nothing of it stays.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clustermesh_integration::history::{Load, LoadConfig};
use clustermesh_integration::lab::cluster::Cluster;
use clustermesh_integration::lab::{Lab, LabConfig};

/// Places of the replicas.
pub const ALL: [usize; 3] = [0, 1, 2];
/// Longest that a group may take to agree on a leader.
const LEADER_SECONDS_MAX: u64 = 30;
/// Longest that clients may be without an acknowledged write while a majority is up and connected. An election takes
/// one to two seconds; the rest is for a machine that many share.
pub const GAP_MAX: Duration = Duration::from_secs(12);
/// Pause between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A cluster with a server of three replicas and nothing else.
pub fn scenario_config() -> Result<LabConfig> {
    Ok(LabConfig {
        clusters: vec!["a".to_owned()],
        replicas: 3,
        nodes_per_cluster: 0,
        agents_per_cluster: 0,
        ..LabConfig::two_by_two()?
    })
}

/// Runs `body` on such a cluster; removes everything, also on failure.
pub async fn scenario(body: impl AsyncFnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    in_lab(scenario_config()?, async |lab| {
        lab.start().await?;
        body(lab.cluster_mut(0)).await
    })
    .await
}

/// Runs `body` in a lab that is built and not started; removes everything, also on failure.
pub async fn in_lab(
    config: LabConfig,
    body: impl AsyncFnOnce(&mut Lab) -> Result<()>,
) -> Result<()> {
    let mut lab = Lab::build(config).await?;
    let mut result = body(&mut lab).await;
    if result.is_err() {
        for cluster in lab.clusters() {
            for replica in cluster.replicas() {
                let log = replica.log_text().unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(40)..].join("\n");
                println!("log of {}/{}:\n{tail}", cluster.name(), replica.name());
            }
        }
    }
    let left = lab.remove().await;
    if result.is_ok() && !left.is_empty() {
        result = Err(anyhow::anyhow!("the lab left behind: {left:?}"));
    }
    result
}

/// The usual load.
pub async fn load(cluster: &Cluster) -> Result<Load> {
    Load::start(cluster, LoadConfig::default()).await
}

/// The replica that those `among` agree on.
pub async fn leader(cluster: &Cluster, among: &[usize]) -> Result<usize> {
    let begun = Instant::now();
    loop {
        if let Some(leader) = agreed_leader(cluster, among).await {
            return Ok(leader);
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(LEADER_SECONDS_MAX),
            "the replicas at {among:?} (from 0) do not agree on a leader after {LEADER_SECONDS_MAX} s"
        );
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn agreed_leader(cluster: &Cluster, among: &[usize]) -> Option<usize> {
    let mut ids = Vec::new();
    let mut leaders = Vec::new();
    for index in among {
        let store = cluster.store_at(*index).ok()?;
        let asked = store.call(|client| async move { Ok(client.store_status().await?) });
        let status = asked.await.ok()?;
        ids.push((*index, status.header?.member_id));
        leaders.push(status.leader);
    }
    let first = *leaders.first()?;
    let agreed = leaders.iter().all(|leader| *leader == first);
    let place = ids.iter().find(|(_, id)| *id == first)?;
    agreed.then_some(place.0)
}

/// The replicas other than `one`.
pub fn others(one: usize) -> Vec<usize> {
    ALL.into_iter().filter(|index| *index != one).collect()
}

/// One of the replicas other than `one`.
pub const fn other(one: usize) -> usize {
    (one + 1) % ALL.len()
}

/// Waits until `log` of a replica has a line with all of `words`; that line.
pub async fn logged(cluster: &Cluster, replica: usize, words: &[&str]) -> Result<String> {
    let begun = Instant::now();
    loop {
        let log = cluster.replica(replica).log_text()?;
        let line = log
            .lines()
            .find(|line| words.iter().all(|word| line.contains(word)));
        if let Some(line) = line {
            return Ok(line.to_owned());
        }
        if begun.elapsed() > Duration::from_secs(LEADER_SECONDS_MAX) {
            return Err(anyhow::anyhow!("{log}"))
                .with_context(|| format!("no line with {words:?} in the log"));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
