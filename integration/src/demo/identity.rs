//! Who sent a packet, by the receiver's own record; lies are dropped and counted.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::report::Measured;
use super::scene::{NAMESPACE, Scene};
use crate::lab::host::run;

/// Forged packets sent in one check.
const FORGED_PACKETS: u64 = 10;
/// Packets that a pod sends from the address of another.
const STOLEN_PACKETS: u64 = 3;
/// Through which a node reaches the others.
const WIREGUARD_DEVICE: &str = "cm_wg0";
/// What the rows of forged packets count.
const UNIT: &str = "packets dropped and counted";
/// How long a record may take to be read.
const RECORD_SECONDS_MAX: u64 = 5;

pub async fn sender(scene: &mut Scene) -> Result<Measured> {
    let sender = if scene.sabotaged() {
        "side-a"
    } else {
        "client-a"
    };
    let expected = scene
        .lab
        .cluster(0)
        .workload_identity(NAMESPACE, "client-a")
        .await?;
    let source = scene.pod(sender)?.address(false)?.to_owned();
    let destination = scene.pod("web-b")?.address(false)?.to_owned();
    let receiver = scene.lab.cluster(1).node(0);
    let mut command = receiver.command(&receiver.binaries().join("clustermesh-node"));
    let mut flows = command
        .args(["--config"])
        .arg(receiver.folder().join("node.toml"))
        .arg("flows")
        .stdout(Stdio::piped())
        .spawn()
        .context("clustermesh-node flows")?;
    let lines = flows.stdout.take().context("no output")?;
    let mut lines = BufReader::new(lines).lines();
    let record = async {
        // Pings go on until a record of one has come: the reader may start late.
        loop {
            tokio::select! {
                line = lines.next_line() => {
                    let Some(line) = line? else { bail!("flows ended") };
                    let record: Value = serde_json::from_str(&line)?;
                    if record["source"] == source.as_str()
                        && record["destination"] == destination.as_str()
                        && record["hook"] == "from-wireguard"
                    {
                        return Ok(record);
                    }
                }
                pinged = scene.pod(sender)?.ping(&destination) => { pinged?; }
            }
        }
    };
    let record = tokio::time::timeout(Duration::from_secs(RECORD_SECONDS_MAX), record)
        .await
        .context("no flow record of the ping")??;
    flows.kill().await?;
    let recorded = record["source_identity"].as_u64().unwrap_or_default();
    ensure!(
        recorded == expected,
        "the record names {recorded}, the store {expected}: {record}"
    );
    Ok(Measured::statement(format!(
        "{source} → {destination} recorded as {recorded}, as cluster a's store says"
    )))
}

pub async fn forged_vni(scene: &mut Scene) -> Result<Measured> {
    // An identity of cluster b, from a node of cluster a.
    let theirs = scene
        .lab
        .cluster(1)
        .workload_identity(NAMESPACE, "client-b")
        .await?;
    let own = scene
        .lab
        .cluster(0)
        .workload_identity(NAMESPACE, "web-a")
        .await?;
    let identity = if scene.sabotaged() { own } else { theirs };
    let source = scene.pod("web-a")?.address(false)?.to_owned();
    let reason = "tunnel-forged-identity";
    let counted = forge(scene, identity, &source, reason).await?;
    let text = format!("{counted} of {FORGED_PACKETS} counted as {reason}");
    Ok(Measured::new(counted as f64, UNIT, text))
}

pub async fn forged_source(scene: &mut Scene) -> Result<Measured> {
    let identity = scene
        .lab
        .cluster(0)
        .workload_identity(NAMESPACE, "web-a")
        .await?;
    // A pod of another node than the one that sends; with sabotage, its own.
    let liar = if scene.sabotaged() {
        "web-a"
    } else {
        "client-a"
    };
    let source = scene.pod(liar)?.address(false)?.to_owned();
    let tunnel = forge(scene, identity, &source, "tunnel-forged-source").await?;
    let pod = forged_at_the_pod(scene).await?;
    let text = format!(
        "tunnel: {tunnel} of {FORGED_PACKETS} counted as tunnel-forged-source; \
         pod: {pod} of {STOLEN_PACKETS} counted as source-not-own"
    );
    Ok(Measured::new((tunnel + pod) as f64, UNIT, text))
}

/// Sends lying tunnel packets from node 1 of cluster a to node 1 of cluster b, encrypted like honest ones.
async fn forge(scene: &Scene, identity: u64, source: &str, reason: &str) -> Result<u64> {
    let sender = scene.lab.cluster(0).node(0);
    let receiver = scene.lab.cluster(1).node(0);
    let destination = scene.pod("web-b")?.address(false)?;
    let before = receiver.drops(reason).await?;
    let to = format!("{}:8472", receiver.underlay_addresses().0);
    let from = sender.underlay_addresses().0.to_string();
    let tool = sender.binaries().join("clustermesh-lab-traffic");
    run(sender.command(&tool).args([
        "forge",
        "--from",
        &from,
        "--device",
        WIREGUARD_DEVICE,
        "--to",
        &to,
        "--identity",
        &identity.to_string(),
        "--inner-source",
        source,
        "--inner-destination",
        destination,
        "--count",
        &FORGED_PACKETS.to_string(),
    ]))
    .await?;
    // The WAN is a task of the lab: a ping through it tells that what went before has arrived.
    scene.pod("side-a")?.ping(destination).await?;
    let counted = receiver.drops(reason).await? - before;
    ensure!(
        counted == FORGED_PACKETS,
        "{FORGED_PACKETS} sent, {counted} counted as {reason}"
    );
    Ok(counted)
}

/// A pod that sends from an address that is not its own.
async fn forged_at_the_pod(scene: &Scene) -> Result<u64> {
    let node = scene.lab.cluster(0).node(0);
    let pod = scene.pod("side-a")?;
    let stolen = scene.pod("client-b")?.address(false)?;
    let ip = std::path::Path::new("ip");
    let cidr = format!("{stolen}/32");
    run(pod.command(ip).args(["addr", "add", &cidr, "dev", "eth0"])).await?;
    let before = node.drops("source-not-own").await?;
    let to = scene.pod("web-a")?.address(false)?;
    let answered = run(pod
        .command(std::path::Path::new("ping"))
        .args(["-n", "-i", "0.01", "-W", "1", "-I", stolen])
        .args(["-c", &STOLEN_PACKETS.to_string(), to]))
    .await;
    run(pod.command(ip).args(["addr", "del", &cidr, "dev", "eth0"])).await?;
    ensure!(
        answered.is_err(),
        "a ping from a stolen address was answered"
    );
    let counted = node.drops("source-not-own").await? - before;
    ensure!(
        counted == STOLEN_PACKETS,
        "{STOLEN_PACKETS} sent, {counted} counted as source-not-own"
    );
    Ok(counted)
}
