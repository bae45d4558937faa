//! Pod to pod across nodes: our tunnel and direct routing against the kernel's VXLAN and plain routing.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::Value;

use super::compare::{Figure, Named, Series, Target, against};
use super::{Wanted, real_time};
use crate::lab::host::{command_in, ip_batch, run, sh};
use crate::lab::pod::Pod;
use crate::lab::process::Process;
use crate::lab::{Lab, LabConfig, RoutingMode};

/// Rows of this suite.
pub const IDS: [&str; 5] = [
    "tunnel-tcp",
    "tunnel-pps",
    "tunnel-plain",
    "tunnel-nooffload",
    "direct-tcp",
];

/// Seconds of one measurement.
const MEASURE_SECONDS: &str = "3";
/// Entries that the ipcache holds beside the two pods.
const IPCACHE_ENTRIES: u32 = 200_000;
/// Largest packet of every contender's pods, so that all carry the same segments.
const POD_MTU: u32 = 1_450;
/// Port of the measuring server.
const PORT: &str = "5201";

/// A pair of namespaces that can reach each other, by one contender's way.
struct Pair {
    name: &'static str,
    client: String,
    server: String,
    address: String,
}

/// Measures every row of the tunnel.
///
/// # Errors
/// When a lab cannot be built or a measurement fails.
pub async fn run_all(
    rounds: usize,
    wanted: &Wanted,
    progress: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let (direct, tunnel): (Vec<&str>, Vec<&str>) = IDS.iter().partition(|id| **id == "direct-tcp");
    if tunnel.iter().any(|id| wanted.has(id)) {
        progress("tunnel: building the lab");
        let mut lab = Lab::build(config(RoutingMode::Tunnel)?).await?;
        let result = tunnel_rows(&mut lab, rounds, progress, &mut figures).await;
        lab.remove().await;
        result?;
    }
    if direct.iter().any(|id| wanted.has(id)) {
        progress("direct routing: building the lab");
        let mut lab = Lab::build(config(RoutingMode::Direct)?).await?;
        let result = direct_row(&mut lab, rounds, progress, &mut figures).await;
        lab.remove().await;
        result?;
    }
    Ok(figures)
}

fn config(routing_mode: RoutingMode) -> Result<LabConfig> {
    Ok(LabConfig {
        clusters: vec!["a".to_owned()],
        nodes_per_cluster: 4,
        agents_per_cluster: 2,
        routing_mode,
        ..LabConfig::two_by_two()?
    })
}

async fn tunnel_rows(
    lab: &mut Lab,
    rounds: usize,
    progress: &dyn Fn(&str),
    figures: &mut Vec<Figure>,
) -> Result<()> {
    lab.start().await?;
    let (pods, ours) = our_pods(lab).await?;
    for node in &lab.cluster(0).nodes()[..2] {
        super::preload::ipcache(&node.bpffs(), IPCACHE_ENTRIES)?;
    }
    let vxlan = bare_pair(lab, "vxlan").await?;
    let plain = bare_pair(lab, "plain").await?;
    let pairs = [ours, vxlan, plain];
    let servers = start_servers(lab, &pairs).await?;

    let tcp = interleave(&pairs, rounds, "tunnel TCP", progress, Measure::Tcp).await?;
    let pps = interleave(&pairs[..2], rounds, "tunnel UDP", progress, Measure::Udp64).await?;
    no_offload(lab).await?;
    let slow = interleave(
        &pairs[..2],
        rounds,
        "tunnel without offload",
        progress,
        Measure::Tcp,
    )
    .await?;
    let named = |id, row, unit| Named { id, row, unit };
    let kernel = "kernel VXLAN, static";
    figures.push(against(
        named(
            "tunnel-tcp",
            "pod to pod over the tunnel, TCP, one stream, 200,000 ipcache entries",
            "Gbit/s",
        ),
        &tcp[0],
        kernel,
        &tcp[1],
        Target::RatioAtLeast(1.08),
    ));
    figures.push(against(
        named("tunnel-pps", "the same, UDP 64 B", "kpps"),
        &pps[0],
        kernel,
        &pps[1],
        Target::RatioAtLeast(1.35),
    ));
    figures.push(against(
        named(
            "tunnel-plain",
            "the same TCP against plain routing",
            "Gbit/s",
        ),
        &tcp[0],
        "plain kernel routing",
        &tcp[2],
        Target::RatioAtLeast(0.95),
    ));
    figures.push(against(
        named(
            "tunnel-nooffload",
            "UDP-tunnel segmentation off, receive GRO on",
            "Gbit/s",
        ),
        &slow[0],
        kernel,
        &slow[1],
        Target::RatioAtLeast(0.95),
    ));
    stop_servers(servers).await;
    drop(pods);
    Ok(())
}

