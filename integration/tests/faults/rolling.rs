//! Planned stops under load: one replica after the other is started again, or replaced by another build.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clustermesh_integration::lab::host::run;
use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::support::{ALL, GAP_MAX, in_lab, leader, load, others, scenario, scenario_config};

/// Load between two restarts.
const BETWEEN: Duration = Duration::from_millis(500);
/// A build from nothing, on a machine that is shared.
const BUILD_SECONDS_MAX: u64 = 1_800;

/// The server of an older commit; `make setup` has built it.
async fn older_server() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("older/build.sh");
    let building = Command::new(&script).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(BUILD_SECONDS_MAX), building)
        .await
        .with_context(|| format!("{} takes too long", script.display()))??;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", script.display());
    let path = String::from_utf8(output.stdout)?;
    Ok(PathBuf::from(path.trim()))
}

#[tokio::test(flavor = "multi_thread")]
async fn rolling_restart_hands_over_and_loses_nothing() -> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        // The leader too, at least once: first.
        let first = leader(cluster, &ALL).await?;
        for index in [vec![first], others(first)].concat() {
            let led = leader(cluster, &ALL).await?;
            cluster.replica_mut(index).stop(Signal::SIGTERM).await?;
            let rest = others(index);
            if led == index {
                let log = cluster.replica(index).log_text()?;
                ensure!(
                    leader(cluster, &rest).await? != index,
                    "nobody took over: {log}"
                );
            }
            load.goes_on(&rest).await?;
            cluster.replica_mut(index).start().await?;
            load.goes_on_everywhere().await?;
            load.run_for(BETWEEN).await;
        }
        let verdict = load.finish(cluster).await?;
        verdict.check("rolling_restart")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn rolling_upgrade_from_an_older_build_loses_nothing() -> Result<()> {
    let older = older_server().await?;
    in_lab(scenario_config()?, async |lab| {
        let newer = lab.config().binaries.join("clustermesh-server");
        let cluster = lab.cluster_mut(0);
        for index in ALL {
            cluster.replica_mut(index).set_program(&older);
        }
        lab.start().await?;
        let cluster = lab.cluster_mut(0);
        run(Command::new(&newer).arg("--version")).await?;
        let load = load(cluster).await?;
        for index in ALL {
            cluster.replica_mut(index).stop(Signal::SIGTERM).await?;
            cluster.replica_mut(index).set_program(&newer);
            cluster.replica_mut(index).start().await?;
            let runs = std::fs::read_link(format!(
                "/proc/{}/exe",
                cluster.replica(index).process()?.pid()
            ))?;
            ensure!(runs == newer, "{} runs", runs.display());
            load.goes_on_everywhere().await?;
            load.run_for(BETWEEN).await;
        }
        // And what the new ones write is read by the new ones after another start.
        let led = leader(cluster, &ALL).await?;
        cluster.replica_mut(led).stop(Signal::SIGTERM).await?;
        cluster.replica_mut(led).start().await?;
        load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("rolling_upgrade")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}
