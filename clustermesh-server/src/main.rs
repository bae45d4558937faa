//! `clustermesh-server`: the control plane of one cluster.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use clustermesh_process::{
    EXIT_BAD_CONFIGURATION, LogFormat, logging, notify_ready, notify_stopping, said_once,
    shutdown_signal,
};
use clustermesh_server::check_data::{self, Form};
use clustermesh_server::config::Config;
use clustermesh_server::server::Server;
use tracing::{error, warn};

/// Exit code of a server that could not go on.
const EXIT_FAILED: i32 = 1;

const EXAMPLES: &str = "\
Examples:
  clustermesh-server --config /etc/clustermesh/server.toml
  clustermesh-server --config server.toml --check-config
  clustermesh-server check-data --config /etc/clustermesh/server.toml

A small configuration:
  data_dir = \"/var/lib/clustermesh/server\"
  listen_client = \"0.0.0.0:2379\"

  [cluster]
  name = \"c1\"
  id = 1
  pod_cidr_v4 = \"10.1.0.0/16\"
  service_cidr_v4 = \"10.101.0.0/16\"

  [tls]
  ca = \"ca.crt\"
  cert = \"c1-server.crt\"
  key = \"c1-server.key\"

  [[peers]]
  name = \"c2\"
  endpoints = [\"https://c2.example.net:2379\"]
  cert = \"remote.crt\"
  key = \"remote.key\"

One of three replicas (the same list everywhere; the server's certificate, O = clustermesh:server,
is also shown to the other replicas, so its SANs name the host in the list):
  [replica]
  name = \"r1\"
  initial_cluster = [\"r1=https://s1:2380\", \"r2=https://s2:2380\", \"r3=https://s3:2380\"]

A replica that joins a running group, as learner first:
  [replica]
  name = \"r4\"
  peer_url = \"https://s4:2380\"
  join = [\"https://s1:2380\", \"https://s2:2380\"]

Environment:
  CLUSTERMESH_LOG   log filter, for example \"info\" or \"clustermesh_server=debug\"

docs/server.md lists all keys.

Exit codes: 0 ended in order, 1 failed or check-data found errors, 2 wrong usage, 64 bad configuration.";

/// Control plane of one cluster: replicated store with etcd's API, node sessions, peering.
#[derive(Debug, Parser)]
#[command(
    name = "clustermesh-server",
    version,
    about,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Option<RunArguments>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look through the data folder of a server that is not running: log, vote, snapshots, identity. Nothing in it is
    /// changed; the log is copied to TMPDIR, and the state is read into memory once.
    CheckData(CheckDataArguments),
}

#[derive(Debug, Args)]
struct CheckDataArguments {
    /// Configuration file of the server: the folder must also be of its cluster.
    #[arg(long, value_name = "FILE", required_unless_present = "data_dir")]
    config: Option<PathBuf>,
    /// The data folder.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    data_dir: Option<PathBuf>,
    /// Form of the report.
    #[arg(short, long, value_enum, default_value_t = Form::Text)]
    output: Form,
}

#[derive(Debug, Args)]
struct RunArguments {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration and the certificates, print what was found, and exit.
    #[arg(long)]
    check_config: bool,
    /// Begin a new group from this replica's data: only when the majority of the old one is lost for good.
    /// Group and replica get new ids, the revision grows by 1000000000, what lies below is compacted.
    /// Start the others with empty folders and `join` afterwards, never with their old data.
    #[arg(long, conflicts_with = "check_config")]
    force_new_cluster: bool,
}

fn main() -> ExitCode {
    match Arguments::parse() {
        Arguments {
            command: Some(Command::CheckData(arguments)),
            ..
        } => check(&arguments),
        Arguments {
            run: Some(arguments),
            ..
        } => serve(&arguments),
        // clap asks for one of them.
        _ => ExitCode::from(EXIT_BAD_CONFIGURATION),
    }
}

fn check(arguments: &CheckDataArguments) -> ExitCode {
    let failed = |code: u8, reason: &dyn std::fmt::Display| {
        eprintln!("clustermesh-server: {reason:#}");
        ExitCode::from(code)
    };
    let mut cluster_name = None;
    let data_dir = match (&arguments.config, &arguments.data_dir) {
        (Some(path), _) => match Config::load(path) {
            Ok(config) => {
                cluster_name = Some(
                    config
                        .cluster
                        .map_or_else(String::new, |cluster| cluster.name),
                );
                config.data_dir
            }
            Err(error) => return failed(EXIT_BAD_CONFIGURATION, &error),
        },
        (None, Some(data_dir)) => data_dir.clone(),
        (None, None) => return failed(EXIT_BAD_CONFIGURATION, &"give --config or --data-dir"),
    };
    let report = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(check_data::run(&data_dir, cluster_name.as_deref())));
    let report = match report {
        Ok(report) => report,
        Err(error) => return failed(1, &said_once(error.as_ref())),
    };
    match arguments.output {
        Form::Text => print!("{}", check_data::to_text(&data_dir, &report)),
        Form::Json => println!("{:#}", check_data::to_json(&data_dir, &report)),
    }
    if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn serve(arguments: &RunArguments) -> ExitCode {
    let config = match load(arguments) {
        Ok(config) => config,
        Err(reason) => {
            eprintln!("clustermesh-server: {reason}");
            return ExitCode::from(EXIT_BAD_CONFIGURATION);
        }
    };
    if arguments.check_config {
        println!("{}: the configuration is good", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(reason) => {
            eprintln!("clustermesh-server: no runtime: {reason}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(&config, arguments.force_new_cluster)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            error!("{}", said_once(reason.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn load(arguments: &RunArguments) -> Result<Config, String> {
    let config = Config::load(&arguments.config).map_err(|error| error.to_string())?;
    let format: LogFormat = config
        .log
        .format
        .parse()
        .map_err(|error| format!("{error}"))?;
    logging::init(format).map_err(|error| error.to_string())?;
    clustermesh_process::install_crypto_provider();
    clustermesh_server::certificates::check(&config)
        .map_err(|reason| format!("{}: {reason}", arguments.config.display()))?;
    Ok(config)
}

async fn run(config: &Config, force_new_cluster: bool) -> anyhow::Result<()> {
    if force_new_cluster {
        clustermesh_server::server::force_new_cluster(config).await?;
    }
    // Before the start, so that a signal during it is not lost.
    let mut signal = tokio::spawn(shutdown_signal());
    let mut server = tokio::select! {
        server = Server::start(config) => server?,
        _ = &mut signal => return Ok(()),
    };
    if let Err(error) = notify_ready() {
        warn!(%error, "the service manager was not told that the server is ready");
    }
    let failed = tokio::select! {
        signal = &mut signal => {
            signal??;
            false
        }
        () = server.failed() => true,
    };
    if let Err(error) = notify_stopping() {
        warn!(%error, "the service manager was not told that the server ends");
    }
    server.drain().await;
    if failed {
        error!("the replica stopped by itself; its log says why");
        // Not by returning: a log whose disk has failed cannot be closed, and sled panics when it tries.
        std::process::exit(EXIT_FAILED);
    }
    server.shutdown().await;
    Ok(())
}
