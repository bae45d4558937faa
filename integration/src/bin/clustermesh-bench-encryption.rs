//! `make bench-encryption`: our WireGuard device against others, as ratios of medians, printed and written as JSON.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use clustermesh_integration::bench::compare::print_table;
use clustermesh_integration::bench::{encryption, update};
use clustermesh_integration::lab::{requirements, teardown};

/// Exit code where the machine lacks something.
const EXIT_CANNOT_RUN: u8 = 2;

#[derive(Parser)]
#[command(
    about = "Our WireGuard device against others; a missed target is printed and is no failure"
)]
struct Arguments {
    /// Rounds of every row
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Only these rows (default: all)
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Where results are written; rows that are not measured now keep what they had there
    #[arg(long, default_value = "bench-results")]
    results: PathBuf,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut missing = requirements::missing();
    missing.extend(requirements::program("iperf3", "iperf3"));
    missing.extend(requirements::program("wg", "wireguard-tools"));
    if !missing.is_empty() {
        eprintln!("Nothing can be measured on this machine. Missing:");
        for what in missing {
            eprintln!("  - {what}");
        }
        return Ok(ExitCode::from(EXIT_CANNOT_RUN));
    }
    let progress = |what: &str| eprintln!("bench: {what}");
    let measured = tokio::select! {
        measured = encryption::run_all(arguments.rounds.into(), &arguments.only, &progress) => measured,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    // Also what an interrupted run had made.
    for failure in teardown::remove_own().await {
        eprintln!("clean-up: {failure}");
    }
    let figures = measured?;
    update(&arguments.results, "encryption", &figures)?;
    print_table(&figures);
    Ok(ExitCode::SUCCESS)
}
