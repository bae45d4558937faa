//! Commands, flags and their help.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "\
Exit codes:
  0  done; `status --wait` also where no node is on record, which it says
  1  failed: no connection, refused by the server, a file that cannot be read,
     or `status --wait` ran out of time
  2  wrong usage";

/// Operate a mesh of clusters.
#[derive(Debug, Parser)]
#[command(name = "clustermesh", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// Where the server is, who we are, and how to print.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalArgs {
    /// Server of the cluster, https://HOST:PORT; several: separated by commas
    #[arg(
        long,
        global = true,
        env = "CLUSTERMESH_ENDPOINT",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "https://127.0.0.1:2379"
    )]
    pub endpoint: Vec<String>,
    /// Certificate of the CA that signed the server's certificate
    #[arg(long, global = true, env = "CLUSTERMESH_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Own certificate
    #[arg(long, global = true, env = "CLUSTERMESH_CERT", value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Own private key
    #[arg(
        long,
        global = true,
        env = "CLUSTERMESH_KEY",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub key: Option<PathBuf>,
    /// Name in the server's certificate, when it is not the endpoint's host
    #[arg(
        long,
        global = true,
        env = "CLUSTERMESH_SERVER_NAME",
        value_name = "NAME"
    )]
    pub server_name: Option<String>,
    /// What to print
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs; fields are only ever added.
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the cluster, its peers and nodes, and what every node has applied
    #[command(after_help = "\
Examples:
  clustermesh status
  clustermesh status --wait --timeout 30s
  clustermesh status -o json | jq '.nodes[].applied'")]
    Status(StatusArgs),
    /// List records of this cluster and of the copies of its peers
    #[command(after_help = "\
Examples:
  clustermesh get nodes
  clustermesh get endpoints -n shop --cluster c2
  clustermesh get identities -o json")]
    Get(GetArgs),
    /// Store manifests; all or none
    #[command(after_help = "\
Examples:
  clustermesh apply -f shop.yaml
  clustermesh apply -f - < shop.yaml
  clustermesh apply -f shop.yaml --dry-run")]
    Apply(ApplyArgs),
    /// Delete stored manifests; what is not there is reported and no failure
    #[command(after_help = "\
Examples:
  clustermesh delete -f shop.yaml
  clustermesh delete service shop/cart
  clustermesh delete workload vm-1")]
    Delete(DeleteArgs),
    /// List, add, promote, remove and replace replicas of the cluster's store
    #[command(after_help = "\
Examples:
  clustermesh member list
  clustermesh member add https://s4.example.net:2380
  clustermesh member promote s4
  clustermesh member remove 8e9e05c52164694d
  clustermesh member replace s2 https://s4.example.net:2380")]
    Member(MemberArgs),
    /// Back the cluster's store up, look into a backup, make a new store of one
    #[command(after_help = "\
Examples:
  clustermesh snapshot save backup.db
  clustermesh snapshot status backup.db -o json
  clustermesh snapshot restore backup.db --data-dir /var/lib/clustermesh/server --name r1 --cluster c1
  clustermesh snapshot restore backup.db --data-dir /var/lib/clustermesh/server --name r1 --cluster c1 \\
    --initial-cluster r1=https://s1:2380,r2=https://s2:2380,r3=https://s3:2380")]
    Snapshot(SnapshotArgs),
    /// List and end alarms of the cluster's store
    #[command(after_help = "\
Examples:
  clustermesh alarm list
  clustermesh alarm disarm
  clustermesh alarm disarm --member s2")]
    Alarm(AlarmArgs),
    /// Show how this machine's packets to other nodes are encrypted, change keys; asks the node agent, not the server
    #[command(after_help = "\
Examples:
  clustermesh encryption status
  clustermesh encryption status --verify
  clustermesh encryption rotate
  clustermesh encryption status -o json | jq '.peers[] | select(.traffic != \"encrypted\")'")]
    Encryption(EncryptionArgs),
    /// Make a certificate authority and certificates for tests and development
    #[command(after_help = "\
