//! Looks after labs: removes what killed runs left behind.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use clustermesh_integration::lab::teardown;

#[derive(Parser)]
#[command(about = "Looks after labs on this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Remove everything of labs whose process is gone
    Clean,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Clean => {
            let mut code = ExitCode::SUCCESS;
            for prefix in teardown::abandoned() {
                println!("removing lab {prefix}");
                for failure in teardown::remove_lab(&prefix).await {
                    eprintln!("{prefix}: {failure}");
                    code = ExitCode::FAILURE;
                }
            }
            Ok(code)
        }
    }
}
