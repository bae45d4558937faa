//! One cluster of the lab: its router, the replicas of its server, its nodes, its certificates.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context, Result};
use futures_util::future::join_all;
use nix::sys::signal::Signal;
use tokio::process::Command;

use super::Lab;
use super::host::{command_in, ip_batch, netns_path, run, run_unchecked, sh};
use super::node::{Home, Node};
use super::process::Process;
use super::replica::Replica;
use super::tap::{in_netns, open_tap};

/// A cluster with its namespaces and processes.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    id: u8,
    prefix: String,
    folder: PathBuf,
    binaries: PathBuf,
    router: String,
    replicas: Vec<Replica>,
    nodes: Vec<Node>,
}

/// What one cluster must know of another to be its peer.
#[derive(Clone, Debug)]
pub struct Peer {
    name: String,
    id: u8,
    endpoints: Vec<String>,
}

impl Cluster {
    pub(super) async fn wire(lab: &Lab, name: &str, id: u8) -> Result<Self> {
        let prefix = format!("{}-{name}", lab.prefix());
        let router = format!("{prefix}-r");
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
        let mut cluster = Self {
            name: name.to_owned(),
            id,
            prefix,
            folder,
            binaries: lab.config().binaries.clone(),
            router,
            replicas: Vec::new(),
            nodes: Vec::new(),
        };
        for _ in 0..lab.config().replicas {
            cluster.add_replica().await?;
        }
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
            let node = Node::prepare(lab, cluster.home(), &netns, number).await?;
            cluster.nodes.push(node);
        }
        Ok(cluster)
    }

    fn home(&self) -> Home {
        Home {
            cluster: self.name.clone(),
            cluster_id: self.id,
            folder: self.folder.clone(),
            endpoints: self.endpoints(),
        }
    }

    /// Makes the machine of one more replica; nothing runs there yet.
    async fn add_replica(&mut self) -> Result<()> {
        let number = self.replicas.len() + 1;
        let port = match number {
            1 => "s".to_owned(),
            _ => format!("s{number}"),
        };
        let netns = format!("{}-{port}", self.prefix);
        let host = u8::try_from(1 + number)?;
        add_machine(&self.router, &netns, &port, self.id, host).await?;
        self.replicas.push(Replica::prepare(
            &self.name,
            number,
            format!("172.30.{}.{host}", self.id),
            netns,
            &self.folder,
            self.binaries.join("clustermesh-server"),
        ));
        Ok(())
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
            endpoints: self.endpoints(),
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
        for replica in &self.replicas {
            self.issue_server_certificate(replica).await?;
        }
        self.issue(&authority, "operator", "admin", &[]).await?;
        self.issue(&authority, "peer", "remote", &[]).await?;
        for node in &self.nodes {
            self.issue(&authority, "node", node.name(), &[]).await?;
        }
        Ok(())
    }

    async fn issue_server_certificate(&self, replica: &Replica) -> Result<()> {
        self.issue_server_certificate_from(&self.pki()?, replica)
            .await
    }

    /// Makes the certificate that a replica shows to clients and to the other replicas, by an authority's hand and
    /// below its folder.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn issue_server_certificate_from(
        &self,
        authority: &Path,
        replica: &Replica,
    ) -> Result<()> {
        let authority = authority.to_str().context("folder name")?;
        let names = ["--san", replica.address(), "--san", "127.0.0.1"];
        self.issue(authority, "server", replica.certificate(), &names)
            .await
    }

    /// Makes the operator's certificate, by an authority's hand and below its folder.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn issue_operator_certificate_from(&self, authority: &Path) -> Result<()> {
        let authority = authority.to_str().context("folder name")?;
        self.issue(authority, "operator", "admin", &[]).await
    }

    /// Makes a further certificate authority in `folder`.
    ///
    /// # Errors
    /// When the command fails.
    pub async fn make_authority(&self, folder: &Path) -> Result<()> {
        let folder = folder.to_str().context("folder name")?;
        self.dev_ca(&["init", "--dir", folder]).await
    }

    /// Folder of the lab's certificate authority; this cluster's certificates are below it.
    ///
    /// # Errors
    /// When the lab's folder is not there.
    pub fn authority(&self) -> Result<PathBuf> {
        self.pki()
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

    /// Starts all replicas and waits until they are ready.
    pub(super) async fn start_server(&mut self, all: &[Peer]) -> Result<()> {
        let initial: Vec<String> = self
            .replicas
            .iter()
            .map(|replica| format!("{}={}", replica.name(), replica.peer_url()))
            .collect();
        for replica in &self.replicas {
            let group = match initial.len() {
                1 => String::new(),
                _ => format!("initial_cluster = {initial:?}\n"),
            };
            let text = self.server_config(replica, all, &group)?;
            std::fs::write(replica.config_path(), text)?;
        }
        // A replica is ready when its group has a leader.
        self.restart_server().await
    }

    /// Makes a further replica that joins the group when it is started; its place.
    ///
    /// # Errors
    /// When its machine, certificate or configuration cannot be made.
    pub async fn add_joining_replica(&mut self) -> Result<usize> {
        let join: Vec<String> = self.replicas.iter().map(Replica::peer_url).collect();
        self.add_replica().await?;
        let place = self.replicas.len() - 1;
        let replica = &self.replicas[place];
        self.issue_server_certificate(replica).await?;
        let group = format!("peer_url = {:?}\njoin = {join:?}\n", replica.peer_url());
        let text = self.server_config(replica, &[], &group)?;
        std::fs::write(replica.config_path(), text)?;
        Ok(place)
    }

    /// The configuration of one replica; `group` says what group it begins with or joins, nothing for one alone.
    fn server_config(&self, replica: &Replica, all: &[Peer], group: &str) -> Result<String> {
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
cert = "{pki}/{name}/{certificate}.crt"
key = "{pki}/{name}/{certificate}.key"
"#,
            data = replica.data().display(),
            certificate = replica.certificate(),
        );
        if !group.is_empty() {
            write!(
                config,
                "\n[replica]\nname = {:?}\nclient_urls = [{:?}]\n{group}",
                replica.name(),
                replica.endpoint(),
            )?;
        }
        for peer in all.iter().filter(|peer| peer.id != id) {
            write!(
                config,
                r#"
[[peers]]
name = "{peer_name}"
endpoints = {endpoints:?}
cert = "{pki}/{name}/remote.crt"
key = "{pki}/{name}/remote.key"
"#,
                peer_name = peer.name,
                endpoints = peer.endpoints,
            )?;
        }
        Ok(config)
    }

    /// Changes the configuration file of every replica; a server reads it when it starts again.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn edit_server_config(&self, edit: impl Fn(String) -> String) -> Result<()> {
        for replica in &self.replicas {
            replica.edit_config(&edit)?;
        }
        Ok(())
    }

    /// Starts all replicas again with the configuration that they had.
    ///
    /// # Errors
    /// When one does not get ready.
    pub async fn restart_server(&mut self) -> Result<()> {
        let starting: Vec<_> = self.replicas.iter_mut().map(Replica::start).collect();
        for started in join_all(starting).await {
            started?;
        }
        Ok(())
    }

    /// Ends all replicas by `signal`.
    ///
    /// # Errors
    /// When one does not run or does not end.
    pub async fn stop_server(&mut self, signal: Signal) -> Result<()> {
        for replica in &mut self.replicas {
            replica.stop(signal).await?;
        }
        Ok(())
    }

    /// The process of the first replica.
    ///
    /// # Errors
    /// When it does not run.
    pub fn server(&self) -> Result<&Process> {
        self.replicas[0].process()
    }

    /// A replica of the server by its place, from 0.
    #[must_use]
    pub fn replica(&self, index: usize) -> &Replica {
        &self.replicas[index]
    }

    /// A replica by its place, to change it.
    pub fn replica_mut(&mut self, index: usize) -> &mut Replica {
        &mut self.replicas[index]
    }

    /// All replicas.
    #[must_use]
    pub fn replicas(&self) -> &[Replica] {
        &self.replicas
    }

    /// Where clients reach the replicas.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.replicas.iter().map(Replica::endpoint).collect()
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

    /// Network namespace of the first replica.
    #[must_use]
    pub fn server_netns(&self) -> &str {
        self.replicas[0].netns()
    }

    /// Network namespace of the cluster's router.
    #[must_use]
    pub fn router_netns(&self) -> &str {
        &self.router
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
        let mut command = command_in(&self.router, None, &self.binaries.join("clustermesh"));
        command
            .args(["--endpoint", &self.endpoints().join(",")])
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
            self.router,
            self.binaries.join("clustermesh").display(),
            self.endpoints().join(","),
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
        // Both at once: who is left alone waits for the others. Whatever is left is killed with the namespaces.
        let processes = self.replicas.iter_mut().filter_map(Replica::take_process);
        let ending: Vec<_> = processes
            .map(|process| process.stop(Signal::SIGTERM))
            .collect();
        let _ = join_all(ending).await;
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
