//! `make bench`: figures against peers, as ratios of medians, printed and written as JSON.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use clustermesh_integration::bench::compare::print_table;
use clustermesh_integration::bench::{Suite, Wanted, write};
use clustermesh_integration::lab::{requirements, teardown};
use tokio::signal::unix::{SignalKind, signal};

/// Exit code where the machine lacks something.
const EXIT_CANNOT_RUN: u8 = 2;

#[derive(Parser)]
#[command(about = "Figures against peers; a missed target is printed and is no failure")]
struct Arguments {
    /// Rounds of every row
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Only these rows or suites (default: all)
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Where results are written
    #[arg(long, default_value = "bench-results")]
    results: PathBuf,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let wanted = Wanted::of(&arguments.only)?;
    let suites: Vec<Suite> = Suite::ALL
        .into_iter()
        .filter(|suite| wanted.has_any_of(*suite))
        .collect();
    let mut missing = requirements::missing();
    for (program, package) in suites.iter().flat_map(|suite| suite.tools()) {
        missing.extend(requirements::program(program, package));
    }
    if !missing.is_empty() {
        eprintln!("Nothing can be measured on this machine. Missing:");
        for what in missing {
            eprintln!("  - {what}");
        }
        return Ok(ExitCode::from(EXIT_CANNOT_RUN));
    }
    for prefix in teardown::abandoned() {
        for failure in teardown::remove_lab(&prefix).await {
            eprintln!("clean-up: {failure}");
        }
    }
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let code = tokio::select! {
        code = run(&arguments, &wanted, &suites) => code,
        _ = interrupt.recv() => Ok(ExitCode::from(130)),
        _ = terminate.recv() => Ok(ExitCode::from(143)),
    };
    // Also what an interrupted run had made.
    for failure in teardown::remove_own().await {
        eprintln!("clean-up: {failure}");
    }
    code
}

async fn run(arguments: &Arguments, wanted: &Wanted, suites: &[Suite]) -> Result<ExitCode> {
    let progress = |what: &str| eprintln!("bench: {what}");
    let mut all = Vec::new();
    let mut failed = Vec::new();
    for suite in suites {
        match suite.run(arguments.rounds.into(), wanted, &progress).await {
            Ok(figures) => {
                write(&arguments.results, suite.name(), &figures)?;
                all.extend(figures);
            }
            // The other suites are worth having without this one.
            Err(error) => failed.push((suite.name(), error)),
        }
    }
    print_table(&all);
    for (suite, error) in &failed {
        eprintln!("{suite} was not measured: {error:#}");
    }
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
