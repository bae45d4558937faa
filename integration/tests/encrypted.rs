//! Encryption between nodes, judged on the wire: what the routers' ports see, and what connections notice.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clustermesh_integration::lab::cluster::Cluster;
use clustermesh_integration::lab::host::{command_in, run};
use clustermesh_integration::lab::node::Node;
use clustermesh_integration::lab::pod::Pod;
use clustermesh_integration::lab::process::Process;
use clustermesh_integration::lab::{Lab, LabConfig};
use clustermesh_integration::scenario::{NAMESPACE, until, workload};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Longest that convergence may take.
const CONVERGED_SECONDS_MAX: u32 = 30;
/// Port of the pods' servers.
const PORT: u16 = 8080;
/// Longest that one echo may take, milliseconds: far less than a connection that broke.
const ECHO_MS_MAX: f64 = 5_000.0;
/// Everything in clear that has to do with pods: tunnel packets, and their addresses.
const CLEAR: &str =
    "udp port 8472 or net 10.1.0.0/16 or net 10.2.0.0/16 or net fd0c:1::/48 or net fd0c:2::/48";

/// Port of the packet that ends a capture; the filter takes it.
const LAST_PORT: u16 = 8472;

/// A capture at a router's port of a node.
struct Tap {
    process: Process,
    file: PathBuf,
    place: String,
    node_netns: String,
    router_address: String,
}

impl Tap {
    async fn open(lab: &Lab, cluster: &Cluster, node: &Node, filter: &str) -> Self {
        let (router, port) = (cluster.router_netns(), node.name());
        let place = format!("{}-{port}", cluster.name());
        let file = lab.folder().join(format!("{place}.pcap"));
        let mut command = command_in(router, None, Path::new("tcpdump"));
        command
            .args(["-Z", "root", "-n", "-U", "-s", "128", "-i", port])
            // Otherwise the last second is never written.
            .args(["--immediate-mode", "-w"])
            .arg(&file)
            .arg(filter);
        let log = lab.folder().join(format!("{place}-tcpdump.log"));
        let process = Process::start("tcpdump", &mut command, &log).unwrap();
        until("tcpdump listens", || async {
            Ok(process.log_tail().contains("listening on").then_some(()))
        })
        .await
        .unwrap();
        Self {
            process,
            file,
            place,
            node_netns: node.netns().to_owned(),
            router_address: format!("172.30.{}.1", cluster.id()),
        }
    }

    /// On every node's port.
    async fn everywhere(lab: &Lab, filter: &str) -> Vec<Self> {
        let mut taps = Vec::new();
        for cluster in lab.clusters() {
            for node in cluster.nodes() {
                taps.push(Self::open(lab, cluster, node, filter).await);
            }
        }
        taps
    }

    /// The packets, one line each. A last one that the filter takes shows that all before it have been looked at.
    async fn close(self) -> Vec<String> {
        let end = format!("{}.{LAST_PORT}", self.router_address);
        let send = format!("echo end > /dev/udp/{}/{LAST_PORT}", self.router_address);
        let packets = until("the last packet", || async {
            let mut command = command_in(&self.node_netns, None, Path::new("bash"));
            run(command.args(["-c", &send])).await?;
            let mut command = tokio::process::Command::new("tcpdump");
            let output = run(command.args(["-n", "-r"]).arg(&self.file)).await?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            Ok(lines
                .iter()
                .any(|line| line.contains(&end))
                .then_some(lines))
        });
        let packets = packets.await.unwrap();
        self.process.stop(Signal::SIGINT).await.unwrap();
        let others = packets.into_iter().filter(|line| !line.contains(&end));
        others
            .map(|line| format!("{}: {line}", self.place))
            .collect()
    }
}

async fn nothing_in_clear(taps: Vec<Tap>) {
    for tap in taps {
        let seen = tap.close().await;
        let first = &seen[..seen.len().min(10)];
        assert!(
            seen.is_empty(),
            "{} packets in clear: {first:#?}",
            seen.len()
        );
    }
}

async fn lab_with(encryption: &'static str, underlay_v6: bool) -> Lab {
    let config = LabConfig {
        encryption,
        underlay_v6,
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.start().await.unwrap();
    lab
}

/// Waits until packets from the node to so many others travel like this.
async fn until_traffic(node: &Node, traffic: &str, count: usize) -> Value {
    let what = format!("{count} nodes reached {traffic}");
    let wait = until(&what, || async {
        let status = node.encryption_status().await?;
        let peers = status["peers"].as_array().cloned().unwrap_or_default();
        let like = peers.iter().filter(|peer| peer["traffic"] == traffic);
        Ok((like.count() == count).then_some(status))
    });
    match wait.await {
        Ok(status) => status,
        Err(error) => panic!(
            "{error:#}: {:?}; {}",
            node.encryption_status().await,
            node.agent().unwrap().log_tail()
        ),
    }
}

/// A pod with a server on every node, the first of the list on the first node of the first cluster.
async fn pods(lab: &Lab) -> (Vec<Pod>, Vec<Process>) {
    let (mut pods, mut servers) = (Vec::new(), Vec::new());
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            let name = format!("{}-{}", cluster.name(), node.name());
            cluster.apply(&workload(&name, "web")).await.unwrap();
            let pod = node.add_pod(NAMESPACE, &name).await.unwrap();
            let port = PORT.to_string();
            let arguments = ["serve", "--name", &name, "--tcp", &port];
            servers.push(pod.start("serve", &arguments).await.unwrap());
            pods.push(pod);
        }
    }
    for cluster in lab.clusters() {
        cluster.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    }
    (pods, servers)
}

