//! Processes that are killed or stand still.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clustermesh_integration::lab::LabConfig;
use clustermesh_integration::scenario::{NAMESPACE, until, workload};
use nix::sys::signal::Signal;

use crate::support::{ALL, GAP_MAX, in_lab, leader, load, other, others, scenario};

/// Far longer than an election timeout: another one leads when the process goes on.
const STANDS_STILL: Duration = Duration::from_secs(4);
/// Load between two faults.
const BETWEEN: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_a_follower_then_of_the_leader_loses_nothing() -> Result<()> {
    scenario(async |cluster| {
        let first = leader(cluster, &ALL).await?;
        let load = load(cluster).await?;
        let follower = other(first);
        cluster.replica_mut(follower).stop(Signal::SIGKILL).await?;
        load.goes_on(&others(follower)).await?;
        load.run_for(BETWEEN).await;
        cluster.replica_mut(follower).start().await?;
        load.goes_on_everywhere().await?;

        cluster.replica_mut(first).stop(Signal::SIGKILL).await?;
        load.goes_on(&others(first)).await?;
        let second = leader(cluster, &others(first)).await?;
        ensure!(second != first, "nobody else leads");
        cluster.replica_mut(first).start().await?;
        let back = load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("kill_9")?;
        println!(
            "  writes through all {} ms after the start",
            back.as_millis()
        );
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn all_killed_at_once_come_back_with_everything() -> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        load.run_for(BETWEEN).await;
        for index in ALL {
            cluster.replica(index).process()?.signal(Signal::SIGKILL)?;
        }
        for index in ALL {
            cluster.replica_mut(index).ended().await?;
        }
        cluster.restart_server().await?;
        let back = load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("all_killed")?;
        println!(
            "  writes through all {} ms after the start",
            back.as_millis()
        );
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn sigstop_of_the_leader_gives_no_stale_read_when_it_goes_on() -> Result<()> {
    scenario(async |cluster| {
        let first = leader(cluster, &ALL).await?;
        let load = load(cluster).await?;
        cluster.replica(first).process()?.signal(Signal::SIGSTOP)?;
        load.goes_on(&others(first)).await?;
        // Meanwhile clients ask the one that stands still: it answers them from its past, or not at all.
        load.run_for(STANDS_STILL).await;
        let second = leader(cluster, &others(first)).await?;
        ensure!(second != first, "nobody else leads");
        cluster.replica(first).process()?.signal(Signal::SIGCONT)?;
        let back = load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("sigstop")?;
        println!("  writes through all {} ms after SIGCONT", back.as_millis());
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}

/// Longest that agents and peers may take to have what was written while a replica was away.
const CONVERGED_SECONDS_MAX: u32 = 30;

#[tokio::test(flavor = "multi_thread")]
async fn agents_and_peers_move_on_whichever_replica_is_killed() -> Result<()> {
    let config = LabConfig {
        replicas: 3,
        nodes_per_cluster: 1,
        agents_per_cluster: 1,
        ..LabConfig::two_by_two()?
    };
    in_lab(config, async |lab| {
        lab.start().await?;
        lab.cluster(0).apply(&workload("web", "web")).await?;
        for index in ALL {
            let killed = lab.cluster_mut(0).replica_mut(index);
            killed.stop(Signal::SIGKILL).await?;
            // Local work goes on, the other cluster hears of it.
            let name = format!("web-{index}");
            until("a workload", || async {
                lab.cluster(0)
                    .apply(&workload(&name, "web"))
                    .await
                    .map(Some)
            })
            .await?;
            let added = lab.cluster(0).node(0).add_pod(NAMESPACE, &name).await;
            added.with_context(|| format!("without the replica at place {index}"))?;
            lab.cluster(0).wait_converged(CONVERGED_SECONDS_MAX).await?;
            until("the other cluster's copy", || async {
                let known = lab.cluster(1).endpoint_count().await?;
                Ok((known > index).then_some(()))
            })
            .await?;
            lab.cluster_mut(0).replica_mut(index).start().await?;
        }
        lab.cluster(1).wait_converged(CONVERGED_SECONDS_MAX).await
    })
    .await
}
