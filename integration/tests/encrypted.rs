//! Encryption between nodes, judged on the wire: what the routers' ports see, and what connections notice.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::net::SocketAddr;
use std::path::Path;

use clustermesh_ebpf_abi::LAYOUT_VERSION;
use clustermesh_integration::lab::capture::{Capture, PODS_IN_CLEAR, WIREGUARD};
use clustermesh_integration::lab::cluster::Cluster;
use clustermesh_integration::lab::host::run;
use clustermesh_integration::lab::node::Node;
use clustermesh_integration::lab::pod::Pod;
use clustermesh_integration::lab::process::Process;
use clustermesh_integration::lab::{Lab, LabConfig};
use clustermesh_integration::scenario::encrypted::{
    PORT, Streams, all_backends_answer, all_reach_all, nodes_reach_pods, nothing_in_clear, pods,
    serve, until_first_reaches_all, until_traffic,
};
use clustermesh_integration::scenario::{NAMESPACE, until};
use futures_util::future::join_all;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Echo requests while keys change: half a minute of them.
const ECHOES: &str = "1500";

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

async fn everything_is_encrypted(underlay_v6: bool) {
    let mut lab = lab_with("mode = \"all\"\nstrict = true", underlay_v6).await;
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            until_traffic(node, "encrypted", 3).await.unwrap();
        }
    }
    let (pods, servers) = pods(&lab).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    all_backends_answer(&lab, &pods).await.unwrap();
    nodes_reach_pods(&lab, &pods).await.unwrap();
    let streams = Streams::begin(&pods).await.unwrap();
    // The device outlives the agent: connections notice neither its death nor its return.
    let node = lab.cluster_mut(0).node_mut(0);
    let before = node.encryption_status().await.unwrap();
    node.stop_agent(Signal::SIGKILL).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    let node = lab.cluster_mut(0).node_mut(0);
    node.start_agent().await.unwrap();
    let after = until_traffic(lab.cluster(0).node(0), "encrypted", 3)
        .await
        .unwrap();
    assert_eq!(
        before["devices"][0]["public_key"],
        after["devices"][0]["public_key"]
    );
    all_reach_all(&pods).await.unwrap();
    streams.finish().await.unwrap();
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
    nothing_in_clear(taps).await.unwrap();
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
async fn between_clusters_alone_is_encrypted_where_no_more_is_wanted() {
    let lab = lab_with("mode = \"inter-cluster\"\nstrict = true", false).await;
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            until_traffic(node, "encrypted", 2).await.unwrap();
            until_traffic(node, "clear", 1).await.unwrap();
        }
    }
    let across =
        "(net 172.30.1.0/24 and net 172.30.2.0/24) or (net fd30:1::/64 and net fd30:2::/64)";
    let across = format!("udp port 8472 and ({across})");
    let across = Capture::everywhere(&lab, &across).await.unwrap();
    let any = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    let (pods, servers) = pods(&lab).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    all_backends_answer(&lab, &pods).await.unwrap();
    for tap in any {
        assert!(
            !tap.close().await.unwrap().is_empty(),
            "nothing is in clear"
        );
    }
    nothing_in_clear(across).await.unwrap();
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
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
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    until_traffic(lab.cluster(0).node(0), "clear", 1)
        .await
        .unwrap();
    let (pods, servers) = pods(&lab).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    let streams = Streams::begin(&pods).await.unwrap();
    // The tap does see what is in clear.
    for tap in taps {
        let seen = tap.close().await.unwrap();
        assert!(seen.len() > 100, "{seen:?}");
    }
    let node = lab.cluster_mut(0).node_mut(1);
    node.stop_agent(Signal::SIGTERM).await.unwrap();
    node.set_encryption("mode = \"all\"");
    node.start_agent().await.unwrap();
    for node in lab.cluster(0).nodes() {
        until_traffic(node, "encrypted", 1).await.unwrap();
    }
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    nothing_in_clear(taps).await.unwrap();
    // And back: its device goes when nobody sends to it any more.
    let node = lab.cluster_mut(0).node_mut(1);
    node.stop_agent(Signal::SIGTERM).await.unwrap();
    node.set_encryption("");
    node.start_agent().await.unwrap();
    until_traffic(lab.cluster(0).node(0), "clear", 1)
        .await
        .unwrap();
    all_reach_all(&pods).await.unwrap();
    until("the device is gone", || async {
        let runs = lab.cluster(0).node(1).wireguard_pid();
        Ok(runs.is_err().then_some(()))
    })
    .await
    .unwrap();
    all_reach_all(&pods).await.unwrap();
    streams.finish().await.unwrap();
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nodes_say_to_each_other_is_encrypted_where_that_is_wanted() {
    let lab = lab_with("mode = \"all\"\nstrict = true\nnodes = true", false).await;
    let nodes: Vec<&Node> = lab.clusters().iter().flat_map(Cluster::nodes).collect();
    for node in &nodes {
        until_traffic(node, "encrypted", 3).await.unwrap();
    }
    let either = |way: &str| {
        let hosts = nodes.iter().map(|node| {
            let (v4, v6) = node.underlay_addresses();
            format!("{way} host {v4} or {way} host {v6}")
        });
        hosts.collect::<Vec<_>>().join(" or ")
    };
    // Neighbours are asked for by ICMPv6; servers are reached as they are.
    let filter = format!(
        "({PODS_IN_CLEAR}) or (({}) and ({}) and not udp port 51871 and not (icmp6 and ip6[40] >= 133 and ip6[40] <= 137) \
         and not arp)",
        either("src"),
        either("dst")
    );
    let taps = Capture::everywhere(&lab, &filter).await.unwrap();
    let port = PORT.to_string();
    let program = nodes[0].binaries().join("clustermesh-lab-traffic");
    let mut servers = Vec::new();
    for node in &nodes {
        let mut command = node.command(&program);
        command.args(["serve", "--name", node.name(), "--tcp", &port]);
        let log = node.folder().join("serve.log");
        servers.push(
            Process::start_ready("serve", &mut command, &log)
                .await
                .unwrap(),
        );
    }
    for from in &nodes {
        for to in nodes.iter().filter(|to| to.netns() != from.netns()) {
            let (v4, v6) = to.underlay_addresses();
            for address in [v4, v6] {
                let mut command = from.command(Path::new("ping"));
                command.args(["-n", "-c", "3", "-i", "0.05", "-W", "5", &address]);
                run(&mut command).await.unwrap();
                let to = SocketAddr::new(address.parse().unwrap(), PORT).to_string();
                let mut command = from.command(&program);
                command.args(["probe", "--to", &to, "--attempts", "5"]);
                let output = run(&mut command).await.unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let report: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
                assert_eq!(report["failed"], 0, "{} to {to}: {report}", from.netns());
            }
        }
    }
    nothing_in_clear(taps).await.unwrap();
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_dies_is_started_again_and_nothing_leaves_in_clear_meanwhile() {
    let lab = lab_with("mode = \"all\"\nstrict = true", false).await;
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            until_traffic(node, "encrypted", 3).await.unwrap();
        }
    }
    let (pods, servers) = pods(&lab).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    let streams = Streams::begin(&pods).await.unwrap();
    let node = lab.cluster(0).node(0);
    let before = node.wireguard_pid().unwrap();
    nix::sys::signal::kill(before, Signal::SIGKILL).unwrap();
    until("another device", || async {
        let pid = node.wireguard_pid()?;
        Ok((pid != before).then_some(()))
    })
    .await
    .unwrap();
    until_traffic(node, "encrypted", 3).await.unwrap();
    until_first_reaches_all(&pods).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    streams.finish().await.unwrap();
    nothing_in_clear(taps).await.unwrap();
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

