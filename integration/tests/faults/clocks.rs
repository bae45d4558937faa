//! Clocks that jump: the wall clock under running replicas, the monotonic one from one start to the next.

use std::time::Duration;

use anyhow::{Result, ensure};
use clustermesh_integration::lab::clock::WallClock;
use nix::sys::signal::Signal;

use crate::support::{ALL, GAP_MAX, in_lab, leader, load, other, scenario, scenario_config};

/// Half an hour: certificates of the lab are valid since an hour.
const STEP_SECONDS: i64 = 1_800;
/// Longer than the test, shorter than a jump.
const LEASE_SECONDS: i64 = 600;
/// Load between two jumps.
const BETWEEN: Duration = Duration::from_millis(1_500);

/// How far the wall clock of a replica is ahead by the time in its newest log line, seconds.
fn ahead_by_log(log: &str) -> Option<i64> {
    // 2026-01-31T12:34:56.789012Z: the minutes and hours are enough to see half an hour.
    let time = |text: &str| {
        let clock = text.split_once('T')?.1;
        let mut parts = clock.split([':', '.']);
        let mut next = || parts.next()?.parse::<i64>().ok();
        Some((next()? * 60 + next()?) * 60 + next()?)
    };
    let last = log.lines().rev().find_map(time)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = i64::try_from(now.ok()?.as_secs()).ok()? % 86_400;
    // The day may have ended in between.
    Some((last - now + 43_200).rem_euclid(86_400) - 43_200)
}

#[tokio::test(flavor = "multi_thread")]
async fn clock_jumps_of_half_an_hour_forth_and_back_change_nothing() -> Result<()> {
    in_lab(scenario_config()?, async |lab| {
        let mut clocks = Vec::new();
        for index in ALL {
            let clock = WallClock::new(lab.folder(), &format!("r{index}")).await?;
            clock.give_to(lab.cluster_mut(0).replica_mut(index));
            clocks.push(clock);
        }
        lab.start().await?;
        let cluster = lab.cluster_mut(0);
        let load = load(cluster).await?;
        cluster.store()?.put_leased("kept", LEASE_SECONDS).await?;
        for (ahead, who) in [
            (STEP_SECONDS, leader(cluster, &ALL).await?),
            (-STEP_SECONDS, other(leader(cluster, &ALL).await?)),
        ] {
            clocks[who].set_ahead_seconds(ahead)?;
            load.run_for(BETWEEN).await;
            load.goes_on_everywhere().await?;
        }
        // A leader whose clock is ahead hands over to one whose clock is behind, and one says so in its log.
        let first = leader(cluster, &ALL).await?;
        clocks[first].set_ahead_seconds(STEP_SECONDS)?;
        cluster.replica_mut(first).stop(Signal::SIGTERM).await?;
        cluster.replica_mut(first).start().await?;
        let log = cluster.replica(first).log_text()?;
        let ahead = ahead_by_log(&log).unwrap_or(0);
        ensure!(
            (STEP_SECONDS - 120..=STEP_SECONDS).contains(&ahead),
            "the clock was to be {STEP_SECONDS} s ahead, by the log it is {ahead} s"
        );
        load.goes_on_everywhere().await?;
        for clock in &clocks {
            clock.set_ahead_seconds(0)?;
        }
        load.goes_on_everywhere().await?;
        ensure!(
            cluster.store()?.get("kept").await?.is_some(),
            "a lease of ten minutes ended with a jump of the wall clock"
        );
        let verdict = load.finish(cluster).await?;
        verdict.check("clock_jump")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn clock_of_a_replica_that_is_a_day_ahead_of_the_others_since_boot_changes_nothing()
-> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        // A time namespace (time_namespaces(7)) shifts the monotonic clock and that since boot; the wall clock cannot be.
        let day = ["unshare", "--time", "--monotonic", "86400", "--boottime", "86400", "--"];
        for _ in 0..2 {
            // The second time the one that leads now: it may be the shifted one.
            let shifted = leader(cluster, &ALL).await?;
            cluster.replica_mut(shifted).stop(Signal::SIGTERM).await?;
            cluster.replica_mut(shifted).set_wrapper(&day);
            cluster.replica_mut(shifted).start().await?;
            let pid = cluster.replica(shifted).process()?.pid();
            let own = std::fs::read_link("/proc/self/ns/time")?;
            ensure!(
                std::fs::read_link(format!("/proc/{pid}/ns/time"))? != own,
                "the replica has the machine's clock (a kernel before 6.3 changes it only for children)"
            );
            load.goes_on_everywhere().await?;
        }
        let verdict = load.finish(cluster).await?;
        verdict.check("monotonic_clock")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}
