//! The same seeded operations on etcd and on ours, answers compared field by field.
//!
//! Cluster id, member id and Raft term are set aside, remaining TTLs and the order of a lease's keys too (etcd's are
//! in the order of a hash map). Everything else must be equal: every field, error codes and texts, revisions, and
//! for every watch the sequence of what it was sent.
//!
//! Deviations that are left out:
//! * A message above 2 MiB is refused by the gRPC library, each with a text and code of its own.
//! * Locks and elections: etcd passes errors on without their codes.
//! * Permission for a range that ends before it begins: etcd's answer depends on the shape of a tree.

mod access;
mod answer;
mod generate;
mod operation;
mod perform;
mod queue;
mod report;
mod watching;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::SeedableRng;

pub use report::{Difference, Report};

use super::group::{Group, Kind, Settings};
use super::programs::Programs;
use generate::Generator;
use operation::Op;
use perform::Side;

/// Operations of one seed.
pub const OPS_PER_SEED: usize = 600;

/// Seeds of a run that time alone ends: enough for every operation to succeed now and then.
pub const SEEDS_MIN: u64 = 6;

/// One pair of fresh servers, one seed.
///
/// # Errors
/// When a server cannot be run; differences are in the report.
pub async fn run_seed(
    seed: u64,
    programs: &Programs,
    folder: &Path,
    report: &mut Report,
) -> Result<()> {
    let settings = Settings {
        replicas: 1,
        durable: false,
        snapshot_log_bytes: None,
    };
    let folder = folder.join(format!("seed-{seed}"));
    let (etcd_folder, our_folder) = (folder.join("etcd"), folder.join("ours"));
    let (etcd, ours) = tokio::try_join!(
        Group::start(Kind::Etcd, settings, programs, &etcd_folder),
        Group::start(Kind::Ours, settings, programs, &our_folder),
    )?;
    let mut sides = Sides {
        etcd: Side::connect(&etcd).await?,
        ours: Side::connect(&ours).await?,
    };
    let outcome = sides.follow(seed, report).await;
    drop((etcd, ours));
    let _ = std::fs::remove_dir_all(&folder);
    outcome.with_context(|| format!("seed {seed}"))
}

/// Seeds from `first` on until `count` are done or the time is over; at least [`SEEDS_MIN`] of them.
///
/// # Errors
/// As [`run_seed`].
pub async fn run(
    first: u64,
    count: u64,
    at_most: Duration,
    programs: &Programs,
    folder: &Path,
) -> Result<Report> {
    let start = Instant::now();
    let mut report = Report::default();
    for seed in first..first.saturating_add(count) {
        run_seed(seed, programs, folder, &mut report).await?;
        if seed >= first.saturating_add(SEEDS_MIN - 1) && start.elapsed() >= at_most {
            break;
        }
    }
    Ok(report)
}

struct Sides {
    etcd: Side,
    ours: Side,
}

impl Sides {
    async fn follow(&mut self, seed: u64, report: &mut Report) -> Result<()> {
        let mut generator = Generator::new(rand::rngs::StdRng::seed_from_u64(seed));
        report.begin(seed);
        for step in 0..OPS_PER_SEED {
            let op = generator.next_op(step);
            if !self.step(step, &op, &mut generator, report).await? {
                return Ok(());
            }
        }
        for (step, op) in (OPS_PER_SEED..).zip(generator.last_ops()) {
            if !self.step(step, &op, &mut generator, report).await? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// False once the two are in different states: what follows would only repeat it.
    async fn step(
        &mut self,
        step: usize,
        op: &Op,
        generator: &mut Generator,
        report: &mut Report,
    ) -> Result<bool> {
        let (etcd, ours) = tokio::join!(self.etcd.perform(op), self.ours.perform(op));
        let etcd = etcd.with_context(|| format!("step {step}, etcd"))?;
        let ours = ours.with_context(|| format!("step {step}, ours"))?;
        generator.learn(op, &etcd);
        let same_state = report.compare(step, op, &etcd, &ours);
        // Reads change nothing.
        Ok(same_state || op.only_reads())
    }
}
