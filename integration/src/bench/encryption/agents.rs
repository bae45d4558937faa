//! Pods of real agents under full load: what goes through tunnel and WireGuard, and what is noticed of a change of keys
//! and of an agent's death.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::bench::compare::{Figure, Named, Series, Target, alone, median};
use crate::lab::host::run;
use crate::lab::node::Node;
use crate::lab::pod::Pod;
use crate::lab::process::Process;
use crate::lab::{Lab, LabConfig};
use crate::scenario::{NAMESPACE, until, workload};

/// Rows of this module.
pub const IDS: [&str; 4] = ["wg-pods", "wg-rotate", "wg-rotate-tcp", "wg-agent-killed"];
/// Least time that is watched at once: a change of keys takes less.
const WATCHED: Duration = Duration::from_secs(15);
/// What is watched goes on for so long after the change is over.
const AFTERWARDS: Duration = Duration::from_secs(2);
/// Longest that a change may take on a machine without time to spare.
const CHANGE_MAX: Duration = Duration::from_secs(60);
/// Seconds of the row that measures nothing but throughput.
const STREAM_SECONDS: &str = "3";
/// Seconds of the load, in which everything of a round has ended.
const LOAD_SECONDS: &str = "300";
/// Port of the servers that echo.
const ECHO_PORT: u16 = 8080;
/// Ports of iperf3, one for each stream: a server that lost its client is busy for a while.
const FIRST_PORT: usize = 5_201;
/// Time between two numbered datagrams.
const DATAGRAM_EVERY_MS: &str = "1";
/// Time between two messages of the connection that is watched.
const MESSAGE_EVERY_MS: &str = "5";
/// Within this a tunnel has to be as before when its agent is killed and started again, milliseconds.
const RESTORED_MS_MAX: f64 = 500.0;

/// A pod that sends and one that receives, on two nodes of one cluster.
struct Pods {
    client: Pod,
    server: Pod,
}

/// What was noticed in a time that was watched.
#[derive(Clone, Copy, Debug)]
struct Noticed {
    /// Numbered datagrams that did not come back.
    lost: f64,
    /// Segments that the client has sent again.
    retransmitted: f64,
    /// Longest time from a message to its echo.
    echo_ms: f64,
}

/// Measures all rows.
///
/// # Errors
/// When the lab cannot be built or something cannot be measured; a missed target is no error.
pub async fn rows(rounds: usize, progress: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    progress("agents: building the lab");
    let config = LabConfig {
        clusters: vec!["a".to_owned()],
        encryption: "mode = \"all\"\nstrict = true",
        ..LabConfig::two_by_two()?
    };
    let mut lab = Lab::build(config).await?;
    let measured = measure(&mut lab, rounds, progress).await;
    let left = lab.remove().await;
    ensure!(left.is_empty(), "clean-up: {}", left.join("; "));
    measured
}

async fn measure(lab: &mut Lab, rounds: usize, progress: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    lab.start().await?;
    let pods = pods(lab).await?;
    let port = ECHO_PORT.to_string();
    let arguments = ["serve", "--name", "server", "--tcp", &port, "--udp", &port];
    let echoing = pods.server.start("serve", &arguments).await?;
    let (mut streams, mut quiet, mut changed, mut killed) =
        (Series::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let say =
            |what: &str| progress(&format!("agents: round {} of {rounds}, {what}", round + 1));
        say("one stream");
        streams.push(stream(&pods, FIRST_PORT + 2 * round).await?);
        let load = Load::begin(&pods, FIRST_PORT + 2 * round + 1).await?;
        say("under load, nothing changes");
        let watch = Watch::begin(&pods, &format!("quiet-{round}")).await?;
        quiet.push(watch.end(&pods).await?);
        say("under load, keys change");
        let watch = Watch::begin(&pods, &format!("changed-{round}")).await?;
        change_keys(lab).await?;
        changed.push(watch.end(&pods).await?);
        say("under load, an agent is killed");
        let watch = Watch::begin(&pods, &format!("killed-{round}")).await?;
        let node = lab.cluster_mut(0).node_mut(0);
        node.stop_agent(Signal::SIGKILL).await?;
        node.start_agent().await?;
        killed.push(watch.end(&pods).await?);
        load.end().await?;
    }
    echoing.stop(Signal::SIGTERM).await?;
    Ok(figures(&streams, &quiet, &changed, &killed))
}

