//! Disks that are full, fail or are slow, under one replica: it stops with a reason or waits, the others go on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clustermesh_integration::lab::LabConfig;
use clustermesh_integration::lab::cluster::Cluster;
use clustermesh_power::mount::{Faults, PowerDisk};

use crate::support::{ALL, GAP_MAX, in_lab, leader, load, logged, others, scenario_config};

/// Room that is left before the disk is full: less than sled takes next.
const ROOM_BYTES: u64 = 64 << 10;
/// Values that fill it.
const FILLER_BYTES: usize = 200_000;
/// Most of them.
const FILLERS_MAX: usize = 200;
/// What a slow disk takes for every sync: longer than an election timeout.
const SLOW_SYNC: Duration = Duration::from_millis(1_500);
/// How long it is slow.
const SLOW: Duration = Duration::from_secs(5);

/// A group whose replicas all have such a disk each: any may lead.
async fn on_disks(body: impl AsyncFnOnce(&mut Cluster, &[PowerDisk]) -> Result<()>) -> Result<()> {
    let config: LabConfig = scenario_config()?;
    in_lab(config, async |lab| {
        let mut disks = Vec::new();
        for replica in lab.cluster(0).replicas() {
            let folder = replica.data();
            std::fs::create_dir_all(&folder)?;
            let disk = PowerDisk::mount(&folder)
                .with_context(|| format!("a disk at {}", folder.display()))?;
            disks.push(disk);
        }
        lab.start().await?;
        let result = body(lab.cluster_mut(0), &disks).await;
        // Nobody must wait for a disk that is gone.
        for disk in &disks {
            disk.set_faults(Faults::default());
        }
        for index in ALL {
            let replica = lab.cluster_mut(0).replica_mut(index);
            if replica.is_started() {
                let stopped = replica.stop(nix::sys::signal::Signal::SIGKILL).await;
                if result.is_ok() {
                    stopped?;
                }
            }
        }
        result
    })
    .await
}

/// The replica ends by itself and its log says which file, why and what to do.
async fn ends_with_a_reason(cluster: &mut Cluster, replica: usize, reason: &str) -> Result<()> {
    let status = cluster.replica_mut(replica).ended().await?;
    ensure!(
        !status.success(),
        "a replica without a disk ended with {status}"
    );
    let data = cluster.replica(replica).data().display().to_string();
    let line = logged(cluster, replica, &["ERROR", &data, reason]).await?;
    ensure!(
        line.contains("start the server again"),
        "no remedy is told: {line}"
    );
    println!("  {line}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_the_leader_with_a_reason_until_there_is_room() -> Result<()> {
    on_disks(async |cluster, disks| {
        let load = load(cluster).await?;
        let full = leader(cluster, &ALL).await?;
        disks[full].set_capacity_bytes(disks[full].used_bytes() + ROOM_BYTES);
        // The group takes them whoever leads.
        for number in 0..FILLERS_MAX {
            let filler = vec![b'x'; FILLER_BYTES];
            // The one that is asked may be the one that ends now.
            let _unknown = cluster
                .store()?
                .put(&format!("filler/{number}"), filler)
                .await;
            if cluster.replica_mut(full).has_ended()? {
                break;
            }
        }
        ends_with_a_reason(cluster, full, "No space left on device").await?;
        load.goes_on(&others(full)).await?;
        // Started again without room it says the same, or waits for the group; it never acknowledges what it has not.
        disks[full].set_capacity_bytes(u64::MAX);
        cluster.replica_mut(full).start().await?;
        let back = load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("full_disk")?;
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
async fn a_disk_that_fails_syncs_or_writes_stops_its_replica_with_a_reason() -> Result<()> {
    on_disks(async |cluster, disks| {
        let load = load(cluster).await?;
        for faults in [
            Faults {
                sync_fails: true,
                ..Faults::default()
            },
            Faults {
                write_fails: true,
                ..Faults::default()
            },
        ] {
            let failing = leader(cluster, &ALL).await?;
            disks[failing].set_faults(faults);
            ends_with_a_reason(cluster, failing, "Input/output error").await?;
            load.goes_on(&others(failing)).await?;
            disks[failing].set_faults(Faults::default());
            cluster.replica_mut(failing).start().await?;
            load.goes_on_everywhere().await?;
        }
        let verdict = load.finish(cluster).await?;
        verdict.check("failing_disk")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_disk_of_the_leader_or_a_follower_stops_nobody_for_long() -> Result<()> {
    on_disks(async |cluster, disks| {
        let load = load(cluster).await?;
        let slow = Faults {
            sync_delay: SLOW_SYNC,
            ..Faults::default()
        };
        let acknowledged = || {
            ALL.into_iter()
                .map(|index| load.acknowledged_by(index))
                .sum::<u64>()
        };
        let first = leader(cluster, &ALL).await?;
        let before = acknowledged();
        disks[first].set_faults(slow);
        load.run_for(SLOW).await;
        println!(
            "  under a slow leader: {} writes in {SLOW:?}",
            acknowledged() - before
        );
        load.goes_on(&others(first)).await?;
        disks[first].set_faults(Faults::default());
        load.goes_on_everywhere().await?;
        let second = others(leader(cluster, &ALL).await?)[0];
        let before = acknowledged();
        disks[second].set_faults(slow);
        load.run_for(SLOW).await;
        println!(
            "  with a slow follower: {} writes in {SLOW:?}",
            acknowledged() - before
        );
        load.goes_on(&others(second)).await?;
        disks[second].set_faults(Faults::default());
        let back = load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("slow_disk")?;
        println!("  writes through all {} ms after the end", back.as_millis());
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}