Examples:
  clustermesh dev-ca init --dir pki
  clustermesh dev-ca issue server c1-server --cluster c1 --san 127.0.0.1 --dir pki
  clustermesh dev-ca issue node w1 --cluster c1 --dir pki
  clustermesh dev-ca issue operator admin --cluster c1 --dir pki")]
    DevCa(DevCaArgs),
    /// Print a completion script
    #[command(after_help = "\
Examples:
  clustermesh completion bash > /etc/bash_completion.d/clustermesh")]
    Completion {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write a man page for every command
    #[command(after_help = "\
Examples:
  clustermesh man /usr/local/share/man/man1")]
    Man {
        /// Folder for the pages; made when it does not exist
        directory: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct MemberArgs {
    #[command(subcommand)]
    pub command: MemberCommand,
}

#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// All replicas, with their ids
    List,
    /// Add a replica; it votes once it has caught up. Start it afterwards with this address as `peer_url` and with `join`
    Add {
        /// Where it will listen for other replicas, https://HOST:PORT
        #[arg(value_name = "PEER_URL", value_parser = parse_peer_url)]
        peer_url: String,
        /// It stays a learner until it is promoted
        #[arg(long)]
        learner: bool,
    },
    /// Make a voter of a learner that has caught up
    Promote {
        /// Name or id
        member: String,
    },
    /// Remove a replica for good: its id is never used again
    Remove {
        /// Name or id
        member: String,
    },
    /// Add a replica, wait until it votes, and remove the old one
    Replace {
        /// Name or id of the old one
        member: String,
        /// Where the new one will listen for other replicas, https://HOST:PORT
        #[arg(value_name = "PEER_URL", value_parser = parse_peer_url)]
        peer_url: String,
        /// Longest wait until the new one votes: a number with ms, s or m
        #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse_duration)]
        timeout: Duration,
    },
}

#[derive(Debug, Args)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Back up all that the connected replica has applied; the file appears when it is whole and checked
    Save {
        /// File to write; an older one is replaced
        file: PathBuf,
    },
    /// Check a backup and tell what is in it
    Status {
        /// Backup
        file: PathBuf,
    },
    /// Make the data folder of one replica of a new group; run it for each replica, with the same file
    Restore(RestoreArgs),
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Backup
    pub file: PathBuf,
    /// Data folder of the replica (`data_dir` of its server); empty, or not there
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Name of the replica (`replica.name` of its server)
    #[arg(long, default_value = "default")]
    pub name: String,
    /// Name of the cluster (`cluster.name` of its server); none for a plain store
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub cluster: String,
    /// All replicas of the new group, NAME=https://HOST:PORT; none for this one alone
    #[arg(long, value_name = "NAME=URL", value_delimiter = ',')]
    pub initial_cluster: Vec<String>,
    /// Makes the new group's ids: what the first restore of the group prints, for the others [default: random]
    #[arg(long, value_name = "TEXT")]
    pub token: Option<String>,
    /// What the revision grows by, so that no client has seen the new ones
    #[arg(long, value_name = "NUMBER", default_value_t = clustermesh_raft::REVISION_BUMP)]
    pub bump_revision: i64,
}

#[derive(Debug, Args)]
pub struct AlarmArgs {
    #[command(subcommand)]
    pub command: AlarmCommand,
}

#[derive(Debug, Subcommand)]
pub enum AlarmCommand {
    /// Alarms that stand
    List,
    /// End alarms: after what raised them is mended
    Disarm {
        /// Only those of this replica, by name or id
        #[arg(long, value_name = "REPLICA")]
        member: Option<String>,
    },
}

#[derive(Debug, Args)]
pub struct EncryptionArgs {
    #[command(subcommand)]
    pub command: EncryptionCommand,
    /// Socket of the node agent (`run_dir` of its configuration)
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "CLUSTERMESH_AGENT_SOCKET",
        default_value = "/run/clustermesh/agent.sock"
    )]
    pub socket: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum EncryptionCommand {
    /// Devices of this machine, and how packets to every other node travel
    Status {
        /// Prove it: ask every other node for an echo and look whether that travelled encrypted; fails if one is not proved
        #[arg(long)]
        verify: bool,
    },
    /// Change keys now: this machine begins, and all others follow; no packet is lost
    Rotate,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Wait until every node of this cluster has applied the revision that each source cluster has now
    #[arg(long)]
    pub wait: bool,
    /// Longest wait: a number with ms, s or m
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse_duration, requires = "wait")]
    pub timeout: Duration,
}

