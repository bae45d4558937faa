//! One cluster of the lab: its router, its server, its nodes, its certificates.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tokio::process::Command;

use super::host::{command_in, ip_batch, netns_path, run, run_unchecked, sh};
use super::node::Node;
use super::process::Process;
use super::tap::{in_netns, open_tap};
use super::{Lab, RoutingMode};

/// A cluster with its namespaces and processes.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    id: u8,
    prefix: String,
    folder: PathBuf,
    binaries: PathBuf,
    router: String,
    server_netns: String,
    server: Option<Process>,
    nodes: Vec<Node>,
}

/// What one cluster must know of another to be its peer.
#[derive(Clone, Debug)]
pub struct Peer {
    name: String,
    id: u8,
}

impl Peer {
    fn server_address(&self) -> String {
        format!("172.30.{}.2", self.id)
    }
}

impl Cluster {
    pub(super) async fn wire(lab: &Lab, name: &str, id: u8) -> Result<Self> {
        let prefix = format!("{}-{name}", lab.prefix());
        let router = format!("{prefix}-r");
        let server_netns = format!("{prefix}-s");
        let folder = lab.folder().join(name);
        std::fs::create_dir_all(&folder)?;
        add_namespace(&router).await?;
        ip_batch(
            Some(&router),
            &format!(
                "link set lo up\nlink add br0 type bridge mcast_snooping 0\naddr add 172.30.{id}.1/24 dev br0\n\
                 addr add fd30:{id}::1/64 dev br0 nodad\nlink set br0 up\n"
            ),
        )
        .await?;
        sysctls(
            &router,
            &[
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
                "net.ipv4.conf.all.rp_filter=0",
            ],
        )
        .await?;
        add_machine(&router, &server_netns, "s", id, 2).await?;
        let mut cluster = Self {
            name: name.to_owned(),
            id,
            prefix,
            folder,
            binaries: lab.config().binaries.clone(),
            router,
            server_netns,
            server: None,
            nodes: Vec::new(),
        };
        for number in 1..=lab.config().nodes_per_cluster {
            let number = u8::try_from(number)?;
            let netns = format!("{}-n{number}", cluster.prefix);
            add_machine(
                &cluster.router,
                &netns,
                &format!("n{number}"),
                id,
                10 + number,
            )
            .await?;
            let node = Node::prepare(lab, &cluster, &netns, number).await?;
            cluster.nodes.push(node);
        }
        Ok(cluster)
    }

    /// Opens the router's device on the wide-area link.
    pub(super) async fn open_wan(&self) -> Result<File> {
        let tap = in_netns(&netns_path(&self.router), || open_tap("wan0"))?;
        ip_batch(
            Some(&self.router),
            &format!(
                "addr add 172.30.0.{0}/24 dev wan0\naddr add fd30:0::{0}/64 dev wan0 nodad\nlink set wan0 up\n",
                self.id
            ),
        )
        .await?;
        Ok(tap)
    }

    /// Routes from this router to the networks of the other clusters.
    pub(super) async fn route_to_others(&self, all: &[Self]) -> Result<()> {
        let mut lines = String::new();
        for other in all.iter().filter(|other| other.id != self.id) {
            let id = other.id;
            writeln!(lines, "route add 172.30.{id}.0/24 via 172.30.0.{id}")?;
            writeln!(lines, "route add fd30:{id}::/64 via fd30:0::{id}")?;
            writeln!(lines, "route add 10.{id}.0.0/16 via 172.30.0.{id}")?;
            writeln!(lines, "route add fd0c:{id}::/48 via fd30:0::{id}")?;
        }
        ip_batch(Some(&self.router), &lines).await
    }

    /// Routes from this router to the pods of its own nodes, as direct routing needs them.
    ///
    /// # Errors
    /// When a node's pod CIDR is not known yet, or `ip` fails.
    pub async fn route_to_pods(&self) -> Result<()> {
        let mut lines = String::new();
        for node in &self.nodes {
            let (v4, v6) = node.underlay_addresses();
            for cidr in node.pod_cidrs().await? {
                let via = if cidr.contains(':') { &v6 } else { &v4 };
                writeln!(lines, "route replace {cidr} via {via}")?;
            }
        }
        ip_batch(Some(&self.router), &lines).await
    }

    pub(super) fn as_peer(&self) -> Peer {
        Peer {
            name: self.name.clone(),
            id: self.id,
        }
    }

    pub(super) fn pki(&self) -> Result<PathBuf> {
        Ok(self.folder.parent().context("lab folder")?.join("pki"))
    }

