//! Planted faults: each must be found within the seeds that are run here.
#![cfg(feature = "mutants")]

use clustermesh_raft::mutants::{Mutant, plant};
use clustermesh_sim::run::{Options, run};

/// Seeds tried, most.
const SEEDS: u64 = 40;

/// The first seed that finds it for the right reason, and what it finds.
fn find(mutant: Mutant, first_seed: u64, steps: u64, says: &[&str]) -> Option<(u64, Vec<String>)> {
    (first_seed..first_seed + SEEDS).find_map(|seed| {
        plant(Some(mutant));
        let report = run(Options { seed, steps });
        plant(None);
        let said = |fault: &String| says.iter().any(|say| fault.contains(say));
        let found = report.faults.iter().any(said);
        found.then_some((seed, report.faults))
    })
}

fn must_find(mutant: Mutant, first_seed: u64, steps: u64, says: &[&str]) {
    let Some((seed, faults)) = find(mutant, first_seed, steps, says) else {
        panic!("no seed finds {mutant:?}");
    };
    println!("{mutant:?}: seed {seed}: {}", faults.join("\n"));
}

#[test]
fn a_discarded_entry_that_is_proposed_again_is_found() {
    // Rare: a leader must lose its quorum, its entries must be committed without it, and their log be gone when it comes back.
    must_find(Mutant::RetryDiscarded, 1, 60, &["was written at"]);
}

#[test]
fn a_reply_before_local_apply_is_found() {
    must_find(Mutant::ReplyBeforeApply, 1, 60, &["this client was at"]);
}

#[test]
fn a_linearizable_read_that_asks_nobody_is_found() {
    must_find(Mutant::ReadWithoutIndex, 1, 60, &["before it was asked"]);
}

#[test]
fn a_snapshot_of_live_keys_only_is_found() {
    must_find(
        Mutant::LiveKeysSnapshot,
        1,
        60,
        &["nobody asked for", "nobody compacted"],
    );
}
