//! `clustermesh-power`: cuts power under a replica's log again and again, or mounts such a disk to try by hand.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use clustermesh_power::{
    mount::PowerDisk,
    rig::{self, Failure, Options},
    throughput,
    workload::{self, Durability},
};

#[derive(Parser)]
#[command(version, about = "A disk that loses power, and a replica's log on it")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Cut power under a replica's log and check what it finds afterwards
    Cuts {
        /// Power cuts
        #[arg(long, default_value_t = 100)]
        cuts: u64,
        /// Decides everything that is random
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// The control: trust sled's flush alone, which must lose something
        #[arg(long)]
        flush_only: bool,
    },
    /// Measure how many entries per second a log makes durable, batch by batch
    Throughput {
        /// An empty folder on the disk to measure
        folder: PathBuf,
        /// Seconds for each size of batch
        #[arg(long, default_value_t = 3)]
        seconds: u64,
    },
    /// Mount such a disk until end of input; each line on the input cuts power
    Mount {
        /// Where
        folder: PathBuf,
    },
    /// The replica on the disk
    #[command(hide = true)]
    Replica {
        /// Its data folder
        folder: PathBuf,
        /// Decides what it writes
        seed: u64,
        /// Trust sled's flush alone
        #[arg(long)]
        flush_only: bool,
    },
}

fn durability(flush_only: bool) -> Durability {
    if flush_only {
        Durability::FlushOnly
    } else {
        Durability::Full
    }
}

fn main() -> anyhow::Result<ExitCode> {
    match Args::parse().command {
        Command::Cuts {
            cuts,
            seed,
            flush_only,
        } => {
            let options = Options {
                program: std::env::current_exe().context("find this program")?,
                seed,
                cuts,
                durability: durability(flush_only),
            };
            let started = Instant::now();
            match rig::run(&options) {
                Ok(outcome) => {
                    println!(
                        "{} power cuts survived in {:.1} s: {} acknowledged operations, at most {} KiB without a sync",
                        outcome.cuts,
                        started.elapsed().as_secs_f64(),
                        outcome.acknowledged,
                        outcome.most_volatile_bytes >> 10
                    );
                    Ok(ExitCode::SUCCESS)
                }
                Err(Failure::Rig(error)) => Err(error),
                Err(Failure::Lost(what)) => {
                    println!("{what}\nagain: clustermesh-power cuts --seed {seed} --cuts {cuts}");
                    Ok(ExitCode::FAILURE)
                }
            }
        }
        Command::Throughput { folder, seconds } => {
            let runtime = tokio::runtime::Builder::new_current_thread().build()?;
            let each = Duration::from_secs(seconds);
            for batch in [1, 16, 64, 1024] {
                let folder = folder.join(format!("batch-{batch}"));
                let entries = runtime.block_on(throughput::measure(&folder, batch, each))?;
                let rate = entries as f64 / each.as_secs_f64();
                println!("batches of {batch}: {rate:.0} entries/s");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Mount { folder } => {
            let disk = PowerDisk::mount(&folder)?;
            for (seed, line) in (0..).zip(std::io::stdin().lines()) {
                line?;
                disk.power_cycle(seed);
                println!("power cut");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Replica {
            folder,
            seed,
            flush_only,
        } => {
            let runtime = tokio::runtime::Builder::new_current_thread().build()?;
            let out = std::io::stdout().lock();
            runtime.block_on(workload::run(&folder, seed, durability(flush_only), out))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
