//! Entry point of the node agent.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use clustermesh_node::config::{Config, DEFAULT_CONFIG, HELP};
use clustermesh_node::{agent, command};
use clustermesh_process::logging;

/// The Clustermesh node agent: keeps the kernel's state equal to the mesh's records.
#[derive(Parser)]
#[command(name = "clustermesh-node", version, after_help = HELP)]
struct Arguments {
    /// Configuration file.
    #[arg(long, global = true, default_value = DEFAULT_CONFIG, env = "CLUSTERMESH_NODE_CONFIG")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, Subcommand)]
enum Command {
    /// Run the agent (the default).
    Run,
    /// Print the running agent's status.
    Status {
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t)]
        output: command::Output,
    },
    /// Print what the kernel programs see, one JSON object per packet and line.
    Flows,
    /// Detach the kernel programs and remove their maps; pods lose the network.
    Uninstall,
    /// Uninstall, and remove pods' interfaces and all state of this node.
    Cleanup,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("clustermesh-node: {error:#}");
            return ExitCode::from(clustermesh_process::EXIT_BAD_CONFIGURATION);
        }
    };
    match start(config, arguments.command.unwrap_or(Command::Run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("clustermesh-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config, command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match command {
            Command::Run => {
                logging::init(config.log_format.parse()?)?;
                agent::run(config).await
            }
            Command::Status { output } => command::status(&config, output).await,
            Command::Flows => command::flows(&config).await,
            Command::Uninstall => command::uninstall(&config).await,
            Command::Cleanup => command::cleanup(&config).await,
        }
    })
}
