//! What the wire shows of it all, and how fast it is.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::report::Measured;
use super::scene::{PODS, Scene};
use crate::lab::capture::{Capture, PODS_IN_CLEAR, WIREGUARD};
use crate::lab::host::run;
use crate::lab::process::Process;
use crate::scenario::until;

/// Connections from each pod to each other one.
const CONNECTIONS: u32 = 3;
/// How long the stream runs.
const STREAM_SECONDS: &str = "2";
/// Longest that it may take in all.
const STREAM_SECONDS_MAX: u64 = 15;
/// Port of its server.
const STREAM_PORT: &str = "5201";

pub async fn wire(scene: &mut Scene) -> Result<Measured> {
    let clear = Capture::everywhere(&scene.lab, PODS_IN_CLEAR).await?;
    let sealed = Capture::everywhere(&scene.lab, WIREGUARD).await?;
    for (from, ..) in PODS {
        for (to, ..) in PODS.iter().filter(|(to, ..)| *to != from) {
            for v6 in [false, true] {
                let backend = scene.backend(to, v6)?;
                let report = scene.probe(from, &backend, CONNECTIONS).await?;
                ensure!(report["failed"] == 0, "{from} to {to}: {report}");
            }
        }
    }
    if scene.sabotaged() {
        in_clear(scene).await?;
    }
    let (clear, sealed) = (close(clear).await?, close(sealed).await?.len());
    ensure!(
        clear.is_empty(),
        "{} packets in clear, the first: {:?}",
        clear.len(),
        clear.first()
    );
    ensure!(sealed > 0, "no encrypted packet was seen either");
    Ok(Measured::new(
        sealed as f64,
        "encrypted packets seen",
        format!("{sealed} encrypted packets at the nodes' ports, none in clear, IPv4 and IPv6"),
    ))
}

async fn close(captures: Vec<Capture>) -> Result<Vec<String>> {
    let mut packets = Vec::new();
    for capture in captures {
        packets.extend(capture.close().await?);
    }
    Ok(packets)
}

/// A tunnel packet that does not go through WireGuard, from the router.
async fn in_clear(scene: &Scene) -> Result<()> {
    let cluster = scene.lab.cluster(0);
    let (address, _) = cluster.node(0).underlay_addresses();
    let send = format!("echo clear > /dev/udp/{address}/8472");
    let mut command = crate::lab::host::command_in(cluster.router_netns(), None, Path::new("bash"));
    run(command.args(["-c", &send])).await?;
    Ok(())
}

pub async fn throughput(scene: &mut Scene) -> Result<Measured> {
    let (server, client) = (scene.pod("web-a")?, scene.pod("client-a")?);
    let iperf3 = Path::new("iperf3");
    let log = scene.lab.folder().join("iperf3-server.log");
    let mut command = server.command(iperf3);
    command.args(["-s", "-1", "--forceflush", "-p", STREAM_PORT]);
    let serving = Process::start("iperf3", &mut command, &log)?;
    until("iperf3 listens", || async {
        Ok(serving.log_tail().contains("listening").then_some(()))
    })
    .await?;
    // With sabotage, a port at which nobody listens.
    let port = if scene.sabotaged() { "1" } else { STREAM_PORT };
    let mut command = client.command(iperf3);
    command.args(["-c", server.address(false)?, "-p", port, "-J"]);
    let stream = run(command.args(["-t", STREAM_SECONDS]));
    let output = tokio::time::timeout(Duration::from_secs(STREAM_SECONDS_MAX), stream)
        .await
        .context("the stream did not end")??;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let gigabits = bits.with_context(|| format!("{report}"))? / 1e9;
    let node = scene.lab.cluster(0).node(1);
    let status = node.encryption_status().await?;
    let percent = status["encrypted_percent"]
        .as_f64()
        .with_context(|| format!("{status}"))?;
    ensure!(
        percent >= 100.0,
        "only {percent} % of the bytes are encrypted"
    );
    let backend = status["devices"][0]["backend"]
        .as_str()
        .with_context(|| format!("{status}"))?;
    Ok(Measured::new(
        gigabits,
        "Gbit/s",
        format!(
            "{gigabits:.2} Gbit/s across nodes by the {backend} device, {percent:.0} % of all bytes encrypted"
        ),
    ))
}