    /// Makes the lab's certificate authority (once) and this cluster's certificates, in a folder of its own.
    pub(super) async fn issue_certificates(&mut self) -> Result<()> {
        let pki = self.pki()?;
        let authority = pki.to_str().context("folder name")?.to_owned();
        self.dev_ca(&["init", "--dir", &authority]).await?;
        let address = self.as_peer().server_address();
        let server = ["--san", address.as_str(), "--san", "127.0.0.1"];
        self.issue(&authority, "server", "server", &server).await?;
        self.issue(&authority, "operator", "admin", &[]).await?;
        self.issue(&authority, "peer", "remote", &[]).await?;
        for node in &self.nodes {
            self.issue(&authority, "node", node.name(), &[]).await?;
        }
        Ok(())
    }

    async fn issue(&self, authority: &str, role: &str, name: &str, more: &[&str]) -> Result<()> {
        let out = format!("{authority}/{}", self.name);
        let mut arguments = vec!["issue", role, name, "--cluster", &self.name];
        arguments.extend(["--dir", authority, "--out", &out]);
        arguments.extend(more);
        self.dev_ca(&arguments).await
    }

    async fn dev_ca(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(self.binaries.join("clustermesh"));
        run(command.arg("dev-ca").args(arguments)).await?;
        Ok(())
    }

    /// Starts the server and waits until it is ready.
    pub(super) async fn start_server(&mut self, all: &[Peer]) -> Result<()> {
        let pki = self.pki()?;
        let pki = pki.display();
        let (name, id) = (&self.name, self.id);
        let mut config = format!(
            r#"data_dir = "{data}"
listen_client = "0.0.0.0:2379"
listen_admin = "127.0.0.1:9962"

[cluster]
name = "{name}"
id = {id}
settle_seconds = 0
pod_cidr_v4 = "10.{id}.0.0/16"
pod_cidr_v6 = "fd0c:{id}::/48"
service_cidr_v4 = "10.1{id:02}.0.0/16"
service_cidr_v6 = "fd60:{id}::/112"

[tls]
ca = "{pki}/ca.crt"
cert = "{pki}/{name}/server.crt"
key = "{pki}/{name}/server.key"
"#,
            data = self.folder.join("server").display(),
        );
        for peer in all.iter().filter(|peer| peer.id != id) {
            write!(
                config,
                r#"
[[peers]]
name = "{peer_name}"
endpoints = ["https://{address}:2379"]
cert = "{pki}/{name}/remote.crt"
key = "{pki}/{name}/remote.key"
"#,
                peer_name = peer.name,
                address = peer.server_address(),
            )?;
        }
        std::fs::write(self.server_config(), config)?;
        self.restart_server().await
    }

    fn server_config(&self) -> PathBuf {
        self.folder.join("server.toml")
    }

