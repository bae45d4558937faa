//! What the rows share: the lab, its pods, its services.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::Lab;
use crate::lab::pod::Pod;
use crate::lab::process::Process;

/// Port of every backend.
pub const BACKEND_PORT: u16 = 8080;
/// Port of every service.
pub const SERVICE_PORT: u16 = 80;
/// Namespace of everything in the demo.
pub const NAMESPACE: &str = "shop";

/// Whether each row's ground is pulled away first, to prove that it can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// A normal run.
    None,
    /// Every row must fail.
    EveryRow,
}

/// The lab with its actors.
#[derive(Debug)]
pub struct Scene {
    /// The lab.
    pub lab: Lab,
    /// When the lab began to be built.
    pub begun: Instant,
    sabotage: Sabotage,
    pods: BTreeMap<&'static str, Pod>,
    servers: BTreeMap<&'static str, Process>,
}

/// A pod of the demo: name, cluster and node by place, whether it is a backend.
pub const PODS: [(&str, usize, usize, bool); 6] = [
    ("web-a", 0, 0, true),
    ("side-a", 0, 0, false),
    ("client-a", 0, 1, false),
    ("web-b", 1, 0, true),
    ("side-b", 1, 0, false),
    ("client-b", 1, 1, false),
];

impl Scene {
    pub(super) const fn new(lab: Lab, sabotage: Sabotage, begun: Instant) -> Self {
        Self {
            lab,
            begun,
            sabotage,
            pods: BTreeMap::new(),
            servers: BTreeMap::new(),
        }
    }

    /// Whether the row that asks is to be made to fail.
    #[must_use]
    pub fn sabotaged(&self) -> bool {
        self.sabotage == Sabotage::EveryRow
    }

    /// Attaches a pod of [`PODS`] and starts its server.
    ///
    /// # Errors
    /// When the plugin or the server fails.
    pub async fn add_pod(&mut self, name: &'static str) -> Result<()> {
        let (_, cluster, node, _) = PODS
            .iter()
            .find(|(pod, ..)| *pod == name)
            .context("no such pod")?;
        let pod = self
            .lab
            .cluster(*cluster)
            .node(*node)
            .add_pod(NAMESPACE, name)
            .await?;
        self.pods.insert(name, pod);
        self.start_server(name).await
    }

    /// Starts the server of a pod: TCP and UDP on [`BACKEND_PORT`].
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn start_server(&mut self, name: &'static str) -> Result<()> {
        let port = BACKEND_PORT.to_string();
        let server = self
            .pod(name)?
            .start(
                "serve",
                &["serve", "--name", name, "--tcp", &port, "--udp", &port],
            )
            .await?;
        self.servers.insert(name, server);
        Ok(())
    }

    /// Ends the server of a pod.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn stop_server(&mut self, name: &str, signal: Signal) -> Result<()> {
        let server = self.servers.remove(name).context("no such server")?;
        server.stop(signal).await?;
        Ok(())
    }

    /// Signals the server of a pod.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal_server(&self, name: &str, signal: Signal) -> Result<()> {
        self.servers
            .get(name)
            .context("no such server")?
            .signal(signal)
    }

    /// Detaches a pod and removes it.
    ///
    /// # Errors
    /// When the plugin fails.
    pub async fn delete_pod(&mut self, name: &str) -> Result<()> {
        let pod = self.pods.remove(name).context("no such pod")?;
        pod.delete().await?;
        // Its processes lived in its namespace only.
        if let Some(server) = self.servers.remove(name) {
            server.stop(Signal::SIGKILL).await?;
        }
        Ok(())
    }

    /// A pod by name.
    ///
    /// # Errors
    /// When it was not attached.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods
            .get(name)
            .with_context(|| format!("pod {name} is not attached"))
    }

    /// The address and port of a pod's server.
    ///
    /// # Errors
    /// When the pod has no address of the family.
    pub fn backend(&self, name: &str, v6: bool) -> Result<String> {
        Ok(socket_address(self.pod(name)?.address(v6)?, BACKEND_PORT))
    }

    /// The virtual address and port of a service in a cluster.
    ///
    /// # Errors
    /// When the service is not there.
    pub async fn service(&self, cluster: usize, name: &str, v6: bool) -> Result<String> {
        let address = self
            .lab
            .cluster(cluster)
            .service_address(NAMESPACE, name, v6)
            .await?;
        Ok(socket_address(&address, SERVICE_PORT))
    }

    /// Runs a bounded probe in a pod and returns its counts.
    ///
    /// # Errors
    /// When the tool fails.
    pub async fn probe(&self, pod: &str, to: &str, attempts: u32) -> Result<Value> {
        self.pod(pod)?
            .traffic(&[
                "probe",
                "--to",
                to,
                "--attempts",
                &attempts.to_string(),
                "--every-ms",
                "2",
            ])
            .await
    }
}

/// `ADDRESS:PORT`, with brackets where the address is IPv6.
#[must_use]
pub fn socket_address(address: &str, port: u16) -> String {
    if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    }
}
