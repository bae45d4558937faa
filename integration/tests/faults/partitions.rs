//! Replicas that do not hear each other, while clients reach all of them.

use std::time::Duration;

use anyhow::{Result, ensure};
use clustermesh_integration::history::Verdict;
use clustermesh_integration::lab::partition::Cut;

use crate::support::{ALL, GAP_MAX, leader, load, other, others, scenario};

/// How long a cut lasts: several election timeouts.
const CUT: Duration = Duration::from_secs(4);

fn judged(scenario: &str, verdict: &Verdict, back: Duration) -> Result<()> {
    verdict.check(scenario)?;
    println!("  writes through all {} ms after healing", back.as_millis());
    ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_symmetric_minority_acknowledges_nothing_and_the_majority_goes_on() -> Result<()> {
    scenario(async |cluster| {
        let first = leader(cluster, &ALL).await?;
        let follower = other(first);
        let load = load(cluster).await?;
        cluster.isolate(follower).await?;
        load.goes_on(&others(follower)).await?;
        let before = load.acknowledged_by(follower);
        load.run_for(CUT).await;
        ensure!(
            load.acknowledged_by(follower) == before,
            "a replica without a majority acknowledged writes"
        );
        // It forwards to nobody and stands for no election: the leader stays.
        ensure!(leader(cluster, &others(follower)).await? == first);
        cluster.heal().await?;
        let back = load.goes_on_everywhere().await?;
        ensure!(
            leader(cluster, &ALL).await? == first,
            "the one that came back unseated the leader"
        );
        judged("minority", &load.finish(cluster).await?, back)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn leader_alone_acknowledges_nothing_and_reads_nothing_stale() -> Result<()> {
    scenario(async |cluster| {
        let first = leader(cluster, &ALL).await?;
        let load = load(cluster).await?;
        cluster.isolate(first).await?;
        load.goes_on(&others(first)).await?;
        let before = load.acknowledged_by(first);
        load.run_for(CUT).await;
        ensure!(
            load.acknowledged_by(first) == before,
            "a leader without a majority acknowledged writes"
        );
        ensure!(leader(cluster, &others(first)).await? != first);
        cluster.heal().await?;
        let back = load.goes_on_everywhere().await?;
        judged("leader_alone", &load.finish(cluster).await?, back)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_way_cuts_of_packets_towards_and_from_the_leader_are_survived() -> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        // The followers are heard no more by the leader, but hear it.
        let deaf = leader(cluster, &ALL).await?;
        for follower in others(deaf) {
            cluster.cut(follower, deaf, Cut::Packets).await?;
        }
        load.run_for(CUT).await;
        load.goes_on(&others(deaf)).await?;
        cluster.heal().await?;
        load.goes_on_everywhere().await?;
        // The leader is not heard, but hears.
        let mute = leader(cluster, &ALL).await?;
        for follower in others(mute) {
            cluster.cut(mute, follower, Cut::Packets).await?;
        }
        load.run_for(CUT).await;
        load.goes_on(&others(mute)).await?;
        cluster.heal().await?;
        let back = load.goes_on_everywhere().await?;
        judged("one_way_packets", &load.finish(cluster).await?, back)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_way_cuts_of_calls_are_survived() -> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        // The leader can be called, but calls nobody: no heartbeat leaves it.
        let first = leader(cluster, &ALL).await?;
        for follower in others(first) {
            cluster.cut(first, follower, Cut::Calls).await?;
        }
        load.run_for(CUT).await;
        load.goes_on(&others(first)).await?;
        cluster.heal().await?;
        load.goes_on_everywhere().await?;
        // A follower is called, but can ask nobody for a vote or a read index, and forward nothing.
        let first = leader(cluster, &ALL).await?;
        let mute = other(first);
        for to in others(mute) {
            cluster.cut(mute, to, Cut::Calls).await?;
        }
        load.run_for(CUT).await;
        load.goes_on(&others(mute)).await?;
        cluster.heal().await?;
        let back = load.goes_on_everywhere().await?;
        judged("one_way_calls", &load.finish(cluster).await?, back)
    })
    .await
}
