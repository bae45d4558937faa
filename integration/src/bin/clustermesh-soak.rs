//! `make soak`: puts on the same keys for long, with compactions; disk and memory must stay flat.

use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use clustermesh_integration::bench::soak::{History, Options, Soak, Soaked};
use clustermesh_integration::judges::programs::{Programs, cache_folder};
use clustermesh_integration::lab::binaries_folder;

#[derive(Parser)]
#[command(about = "Disk and memory of a group while the same keys are put over and over")]
struct Arguments {
    /// Puts
    #[arg(long, default_value_t = 10_000_000)]
    puts: u64,
    /// Keys
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
    keys: u32,
    /// Replicas
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    replicas: u8,
    /// Times that disk and memory are looked at, each after a compaction
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(20..))]
    looks: u64,
    /// Fails when it takes longer
    #[arg(long, default_value_t = 3_600)]
    seconds: u64,
}

/// Revisions that a compaction leaves.
const KEPT_REVISIONS: i64 = 1_000;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let programs = Programs::find(&binaries_folder()?)?;
    let folder = cache_folder()?.join(format!("soak-{}", std::process::id()));
    let options = Options {
        replicas: arguments.replicas,
        keys: arguments.keys,
        kept_revisions: KEPT_REVISIONS,
        snapshot_log_bytes: None,
        time: Duration::from_secs(arguments.seconds),
        folder: folder.clone(),
    };
    let soaked = soak(options, &arguments, &programs).await;
    let _ = std::fs::remove_dir_all(&folder);
    let soaked = soaked?;
    println!("{soaked}");
    soaked.check_flat()
}

async fn soak(options: Options, arguments: &Arguments, programs: &Programs) -> Result<Soaked> {
    let mut soak = Soak::start(options, programs).await?;
    soak.put(arguments.puts, arguments.looks, History::Compacted)
        .await?;
    soak.end().await
}
