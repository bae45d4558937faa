//! Agents and servers die and return under traffic.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::report::Measured;
use super::scene::{NAMESPACE, Scene};
use crate::lab::process::Process;
use crate::lab::store::gone;

/// How long traffic runs without the agent.
const AWAY_MS: u64 = 700;
/// Longest that convergence may take afterwards.
const CONVERGED_SECONDS_MAX: u32 = 20;
/// What a server that was killed must still have: records of both clusters and what was applied.
const KEPT: [&str; 3] = [
    "cilium/",
    "clustermesh.io/workloads/",
    "clustermesh.io/services/",
];

pub async fn agent_terminated(scene: &mut Scene) -> Result<Measured> {
    agent_ended(scene, Signal::SIGTERM).await
}

pub async fn agent_killed(scene: &mut Scene) -> Result<Measured> {
    agent_ended(scene, Signal::SIGKILL).await
}

async fn agent_ended(scene: &mut Scene, signal: Signal) -> Result<Measured> {
    let traffic = Traffic::start(scene).await?;
    let begun = Instant::now();
    scene
        .lab
        .cluster_mut(0)
        .node_mut(0)
        .stop_agent(signal)
        .await?;
    sabotage(scene).await?;
    // What is proved is that traffic runs for a while without an agent.
    tokio::time::sleep(Duration::from_millis(AWAY_MS)).await;
    scene.lab.cluster_mut(0).node_mut(0).start_agent().await?;
    let away = begun.elapsed();
    scene
        .lab
        .cluster(0)
        .wait_converged(CONVERGED_SECONDS_MAX)
        .await?;
    traffic.finish(away).await
}

pub async fn agent_replaced(scene: &mut Scene) -> Result<Measured> {
    let other = other_layout(scene)?;
    let traffic = Traffic::start(scene).await?;
    let begun = Instant::now();
    scene
        .lab
        .cluster_mut(0)
        .node_mut(0)
        .stop_agent(Signal::SIGTERM)
        .await?;
    sabotage(scene).await?;
    scene
        .lab
        .cluster_mut(0)
        .node_mut(0)
        .start_agent_of(&other)
        .await?;
    scene
        .lab
        .cluster(0)
        .wait_converged(CONVERGED_SECONDS_MAX)
        .await?;
    let status = scene.lab.cluster(0).node(0).agent_status().await?;
    let layout = status["map_layout_version"].as_u64().unwrap_or(0);
    // And back again: a downgrade is a change of layout too.
    scene
        .lab
        .cluster_mut(0)
        .node_mut(0)
        .stop_agent(Signal::SIGTERM)
        .await?;
    scene.lab.cluster_mut(0).node_mut(0).start_agent().await?;
    let away = begun.elapsed();
    scene
        .lab
        .cluster(0)
        .wait_converged(CONVERGED_SECONDS_MAX)
        .await?;
    let figures = traffic.finish(away).await?;
    ensure!(
        layout > 1_000_000,
        "the other build reported layout {layout}"
    );
    Ok(Measured {
        text: format!("to layout {layout} and back; {}", figures.text),
        ..figures
    })
}

/// The build with the other layout lies in a folder below the normal one's.
fn other_layout(scene: &Scene) -> Result<std::path::PathBuf> {
    let program = scene
        .lab
        .config()
        .binaries
        .join("layout-next")
        .join("clustermesh-node");
    ensure!(
        program.exists(),
        "{} is not built (make build)",
        program.display()
    );
    Ok(program)
}

/// Removes the programs while the agent is away: what continuity would look like without pins.
async fn sabotage(scene: &Scene) -> Result<()> {
    if scene.sabotaged() {
        let node = scene.lab.cluster(0).node(0);
        let program = node.binaries().join("clustermesh-node");
        crate::lab::host::run(
            node.command(&program)
                .arg("--config")
                .arg(node.folder().join("node.toml"))
                .arg("uninstall"),
        )
        .await?;
    }
    Ok(())
}

