//! A group of replicas, etcd's or ours, as processes on loopback addresses of its own, behind mutual TLS.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result};
use clustermesh_client::{Client, ClientConfig, TlsPaths};
use nix::sys::signal::Signal;
use tokio::process::Command;

use super::programs::Programs;
use crate::lab::host::run;
use crate::lab::process::Process;

/// Name in the certificates.
const CERTIFICATE_CLUSTER: &str = "judged";
/// Addresses of one process; the first ones are used again after them.
const LAST_OCTETS: u16 = 250;

/// Whose server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The one that ours is compared with.
    Etcd,
    /// `clustermesh-server` as a plain store.
    Ours,
}

impl Kind {
    /// Name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Ours => "clustermesh",
        }
    }
}

/// How a group is run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Replicas: 1, 3 or 5.
    pub replicas: u8,
    /// Every acknowledged write is on disk. Tests of answers do without, for speed, where a server can.
    pub durable: bool,
    /// Bytes of log after which ours take a snapshot; `None` for what they do unless told.
    pub snapshot_log_bytes: Option<u64>,
}

/// Certificates of one comparison.
#[derive(Clone, Debug)]
pub struct Pki {
    folder: PathBuf,
}

impl Pki {
    /// The authority.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Certificate and key of the operator.
    #[must_use]
    pub fn operator(&self) -> (PathBuf, PathBuf) {
        self.pair("admin")
    }

    fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
        let folder = self.folder.join(CERTIFICATE_CLUSTER);
        (
            folder.join(format!("{name}.crt")),
            folder.join(format!("{name}.key")),
        )
    }

    async fn make(programs: &Programs, folder: &Path, addresses: &[Ipv4Addr]) -> Result<Self> {
        let authority = folder.to_str().context("folder name")?;
        let out = folder.join(CERTIFICATE_CLUSTER);
        let dev_ca = || {
            let mut command = Command::new(programs.cli());
            command.arg("dev-ca");
            command
        };
        run(dev_ca().args(["init", "--dir", authority])).await?;
        let issue = |role: &str, name: &str| {
            let mut command = dev_ca();
            command
                .args(["issue", role, name, "--cluster", CERTIFICATE_CLUSTER])
                .args(["--dir", authority, "--out"])
                .arg(&out);
            command
        };
        let mut server = issue("server", "server");
        server.args(["--san", "localhost"]);
        for address in addresses {
            server.args(["--san", &address.to_string()]);
        }
        run(&mut server).await?;
        run(&mut issue("operator", "admin")).await?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }
}

/// One replica.
#[derive(Debug)]
pub struct Member {
    name: String,
    address: Ipv4Addr,
    folder: PathBuf,
    process: Option<Process>,
}

impl Member {
    /// Its process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn process(&self) -> Result<&Process> {
        self.process
            .as_ref()
            .with_context(|| format!("{} does not run", self.name))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Where clients reach it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("https://{}:2379", self.address)
    }

    fn peer_url(&self) -> String {
        format!("https://{}:2380", self.address)
    }
}

/// A running group.
#[derive(Debug)]
pub struct Group {
    kind: Kind,
    settings: Settings,
    programs: Programs,
    pki: Pki,
    members: Vec<Member>,
}

impl Group {
    /// Makes certificates and data folders below `folder`, starts the replicas and waits until all are ready.
    ///
    /// # Errors
    /// When something cannot be made or a replica does not get ready.
    pub async fn start(
        kind: Kind,
        settings: Settings,
        programs: &Programs,
        folder: &Path,
    ) -> Result<Self> {
        let addresses = own_addresses(settings.replicas)?;
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let pki = Pki::make(programs, &folder.join("pki"), &addresses).await?;
        let mut members = Vec::new();
        for (number, address) in (1..).zip(addresses) {
            // Of one length: tables are as wide as the names in them.
            let name = format!("member-{number}");
            let folder = folder.join(&name);
            std::fs::create_dir_all(&folder)?;
            members.push(Member {
                name,
                address,
                folder,
                process: None,
            });
        }
        let mut group = Self {
            kind,
            settings,
            programs: programs.clone(),
            pki,
            members,
        };
        group.launch_all().await?;
        Ok(group)
    }

    /// Whose it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Its replicas.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Its certificates.
    #[must_use]
    pub const fn pki(&self) -> &Pki {
        &self.pki
    }

