//! The link between the clusters is cut, and heals.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::report::Measured;
use super::scene::{NAMESPACE, Scene};
use crate::lab::process::Process;
use crate::lab::store::{Made, gone};

/// Connections made to the affinity=none service during the cut.
const CONNECTIONS: u32 = 20;
/// Longest that convergence may take after the link heals.
const CONVERGED_SECONDS_MAX: u32 = 20;

pub async fn cut(scene: &mut Scene) -> Result<Measured> {
    let before = records(scene).await?;
    let inside = start_probe(scene, "client-a", &scene.backend("web-a", false)?, "inside").await?;
    let local = start_probe(
        scene,
        "client-a",
        &scene.service(0, "pay", false).await?,
        "local",
    )
    .await?;
    scene.lab.wan().cut();
    if scene.sabotaged() {
        scene.stop_server("web-a", Signal::SIGKILL).await?;
    }
    let to = scene.service(0, "cart", false).await?;
    let everywhere = scene
        .pod("client-a")?
        .traffic(&[
            "probe",
            "--to",
            &to,
            "--attempts",
            &CONNECTIONS.to_string(),
            "--every-ms",
            "2",
            "--timeout-ms",
            "300",
        ])
        .await?;
    // Changes made during the cut are what healing must bring over.
    scene
        .lab
        .cluster(0)
        .apply(&format!(
            "apiVersion: clustermesh.io/v1\nkind: Workload\nmetadata:\n  namespace: {NAMESPACE}\n  name: late-a\n  labels:\n    app: late\n"
        ))
        .await?;
    let inside = inside.finish().await?;
    let local = local.finish().await?;
    if scene.sabotaged() {
        scene.start_server("web-a").await?;
    }
    for (what, report) in [("inside cluster a", &inside), ("affinity=local", &local)] {
        ensure!(
            report["failed"] == 0 && report["ok"].as_u64().unwrap_or(0) > 0,
            "{what}: {report}"
        );
    }
    let after = records(scene).await?;
    let mut kept = 0;
    for (before, after) in before.iter().zip(&after) {
        let gone = gone(before, after);
        ensure!(gone.is_empty(), "records deleted during the cut: {gone:?}");
        kept += before.len();
    }
    let failed = everywhere["failed"].as_f64();
    let failed = failed.with_context(|| format!("no count of failures: {everywhere}"))?;
    let failed = failed * 100.0 / f64::from(CONNECTIONS);
    Ok(Measured::new(
        failed,
        "% failed, affinity=none",
        format!(
            "{} and {} connects, none failed; {kept} records kept; affinity=none failed {failed} %",
            inside["ok"], local["ok"]
        ),
    ))
}

pub async fn healed(scene: &mut Scene) -> Result<Measured> {
    // With sabotage the link stays cut while the row looks.
    if !scene.sabotaged() {
        scene.lab.wan().heal();
    }
    let begun = Instant::now();
    let seconds_max = if scene.sabotaged() {
        2
    } else {
        CONVERGED_SECONDS_MAX
    };
    let mut result = Ok(());
    for cluster in scene.lab.clusters() {
        result = cluster.wait_converged(seconds_max).await;
        if result.is_err() {
            break;
        }
    }
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    scene.lab.wan().heal();
    result?;
    // The identity was made during the cut, in cluster a.
    let identity = scene.lab.cluster(1).identity_labelled("app=late").await?;
    Ok(Measured::new(
        ms,
        "ms until converged",
        format!("converged {ms:.0} ms after healing, with identity {identity} made during the cut"),
    ))
}

/// What each cluster's store holds, own records and copies.
async fn records(scene: &Scene) -> Result<Vec<Made>> {
    let mut records = Vec::new();
    for cluster in scene.lab.clusters() {
        records.push(cluster.store()?.made(&["cilium/"]).await?);
    }
    Ok(records)
}

async fn start_probe(scene: &Scene, pod: &str, to: &str, label: &str) -> Result<Process> {
    scene
        .pod(pod)?
        .start(label, &["probe", "--to", to, "--every-ms", "5"])
        .await
}
