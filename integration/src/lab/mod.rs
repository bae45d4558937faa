//! The lab: clusters as network namespaces on one machine, real binaries as processes.
//!
//! Each cluster is a bridge with a router, the replicas of a server and its nodes; the routers are joined by a
//! [`wan::Wan`] that delays, cuts and heals. Every name bears a prefix of the run, so that runs
//! do not collide, and everything is removed at the end, also after a crash of an earlier run.

pub mod capture;
pub mod clock;
pub mod cluster;
pub mod host;
pub mod node;
mod observe;
pub mod partition;
pub mod pod;
pub mod process;
pub mod replica;
pub mod requirements;
pub mod store;
pub mod tap;
pub mod teardown;
pub mod wan;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use cluster::Cluster;
use teardown::PREFIX_START;
use wan::Wan;

/// Clusters in one lab.
pub const CLUSTERS_MAX: usize = 2;
/// Nodes in one cluster of a lab.
pub const NODES_PER_CLUSTER_MAX: usize = 9;
/// Replicas that the server of a cluster may begin with.
pub const REPLICAS: [usize; 3] = [1, 3, 5];

/// How the agents attach their programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// tcx links where the kernel has them, else clsact.
    Auto,
    /// tcx links (kernel 6.6).
    Tcx,
    /// The clsact queueing discipline.
    Clsact,
}

/// How pods of different nodes reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingMode {
    /// VXLAN.
    Tunnel,
    /// The underlay routes pod addresses.
    Direct,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Cluster names; ids are 1, 2, …
    pub clusters: Vec<String>,
    /// Replicas of each cluster's server, each on a machine of its own: 1, 3 or 5.
    pub replicas: usize,
    /// Machines in each beside those; none for a server alone.
    pub nodes_per_cluster: usize,
    /// How many of them run an agent; the others are bare machines, for comparison.
    pub agents_per_cluster: usize,
    /// How programs are attached.
    pub attach_mode: AttachMode,
    /// How packets travel.
    pub routing_mode: RoutingMode,
    /// Whether the underlay between tunnel ends is IPv6.
    pub underlay_v6: bool,
    /// What stands below `[encryption]` in the agents' configuration; empty: nothing is encrypted.
    pub encryption: &'static str,
    /// Folder of the binaries under test.
    pub binaries: PathBuf,
}

impl LabConfig {
    /// Two clusters of two nodes, the best attach mode, tunnel, IPv4 underlay, binaries beside the running one.
    ///
    /// # Errors
    /// When the running binary's folder cannot be told.
    pub fn two_by_two() -> Result<Self> {
        Ok(Self {
            clusters: vec!["a".to_owned(), "b".to_owned()],
            replicas: 1,
            nodes_per_cluster: 2,
            agents_per_cluster: 2,
            attach_mode: AttachMode::Auto,
            routing_mode: RoutingMode::Tunnel,
            underlay_v6: false,
            encryption: "",
            binaries: binaries_folder()?,
        })
    }
}

/// Folder of the running build's binaries.
///
/// # Errors
/// When the running program's path is not known.
pub fn binaries_folder() -> Result<PathBuf> {
    let program = std::env::current_exe().context("path of the running program")?;
    let mut folder = program.parent().context("no parent folder")?;
    if folder.ends_with("deps") {
        folder = folder.parent().context("no parent folder")?;
    }
    Ok(folder.to_owned())
}

/// A running lab. [`Lab::remove`] takes it down; a lab that is dropped is removed by the next one.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    folder: PathBuf,
    config: LabConfig,
    wan: Wan,
    wan_tasks: Vec<tokio::task::JoinHandle<()>>,
    clusters: Vec<Cluster>,
}

