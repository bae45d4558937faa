//! What scenarios of encryption share: pods on every node, traffic of every kind between them, and nothing in clear.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::Value;

use super::{NAMESPACE, until, workload};
use crate::lab::Lab;
use crate::lab::capture::Capture;
use crate::lab::host::run;
use crate::lab::node::Node;
use crate::lab::pod::Pod;
use crate::lab::process::Process;

/// Longest that convergence may take.
const CONVERGED_SECONDS_MAX: u32 = 30;
/// Port of the pods' servers.
pub const PORT: u16 = 8080;
/// Port of the service that has all of them as backends.
const SERVICE_PORT: u16 = 80;
/// Bytes of an echo request that goes in fragments.
const FRAGMENTED_BYTES: &str = "4000";
/// Connections to the service, in which every backend is met.
const SERVICE_CONNECTIONS: &str = "40";
/// Longest that one echo may take, milliseconds: far less than a connection that broke.
const ECHO_MS_MAX: f64 = 5_000.0;
/// Least number of echoes that show that traffic goes on.
const ECHOES_MIN: u64 = 10;

/// Ends all captures.
///
/// # Errors
/// When one has seen a packet.
pub async fn nothing_in_clear(taps: Vec<Capture>) -> Result<()> {
    for tap in taps {
        let seen = tap.close().await?;
        let first = &seen[..seen.len().min(10)];
        ensure!(
            seen.is_empty(),
            "{} packets in clear: {first:#?}",
            seen.len()
        );
    }
    Ok(())
}

/// Waits until packets from the node to so many others travel like this; gives the status.
///
/// # Errors
/// When that does not happen in time; with status and log.
pub async fn until_traffic(node: &Node, traffic: &str, count: usize) -> Result<Value> {
    let what = format!("{count} nodes reached {traffic}");
    let seen = until(&what, || async {
        let status = node.encryption_status().await?;
        let peers = status["peers"].as_array().cloned().unwrap_or_default();
        let like = peers.iter().filter(|peer| peer["traffic"] == traffic);
        Ok((like.count() == count).then_some(status))
    });
    match seen.await {
        Ok(status) => Ok(status),
        Err(error) => Err(error.context(format!(
            "{:?}; {}",
            node.encryption_status().await,
            node.agent()?.log_tail()
        ))),
    }
}

/// A pod with a server on every node, the first of the list on the first node of the first cluster; and a service in
/// every cluster that has all of them as backends.
///
/// # Errors
/// When something is refused, or does not converge.
pub async fn pods(lab: &Lab) -> Result<(Vec<Pod>, Vec<Process>)> {
    let (mut pods, mut servers) = (Vec::new(), Vec::new());
    for cluster in lab.clusters() {
        for node in cluster.nodes() {
            let name = format!("{}-{}", cluster.name(), node.name());
            cluster.apply(&workload(&name, "web")).await?;
            let pod = node.add_pod(NAMESPACE, &name).await?;
            servers.push(serve(&pod, "serve").await?);
            pods.push(pod);
        }
        let service = format!(
            "apiVersion: clustermesh.io/v1\nkind: Service\nmetadata:\n  namespace: {NAMESPACE}\n  name: web\n  \
             annotations:\n    service.cilium.io/global: \"true\"\nspec:\n  selector:\n    app: web\n  ports:\n    \
             - name: http\n      protocol: TCP\n      port: {SERVICE_PORT}\n      targetPort: {PORT}\n"
        );
        cluster.apply(&service).await?;
    }
    for cluster in lab.clusters() {
        cluster.wait_converged(CONVERGED_SECONDS_MAX).await?;
    }
    Ok((pods, servers))
}

/// Starts the server of a pod, for TCP and UDP.
///
/// # Errors
/// When it does not get ready.
pub async fn serve(pod: &Pod, label: &str) -> Result<Process> {
    let port = PORT.to_string();
    let name = pod.name();
    let arguments = ["serve", "--name", name, "--tcp", &port, "--udp", &port];
    pod.start(label, &arguments).await
}

fn server_of(pod: &Pod, v6: bool) -> Result<String> {
    Ok(SocketAddr::new(pod.address(v6)?.parse()?, PORT).to_string())
}

/// Echo requests, whole and in fragments, and connections from every pod to every other, in both families; those of one
/// pod beside each other.
///
/// # Errors
/// When one is not answered.
pub async fn all_reach_all(pods: &[Pod]) -> Result<()> {
    for from in pods {
        let others = pods.iter().filter(|to| to.name() != from.name());
        let ways = others.flat_map(|to| [(to, false), (to, true)]);
        let reached = ways.map(|(to, v6)| async move {
            let reached = reaches(from, to, v6).await;
            reached.with_context(|| format!("{} to {} v6 {v6}", from.name(), to.name()))
        });
        try_join_all(reached).await?;
    }
    Ok(())
}

