//! Builds a lab to work in, and removes what killed runs left behind.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use clustermesh_integration::lab::{
    AttachMode, Lab, LabConfig, RoutingMode, requirements, teardown,
};
use tokio::signal::unix::{SignalKind, signal};

/// Exit code where the machine lacks something.
const EXIT_CANNOT_RUN: u8 = 2;

#[derive(Parser)]
#[command(about = "Labs on this machine: clusters as network namespaces")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build a lab, start its processes, and keep it until Ctrl-C
    #[command(
        after_help = "Examples:\n  clustermesh-lab up\n  clustermesh-lab up --replicas 3\n  clustermesh-lab up --nodes 3 --wan-delay-ms 40 --attach clsact"
    )]
    Up {
        /// Replicas of each cluster's server: 1, 3 or 5
        #[arg(long, default_value_t = 1)]
        replicas: usize,
        /// Machines in each of the two clusters
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// How many of them run an agent [default: all]
        #[arg(long)]
        agents: Option<usize>,
        /// How programs are attached
        #[arg(long, value_enum, default_value_t = Attach::Auto)]
        attach: Attach,
        /// How pods of different nodes reach each other
        #[arg(long, value_enum, default_value_t = Routing::Tunnel)]
        routing: Routing,
        /// One-way delay between the clusters
        #[arg(long, default_value_t = 0)]
        wan_delay_ms: u64,
    },
    /// Remove everything of labs whose process is gone
    Clean,
}

#[derive(Clone, Copy, ValueEnum)]
enum Attach {
    Auto,
    Tcx,
    Clsact,
}

#[derive(Clone, Copy, ValueEnum)]
enum Routing {
    Tunnel,
    Direct,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Up {
            replicas,
            nodes,
            agents,
            attach,
            routing,
            wan_delay_ms,
        } => {
            let missing = requirements::missing();
            if !missing.is_empty() {
                for what in missing {
                    eprintln!("missing: {what}");
                }
                return Ok(ExitCode::from(EXIT_CANNOT_RUN));
            }
            let config = LabConfig {
                replicas,
                nodes_per_cluster: nodes,
                agents_per_cluster: agents.unwrap_or(nodes),
                attach_mode: match attach {
                    Attach::Auto => AttachMode::Auto,
                    Attach::Tcx => AttachMode::Tcx,
                    Attach::Clsact => AttachMode::Clsact,
                },
                routing_mode: match routing {
                    Routing::Tunnel => RoutingMode::Tunnel,
                    Routing::Direct => RoutingMode::Direct,
                },
                ..LabConfig::two_by_two()?
            };
            up(config, Duration::from_millis(wan_delay_ms)).await
        }
        Command::Clean => Ok(clean().await),
    }
}

async fn up(config: LabConfig, delay: Duration) -> Result<ExitCode> {
    let mut end = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut lab = Lab::build(config).await?;
    lab.wan().set_delay(delay);
    let code = match lab.start().await {
        Ok(()) => {
            print!("{}", lab.how_to_enter());
            println!("Ctrl-C removes it.");
            tokio::select! {
                _ = end.recv() => {}
                _ = terminate.recv() => {}
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    };
    for failure in lab.remove().await {
        eprintln!("clean-up: {failure}");
    }
    Ok(code)
}

async fn clean() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for prefix in teardown::abandoned() {
        println!("removing lab {prefix}");
        for failure in teardown::remove_lab(&prefix).await {
            eprintln!("{prefix}: {failure}");
            code = ExitCode::FAILURE;
        }
    }
    code
}