impl Lab {
    /// Builds the namespaces and links; no process runs yet.
    ///
    /// # Errors
    /// When the machine lacks something, or a command fails; what was made is removed again.
    pub async fn build(config: LabConfig) -> Result<Self> {
        let missing = requirements::missing();
        if !missing.is_empty() {
            bail!("this machine lacks: {}", missing.join("; "));
        }
        if config.clusters.is_empty()
            || config.clusters.len() > CLUSTERS_MAX
            || config.nodes_per_cluster > NODES_PER_CLUSTER_MAX
        {
            bail!("a lab has 1 to {CLUSTERS_MAX} clusters of up to {NODES_PER_CLUSTER_MAX} nodes");
        }
        if !REPLICAS.contains(&config.replicas) {
            bail!(
                "{} replicas: the server of a cluster begins with 1, 3 or 5",
                config.replicas
            );
        }
        for prefix in teardown::abandoned() {
            teardown::remove_lab(&prefix).await;
        }
        let prefix = new_prefix();
        let folder = teardown::make_folder(&prefix)?;
        let mut lab = Self {
            prefix,
            folder,
            config,
            wan: Wan::default(),
            wan_tasks: Vec::new(),
            clusters: Vec::new(),
        };
        if let Err(error) = lab.wire().await {
            lab.remove().await;
            return Err(error);
        }
        Ok(lab)
    }

    async fn wire(&mut self) -> Result<()> {
        let mut taps = Vec::new();
        for (index, name) in self.config.clusters.clone().iter().enumerate() {
            let id = u8::try_from(index + 1)?;
            let cluster = Cluster::wire(self, name, id).await?;
            if self.config.clusters.len() > 1 {
                taps.push(cluster.open_wan().await?);
            }
            self.clusters.push(cluster);
        }
        let mut taps = taps.into_iter();
        if let (Some(left), Some(right)) = (taps.next(), taps.next()) {
            self.wan_tasks.extend(self.wan.join(left, right)?);
            for cluster in &self.clusters {
                cluster.route_to_others(&self.clusters).await?;
            }
        }
        Ok(())
    }

    /// Starts every server and every agent and waits until all are ready.
    ///
    /// # Errors
    /// When one does not get ready; the message ends with its log.
    pub async fn start(&mut self) -> Result<()> {
        let all: Vec<_> = self.clusters.iter().map(Cluster::as_peer).collect();
        for cluster in &mut self.clusters {
            cluster.issue_certificates().await?;
        }
        for cluster in &mut self.clusters {
            cluster.start_server(&all).await?;
        }
        for cluster in &mut self.clusters {
            for node in cluster
                .nodes_mut()
                .iter_mut()
                .take(self.config.agents_per_cluster)
            {
                node.start_agent().await?;
            }
        }
        Ok(())
    }

    /// For people: the commands that lead into each machine of the lab.
    #[must_use]
    pub fn how_to_enter(&self) -> String {
        use std::fmt::Write as _;
        let mut text = format!("The lab runs; its files are in {}\n", self.folder.display());
        for cluster in &self.clusters {
            // Writing to a string does not fail.
            let _ = writeln!(text, "  cluster {}: {}", cluster.name(), cluster.cli_text());
            for replica in cluster.replicas() {
                let _ = writeln!(
                    text,
                    "    server {}: nsenter --net=/run/netns/{}",
                    replica.name(),
                    replica.netns()
                );
            }
            for node in cluster.nodes() {
                let _ = writeln!(
                    text,
                    "    node {}: nsenter --net=/run/netns/{}",
                    node.name(),
                    node.netns()
                );
            }
        }
        text
    }

    /// First part of every name of this lab.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Where the lab keeps its files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was asked for.
    #[must_use]
    pub const fn config(&self) -> &LabConfig {
        &self.config
    }

    /// The link between the clusters.
    #[must_use]
    pub const fn wan(&self) -> &Wan {
        &self.wan
    }

    /// A cluster by its place, from 0.
    #[must_use]
    pub fn cluster(&self, index: usize) -> &Cluster {
        &self.clusters[index]
    }

    /// A cluster by its place, to change it.
    pub fn cluster_mut(&mut self, index: usize) -> &mut Cluster {
        &mut self.clusters[index]
    }

    /// All clusters.
    #[must_use]
    pub fn clusters(&self) -> &[Cluster] {
        &self.clusters
    }

    /// Ends every process and removes every name; reports what could not be removed.
    pub async fn remove(mut self) -> Vec<String> {
        for cluster in std::mem::take(&mut self.clusters) {
            cluster.stop().await;
        }
        for task in self.wan_tasks.drain(..) {
            task.abort();
        }
        teardown::remove_lab(&self.prefix).await
    }
}

fn new_prefix() -> String {
    static LABS: AtomicU32 = AtomicU32::new(0);
    let number = LABS.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX_START}{:x}x{number}", std::process::id())
}