async fn direct_row(
    lab: &mut Lab,
    rounds: usize,
    progress: &dyn Fn(&str),
    figures: &mut Vec<Figure>,
) -> Result<()> {
    lab.start().await?;
    let (pods, ours) = our_pods(lab).await?;
    for node in &lab.cluster(0).nodes()[..2] {
        super::preload::ipcache(&node.bpffs(), IPCACHE_ENTRIES)?;
    }
    // The same segments for both: direct routing would otherwise carry larger ones.
    for pod in &pods {
        let mtu = POD_MTU.to_string();
        sh(
            "ip",
            &["-n", pod.netns(), "link", "set", "eth0", "mtu", &mtu],
        )
        .await?;
    }
    let plain = bare_pair(lab, "plain").await?;
    let pairs = [ours, plain];
    let servers = start_servers(lab, &pairs).await?;
    let tcp = interleave(&pairs, rounds, "direct TCP", progress, Measure::Tcp).await?;
    figures.push(against(
        Named {
            id: "direct-tcp",
            row: "pod to pod by direct routing, TCP, one stream",
            unit: "Gbit/s",
        },
        &tcp[0],
        "plain kernel routing",
        &tcp[1],
        Target::RatioAtLeast(1.0),
    ));
    stop_servers(servers).await;
    drop(pods);
    Ok(())
}

/// Two pods of ours on the two nodes with agents.
async fn our_pods(lab: &Lab) -> Result<([Pod; 2], Pair)> {
    let cluster = lab.cluster(0);
    let workload = |name: &str| {
        format!(
            "apiVersion: clustermesh.io/v1\nkind: Workload\nmetadata:\n  namespace: bench\n  name: {name}\n  labels:\n    app: bench\n---\n"
        )
    };
    cluster
        .apply(&format!("{}{}", workload("client"), workload("server")))
        .await?;
    let client = cluster.node(0).add_pod("bench", "client").await?;
    let server = cluster.node(1).add_pod("bench", "server").await?;
    cluster.wait_converged(20).await?;
    let pair = Pair {
        name: "ours",
        client: client.netns().to_owned(),
        server: server.netns().to_owned(),
        address: server.address(false)?.to_owned(),
    };
    Ok(([client, server], pair))
}

/// Two "pods" on the bare machines, joined by the kernel: through its VXLAN device or by routes.
async fn bare_pair(lab: &Lab, kind: &'static str) -> Result<Pair> {
    let nodes = &lab.cluster(0).nodes()[2..4];
    let net = if kind == "vxlan" { 51 } else { 52 };
    let mut names = Vec::new();
    for (place, node) in nodes.iter().enumerate() {
        let (own, other) = (place + 1, 2 - place);
        let pod = format!("{}-{kind}", node.netns());
        sh("ip", &["netns", "add", &pod]).await?;
        let remote = nodes[1 - place].underlay_addresses().0;
        let way = if kind == "vxlan" {
            let local = node.underlay_addresses().0;
            format!(
                "link add vx0 type vxlan id 42 local {local} remote {remote} dstport 4789 dev eth0 noudpcsum\n\
                 addr add 10.50.0.{own}/24 dev vx0\nlink set vx0 up mtu {POD_MTU}\n\
                 route add 10.{net}.{other}.0/24 via 10.50.0.{other}\n"
            )
        } else {
            format!("route add 10.{net}.{other}.0/24 via {remote}\n")
        };
        ip_batch(
            Some(node.netns()),
            &format!(
                "link add {kind} type veth peer name eth0 netns {pod}\naddr add 10.{net}.{own}.1/24 dev {kind}\n\
                 link set {kind} up mtu {POD_MTU}\n{way}"
            ),
        )
        .await?;
        run(command_in(node.netns(), None, Path::new("sysctl"))
            .args(["-qw", "net.ipv4.ip_forward=1"]))
        .await?;
        ip_batch(
            Some(&pod),
            &format!(
                "link set lo up\naddr add 10.{net}.{own}.2/24 dev eth0\nlink set eth0 up mtu {POD_MTU}\n\
                 route add default via 10.{net}.{own}.1\n"
            ),
        )
        .await?;
        names.push(pod);
    }
    let server = names.pop().context("two machines")?;
    let client = names.pop().context("two machines")?;
    Ok(Pair {
        name: kind,
        client,
        server,
        address: format!("10.{net}.2.2"),
    })
}

