//! `make demo`: two clusters on one machine, every row checked and measured.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use clustermesh_integration::demo::{self, Sabotage, Scene, report};
use clustermesh_integration::lab::{LabConfig, requirements, teardown};
use tokio::signal::unix::{SignalKind, signal};

/// Exit code where the machine lacks something.
const EXIT_CANNOT_RUN: u8 = 2;

#[derive(Parser)]
#[command(about = "Two clusters on one machine: every row checked and measured")]
struct Arguments {
    /// Leave the lab running and say how to enter it
    #[arg(long)]
    keep: bool,
    /// Check no rows beyond this one
    #[arg(long, value_name = "ROW")]
    until: Option<String>,
    /// Where results are written
    #[arg(long, default_value = "bench-results")]
    results: PathBuf,
    /// Pull the ground from under every row: all of them must fail
    #[arg(long, hide = true)]
    sabotage: bool,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let missing = requirements::missing();
    if !missing.is_empty() {
        eprintln!("The demo cannot run on this machine. Missing:");
        for what in missing {
            eprintln!("  - {what}");
        }
        return Ok(ExitCode::from(EXIT_CANNOT_RUN));
    }
    if let Some(until) = arguments.until.as_deref()
        && !demo::row_ids().any(|row| row == until)
    {
        let rows: Vec<&str> = demo::row_ids().collect();
        anyhow::bail!("there is no row {until}; rows are {}", rows.join(", "));
    }
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let code = tokio::select! {
        ended = run(&arguments) => match ended {
            Ok((scene, code)) => {
                if arguments.keep {
                    print!("\n{}", scene.lab.how_to_enter());
                    println!("Ctrl-C removes it.");
                    // The end that was announced, not an interruption.
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                }
                for failure in scene.lab.remove().await {
                    eprintln!("clean-up: {failure}");
                }
                Ok(code)
            }
            Err(error) => Err(error),
        },
        _ = interrupt.recv() => Ok(ExitCode::from(130)),
        _ = terminate.recv() => Ok(ExitCode::from(143)),
    };
    // Also what an interrupted run had made: its lab was dropped with the run.
    for failure in teardown::remove_own().await {
        eprintln!("clean-up: {failure}");
    }
    code
}

/// Checks the rows, prints and writes them; the code tells whether all passed.
async fn run(arguments: &Arguments) -> Result<(Scene, ExitCode)> {
    let sabotage = if arguments.sabotage {
        Sabotage::EveryRow
    } else {
        Sabotage::None
    };
    let begun = std::time::Instant::now();
    let terminal = std::io::stderr().is_terminal();
    let progress = |what: &str| {
        let line = format!("[{:5.1} s] {what} …", begun.elapsed().as_secs_f64());
        if terminal {
            eprint!("\r\x1b[2K{line}");
            // Progress that cannot be shown is not worth failing for.
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{line}");
        }
    };
    let (scene, rows) = demo::run(
        LabConfig {
            encryption: "mode = \"all\"\nstrict = true",
            ..LabConfig::two_by_two()?
        },
        sabotage,
        arguments.until.as_deref(),
        progress,
    )
    .await?;
    if terminal {
        eprint!("\r\x1b[2K");
    }
    let passed = report::print_table(&rows);
    println!("took {:.0} s", begun.elapsed().as_secs_f64());
    report::write_json(&arguments.results, "demo", &rows)?;
    let code = if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    Ok((scene, code))
}
