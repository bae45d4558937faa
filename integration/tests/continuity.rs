//! Continuity beyond a crash: an agent and its server are away for four times the session's time to live,
//! the agent for one time more.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use clustermesh_integration::lab::process::Process;
use clustermesh_integration::lab::store::gone;
use clustermesh_integration::lab::{AttachMode, Lab, LabConfig};
use clustermesh_integration::scenario::{NAMESPACE, until, workload};
use nix::sys::signal::Signal;

/// How long agent and server are away; the session's time to live is 15 s.
const AWAY: Duration = Duration::from_secs(60);
/// Longest that convergence may take.
const CONVERGED_SECONDS_MAX: u32 = 30;
/// Longest that one echo may take, milliseconds: far less than any outage that is looked for.
const ECHO_MS_MAX: f64 = 2_000.0;
/// Port of the servers.
const PORT: u16 = 8080;

fn socket_address(address: &str, port: u16) -> String {
    SocketAddr::new(address.parse().unwrap(), port).to_string()
}

async fn finish_stream(stream: Process, what: &str) {
    let report = stream.finish().await.unwrap();
    assert_eq!(report["broken"], false, "{what}: {report}");
    assert!(report["echoed"].as_u64().unwrap() > 500, "{what}: {report}");
    // A flow that stood still is not one that lived on.
    let longest = report["echo_ms_max"].as_f64().unwrap();
    assert!(longest < ECHO_MS_MAX, "{what}: {report}");
}

async fn finish_connects(connects: Process, what: &str) {
    let report = connects.finish().await.unwrap();
    assert_eq!(report["failed"], 0, "{what}: {report}");
    assert!(report["ok"].as_u64().unwrap() > 500, "{what}: {report}");
}

async fn agent_and_server_are_away(attach_mode: AttachMode, signal: Signal) {
    let config = LabConfig {
        attach_mode,
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.start().await.unwrap();
    let mut pods = BTreeMap::new();
    for (name, cluster, node) in [
        ("web-a", 0, 0),
        ("side-a", 0, 0),
        ("far-a", 0, 1),
        ("web-b", 1, 0),
    ] {
        let cluster = lab.cluster(cluster);
        let app = name.split('-').next().unwrap_or_default();
        cluster.apply(&workload(name, app)).await.unwrap();
        pods.insert(
            name,
            cluster.node(node).add_pod(NAMESPACE, name).await.unwrap(),
        );
    }
    let service = format!(
        "apiVersion: clustermesh.io/v1\nkind: Service\nmetadata:\n  namespace: {NAMESPACE}\n  name: web\n  annotations:\n    service.cilium.io/global: \"true\"\nspec:\n  selector:\n    app: web\n  ports:\n    - name: http\n      protocol: TCP\n      port: 80\n      targetPort: {PORT}\n"
    );
    let mut servers = Vec::new();
    let port = PORT.to_string();
    for name in ["web-a", "web-b"] {
        servers.push(
            pods[name]
                .start("serve", &["serve", "--name", name, "--tcp", &port])
                .await
                .unwrap(),
        );
    }
    for cluster in lab.clusters() {
        cluster.apply(&service).await.unwrap();
        cluster.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    }
    let virtual_address = lab
        .cluster(0)
        .service_address(NAMESPACE, "web", false)
        .await
        .unwrap();
    let virtual_address = socket_address(&virtual_address, 80);
    until("both backends answer", || async {
        let report = pods["side-a"]
            .traffic(&["probe", "--to", &virtual_address, "--attempts", "20"])
            .await?;
        let of = |name: &str| report["by_name"][name].as_u64().unwrap_or(0);
        Ok((report["failed"] == 0 && of("web-a") > 0 && of("web-b") > 0).then_some(()))
    })
    .await
    .unwrap();
    let own = ["cilium/state/", "clustermesh.io/"];
    let copies = ["cilium/cache/"];
    let own_before = lab.cluster(0).store().unwrap().made(&own).await.unwrap();
    let copies_before = lab.cluster(1).store().unwrap().made(&copies).await.unwrap();
    assert!(own_before.len() > 10 && copies_before.len() > 10);

    // Established and new flows, from and to the node whose agent goes, both families, in and between clusters.
    let to_a = |v6| socket_address(pods["web-a"].address(v6).unwrap(), PORT);
    let to_b = |v6| socket_address(pods["web-b"].address(v6).unwrap(), PORT);
    let mut streams = Vec::new();
    let mut connects = Vec::new();
    for v6 in [false, true] {
        for (pod, to) in [
            ("web-b", to_a(v6)),
            ("side-a", to_b(v6)),
            ("far-a", to_a(v6)),
        ] {
            let family = if v6 { 6 } else { 4 };
            let label = format!("stream{family}");
            let arguments = ["stream", "--to", &to, "--every-ms", "50"];
            let stream = pods[pod].start(&label, &arguments).await.unwrap();
            streams.push((stream, format!("{pod} to {to}")));
            let label = format!("connects{family}");
            let arguments = ["probe", "--to", &to, "--every-ms", "50"];
            let probe = pods[pod].start(&label, &arguments).await.unwrap();
            connects.push((probe, format!("{pod} to {to}")));
        }
    }
    for pod in ["side-a", "far-a"] {
        let arguments = ["probe", "--to", &virtual_address, "--every-ms", "50"];
        let probe = pods[pod].start("service", &arguments).await.unwrap();
        connects.push((probe, format!("{pod} to the service")));
    }

    let a = lab.cluster_mut(0);
    a.node_mut(0).stop_agent(signal).await.unwrap();
    a.stop_server(signal).await.unwrap();
    // What is proved is that traffic runs that long without them.
    tokio::time::sleep(AWAY).await;
    let copies_away = lab.cluster(1).store().unwrap().made(&copies).await.unwrap();
    assert_eq!(gone(&copies_before, &copies_away), Vec::<String>::new());
    let a = lab.cluster_mut(0);
    a.restart_server().await.unwrap();
    // The server comes first and misses the agent for its time to live: the node is stale, and keeps all it has.
    let a = lab.cluster(0);
    until("the node is stale", || async {
        let status = a.status().await?;
        let states: Vec<_> = status["nodes"].as_array().into_iter().flatten().collect();
        Ok((states[0]["state"] == "stale" && states[1]["state"] == "connected").then_some(()))
    })
    .await
    .unwrap();
    let own_stale = a.store().unwrap().made(&own).await.unwrap();
    assert_eq!(gone(&own_before, &own_stale), Vec::<String>::new());
    let a = lab.cluster_mut(0);
    a.node_mut(0).start_agent().await.unwrap();
    for cluster in lab.clusters() {
        cluster.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    }
    let own_after = lab.cluster(0).store().unwrap().made(&own).await.unwrap();
    let copies_after = lab.cluster(1).store().unwrap().made(&copies).await.unwrap();
    assert_eq!(gone(&own_before, &own_after), Vec::<String>::new());
    assert_eq!(gone(&copies_before, &copies_after), Vec::<String>::new());
    for (stream, what) in streams {
        finish_stream(stream, &what).await;
    }
    for (probe, what) in connects {
        finish_connects(probe, &what).await;
    }
    drop(servers);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_seconds_without_agent_and_server_break_nothing_with_tcx() {
    agent_and_server_are_away(AttachMode::Tcx, Signal::SIGTERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_seconds_without_agent_and_server_break_nothing_with_clsact() {
    agent_and_server_are_away(AttachMode::Clsact, Signal::SIGKILL).await;
}