pub async fn server_killed(scene: &mut Scene) -> Result<Measured> {
    let before = scene.lab.cluster(0).revision().await?;
    let records = scene.lab.cluster(0).store()?.made(&KEPT).await?;
    let begun = Instant::now();
    scene
        .lab
        .cluster_mut(0)
        .stop_server(Signal::SIGKILL)
        .await?;
    if scene.sabotaged() {
        let data = scene.lab.cluster(0).server_data();
        std::fs::remove_dir_all(&data).with_context(|| data.display().to_string())?;
    }
    scene.lab.cluster_mut(0).restart_server().await?;
    let up_ms = begun.elapsed().as_millis();
    let after = scene.lab.cluster(0).revision().await?;
    ensure!(after >= before, "revision {before} before, {after} after");
    let kept = scene.lab.cluster(0).store()?.made(&KEPT).await?;
    let gone = gone(&records, &kept);
    ensure!(gone.is_empty(), "records lost: {gone:?}");
    // A change that only a resumed watch can bring to every node of both clusters.
    scene
        .lab
        .cluster(0)
        .apply(&format!(
            "apiVersion: clustermesh.io/v1\nkind: Workload\nmetadata:\n  namespace: {NAMESPACE}\n  name: after-restart-a\n  labels:\n    app: after-restart\n"
        ))
        .await?;
    for cluster in scene.lab.clusters() {
        cluster.wait_converged(CONVERGED_SECONDS_MAX).await?;
    }
    let converged_ms = begun.elapsed().as_secs_f64() * 1e3;
    let text = format!(
        "up after {up_ms} ms at revision {after} (≥ {before}), {} records kept, all nodes of both clusters converged after {converged_ms:.0} ms",
        records.len()
    );
    Ok(Measured::new(converged_ms, "ms until converged", text))
}

/// Traffic through one node: established, new through a service, and datagrams both ways.
struct Traffic {
    stream: Process,
    connects: Process,
    datagrams: Process,
}

impl Traffic {
    /// All of it ends or begins on node 1 of cluster a, the one whose agent is touched.
    async fn start(scene: &Scene) -> Result<Self> {
        let backend = scene.backend("web-a", false)?;
        let service = scene.service(0, "pay", false).await?;
        let stream = scene
            .pod("client-b")?
            .start("stream", &["stream", "--to", &backend])
            .await?;
        let connects = scene
            .pod("side-a")?
            .start("connects", &["probe", "--to", &service, "--every-ms", "5"])
            .await?;
        let remote = scene.backend("web-b", false)?;
        let datagrams = scene
            .pod("side-a")?
            .start("datagrams", &["udp", "--to", &remote])
            .await?;
        Ok(Self {
            stream,
            connects,
            datagrams,
        })
    }

    async fn finish(self, away: Duration) -> Result<Measured> {
        let stream: Value = self.stream.finish().await?;
        let connects: Value = self.connects.finish().await?;
        let datagrams: Value = self.datagrams.finish().await?;
        let echoed = stream["echoed"].as_u64().unwrap_or(0);
        ensure!(stream["broken"] == false && echoed > 0, "stream: {stream}");
        ensure!(
            connects["failed"] == 0 && connects["ok"].as_u64().unwrap_or(0) > 0,
            "connects: {connects}"
        );
        let lost = datagrams["lost"].as_f64();
        let lost = lost.with_context(|| format!("no count of lost datagrams: {datagrams}"))?;
        let text = format!(
            "agent away {} ms: 0 resets, 0 of {} connects failed, {lost} of {} datagrams lost, longest echo {:.0} ms",
            away.as_millis(),
            connects["attempts"],
            datagrams["sent"],
            stream["echo_ms_max"].as_f64().unwrap_or_default()
        );
        Ok(Measured::new(lost, "datagrams lost", text))
    }
}
