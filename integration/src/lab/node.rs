//! One node of the lab: its namespace, its cgroup, its bpffs, its agent, its pods.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::host::{cgroup2_root, command_in, run, sh};
use super::pod::{Place, Pod};
use super::process::Process;
use super::{AttachMode, Lab, RoutingMode};

/// Longest that an agent may take to find out that it cannot run.
const GIVE_UP_SECONDS_MAX: u64 = 15;

/// Where the settings of encryption begin, at the end of the configuration.
const ENCRYPTION_HEADING: &str = "\n[encryption]\n";

fn encryption_section(folder: &Path, settings: &str) -> String {
    // The sockets of all nodes would have the same names.
    let sockets = folder.join("run/wireguard");
    format!(
        "{ENCRYPTION_HEADING}socket_dir = {:?}\n{settings}\n",
        sockets.display().to_string()
    )
}

/// What a node knows of its cluster.
pub(super) struct Home {
    pub(super) cluster: String,
    pub(super) cluster_id: u8,
    /// Folder of the cluster.
    pub(super) folder: PathBuf,
    /// Where clients reach the replicas.
    pub(super) endpoints: Vec<String>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    name: String,
    cluster: String,
    cluster_id: u8,
    number: u8,
    netns: String,
    folder: PathBuf,
    cgroup: PathBuf,
    binaries: PathBuf,
    config_text: String,
    agent: Option<Process>,
}

impl Node {
    pub(super) async fn prepare(lab: &Lab, home: Home, netns: &str, number: u8) -> Result<Self> {
        let name = format!("n{number}");
        let folder = home.folder.join(&name);
        let bpffs = folder.join("bpf");
        std::fs::create_dir_all(&bpffs)?;
        std::fs::create_dir_all(folder.join("run"))?;
        let bpffs = bpffs.display().to_string();
        sh("mount", &["-t", "bpf", "none", &bpffs]).await?;
        let cgroup = cgroup2_root()?
            .join(lab.prefix())
            .join(format!("{}-{name}", home.cluster));
        std::fs::create_dir_all(&cgroup).with_context(|| cgroup.display().to_string())?;
        let pki = lab.folder().join("pki");
        let attach_mode = match lab.config().attach_mode {
            AttachMode::Auto => "auto",
            AttachMode::Tcx => "tcx",
            AttachMode::Clsact => "clsact",
        };
        let (id, host) = (home.cluster_id, 10 + number);
        let underlay = if lab.config().underlay_v6 {
            format!("\"fd30:{id}::{host}\"")
        } else {
            format!("\"172.30.{id}.{host}\", \"fd30:{id}::{host}\"")
        };
        let mut config_text = format!(
            r#"node = "{name}"
cluster = "{cluster}"
state_dir = "{folder}/state"
run_dir = "{folder}/run"
bpffs = "{bpffs}"
cgroup = "{cgroup}"
attach_mode = "{attach_mode}"
routing = "{routing}"
underlay_devices = ["eth0"]
underlay_addresses = [{underlay}]
admin = "127.0.0.1:9964"
probe_interval_ms = 200

[server]
endpoints = {endpoints:?}

[server.tls]
ca = "{pki}/ca.crt"
cert = "{pki}/{cluster}/{name}.crt"
key = "{pki}/{cluster}/{name}.key"
"#,
            cluster = home.cluster,
            endpoints = home.endpoints,
            folder = folder.display(),
            cgroup = cgroup.display(),
            routing = match lab.config().routing_mode {
                RoutingMode::Tunnel => "tunnel",
                RoutingMode::Direct => "direct",
            },
            pki = pki.display(),
        );
        if !lab.config().encryption.is_empty() {
            config_text.push_str(&encryption_section(&folder, lab.config().encryption));
        }
        Ok(Self {
            name,
            cluster: home.cluster,
            cluster_id: id,
            number,
            netns: netns.to_owned(),
            folder,
            cgroup,
            binaries: lab.config().binaries.clone(),
            config_text,
            agent: None,
        })
    }