    /// A connection to one replica, for the operator.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn connect(&self, member: usize) -> Result<Client> {
        let member = &self.members[member % self.members.len()];
        let (cert, key) = self.pki.operator();
        let config = ClientConfig {
            endpoints: vec![member.endpoint()],
            tls: Some(TlsPaths {
                ca: self.pki.authority(),
                cert,
                key,
            }),
            server_name: None,
        };
        Client::connect(&config)
            .await
            .with_context(|| format!("connection to {}", member.name))
    }

    /// Ends one replica.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub async fn stop(&mut self, member: usize, signal: Signal) -> Result<()> {
        let member = &mut self.members[member];
        let process = member
            .process
            .take()
            .with_context(|| format!("{} does not run", member.name))?;
        process.stop(signal).await?;
        Ok(())
    }

    /// Ends all replicas at once, without letting them finish anything.
    ///
    /// # Errors
    /// When one does not end.
    pub async fn kill(&mut self) -> Result<()> {
        for number in 0..self.members.len() {
            if self.members[number].process.is_some() {
                self.stop(number, Signal::SIGKILL).await?;
            }
        }
        Ok(())
    }

    /// Starts all replicas that do not run and waits until they are ready.
    ///
    /// # Errors
    /// When one does not get ready.
    pub async fn launch_all(&mut self) -> Result<()> {
        let mut starting = tokio::task::JoinSet::new();
        for (number, member) in self.members.iter().enumerate() {
            if member.process.is_some() {
                continue;
            }
            let mut command = self.command(member)?;
            let (name, log) = (member.name.clone(), member.folder.join("log"));
            starting.spawn(async move {
                let started = Process::start_ready(&name, &mut command, &log).await;
                (number, started)
            });
        }
        while let Some(started) = starting.join_next().await {
            let (number, process) = started?;
            self.members[number].process = Some(process?);
        }
        Ok(())
    }

    fn command(&self, member: &Member) -> Result<Command> {
        match self.kind {
            Kind::Etcd => Ok(self.etcd_command(member)),
            Kind::Ours => self.our_command(member),
        }
    }

    /// `NAME=URL` of every replica, which both take.
    fn initial_cluster(&self) -> Vec<String> {
        let pair = |member: &Member| format!("{}={}", member.name, member.peer_url());
        self.members.iter().map(pair).collect()
    }

    fn etcd_command(&self, member: &Member) -> Command {
        let (cert, key) = self.pki.pair("server");
        let mut command = Command::new(self.programs.etcd());
        command
            .args(["--name", &member.name, "--log-level", "warn"])
            .args(["--listen-client-urls", &member.endpoint()])
            .args(["--advertise-client-urls", &member.endpoint()])
            .args(["--listen-peer-urls", &member.peer_url()])
            .args(["--initial-advertise-peer-urls", &member.peer_url()])
            .args(["--initial-cluster", &self.initial_cluster().join(",")])
            .args(["--client-cert-auth", "--peer-client-cert-auth"])
            .arg("--data-dir")
            .arg(member.folder.join("data"));
        for prefix in ["", "peer-"] {
            command
                .arg(format!("--{prefix}trusted-ca-file"))
                .arg(self.pki.authority())
                .arg(format!("--{prefix}cert-file"))
                .arg(&cert)
                .arg(format!("--{prefix}key-file"))
                .arg(&key);
        }
        if !self.settings.durable {
            command.arg("--unsafe-no-fsync");
        }
        command
    }

    fn our_command(&self, member: &Member) -> Result<Command> {
        let (cert, key) = self.pki.pair("server");
        let mut config = format!(
            "data_dir = {:?}\nlisten_client = \"{address}:2379\"\nlisten_admin = \"{address}:9962\"\n",
            member.folder.join("data"),
            address = member.address,
        );
        if let Some(bytes) = self.settings.snapshot_log_bytes {
            writeln!(config, "snapshot_log_bytes = {bytes}")?;
        }
        write!(
            config,
            "\n[tls]\nca = {:?}\ncert = {cert:?}\nkey = {key:?}\n\n[compaction]\nmode = \"off\"\n\n\
             [replica]\nname = {:?}\nlisten_peer = \"{}:2380\"\ninitial_cluster = {:?}\n",
            self.pki.authority(),
            member.name,
            member.address,
            self.initial_cluster(),
        )?;
        let path = member.folder.join("server.toml");
        std::fs::write(&path, config).with_context(|| path.display().to_string())?;
        let mut command = Command::new(self.programs.server());
        command.arg("--config").arg(path).env("RUST_LOG", "warn");
        Ok(command)
    }
}

/// Loopback addresses that no other group of this machine uses, so that well-known ports can be.
fn own_addresses(count: u8) -> Result<Vec<Ipv4Addr>> {
    static USED: AtomicU16 = AtomicU16::new(0);
    // The middle octets tell processes apart, the last one the replicas of this process.
    let [high, low] = u16::try_from(std::process::id() % 0x1_0000)?.to_be_bytes();
    (0..count)
        .map(|_| {
            let used = USED.fetch_add(1, Ordering::Relaxed);
            let last = u8::try_from(used % LAST_OCTETS)? + 1;
            Ok(Ipv4Addr::new(127, high | 0x40, low, last))
        })
        .collect()
}