/// The underlay loses tunnel segmentation and keeps receive coalescing, as many network cards do.
///
/// A veth pair coalesces at the receiver only where the sending end cannot carry super-packets.
async fn no_offload(lab: &Lab) -> Result<()> {
    let cluster = lab.cluster(0);
    for node in cluster.nodes() {
        ethtool(node.netns(), "eth0", ["tx-udp_tnl-segmentation", "off"]).await?;
        ethtool(node.netns(), "eth0", ["gro", "on"]).await?;
    }
    let bridge = cluster.router_netns();
    let ports = sh("ip", &["-n", bridge, "-j", "link", "show", "master", "br0"]).await?;
    let ports: Value = serde_json::from_str(&ports)?;
    for port in ports.as_array().into_iter().flatten() {
        let name = port["ifname"].as_str().context("a port has a name")?;
        ethtool(bridge, name, ["tso", "off"]).await?;
    }
    Ok(())
}

async fn ethtool(netns: &str, device: &str, setting: [&str; 2]) -> Result<()> {
    let mut command = command_in(netns, None, Path::new("ethtool"));
    run(command.args(["-K", device]).args(setting))
        .await
        .map(drop)
}

async fn start_servers(lab: &Lab, pairs: &[Pair]) -> Result<Vec<Process>> {
    let mut servers = Vec::new();
    for pair in pairs {
        let mut command = real_time(&pair.server, None, Path::new("iperf3"));
        command.args(["-s", "-p", PORT, "--forceflush"]);
        let log = lab.folder().join(format!("iperf3-{}.log", pair.name));
        let server = Process::start(&format!("iperf3 of {}", pair.name), &mut command, &log)?;
        listening(&pair.server).await?;
        servers.push(server);
    }
    Ok(servers)
}

/// Waits until the namespace has a listener on [`PORT`].
async fn listening(netns: &str) -> Result<()> {
    for _ in 0..500 {
        let sockets =
            run(command_in(netns, None, Path::new("ss"))
                .args(["-Hltn", &format!("sport = :{PORT}")]))
            .await?;
        if !sockets.stdout.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    anyhow::bail!("iperf3 in {netns} does not listen")
}

async fn stop_servers(servers: Vec<Process>) {
    for server in servers {
        // The namespaces go next, and take what is left with them.
        let _ = server.stop(nix::sys::signal::Signal::SIGKILL).await;
    }
}

#[derive(Clone, Copy)]
enum Measure {
    Tcp,
    Udp64,
}

async fn interleave(
    pairs: &[Pair],
    rounds: usize,
    what: &str,
    progress: &dyn Fn(&str),
    measure: Measure,
) -> Result<Vec<Series>> {
    let mut series = vec![Vec::new(); pairs.len()];
    for round in 0..rounds {
        // Another one begins in every round: none always follows the same one.
        for turn in 0..pairs.len() {
            let place = (round + turn) % pairs.len();
            let pair = &pairs[place];
            progress(&format!(
                "{what}: round {} of {rounds}, {}",
                round + 1,
                pair.name
            ));
            series[place].push(measure_once(pair, measure).await?);
        }
    }
    Ok(series)
}

async fn measure_once(pair: &Pair, measure: Measure) -> Result<f64> {
    let mut command = real_time(&pair.client, None, Path::new("iperf3"));
    command.args(["-c", &pair.address, "-p", PORT, "-t", MEASURE_SECONDS, "-J"]);
    if matches!(measure, Measure::Udp64) {
        command.args(["-u", "-b", "0", "-l", "64"]);
    }
    let output = run(command.stderr(Stdio::inherit())).await?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let end = &report["end"];
    match measure {
        Measure::Tcp => end["sum_received"]["bits_per_second"]
            .as_f64()
            .map(|bits| bits / 1e9),
        Measure::Udp64 => {
            let sum = &end["sum"];
            let (packets, lost) = (sum["packets"].as_f64(), sum["lost_packets"].as_f64());
            let seconds = sum["seconds"].as_f64();
            packets
                .zip(lost)
                .zip(seconds)
                .map(|((packets, lost), seconds)| (packets - lost) / seconds / 1e3)
        }
    }
    .with_context(|| format!("iperf3's report of {}: {report}", pair.name))
}
