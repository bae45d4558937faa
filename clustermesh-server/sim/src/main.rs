//! `clustermesh-sim`: runs simulations, seed after seed, and says how to run a failed one again.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use clap::Parser;
use clustermesh_sim::run::{Options, run};
use parking_lot::Mutex;

#[derive(Parser)]
#[command(version, about = "Deterministic simulation of a group of replicas")]
struct Args {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Blows of chaos in each
    #[arg(long, default_value_t = 60)]
    steps: u64,
    /// Seeds at once; as many as there are processors unless given
    #[arg(long)]
    jobs: Option<usize>,
    /// Tell of each seed
    #[arg(long, short)]
    verbose: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing_subscriber::filter::LevelFilter::OFF.into())
                .from_env_lossy(),
        )
        .with_writer(std::io::stderr)
        .init();
    let begun = Instant::now();
    let processors = || std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.unwrap_or_else(processors).max(1);
    let next = AtomicU64::new(0);
    let totals = Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= args.seeds {
                        return;
                    }
                    run_one(&args, args.seed.saturating_add(number), &totals);
                }
            });
        }
    });
    let Totals {
        failed,
        operations,
        revisions,
        blows,
    } = totals.into_inner();
    println!(
        "{} seeds, {failed} failed, {operations} operations, {revisions} revisions, {blows} blows, {:.1?}",
        args.seeds,
        begun.elapsed()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[derive(Default)]
struct Totals {
    failed: u64,
    operations: usize,
    revisions: usize,
    blows: u64,
}

fn run_one(args: &Args, seed: u64, totals: &Mutex<Totals>) {
    let options = Options {
        seed,
        steps: args.steps,
    };
    let run = catch_unwind(AssertUnwindSafe(|| run(options)));
    let mut totals = totals.lock();
    let faults = match run {
        Ok(report) => {
            totals.operations += report.operations;
            totals.revisions += report.revisions;
            totals.blows += report.blows.values().sum::<u64>();
            if args.verbose {
                println!("seed {seed}: {report:?}");
            }
            report.faults
        }
        Err(_) => vec!["a task has panicked, see above".to_owned()],
    };
    if faults.is_empty() {
        return;
    }
    totals.failed += 1;
    eprintln!("seed {seed} failed:");
    for fault in faults {
        eprintln!("  {fault}");
    }
    eprintln!(
        "again: make sim SEED={seed} SEEDS=1 STEPS={steps}, that is clustermesh-sim --seed {seed} --seeds 1 --steps {steps}",
        steps = args.steps
    );
}
