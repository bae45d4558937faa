//! Power cuts under the real log: what was acknowledged is there, and the control loses something.

use std::{path::PathBuf, process::ExitCode};

use clustermesh_power::{
    rig::{self, Failure, Options},
    workload::Durability,
};

const SEED: u64 = 1;
const CUTS: u64 = 20;
/// A segment of sled's. While less than one is volatile, none is given to later writes before a sync, and none is
/// believed to be stable because a later one says so.
const SEGMENT_BYTES: u64 = 8 << 20;

fn options(durability: Durability) -> Options {
    Options {
        program: PathBuf::from(env!("CARGO_BIN_EXE_clustermesh-power")),
        seed: SEED,
        cuts: CUTS,
        durability,
    }
}

#[test]
fn power_cuts_lose_nothing_acknowledged() -> ExitCode {
    match rig::run(&options(Durability::Full)) {
        Ok(outcome) => {
            assert_eq!(outcome.cuts, CUTS);
            assert!(outcome.acknowledged > 500, "{outcome:?}");
            assert!(outcome.most_volatile_bytes < SEGMENT_BYTES, "{outcome:?}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{failure}\nagain: clustermesh-power cuts --seed {SEED} --cuts {CUTS}");
            ExitCode::FAILURE
        }
    }
}

#[test]
fn the_control_that_trusts_sleds_flush_loses_something_or_the_rig_is_void() {
    match rig::run(&options(Durability::FlushOnly)) {
        Err(Failure::Lost(_)) => {}
        other => panic!("the rig is void: {other:?}"),
    }
}