fn figures(
    streams: &[f64],
    quiet: &[Noticed],
    changed: &[Noticed],
    killed: &[Noticed],
) -> Vec<Figure> {
    let of =
        |seen: &[Noticed], what: fn(&Noticed) -> f64| -> Series { seen.iter().map(what).collect() };
    let beside = |mut figure: Figure, peer: &[f64]| {
        figure.peer = Some(median(peer));
        "the same time without it".clone_into(&mut figure.peer_name);
        figure
    };
    let named = |id, row, unit| Named { id, row, unit };
    let more: Series = changed
        .iter()
        .zip(quiet)
        .map(|(changed, quiet)| changed.retransmitted - quiet.retransmitted)
        .collect();
    vec![
        alone(
            named(
                "wg-pods",
                "pod to pod through VXLAN and WireGuard, one TCP stream",
                "Gbit/s",
            ),
            streams,
            Target::Report,
        ),
        beside(
            alone(
                named(
                    "wg-rotate",
                    "keys change under full load: datagrams lost, of 1,000 a second",
                    "datagrams",
                ),
                &of(changed, |seen| seen.lost),
                Target::AtMost(0.0),
            ),
            &of(quiet, |seen| seen.lost),
        ),
        beside(
            alone(
                named(
                    "wg-rotate-tcp",
                    "the same: TCP segments sent again, more than without a change",
                    "segments",
                ),
                &more,
                Target::AtMost(0.0),
            ),
            &of(quiet, |seen| seen.retransmitted),
        ),
        beside(
            alone(
                named(
                    "wg-agent-killed",
                    "an agent is killed under full load and started again: longest echo on a connection",
                    "ms",
                ),
                &of(killed, |seen| seen.echo_ms),
                Target::AtMost(RESTORED_MS_MAX),
            ),
            &of(quiet, |seen| seen.echo_ms),
        ),
    ]
}

/// One pod on either node, which reach each other encrypted.
async fn pods(lab: &Lab) -> Result<Pods> {
    let cluster = lab.cluster(0);
    let both = format!(
        "{}{}",
        workload("client", "bench"),
        workload("server", "bench")
    );
    cluster.apply(&both).await?;
    let client = cluster.node(0).add_pod(NAMESPACE, "client").await?;
    let server = cluster.node(1).add_pod(NAMESPACE, "server").await?;
    cluster.wait_converged(20).await?;
    for node in cluster.nodes() {
        until("the other node is reached encrypted", || async {
            let status = node.encryption_status().await?;
            Ok((status["peers"][0]["traffic"] == "encrypted").then_some(()))
        })
        .await?;
    }
    Ok(Pods { client, server })
}

/// The epoch of a node's key; `None` while it has two devices.
async fn epoch(node: &Node) -> Result<Option<u64>> {
    let status = node.encryption_status().await?;
    match status["devices"].as_array().map(Vec::as_slice) {
        Some([device]) => Ok(device["epoch"].as_u64()),
        _ => Ok(None),
    }
}

