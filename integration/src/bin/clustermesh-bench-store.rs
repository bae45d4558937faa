//! `make bench-store`: the store against etcd, as ratios of medians, printed and written as JSON.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use clustermesh_integration::bench::compare::print_table;
use clustermesh_integration::bench::store::{Options, run_all};
use clustermesh_integration::bench::update;
use clustermesh_integration::judges::programs::{Programs, cache_folder};
use clustermesh_integration::lab::binaries_folder;

#[derive(Parser)]
#[command(about = "The store against etcd; a missed target is printed and is no failure")]
struct Arguments {
    /// Rounds of every row
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Replicas of each group
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    replicas: u8,
    /// Seconds of one measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// Keys of the rows with many keys
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1_000..=10_000_000))]
    keys: u32,
    /// Only these rows (default: all)
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Without etcd
    #[arg(long)]
    ours_alone: bool,
    /// Where results are written; rows that are not measured now keep what they had there
    #[arg(long, default_value = "bench-results")]
    results: PathBuf,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let programs = Programs::find(&binaries_folder()?)?;
    let folder = cache_folder()?.join(format!("bench-{}", std::process::id()));
    let options = Options {
        rounds: arguments.rounds.into(),
        replicas: arguments.replicas,
        time: Duration::from_secs(arguments.seconds.into()),
        many_keys: arguments.keys,
        folder: folder.clone(),
        only: arguments.only,
        ours_alone: arguments.ours_alone,
    };
    let measured = run_all(&options, &programs, &|what| eprintln!("bench: {what}")).await;
    let _ = std::fs::remove_dir_all(&folder);
    let figures = measured?;
    let name = format!("store-{}", arguments.replicas);
    if !arguments.ours_alone {
        update(&arguments.results, &name, &figures)?;
    }
    print_table(&figures);
    Ok(())
}