    /// Changes the server's configuration file; the server reads it when it starts again.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn edit_server_config(&self, edit: impl FnOnce(String) -> String) -> Result<()> {
        let path = self.server_config();
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        std::fs::write(&path, edit(text))?;
        Ok(())
    }

    /// Starts the server again with the configuration that it had.
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn restart_server(&mut self) -> Result<()> {
        let mut command = command_in(
            &self.server_netns,
            None,
            &self.binaries.join("clustermesh-server"),
        );
        command.arg("--config").arg(self.server_config());
        let name = format!("server of {}", self.name);
        self.server =
            Some(Process::start_ready(&name, &mut command, &self.folder.join("server.log")).await?);
        Ok(())
    }

    /// Ends the server by `signal`.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub async fn stop_server(&mut self, signal: Signal) -> Result<()> {
        let server = self.server.take().context("the server does not run")?;
        server.stop(signal).await?;
        Ok(())
    }

    /// The server's process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn server(&self) -> Result<&Process> {
        self.server.as_ref().context("the server does not run")
    }

    /// Name of the cluster.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Cluster id.
    #[must_use]
    pub const fn id(&self) -> u8 {
        self.id
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Network namespace of the server.
    #[must_use]
    pub fn server_netns(&self) -> &str {
        &self.server_netns
    }

    /// Network namespace of the cluster's router.
    #[must_use]
    pub fn router_netns(&self) -> &str {
        &self.router
    }

    /// Address of the server as its nodes and peers dial it.
    #[must_use]
    pub fn server_endpoint(&self) -> String {
        format!("https://{}:2379", self.as_peer().server_address())
    }

    /// A node by its place, from 0.
    #[must_use]
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// A node by its place, to change it.
    pub fn node_mut(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index]
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(super) fn nodes_mut(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    /// The operator's command against this cluster, not yet started.
    ///
    /// # Errors
    /// When the lab's folder is not there.
    pub fn cli(&self, arguments: &[&str]) -> Result<Command> {
        let pki = self.pki()?;
        let mut command = command_in(&self.server_netns, None, &self.binaries.join("clustermesh"));
        command
            .args(["--endpoint", &self.server_endpoint()])
            .arg("--ca")
            .arg(pki.join("ca.crt"))
            .arg("--cert")
            .arg(pki.join(&self.name).join("admin.crt"))
            .arg("--key")
            .arg(pki.join(&self.name).join("admin.key"))
            .args(arguments);
        Ok(command)
    }

    /// The operator's command as a person would type it.
    #[must_use]
    pub fn cli_text(&self) -> String {
        let pki = self.folder.with_file_name("pki");
        format!(
            "nsenter --net=/run/netns/{} {} --endpoint {} --ca {ca} --cert {own}.crt --key {own}.key status",
            self.server_netns,
            self.binaries.join("clustermesh").display(),
            self.server_endpoint(),
            ca = pki.join("ca.crt").display(),
            own = pki.join(&self.name).join("admin").display(),
        )
    }

    /// Runs the operator's command and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub async fn run_cli(&self, arguments: &[&str]) -> Result<String> {
        let output = run(&mut self.cli(arguments)?).await?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs the operator's command, whatever its exit code.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn try_cli(&self, arguments: &[&str]) -> Result<Output> {
        run_unchecked(&mut self.cli(arguments)?).await
    }

    /// Applies manifests.
    ///
    /// # Errors
    /// When the server refuses them.
    pub async fn apply(&self, manifests: &str) -> Result<()> {
        let file = tempfile_in(&self.folder, manifests)?;
        let path = file.to_str().context("file name")?;
        self.run_cli(&["apply", "-f", path]).await?;
        std::fs::remove_file(&file)?;
        Ok(())
    }

    /// Waits until every node of this cluster has applied what every cluster has now.
    ///
    /// # Errors
    /// When that takes longer than `seconds_max`; the message names the laggards.
    pub async fn wait_converged(&self, seconds_max: u32) -> Result<()> {
        self.run_cli(&["status", "--wait", "--timeout", &format!("{seconds_max}s")])
            .await?;
        Ok(())
    }

    pub(super) async fn stop(mut self) {
        for node in self.nodes {
            node.stop().await;
        }
        if let Some(server) = self.server.take() {
            // Whatever is left is killed with the namespaces.
            let _ = server.stop(Signal::SIGTERM).await;
        }
    }
}

fn tempfile_in(folder: &Path, text: &str) -> Result<PathBuf> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static FILES: AtomicU32 = AtomicU32::new(0);
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("manifest-{number}.yaml"));
    std::fs::write(&path, text)?;
    Ok(path)
}

/// Makes a namespace with `eth0` on the cluster's bridge.
async fn add_machine(router: &str, netns: &str, port: &str, id: u8, host: u8) -> Result<()> {
    add_namespace(netns).await?;
    ip_batch(
        Some(router),
        &format!(
            "link add {port} type veth peer name eth0 netns {netns}\nlink set {port} master br0\nlink set {port} up\n"
        ),
    )
    .await?;
    ip_batch(
        Some(netns),
        &format!(
            "link set lo up\naddr add 172.30.{id}.{host}/24 dev eth0\naddr add fd30:{id}::{host}/64 dev eth0 nodad\n\
             link set eth0 up\nroute add default via 172.30.{id}.1\nroute add default via fd30:{id}::1\n"
        ),
    )
    .await
}

/// Makes a namespace whose IPv6 addresses serve at once, without duplicate address detection.
async fn add_namespace(netns: &str) -> Result<()> {
    sh("ip", &["netns", "add", netns]).await?;
    sysctls(
        netns,
        &[
            "net.ipv6.conf.all.accept_dad=0",
            "net.ipv6.conf.default.accept_dad=0",
            "net.ipv6.conf.default.dad_transmits=0",
            "net.ipv6.conf.default.router_solicitations=0",
        ],
    )
    .await
}

async fn sysctls(netns: &str, settings: &[&str]) -> Result<()> {
    let mut command = command_in(netns, None, Path::new("sysctl"));
    run(command.arg("-qw").args(settings)).await?;
    Ok(())
}

/// How the routing mode is written in an agent's configuration.
pub(super) const fn routing_name(mode: RoutingMode) -> &'static str {
    match mode {
        RoutingMode::Tunnel => "tunnel",
        RoutingMode::Direct => "direct",
    }
}
