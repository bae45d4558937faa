//! What passes between a node and its router, as tcpdump sees it there.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;
use nix::sys::signal::Signal;
use tokio::process::Command;

use super::Lab;
use super::cluster::Cluster;
use super::host::{command_in, run};
use super::node::Node;
use super::process::Process;
use crate::scenario::until;

/// Everything in clear that has to do with pods: tunnel packets, their addresses, and the virtual ones of services.
pub const PODS_IN_CLEAR: &str = "udp port 8472 or net 10.1.0.0/16 or net 10.2.0.0/16 or net fd0c:1::/48 or \
     net fd0c:2::/48 or net 10.101.0.0/16 or net 10.102.0.0/16 or net fd60:1::/112 or net fd60:2::/112";
/// What WireGuard sends.
pub const WIREGUARD: &str = "udp portrange 51871-51872";

/// Port of the packet that ends a capture; every filter takes it too.
const LAST_PORT: u16 = 9;

/// A capture at a router's port of a node.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
    place: String,
    node_netns: String,
    router_address: String,
}

impl Capture {
    /// Begins to capture what `filter` takes.
    ///
    /// # Errors
    /// When tcpdump does not start.
    pub async fn open(lab: &Lab, cluster: &Cluster, node: &Node, filter: &str) -> Result<Self> {
        let (router, port) = (cluster.router_netns(), node.name());
        let place = format!("{}-{port}", cluster.name());
        // A log of its own: the line of an earlier capture would be taken for this one's.
        static CAPTURES: AtomicU32 = AtomicU32::new(0);
        let number = CAPTURES.fetch_add(1, Ordering::Relaxed);
        let name = format!("{place}-{number}");
        let file = lab.folder().join(format!("{name}.pcap"));
        let mut command = command_in(router, None, Path::new("tcpdump"));
        command
            .args(["-Z", "root", "-n", "-U", "-s", "128", "-i", port])
            // Otherwise the last second is never written.
            .args(["--immediate-mode", "-w"])
            .arg(&file)
            .arg(format!("{filter} or udp port {LAST_PORT}"));
        let log = lab.folder().join(format!("{name}-tcpdump.log"));
        let process = Process::start("tcpdump", &mut command, &log)?;
        until("tcpdump listens", || async {
            Ok(process.log_tail().contains("listening on").then_some(()))
        })
        .await?;
        Ok(Self {
            process,
            file,
            place,
            node_netns: node.netns().to_owned(),
            router_address: format!("172.30.{}.1", cluster.id()),
        })
    }

    /// At every node's port.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn everywhere(lab: &Lab, filter: &str) -> Result<Vec<Self>> {
        let mut captures = Vec::new();
        for cluster in lab.clusters() {
            for node in cluster.nodes() {
                captures.push(Self::open(lab, cluster, node, filter).await?);
            }
        }
        Ok(captures)
    }

    /// Ends it: the packets, one line each. A last one shows that all before it have been looked at.
    ///
    /// # Errors
    /// When the last packet is not seen.
    pub async fn close(self) -> Result<Vec<String>> {
        let end = format!("{}.{LAST_PORT}", self.router_address);
        let send = format!("echo end > /dev/udp/{}/{LAST_PORT}", self.router_address);
        let packets = until("the last packet", || async {
            let mut command = command_in(&self.node_netns, None, Path::new("bash"));
            run(command.args(["-c", &send])).await?;
            let mut command = Command::new("tcpdump");
            let output = run(command.args(["-n", "-r"]).arg(&self.file)).await?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            Ok(lines
                .iter()
                .any(|line| line.contains(&end))
                .then_some(lines))
        })
        .await?;
        self.process.stop(Signal::SIGINT).await?;
        let others = packets.into_iter().filter(|line| !line.contains(&end));
        Ok(others
            .map(|line| format!("{}: {line}", self.place))
            .collect())
    }
}
