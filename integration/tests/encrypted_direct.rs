//! Direct routing under WireGuard: nothing in clear, identities by the source, and who may send from it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use clustermesh_integration::lab::capture::{Capture, PODS_IN_CLEAR, WIREGUARD};
use clustermesh_integration::lab::host::run;
use clustermesh_integration::lab::node::Node;
use clustermesh_integration::lab::pod::Pod;
use clustermesh_integration::lab::{Lab, LabConfig, RoutingMode};
use clustermesh_integration::scenario::encrypted::nothing_in_clear;
use clustermesh_integration::scenario::{NAMESPACE, until, workload};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// Longest wait for a flow record.
const RECORD_SECONDS_MAX: u64 = 30;

/// The first flow record of a packet from one pod to another on `node`, while pings go on.
async fn record_of(node: &Node, from: &Pod, to: &Pod, v6: bool) -> Value {
    let mut command = node.command(&node.binaries().join("clustermesh-node"));
    let mut flows = command
        .arg("--config")
        .arg(node.folder().join("node.toml"))
        .arg("flows")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(flows.stdout.take().unwrap()).lines();
    let (source, target) = (from.address(v6).unwrap(), to.address(v6).unwrap());
    let record = async {
        loop {
            tokio::select! {
                line = lines.next_line() => {
                    let record: Value = serde_json::from_str(&line.unwrap().unwrap()).unwrap();
                    if record["source"] == source && record["destination"] == target {
                        return record;
                    }
                }
                pinged = from.ping(target) => drop(pinged.unwrap()),
            }
        }
    };
    let limit = Duration::from_secs(RECORD_SECONDS_MAX);
    let record = tokio::time::timeout(limit, record).await.unwrap();
    flows.kill().await.unwrap();
    record
}

fn not_allowed(status: &Value) -> u64 {
    let counters = &status["devices"][0]["counters"];
    counters["wrong_source"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_routing_is_encrypted_and_a_source_is_vouched_for_by_its_nodes_key() {
    let config = LabConfig {
        routing_mode: RoutingMode::Direct,
        encryption: "mode = \"all\"\nstrict = true",
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.start().await.unwrap();
    let clear = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    let mut pods = Vec::new();
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            let name = format!("{}-{}", cluster.name(), node.name());
            cluster.apply(&workload(&name, "web")).await.unwrap();
            let status = until("three nodes reached encrypted", || async {
                let status = node.encryption_status().await?;
                let peers = status["peers"].as_array().cloned().unwrap_or_default();
                let encrypted = peers.iter().filter(|peer| peer["traffic"] == "encrypted");
                Ok((encrypted.count() == 3).then_some(peers))
            });
            // With every key come the pods' ranges of its node, of both families, beside its own addresses.
            for peer in status.await.unwrap() {
                let of = |cluster: &&clustermesh_integration::lab::cluster::Cluster| {
                    peer["cluster"] == cluster.name()
                };
                let cluster = lab.clusters().iter().find(of).unwrap();
                let node = cluster
                    .nodes()
                    .iter()
                    .find(|node| peer["node"] == node.name());
                let allowed = peer["allowed_ips"].as_array().unwrap();
                for cidr in node.unwrap().pod_cidrs().await.unwrap() {
                    assert!(allowed.iter().any(|held| *held == cidr), "{cidr}: {peer}");
                }
            }
            pods.push(node.add_pod(NAMESPACE, &name).await.unwrap());
        }
    }
    for cluster in lab.clusters() {
        cluster.wait_converged(30).await.unwrap();
    }
    let sealed = Capture::everywhere(&lab, WIREGUARD).await.unwrap();
    for from in &pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            for v6 in [false, true] {
                from.ping(to.address(v6).unwrap()).await.unwrap();
            }
        }
    }
    for tap in sealed {
        assert!(!tap.close().await.unwrap().is_empty(), "nothing is sealed");
    }
    // The identity does not travel: the receiver has it from its own records.
    let receiver = lab.cluster(1).node(0);
    let to = &pods[2];
    for (place, from) in pods.iter().enumerate().take(2) {
        let identity = lab.cluster(0).workload_identity(NAMESPACE, from.name());
        let identity = identity.await.unwrap();
        for v6 in [false, true] {
            let record = record_of(receiver, from, to, v6).await;
            assert_eq!(record["source_identity"], identity, "{place}: {record}");
            assert_eq!(record["verdict"], "forwarded:direct-in", "{record}");
            assert_eq!(record["hook"], "from-wireguard", "{record}");
        }
    }
    // The first node sends from the address of a pod of the second one: its key does not vouch for that.
    let liar = lab.cluster(0).node(0);
    for v6 in [false, true] {
        let (stolen, target) = (pods[1].address(v6).unwrap(), to.address(v6).unwrap());
        let bits = if v6 { 128 } else { 32 };
        let (own, there) = (format!("{stolen}/{bits}"), format!("{target}/{bits}"));
        let before = not_allowed(&receiver.encryption_status().await.unwrap());
        let ip = Path::new("ip");
        run(liar.command(ip).args(["addr", "add", &own, "dev", "lo"]))
            .await
            .unwrap();
        run(liar
            .command(ip)
            .args(["route", "add", &there, "dev", "cm_wg0"]))
        .await
        .unwrap();
        let mut ping = liar.command(Path::new("ping"));
        ping.args([
            "-n", "-c", "3", "-i", "0.05", "-W", "1", "-I", stolen, target,
        ]);
        let answered = run(&mut ping).await;
        run(liar
            .command(ip)
            .args(["route", "del", &there, "dev", "cm_wg0"]))
        .await
        .unwrap();
        run(liar.command(ip).args(["addr", "del", &own, "dev", "lo"]))
            .await
            .unwrap();
        assert!(answered.is_err(), "a stolen address is answered");
        until("three refused packets", || async {
            let now = not_allowed(&receiver.encryption_status().await?);
            Ok((now >= before + 3).then_some(()))
        })
        .await
        .unwrap();
        pods[1].ping(target).await.unwrap();
    }
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            let status = node.encryption_status().await.unwrap();
            assert_eq!(status["encrypted_percent"], 100.0, "{status}");
        }
    }
    nothing_in_clear(clear).await.unwrap();
    assert_eq!(lab.remove().await, Vec::<String>::new());
}
