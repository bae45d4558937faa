//! A bounded number of seeds; `make sim SEEDS=1000` runs more.

use clustermesh_sim::world::{Options, run};

/// Seeds of each thread: two threads take less than twenty seconds in a debug build.
const SEEDS: u64 = 3;
const STEPS: u64 = 60;

fn all_hold(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let report = run(Options { seed, steps: STEPS });
        assert!(
            report.faults.is_empty(),
            "again: clustermesh-sim --seed {seed} --seeds 1 --steps {STEPS}\n{}",
            report.faults.join("\n")
        );
        assert!(report.answered > 50, "{report:?}");
    }
}

#[test]
fn the_same_seed_twice_gives_the_same_trace() {
    let options = Options {
        seed: 7,
        steps: STEPS,
    };
    let first = run(options);
    // Another thread has other random states of hash maps.
    let second = std::thread::spawn(move || run(options)).join();
    assert_eq!(Some(first.clone()), second.ok());
    assert_ne!(first.trace, run(Options { seed: 8, ..options }).trace);
}

#[test]
fn guarantees_hold_through_chaos() {
    all_hold(1..1 + SEEDS);
}

#[test]
fn guarantees_hold_through_more_chaos() {
    // Begins with one in which a leader crashed and came back before anyone missed it.
    all_hold(18..18 + SEEDS);
}