#[derive(Debug, Args)]
pub struct GetArgs {
    /// Kind of records
    #[arg(value_enum)]
    pub kind: GetKind,
    /// Only of this cluster
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Only of this namespace (endpoints, services, identities)
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GetKind {
    /// Machines
    #[value(alias = "node")]
    Nodes,
    /// Addresses of workloads
    #[value(alias = "endpoint")]
    Endpoints,
    /// Services: own ones, and those that peers share
    #[value(alias = "service")]
    Services,
    /// Identities and their labels
    #[value(alias = "identity")]
    Identities,
}

#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// YAML (several documents) or JSON; - reads standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Let the server check, store nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Delete what these manifests name; - reads standard input
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["kind", "object"])]
    pub file: Option<PathBuf>,
    /// Kind of the object
    #[arg(value_enum, required_unless_present = "file", requires = "object")]
    pub kind: Option<ObjectKind>,
    /// NAMESPACE/NAME, or NAME in namespace default
    pub object: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ObjectKind {
    /// A Service
    #[value(aliases = ["services", "Service"])]
    Service,
    /// A Workload
    #[value(aliases = ["workloads", "Workload"])]
    Workload,
}

#[derive(Debug, Args)]
pub struct DevCaArgs {
    #[command(subcommand)]
    pub command: DevCaCommand,
}

#[derive(Debug, Subcommand)]
pub enum DevCaCommand {
    /// Make the authority: ca.crt and ca.key
    Init {
        /// Folder of the authority; made when it does not exist
        #[arg(long, value_name = "DIR", default_value = "pki")]
        dir: PathBuf,
        /// Replace what is there; every certificate must then be issued again
        #[arg(long)]
        force: bool,
    },
    /// Issue NAME.crt and NAME.key
    Issue(IssueArgs),
}

#[derive(Debug, Args)]
pub struct IssueArgs {
    /// What the holder may do
    #[arg(value_enum)]
    pub role: Role,
    /// Node name, server name, or name of the peer or operator; also the files' name
    pub name: String,
    /// Cluster that the holder belongs to
    #[arg(long, value_name = "NAME")]
    pub cluster: String,
    /// Host name or address of a server; can be repeated
    #[arg(long = "san", value_name = "NAME", value_parser = parse_san)]
    pub sans: Vec<String>,
    /// Folder of the authority
    #[arg(long, value_name = "DIR", default_value = "pki")]
    pub dir: PathBuf,
    /// Folder for the files [default: that of the authority]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Days until the certificate expires
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    pub days: u16,
    /// Replace what is there
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// A server of the cluster
    Server,
    /// The agent of a machine
    Node,
    /// Another cluster's server, which reads what this one publishes
    Peer,
    /// A person or tool that may do everything
    Operator,
}

/// As the server checks it.
pub fn parse_peer_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("https://").unwrap_or_default();
    let is_url = rest.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if is_url {
        Ok(text.to_owned())
    } else {
        Err("it is not https://HOST:PORT".to_owned())
    }
}

/// A host name, with `*` for the first label, or an address: what a certificate can be for.
fn parse_san(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("*.").unwrap_or(text);
    if text.parse::<std::net::IpAddr>().is_ok()
        || clustermesh_api::names::check_dns_subdomain(host).is_ok()
    {
        return Ok(text.to_owned());
    }
    Err("it is neither a host name nor an address".to_owned())
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor_ms = match unit {
        "ms" => 1,
        "s" | "" => 1000,
        "m" => 60_000,
        _ => return Err(format!("unit {unit:?} is not ms, s or m")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "expected a number and a unit, for example 30s".to_owned())?;
    let ms = number.checked_mul(factor_ms).ok_or("too long")?;
    let max_ms = u64::from(clustermesh_api::limits::WAIT_MAX_MS);
    if ms == 0 || ms > max_ms {
        return Err(format!("must be 1 ms to {} s", max_ms / 1000));
    }
    Ok(Duration::from_millis(ms))
}

#[cfg(test)]
mod tests;
