//! A path on which large packets vanish without a word: connections go on, and the alarm names both ends.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::net::SocketAddr;

use clustermesh_integration::lab::node::Node;
use clustermesh_integration::lab::pod::Pod;
use clustermesh_integration::lab::process::Process;
use clustermesh_integration::lab::{Lab, LabConfig};
use clustermesh_integration::scenario::{NAMESPACE, until, workload};
use serde_json::Value;

/// What the wide-area link lets through at first, bytes.
const NARROW_BYTES: usize = 1_420;
/// Port of the pods' servers.
const PORT: u16 = 8080;
/// Many full segments, so that a black hole stops the connection.
const MESSAGE_BYTES: &str = "60000";
/// Longest that one message may take, milliseconds: until the black hole is found, and the sender's timer has gone off.
const MESSAGE_MS_MAX: f64 = 60_000.0;
/// A wide path is tried again ever more seldom: that may take so many waits.
const WAITS_MAX: usize = 5;
/// Paths are asked this often, for the sake of the test's time.
const PROBE_SECONDS: u32 = 2;

async fn path(from: &Node, cluster: &str, to: &str) -> anyhow::Result<Value> {
    let status = from.agent_status().await?;
    let paths = status["paths"].as_array().cloned().unwrap_or_default();
    let mut found = paths
        .into_iter()
        .filter(|path| path["cluster"] == cluster && path["node"] == to);
    Ok(found.next().unwrap_or_default())
}

async fn until_path(
    from: &Node,
    to: (&str, &str),
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    for _ in 0..WAITS_MAX {
        let seen = until(what, || async {
            let path = path(from, to.0, to.1).await?;
            Ok(wanted(&path).then_some(path))
        });
        if let Ok(path) = seen.await {
            return path;
        }
    }
    panic!(
        "{what}: {:?}; {}",
        path(from, to.0, to.1).await,
        from.agent().unwrap().log_tail()
    )
}

async fn pod_with_server(lab: &Lab, place: usize) -> (Pod, Process) {
    let cluster = lab.cluster(place);
    let name = format!("web-{}", cluster.name());
    cluster.apply(&workload(&name, "web")).await.unwrap();
    let pod = cluster.node(0).add_pod(NAMESPACE, &name).await.unwrap();
    let port = PORT.to_string();
    let arguments = ["serve", "--name", &name, "--tcp", &port];
    let server = pod.start("serve", &arguments).await.unwrap();
    (pod, server)
}

async fn transfer(from: &Pod, to: &Pod, v6: bool) -> Process {
    let server = SocketAddr::new(to.address(v6).unwrap().parse().unwrap(), PORT).to_string();
    let label = format!("transfer-{v6}");
    let arguments = [
        "stream",
        "--to",
        &server,
        "--every-ms",
        "20",
        "--bytes",
        MESSAGE_BYTES,
    ];
    from.start(&label, &arguments).await.unwrap()
}

async fn connections_outlive_a_black_hole(encryption: &'static str, device_bytes: u64) {
    let config = LabConfig {
        nodes_per_cluster: 1,
        agents_per_cluster: 1,
        encryption,
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    for place in 0..2 {
        let node = lab.cluster_mut(place).node_mut(0);
        node.edit_config(|text| format!("path_probe_seconds = {PROBE_SECONDS}\n{text}"));
    }
    lab.start().await.unwrap();
    let (a, b) = (lab.cluster(0).node(0), lab.cluster(1).node(0));
    let ways = [(a, ("b", "n1")), (b, ("a", "n1"))];
    for (from, to) in ways {
        let is_whole = |path: &Value| {
            path["answers"] == true
                && path["black_hole"] == false
                && path["mtu_bytes"] == device_bytes
        };
        until_path(from, to, "a path as its devices say", is_whole).await;
    }
    let ((pod_a, server_a), (pod_b, server_b)) = (
        pod_with_server(&lab, 0).await,
        pod_with_server(&lab, 1).await,
    );
    for cluster in lab.clusters() {
        cluster.wait_converged(30).await.unwrap();
    }
    let transfers = [
        transfer(&pod_a, &pod_b, false).await,
        transfer(&pod_b, &pod_a, true).await,
    ];
    lab.wan().swallow_over(Some(NARROW_BYTES));
    for (from, to) in ways {
        let path = until_path(from, to, "an alarm", |path| path["black_hole"] == true).await;
        let bytes = path["mtu_bytes"].as_u64().unwrap();
        assert!(bytes < device_bytes, "{path}");
        let log = from.agent().unwrap().log_tail();
        let (own, other) = (
            format!("{}/{}", from.cluster(), from.name()),
            format!("{}/{}", to.0, to.1),
        );
        let named = |line: &&str| {
            line.contains("black hole") && line.contains(&own) && line.contains(&other)
        };
        assert_eq!(log.lines().filter(named).count(), 1, "{log}");
        let status = from.encryption_status().await.unwrap();
        let shown = &status["black_holes"][0];
        assert_eq!(
            (&shown["cluster"], &shown["node"]),
            (&to.0.into(), &to.1.into()),
            "{status:#}"
        );
    }
    // New connections find their size when they begin, and the old ones go on.
    let fresh = transfer(&pod_a, &pod_b, true).await;
    let mut sizes = Vec::new();
    for (from, to) in ways {
        let is_measured = |path: &Value| {
            let bytes = path["mtu_bytes"].as_u64().unwrap_or(0);
            path["black_hole"] == true && bytes > 1_280 && bytes < device_bytes
        };
        let path = until_path(from, to, "what passes is measured", is_measured).await;
        sizes.push(path["mtu_bytes"].as_u64().unwrap());
    }
    for (from, to) in [(&pod_a, &pod_b), (&pod_b, &pod_a)] {
        // As large as is said, and not to be cut; the pods remember the smaller size of the beginning for ten minutes.
        let forget = ["-n", from.netns(), "route", "flush", "cache"];
        clustermesh_integration::lab::host::sh("ip", &forget)
            .await
            .unwrap();
        let mut ping = from.command(std::path::Path::new("ping"));
        let bytes = (sizes[0].min(sizes[1]) - 28).to_string();
        ping.args(["-n", "-c", "3", "-M", "do", "-W", "5", "-s", &bytes]);
        ping.arg(to.address(false).unwrap());
        clustermesh_integration::lab::host::run(&mut ping)
            .await
            .unwrap();
    }
    lab.wan().swallow_over(None);
    for (from, to) in ways {
        let is_whole =
            |path: &Value| path["black_hole"] == false && path["mtu_bytes"] == device_bytes;
        until_path(from, to, "the alarm's end", is_whole).await;
    }
    for transfer in transfers.into_iter().chain([fresh]) {
        let report = transfer.finish().await.unwrap();
        assert_eq!(report["broken"], false, "{report}");
        assert!(report["echoed"].as_u64().unwrap() > 20, "{report}");
        let longest = report["echo_ms_max"].as_f64().unwrap();
        assert!(longest < MESSAGE_MS_MAX, "{report}");
    }
    drop((server_a, server_b));
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_outlive_a_black_hole_under_encryption_and_the_alarm_names_both_ends() {
    connections_outlive_a_black_hole("mode = \"all\"\nstrict = true", 1_390).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_outlive_a_black_hole_in_the_tunnel_alone() {
    connections_outlive_a_black_hole("", 1_450).await;
}
