//! Who reaches whom: host, same node, other node, other cluster.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::report::Measured;
use super::scene::Scene;
use crate::lab::host::run;
use crate::lab::pod::parse_ping_micros;

/// Connections of one TCP check.
const CONNECTIONS: u32 = 20;

pub async fn host_to_pod(scene: &mut Scene) -> Result<Measured> {
    let mut figures = Vec::new();
    for v6 in [false, true] {
        let address = target(scene, "web-a", v6)?;
        let node = scene.lab.cluster(0).node(0);
        let output = run(node
            .command(Path::new("ping"))
            .args(["-n", "-c", "3", "-i", "0.01", "-W", "2", &address]))
        .await?;
        let ping = parse_ping_micros(&String::from_utf8_lossy(&output.stdout))?;
        let tool = node.binaries().join("clustermesh-lab-traffic");
        let to = scene.backend("web-a", v6)?;
        let output = run(node.command(&tool).args([
            "probe",
            "--to",
            &to,
            "--attempts",
            &CONNECTIONS.to_string(),
            "--every-ms",
            "2",
        ]))
        .await?;
        let report = serde_json::from_slice(&output.stdout)?;
        figures.push((v6, ping, connect_micros(&report, "web-a")?));
    }
    Ok(measured(&figures))
}

pub async fn same_node(scene: &mut Scene) -> Result<Measured> {
    pair(scene, "side-a", "web-a").await
}

pub async fn across_nodes(scene: &mut Scene) -> Result<Measured> {
    pair(scene, "client-a", "web-a").await
}

pub async fn across_clusters(scene: &mut Scene) -> Result<Measured> {
    pair(scene, "client-a", "web-b").await
}

async fn pair(scene: &Scene, from: &str, to: &str) -> Result<Measured> {
    let mut figures = Vec::new();
    for v6 in [false, true] {
        let ping = scene.pod(from)?.ping(&target(scene, to, v6)?).await?;
        let report = scene
            .probe(from, &scene.backend(to, v6)?, CONNECTIONS)
            .await?;
        figures.push((v6, ping, connect_micros(&report, to)?));
    }
    Ok(measured(&figures))
}

/// The pod's address, or with sabotage one beside it that no pod has.
fn target(scene: &Scene, pod: &str, v6: bool) -> Result<String> {
    let address = scene.pod(pod)?.address(v6)?;
    if !scene.sabotaged() {
        return Ok(address.to_owned());
    }
    let cut = address
        .rfind([':', '.'])
        .context("an address has separators")?;
    Ok(format!("{}{}", &address[..=cut], 99))
}

/// The median connect, where all of them reached the pod of that name.
fn connect_micros(report: &serde_json::Value, name: &str) -> Result<f64> {
    ensure!(
        report["failed"] == 0 && report["by_name"][name] == CONNECTIONS,
        "TCP to {name}: {report}"
    );
    report["p50_us"]
        .as_f64()
        .with_context(|| format!("TCP to {name} without a median: {report}"))
}

/// Of IPv4 and IPv6: ping and connect, microseconds.
fn measured(figures: &[(bool, f64, f64)]) -> Measured {
    let texts: Vec<String> = figures
        .iter()
        .map(|(v6, ping, connect)| {
            let version = if *v6 { 6 } else { 4 };
            format!("IPv{version} ping {ping:.0} µs, connect {connect:.0} µs")
        })
        .collect();
    let slowest = figures.iter().map(|figure| figure.2).fold(0.0, f64::max);
    Measured::new(slowest, "µs per connect", texts.join("; "))
}