async fn reaches(from: &Pod, to: &Pod, v6: bool) -> Result<()> {
    let address = to.address(v6)?;
    from.ping(address).await?;
    // The first may be answered by "too big": a path has become narrower.
    let mut ping = from.command(Path::new("ping"));
    ping.args(["-n", "-c", "3", "-i", "0.1", "-W", "5"]);
    ping.args(["-s", FRAGMENTED_BYTES, address]);
    run(&mut ping).await?;
    let server = server_of(to, v6)?;
    let arguments = ["probe", "--to", &server, "--attempts", "5"];
    let report = from.traffic(&arguments).await?;
    ensure!(report["failed"] == 0, "{report}");
    Ok(())
}

/// Connections from every pod to the virtual address of its cluster, until each backend of the mesh has answered.
///
/// # Errors
/// When one has not in time.
pub async fn all_backends_answer(lab: &Lab, pods: &[Pod]) -> Result<()> {
    let per_cluster = pods.len() / lab.clusters().len();
    for (cluster, of_cluster) in lab.clusters().iter().zip(pods.chunks(per_cluster)) {
        for v6 in [false, true] {
            let address = cluster.service_address(NAMESPACE, "web", v6).await?;
            let to = SocketAddr::new(address.parse()?, SERVICE_PORT).to_string();
            for from in of_cluster {
                until("every backend answers at the virtual address", || async {
                    let arguments = ["probe", "--to", &to, "--attempts", SERVICE_CONNECTIONS];
                    let report = from.traffic(&arguments).await?;
                    let met = |pod: &Pod| report["by_name"][pod.name()].as_u64() > Some(0);
                    Ok((report["failed"] == 0 && pods.iter().all(met)).then_some(()))
                })
                .await?;
            }
        }
    }
    Ok(())
}

/// Echo requests from every node to the pods of all others, in both families.
///
/// # Errors
/// When one is not answered.
pub async fn nodes_reach_pods(lab: &Lab, pods: &[Pod]) -> Result<()> {
    for node in lab.clusters().iter().flat_map(|cluster| cluster.nodes()) {
        for to in pods {
            for v6 in [false, true] {
                let mut ping = node.command(Path::new("ping"));
                ping.args(["-n", "-c", "2", "-i", "0.05", "-W", "5", to.address(v6)?]);
                let pinged = run(&mut ping).await;
                pinged.with_context(|| format!("{} to {}", node.netns(), to.name()))?;
            }
        }
    }
    Ok(())
}

/// Traffic that goes on: connections and datagrams.
#[derive(Debug)]
pub struct Streams(Vec<(Process, String)>);

impl Streams {
    /// A connection and datagrams in each family from each pod to the next.
    ///
    /// # Errors
    /// When one does not begin.
    pub async fn begin(pods: &[Pod]) -> Result<Self> {
        let mut streams = Vec::new();
        for (from, to) in pods.iter().zip(pods.iter().cycle().skip(1)) {
            for v6 in [false, true] {
                let server = server_of(to, v6)?;
                for tool in ["stream", "udp"] {
                    let label = format!("{tool}-{v6}");
                    let arguments = [tool, "--to", &server, "--every-ms", "20"];
                    let stream = from.start(&label, &arguments).await?;
                    streams.push((stream, format!("{tool} from {} to {server}", from.name())));
                }
            }
        }
        Ok(Self(streams))
    }

    /// Ends them all: no connection may have broken or stood still for long.
    ///
    /// # Errors
    /// When one has, or nothing came back.
    pub async fn finish(self) -> Result<()> {
        for (stream, what) in self.0 {
            let report = stream.finish().await?;
            let echoed = report["echoed"].as_u64().or(report["received"].as_u64());
            ensure!(echoed > Some(ECHOES_MIN), "{what}: {report}");
            if let Some(longest) = report["echo_ms_max"].as_f64() {
                let is_well = report["broken"] == false && longest < ECHO_MS_MAX;
                ensure!(is_well, "{what}: {report}");
            }
        }
        Ok(())
    }
}

/// Waits until the first pod and all others reach each other, one way in each family.
///
/// # Errors
/// When they do not in time.
pub async fn until_first_reaches_all(pods: &[Pod]) -> Result<()> {
    let (first, others) = pods.split_first().context("a pod")?;
    until("every pod answers again", || async {
        for to in others {
            first.ping(to.address(false)?).await?;
            to.ping(first.address(true)?).await?;
        }
        Ok(Some(()))
    })
    .await
}