/// What the kernel's and the device's state of encryption hangs on: the device's process, its keys, and the peers' keys.
async fn keys_of(node: &Node) -> (Pid, Value) {
    let status = until_traffic(node, "encrypted", 3).await.unwrap();
    let keys = |list: &str| -> Vec<Value> {
        let of = status[list].as_array().unwrap().iter();
        of.map(|one| json!([one["public_key"], one["epoch"]]))
            .collect()
    };
    let (mut devices, mut peers) = (keys("devices"), keys("peers"));
    for list in [&mut devices, &mut peers] {
        list.sort_by_key(Value::to_string);
    }
    (
        node.wireguard_pid().unwrap(),
        json!({"devices": devices, "peers": peers}),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_another_map_layout_takes_over_without_a_new_key_or_clear_text() {
    let mut lab = lab_with("mode = \"all\"\nstrict = true", false).await;
    let other = lab.config().binaries.join("layout-next/clustermesh-node");
    let nodes: Vec<&Node> = lab.clusters().iter().flat_map(Cluster::nodes).collect();
    let mut before = Vec::new();
    for node in nodes {
        before.push(keys_of(node).await);
    }
    let (pods, servers) = pods(&lab).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    let sealed = Capture::everywhere(&lab, WIREGUARD).await.unwrap();
    let streams = Streams::begin(&pods).await.unwrap();
    let own = lab.config().binaries.join("clustermesh-node");
    let mut layouts = Vec::new();
    // To the other build and back: a downgrade is a change of layout too.
    for program in [&other, &own] {
        let node = lab.cluster_mut(0).node_mut(0);
        node.stop_agent(Signal::SIGTERM).await.unwrap();
        node.start_agent_of(program).await.unwrap();
        lab.cluster(0).wait_converged(30).await.unwrap();
        let status = lab.cluster(0).node(0).agent_status().await.unwrap();
        layouts.push(status["map_layout_version"].clone());
        all_reach_all(&pods).await.unwrap();
        let nodes = lab.clusters().iter().flat_map(Cluster::nodes);
        for (node, before) in nodes.zip(&before) {
            assert_eq!(keys_of(node).await, *before, "{}", node.netns());
        }
    }
    assert_ne!(layouts[0], layouts[1], "both builds have the same layout");
    assert_eq!(layouts[1], LAYOUT_VERSION);
    streams.finish().await.unwrap();
    for tap in sealed {
        assert!(!tap.close().await.unwrap().is_empty(), "nothing is sealed");
    }
    nothing_in_clear(taps).await.unwrap();
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

/// Echo requests between every two pods, a hundred a second; each process ends by itself.
fn pings(pods: &[Pod], folder: &Path) -> Vec<(Process, String)> {
    let mut pings = Vec::new();
    for from in pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            let v6 = from.name() < to.name();
            let what = format!("{} to {} v6 {v6}", from.name(), to.name());
            let mut command = from.command(Path::new("ping"));
            command.args(["-n", "-q", "-i", "0.02", "-c", ECHOES, "-W", "10"]);
            command.arg(to.address(v6).unwrap());
            let log = folder.join(format!("ping-{}-{}.log", from.name(), to.name()));
            pings.push((Process::start(&what, &mut command, &log).unwrap(), what));
        }
    }
    pings
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_change_on_every_node_without_losing_a_packet() {
    let lab = lab_with("mode = \"all\"\nstrict = true", false).await;
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    let nodes: Vec<&Node> = lab.clusters().iter().flat_map(Cluster::nodes).collect();
    let mut before = Vec::new();
    for node in &nodes {
        let status = until_traffic(node, "encrypted", 3).await.unwrap();
        before.push(status["devices"][0]["public_key"].clone());
    }
    let (pods, servers) = pods(&lab).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    let streams = Streams::begin(&pods).await.unwrap();
    let pings = pings(&pods, lab.folder());
    nodes[0].rotate_keys().await.unwrap();
    for (node, before) in nodes.iter().zip(&before) {
        let changed = until("one device with another key", || async {
            let status = node.encryption_status().await?;
            let devices = status["devices"].as_array().cloned().unwrap_or_default();
            let is_done = devices.len() == 1 && devices[0]["epoch"] == 1;
            Ok((is_done && devices[0]["public_key"] != *before).then_some(()))
        });
        if let Err(error) = changed.await {
            let log = node.agent().unwrap().log_tail();
            panic!(
                "{error:#}: {:#}\n{log}",
                node.encryption_status().await.unwrap()
            );
        }
    }
    for (ping, what) in pings {
        let log = ping.log().to_owned();
        ping.wait().await.unwrap();
        let text = std::fs::read_to_string(log).unwrap();
        let all = format!("{ECHOES} packets transmitted, {ECHOES} received");
        assert!(text.contains(&all), "{what}: {text}");
    }
    for node in &nodes {
        let status = until_traffic(node, "encrypted", 3).await.unwrap();
        let peers = status["peers"].as_array().unwrap();
        assert!(peers.iter().all(|peer| peer["epoch"] == 1), "{status:#}");
    }
    all_reach_all(&pods).await.unwrap();
    streams.finish().await.unwrap();
    nothing_in_clear(taps).await.unwrap();
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

/// Tries every way to a pod of another node, from a pod and from the host. None may lead there.
async fn nobody_is_reached(node: &Node, pod: &Pod, others: &[Pod]) {
    let ways = others.iter().flat_map(|to| [(to, false), (to, true)]);
    let tried = ways.map(|(to, v6)| async move {
        let address = to.address(v6).unwrap();
        for mut ping in [
            pod.command(Path::new("ping")),
            node.command(Path::new("ping")),
        ] {
            ping.args(["-n", "-c", "3", "-i", "0.05", "-W", "1", address]);
            let reached = run(&mut ping).await;
            assert!(reached.is_err(), "{} is reached", to.name());
        }
    });
    join_all(tried).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_boots_while_its_server_is_away_sends_nothing_in_clear() {
    let mut lab = lab_with("mode = \"all\"\nstrict = true", false).await;
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            until_traffic(node, "encrypted", 3).await.unwrap();
        }
    }
    let (mut pods, mut servers) = pods(&lab).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    let node = lab.cluster(0).node(0);
    until("three nodes and the own range", || async {
        let status = node.agent_status().await?;
        let prefixes = status["map_entries"]["mesh"].as_u64().unwrap_or(0);
        Ok((prefixes >= 14).then_some(()))
    })
    .await
    .unwrap();
    // A boot, and no server: nothing is left but the state folder.
    lab.cluster_mut(0)
        .stop_server(Signal::SIGKILL)
        .await
        .unwrap();
    let node = lab.cluster_mut(0).node_mut(0);
    node.stop_agent(Signal::SIGKILL).await.unwrap();
    drop(servers.remove(0));
    let pod = pods.remove(0);
    let name = pod.name().to_owned();
    pod.delete().await.unwrap();
    node.uninstall().await.unwrap();
    assert!(!node.bpffs().join("clustermesh").exists(), "pins are left");
    node.start_agent().await.unwrap();
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    let node = lab.cluster(0).node(0);
    let pod = node.add_pod(NAMESPACE, &name).await.unwrap();
    nobody_is_reached(node, &pod, &pods).await;
    // Three echoes to each of three pods, in both families, from pod and host: the host has no route for some of them.
    let dropped = node.drops("mesh-unknown").await.unwrap();
    assert!(dropped >= 18, "{dropped}");
    nothing_in_clear(taps).await.unwrap();
    // The world is reached, and so is the own pod.
    let (router, own) = (
        format!("172.30.{}.1", lab.cluster(0).id()),
        pod.address(false).unwrap().to_owned(),
    );
    let mut ping = node.command(Path::new("ping"));
    run(ping.args(["-n", "-c", "1", "-W", "5", &router]))
        .await
        .unwrap();
    let mut ping = node.command(Path::new("ping"));
    run(ping.args(["-n", "-c", "1", "-W", "5", &own]))
        .await
        .unwrap();
    let taps = Capture::everywhere(&lab, PODS_IN_CLEAR).await.unwrap();
    lab.cluster_mut(0).restart_server().await.unwrap();
    until_traffic(lab.cluster(0).node(0), "encrypted", 3)
        .await
        .unwrap();
    pods.insert(0, pod);
    servers.push(serve(&pods[0], "serve-again").await.unwrap());
    until_first_reaches_all(&pods).await.unwrap();
    all_reach_all(&pods).await.unwrap();
    nothing_in_clear(taps).await.unwrap();
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}