    /// Starts the agent of the build under test and waits until it is ready.
    ///
    /// # Errors
    /// When it does not get ready; the message ends with its log.
    pub async fn start_agent(&mut self) -> Result<()> {
        let program = self.binaries.join("clustermesh-node");
        self.start_agent_of(&program).await
    }

    /// Starts an agent of another build and waits until it is ready.
    ///
    /// # Errors
    /// As [`Self::start_agent`].
    pub async fn start_agent_of(&mut self, program: &Path) -> Result<()> {
        std::fs::write(self.config_path(), &self.config_text)?;
        let mut command = command_in(&self.netns, Some(&self.cgroup), program);
        command.arg("--config").arg(self.config_path());
        let name = format!("agent of {}/{}", self.cluster, self.name);
        self.agent =
            Some(Process::start_ready(&name, &mut command, &self.folder.join("agent.log")).await?);
        Ok(())
    }

    /// Ends the agent by `signal`.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub async fn stop_agent(&mut self, signal: Signal) -> Result<()> {
        let agent = self.agent.take().context("the agent does not run")?;
        agent.stop(signal).await?;
        Ok(())
    }

    /// Takes away what the agent has put into the kernel, as a boot does; its state folder stays.
    ///
    /// # Errors
    /// When an agent runs, or something cannot be removed.
    pub async fn uninstall(&self) -> Result<()> {
        let mut command = command_in(&self.netns, None, &self.binaries.join("clustermesh-node"));
        command
            .arg("--config")
            .arg(self.config_path())
            .arg("uninstall");
        run(&mut command).await.map(drop)
    }

    /// The agent's process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn agent(&self) -> Result<&Process> {
        self.agent.as_ref().context("the agent does not run")
    }

    /// The agent's own report, as JSON.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn agent_status(&self) -> Result<serde_json::Value> {
        let mut command = command_in(&self.netns, None, &self.binaries.join("clustermesh-node"));
        command
            .arg("--config")
            .arg(self.config_path())
            .args(["status", "-o", "json"]);
        let output = run(&mut command).await?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// How the node's packets to others are encrypted, as JSON.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn encryption_status(&self) -> Result<serde_json::Value> {
        let mut command = command_in(&self.netns, None, &self.binaries.join("clustermesh"));
        command
            .args(["encryption", "status", "-o", "json", "--socket"])
            .arg(self.socket());
        let output = run(&mut command).await?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Makes the node change its WireGuard keys, and with it all others.
    ///
    /// # Errors
    /// When the agent does not answer, or encrypts nothing.
    pub async fn rotate_keys(&self) -> Result<()> {
        let mut command = command_in(&self.netns, None, &self.binaries.join("clustermesh"));
        command
            .args(["encryption", "rotate", "--socket"])
            .arg(self.socket());
        run(&mut command).await.map(drop)
    }

    /// The process of the node's WireGuard device.
    ///
    /// # Errors
    /// When none runs.
    pub fn wireguard_pid(&self) -> Result<nix::unistd::Pid> {
        let processes = std::fs::read_to_string(self.cgroup.join("cgroup.procs"))?;
        processes
            .lines()
            .filter_map(|line| line.parse().ok())
            .find(|pid: &i32| {
                let command = std::fs::read_to_string(format!("/proc/{pid}/comm"));
                // The kernel keeps 15 bytes of the name.
                command.is_ok_and(|command| command.trim() == "clustermesh-wir")
            })
            .map(nix::unistd::Pid::from_raw)
            .with_context(|| format!("no WireGuard device runs on {}", self.name))
    }

    /// Gives the agent settings of encryption when it starts the next time, in place of those that it has.
    pub fn set_encryption(&mut self, settings: &str) {
        let before = self.config_text.split(ENCRYPTION_HEADING).next();
        self.config_text = before.unwrap_or_default().to_owned();
        if !settings.is_empty() {
            let section = encryption_section(&self.folder, settings);
            self.config_text.push_str(&section);
        }
    }

    /// A drop counter of the agent's programs.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn drops(&self, reason: &str) -> Result<u64> {
        let status = self.agent_status().await?;
        Ok(status["drops"][reason].as_u64().unwrap_or(0))
    }

    /// Pod CIDRs of the node.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn pod_cidrs(&self) -> Result<Vec<String>> {
        let status = self.agent_status().await?;
        Ok(status["pod_cidrs"]
            .as_array()
            .map(|cidrs| {
                cidrs
                    .iter()
                    .filter_map(|cidr| cidr.as_str().map(str::to_owned))
                    .collect()
            })
            .unwrap_or_default())
    }

    /// Makes a pod's namespace and attaches it through the CNI plugin.
    ///
    /// # Errors
    /// When the plugin refuses; its JSON error is in the message.
    pub async fn add_pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        Pod::add(self.place(), namespace, name).await
    }

    /// Makes a pod's namespace without attaching it.
    ///
    /// # Errors
    /// When `ip` fails.
    pub async fn prepare_pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        Pod::prepare(self.place(), namespace, name).await
    }

    fn place(&self) -> Place {
        Place {
            netns: self.netns.clone(),
            cgroup: self.cgroup.clone(),
            folder: self.folder.clone(),
            socket: self.socket(),
            binaries: self.binaries.clone(),
        }
    }

    /// Changes the configuration that the agent gets when it starts the next time.
    pub fn edit_config(&mut self, edit: impl FnOnce(&str) -> String) {
        self.config_text = edit(&self.config_text);
    }

    /// Runs an agent that is expected to give up, and returns its exit code and its log.
    ///
    /// # Errors
    /// When it cannot be started, or still runs after a quarter of a minute.
    pub async fn failing_agent(&self, name: &str, config: &str) -> Result<(Option<i32>, String)> {
        let path = self.folder.join(format!("{name}.toml"));
        std::fs::write(&path, config)?;
        let program = self.binaries.join("clustermesh-node");
        let mut command = command_in(&self.netns, Some(&self.cgroup), &program);
        command.arg("--config").arg(&path);
        let log = self.folder.join(format!("{name}.log"));
        let process = Process::start(name, &mut command, &log)?;
        let limit = std::time::Duration::from_secs(GIVE_UP_SECONDS_MAX);
        let status = tokio::time::timeout(limit, process.wait())
            .await
            .with_context(|| format!("{name} still runs after {GIVE_UP_SECONDS_MAX} s"))??;
        Ok((status.code(), std::fs::read_to_string(&log)?))
    }

    /// The agent's configuration.
    #[must_use]
    pub fn config_text(&self) -> &str {
        &self.config_text
    }

    /// A command in the node's own namespace and cgroup, as a host process.
    #[must_use]
    pub fn command(&self, program: &Path) -> tokio::process::Command {
        command_in(&self.netns, Some(&self.cgroup), program)
    }

    /// Name of the node.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of its cluster.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// Its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where its maps are pinned.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.folder.join("bpf")
    }

    /// The agent's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("run/agent.sock")
    }

    /// Folder of the binaries under test.
    #[must_use]
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// Its addresses on the underlay: IPv4, IPv6.
    #[must_use]
    pub fn underlay_addresses(&self) -> (String, String) {
        let (id, host) = (self.cluster_id, 10 + self.number);
        (format!("172.30.{id}.{host}"), format!("fd30:{id}::{host}"))
    }

    fn config_path(&self) -> PathBuf {
        self.folder.join("node.toml")
    }

    pub(super) async fn stop(mut self) {
        if let Some(agent) = self.agent.take() {
            // Whatever is left is killed with the namespaces.
            let _ = agent.stop(Signal::SIGTERM).await;
        }
    }
}
