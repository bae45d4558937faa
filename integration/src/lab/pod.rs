//! One pod of the lab: a namespace attached to its node by the CNI plugin.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::host::{command_in, netns_path, run, sh};
use super::process::Process;

/// CNI specification version that the lab speaks.
const CNI_VERSION: &str = "1.1.0";

/// Where pods of a node live.
#[derive(Debug)]
pub(super) struct Place {
    /// Namespace of the node.
    pub(super) netns: String,
    /// Parent of the pods' cgroups.
    pub(super) cgroup: PathBuf,
    /// Folder of the node.
    pub(super) folder: PathBuf,
    /// The agent's socket.
    pub(super) socket: PathBuf,
    pub(super) binaries: PathBuf,
}

/// An attached pod.
#[derive(Debug)]
pub struct Pod {
    namespace: String,
    name: String,
    netns: String,
    container_id: String,
    cgroup: PathBuf,
    node: Place,
    addresses: Vec<String>,
}

impl Pod {
    pub(super) async fn add(node: Place, namespace: &str, name: &str) -> Result<Self> {
        let mut pod = Self::prepare(node, namespace, name).await?;
        pod.attach().await?;
        Ok(pod)
    }

    pub(super) async fn prepare(node: Place, namespace: &str, name: &str) -> Result<Self> {
        let netns = format!("{}-{namespace}-{name}", node.netns);
        sh("ip", &["netns", "add", &netns]).await?;
        sh("ip", &["-n", &netns, "link", "set", "lo", "up"]).await?;
        let cgroup = node.cgroup.join(format!("{namespace}-{name}"));
        std::fs::create_dir_all(&cgroup)?;
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            container_id: netns.clone(),
            netns,
            cgroup,
            node,
            addresses: Vec::new(),
        })
    }

    /// Attaches the pod by CNI ADD and returns the result.
    ///
    /// # Errors
    /// When the plugin refuses; its JSON error is in the message.
    pub async fn attach(&mut self) -> Result<Value> {
        let result = self.cni("ADD").await?;
        self.addresses = result["ips"]
            .as_array()
            .context("the plugin's result has no ips")?
            .iter()
            .filter_map(|ip| ip["address"].as_str())
            .filter_map(|cidr| cidr.split('/').next())
            .map(str::to_owned)
            .collect();
        Ok(result)
    }

    /// Calls the CNI plugin for this pod and returns its JSON result (null when it prints none).
    ///
    /// # Errors
    /// When the plugin fails; the message is its JSON error.
    pub async fn cni(&self, verb: &str) -> Result<Value> {
        match self.call_cni(verb, json!({})).await? {
            Ok(result) => Ok(result),
            Err(error) => bail!(
                "CNI {verb} of {}/{} failed: {error}",
                self.namespace,
                self.name
            ),
        }
    }

    /// Calls the CNI plugin with `more` in its configuration: its result, or its error, as JSON.
    ///
    /// # Errors
    /// When it cannot be started, or prints something else than JSON.
    pub async fn call_cni(
        &self,
        verb: &str,
        more: Value,
    ) -> Result<std::result::Result<Value, Value>> {
        let mut command = command_in(
            &self.node.netns,
            None,
            &self.node.binaries.join("clustermesh-cni"),
        );
        let mut child = command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", netns_path(&self.netns))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.node.binaries)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={}",
                    self.namespace, self.name
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the CNI plugin")?;
        let mut config = json!({
            "cniVersion": CNI_VERSION,
            "name": "clustermesh",
            "type": "clustermesh-cni",
            "socket": self.node.socket,
            "queueDir": self.queue_dir(),
        });
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(config.to_string().as_bytes()).await?;
        }
        let output = child.wait_with_output().await?;
        let printed = String::from_utf8_lossy(&output.stdout);
        let value = if printed.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&printed).with_context(|| printed.clone().into_owned())?
        };
        if output.status.success() {
            return Ok(Ok(value));
        }
        if value.is_null() {
            bail!(
                "CNI {verb} failed without an error in JSON ({}): {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(Err(value))
    }

    /// Where DELs wait for an agent that does not run.
    #[must_use]
    pub fn queue_dir(&self) -> PathBuf {
        self.node.folder.join("state/cni-queue")
    }

    /// The container's id.
    #[must_use]
    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// Detaches the pod and removes its namespace.
    ///
    /// # Errors
    /// When the plugin or `ip` fails.
    pub async fn delete(self) -> Result<()> {
        self.cni("DEL").await?;
        sh("ip", &["netns", "del", &self.netns]).await?;
        Ok(())
    }

    /// A command inside the pod.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        command_in(&self.netns, Some(&self.cgroup), program)
    }

    /// Starts a long-running program of the lab inside the pod, ready when it says so.
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn start(&self, label: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = self.command(&self.node.binaries.join("clustermesh-lab-traffic"));
        command.args(arguments);
        let log = self
            .node
            .folder
            .join(format!("{}-{}-{label}.log", self.namespace, self.name));
        Process::start_ready(&format!("{label} in {}", self.name), &mut command, &log).await
    }

    /// Runs a traffic tool to its end and returns its JSON report.
    ///
    /// # Errors
    /// When it fails or prints no JSON.
    pub async fn traffic(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.command(&self.node.binaries.join("clustermesh-lab-traffic"));
        let output = run(command.args(arguments)).await?;
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().context("no report")?;
        serde_json::from_str(last).with_context(|| format!("report: {text}"))
    }

    /// Pings an address three times, fast; the average round trip in microseconds.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn ping(&self, address: &str) -> Result<f64> {
        let mut command = self.command(Path::new("ping"));
        let output = run(command.args(["-n", "-c", "3", "-i", "0.01", "-W", "2", address])).await?;
        parse_ping_micros(&String::from_utf8_lossy(&output.stdout))
    }

    /// The pod's address of that family.
    ///
    /// # Errors
    /// When it has none.
    pub fn address(&self, v6: bool) -> Result<&str> {
        self.addresses
            .iter()
            .find(|address| address.contains(':') == v6)
            .map(String::as_str)
            .with_context(|| {
                format!(
                    "pod {} has no IPv{} address",
                    self.name,
                    if v6 { 6 } else { 4 }
                )
            })
    }

    /// Name of the pod.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.netns
    }
}

/// The average of `ping`'s summary, in microseconds.
///
/// # Errors
/// When the text is not `ping`'s.
pub fn parse_ping_micros(text: &str) -> Result<f64> {
    let summary = text
        .lines()
        .find(|line| line.starts_with("rtt "))
        .context("no summary line from ping")?;
    let average = summary
        .split(" = ")
        .nth(1)
        .and_then(|numbers| numbers.split('/').nth(1))
        .context("no average in ping's summary")?;
    Ok(average.parse::<f64>()? * 1_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_of_a_ping_summary_is_read_in_microseconds() {
        let text = "3 packets transmitted, 3 received\nrtt min/avg/max/mdev = 0.043/0.050/0.061/0.007 ms\n";
        assert!((parse_ping_micros(text).unwrap() - 50.0).abs() < 1e-9);
        assert!(parse_ping_micros("nothing").is_err());
    }
}