/// Changes the keys of all nodes, and waits until the old ones are gone.
async fn change_keys(lab: &Lab) -> Result<()> {
    let nodes = lab.cluster(0).nodes();
    let first = nodes.first().context("a node")?;
    let before = epoch(first).await?.context("keys are changing already")?;
    first.rotate_keys().await?;
    let begun = Instant::now();
    for node in nodes {
        while epoch(node).await? != Some(before + 1) {
            ensure!(
                begun.elapsed() < CHANGE_MAX,
                "keys have not changed on {} within {CHANGE_MAX:?}: {:#}",
                node.name(),
                node.encryption_status().await?
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    tokio::time::sleep(AFTERWARDS).await;
    Ok(())
}

/// Gbit/s of one stream.
async fn stream(pods: &Pods, port: usize) -> Result<f64> {
    let (port, server) = listening(pods, port).await?;
    let mut command = pods.client.command(Path::new("iperf3"));
    command.args(["-c", pods.server.address(false)?, "-p", &port]);
    let output = run(command.args(["-t", STREAM_SECONDS, "-J"])).await?;
    server.stop(Signal::SIGKILL).await?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3's report: {report}"))? / 1e9)
}

/// A server of iperf3 for one client.
async fn listening(pods: &Pods, port: usize) -> Result<(String, Process)> {
    let port = port.to_string();
    let mut command = pods.server.command(Path::new("iperf3"));
    command.args(["-s", "-1", "--forceflush", "-p", &port]);
    let log = std::env::temp_dir().join(format!("{}-iperf3-{port}.log", pods.server.netns()));
    let server = Process::start("iperf3", &mut command, &log)?;
    until("iperf3 listens", || async {
        Ok(server.log_tail().contains("listening").then_some(()))
    })
    .await?;
    std::fs::remove_file(&log)?;
    Ok((port, server))
}

/// One TCP stream that takes all that the machine has left.
struct Load {
    client: Process,
    server: Process,
}

impl Load {
    async fn begin(pods: &Pods, port: usize) -> Result<Self> {
        let (port, server) = listening(pods, port).await?;
        let mut command = pods.client.command(Path::new("iperf3"));
        command.args(["-c", pods.server.address(false)?, "-p", &port]);
        command.args(["-t", LOAD_SECONDS]);
        let client = Process::start("iperf3", &mut command, Path::new("/dev/null"))?;
        Ok(Self { client, server })
    }

    /// An error where it ended before: then there was no load.
    async fn end(mut self) -> Result<()> {
        ensure!(!self.client.has_ended()?, "the load has ended by itself");
        self.client.stop(Signal::SIGKILL).await?;
        self.server.stop(Signal::SIGKILL).await?;
        Ok(())
    }
}

/// Numbered datagrams and a connection beside the load, and the counter of segments that were sent again.
struct Watch {
    begun: Instant,
    datagrams: Process,
    connection: Process,
    retransmitted: u64,
}

impl Watch {
    async fn begin(pods: &Pods, label: &str) -> Result<Self> {
        let to = format!("{}:{ECHO_PORT}", pods.server.address(false)?);
        let client = &pods.client;
        let connection = ["stream", "--to", &to, "--every-ms", MESSAGE_EVERY_MS];
        let connection = client
            .start(&format!("stream-{label}"), &connection)
            .await?;
        let datagrams = ["udp", "--to", &to, "--every-ms", DATAGRAM_EVERY_MS];
        let datagrams = client.start(&format!("udp-{label}"), &datagrams).await?;
        Ok(Self {
            begun: Instant::now(),
            datagrams,
            connection,
            retransmitted: retransmitted(client).await?,
        })
    }

    async fn end(self, pods: &Pods) -> Result<Noticed> {
        tokio::time::sleep(WATCHED.saturating_sub(self.begun.elapsed())).await;
        let retransmitted = retransmitted(&pods.client).await? - self.retransmitted;
        let datagrams = self.datagrams.finish().await?;
        let connection = self.connection.finish().await?;
        ensure!(connection["broken"] == false, "{connection}");
        let number = |report: &Value, name: &str| {
            let number = report[name].as_f64();
            number.with_context(|| format!("no {name} in {report}"))
        };
        Ok(Noticed {
            lost: number(&datagrams, "lost")? + number(&datagrams, "send_errors")?,
            #[expect(clippy::cast_precision_loss, reason = "a small number")]
            retransmitted: retransmitted as f64,
            echo_ms: number(&connection, "echo_ms_max")?,
        })
    }
}

/// Segments that the pod's sockets have sent again (`RetransSegs` of RFC 1213).
async fn retransmitted(pod: &Pod) -> Result<u64> {
    let output = run(pod.command(Path::new("cat")).arg("/proc/net/snmp")).await?;
    retransmitted_of(&String::from_utf8_lossy(&output.stdout))
}

fn retransmitted_of(text: &str) -> Result<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = lines.next().zip(lines.next()).context("/proc/net/snmp")?;
    names
        .split_whitespace()
        .zip(values.split_whitespace())
        .find(|(name, _)| *name == "RetransSegs")
        .and_then(|(_, value)| value.parse().ok())
        .context("no RetransSegs in /proc/net/snmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_of_segments_sent_again_is_read_by_its_name() {
        let text = "Ip: Forwarding\nIp: 1\nTcp: RtoMax OutSegs RetransSegs InErrs\nTcp: 120 9 41 0\nUdp: a\nUdp: 1\n";
        assert_eq!(retransmitted_of(text).unwrap(), 41);
        assert!(retransmitted_of("Tcp: RtoMax\nTcp: 1\n").is_err());
        assert!(retransmitted_of("").is_err());
    }

    #[test]
    fn one_lost_datagram_or_segment_misses_the_goal() {
        let seen = |lost, retransmitted, echo_ms| Noticed {
            lost,
            retransmitted,
            echo_ms,
        };
        let quiet = [seen(0.0, 7.0, 3.0)];
        let met = |changed, killed| -> Vec<bool> {
            let figures = figures(&[1.0], &quiet, &[changed], &[killed]);
            figures.iter().map(|figure| figure.met).collect()
        };
        assert_eq!(met(seen(0.0, 7.0, 900.0), seen(9.0, 9.0, 400.0)), [true; 4]);
        assert_eq!(
            met(seen(1.0, 8.0, 1.0), seen(0.0, 0.0, 501.0)),
            [true, false, false, false]
        );
    }
}
