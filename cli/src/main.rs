//! `clustermesh`, the operator's command: status, records, manifests, development certificates.

mod alarm;
mod args;
mod connect;
mod dev_ca;
mod encryption;
mod get;
mod manifests;
mod member;
mod objects;
mod output;
mod replicas;
mod shell;
mod snapshot;
mod status;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command, GlobalArgs};

/// The command ran and failed, or what `status --wait` waited for did not come.
const EXIT_FAILED: u8 = 1;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    match run(&global, command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&connect::explain(&global, &error));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

async fn run(global: &GlobalArgs, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Status(args) => status::run(global, &args).await,
        Command::Get(args) => get::run(global, &args).await,
        Command::Apply(args) => objects::apply(global, &args).await,
        Command::Delete(args) => objects::delete(global, &args).await,
        Command::Member(args) => member::run(global, &args).await,
        Command::Snapshot(args) => snapshot::run(global, &args).await,
        Command::Alarm(args) => alarm::run(global, &args).await,
        Command::Encryption(args) => encryption::run(global, &args).await,
        Command::DevCa(args) => dev_ca::run(&args, global.output),
        Command::Completion { shell } => shell::completion(shell),
        Command::Man { directory } => shell::man_pages(&directory),
    }
}