fn server_of(pod: &Pod, v6: bool) -> Result<String> {
    Ok(SocketAddr::new(pod.address(v6)?.parse()?, PORT).to_string())
}

/// Echo requests and connections from every pod to every other, in both families.
async fn all_reach_all(pods: &[Pod]) {
    for from in pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            for v6 in [false, true] {
                let what = format!("{} to {} v6 {v6}", from.name(), to.name());
                let address = to.address(v6).unwrap();
                from.ping(address).await.expect(&what);
                let server = server_of(to, v6).unwrap();
                let arguments = ["probe", "--to", &server, "--attempts", "5"];
                let report = from.traffic(&arguments).await.expect(&what);
                assert_eq!(report["failed"], 0, "{what}: {report}");
            }
        }
    }
}

/// A connection in each family from each pod to the next.
async fn streams(pods: &[Pod]) -> Vec<(Process, String)> {
    let mut streams = Vec::new();
    for (from, to) in pods.iter().zip(pods.iter().cycle().skip(1)) {
        for v6 in [false, true] {
            let server = server_of(to, v6).unwrap();
            let label = format!("stream-{v6}");
            let arguments = ["stream", "--to", &server, "--every-ms", "20"];
            let stream = from.start(&label, &arguments).await.unwrap();
            streams.push((stream, format!("{} to {server}", from.name())));
        }
    }
    streams
}

/// Waits until every stream has gone on for some more echoes, then ends it and looks at its report.
async fn finish(streams: Vec<(Process, String)>) {
    for (stream, what) in streams {
        let report = stream.finish().await.unwrap();
        assert_eq!(report["broken"], false, "{what}: {report}");
        assert!(report["echoed"].as_u64().unwrap() > 10, "{what}: {report}");
        let longest = report["echo_ms_max"].as_f64().unwrap();
        assert!(longest < ECHO_MS_MAX, "{what}: {report}");
    }
}

async fn everything_is_encrypted(underlay_v6: bool) {
    let mut lab = lab_with("mode = \"all\"\nstrict = true", underlay_v6).await;
    let taps = Tap::everywhere(&lab, CLEAR).await;
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            until_traffic(node, "encrypted", 3).await;
        }
    }
    let (pods, servers) = pods(&lab).await;
    all_reach_all(&pods).await;
    let streams = streams(&pods).await;
    // The device outlives the agent: connections notice neither its death nor its return.
    let node = lab.cluster_mut(0).node_mut(0);
    let before = node.encryption_status().await.unwrap();
    node.stop_agent(Signal::SIGKILL).await.unwrap();
    all_reach_all(&pods).await;
    let node = lab.cluster_mut(0).node_mut(0);
    node.start_agent().await.unwrap();
    let after = until_traffic(lab.cluster(0).node(0), "encrypted", 3).await;
    assert_eq!(
        before["devices"][0]["public_key"],
        after["devices"][0]["public_key"]
    );
    all_reach_all(&pods).await;
    finish(streams).await;
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            let status = node.encryption_status().await.unwrap();
            assert_eq!(status["encrypted_percent"], 100.0, "{status}");
            for peer in status["peers"].as_array().unwrap() {
                assert_eq!(peer["session"], "established", "{peer}");
                assert!(peer["sent_bytes"].as_u64().unwrap() > 0, "{peer}");
            }
        }
    }
    nothing_in_clear(taps).await;
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_between_pods_leaves_in_clear_over_ipv4_also_without_the_agent() {
    everything_is_encrypted(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_between_pods_leaves_in_clear_over_ipv6_also_without_the_agent() {
    everything_is_encrypted(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_without_a_key_are_reached_in_clear_until_they_have_one() {
    let config = LabConfig {
        clusters: vec!["a".to_owned()],
        encryption: "mode = \"all\"",
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.cluster_mut(0).node_mut(1).set_encryption("");
    lab.start().await.unwrap();
    let taps = Tap::everywhere(&lab, CLEAR).await;
    until_traffic(lab.cluster(0).node(0), "clear", 1).await;
    let (pods, servers) = pods(&lab).await;
    all_reach_all(&pods).await;
    let streams = streams(&pods).await;
    // The tap does see what is in clear.
    for tap in taps {
        let seen = tap.close().await;
        assert!(seen.len() > 100, "{seen:?}");
    }
    let node = lab.cluster_mut(0).node_mut(1);
    node.stop_agent(Signal::SIGTERM).await.unwrap();
    node.set_encryption("mode = \"all\"");
    node.start_agent().await.unwrap();
    for node in lab.cluster(0).nodes() {
        until_traffic(node, "encrypted", 1).await;
    }
    let taps = Tap::everywhere(&lab, CLEAR).await;
    all_reach_all(&pods).await;
    nothing_in_clear(taps).await;
    finish(streams).await;
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}
