//! Every target takes its seeds, the inputs in `corpus/`, and each of them cut short or with a byte changed.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use clustermesh_fuzz::{TARGETS, Target};

/// Cuts and changes of one input.
const CHANGES_PER_INPUT: usize = 64;

fn folder(target: &Target) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name)
}

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let mut names: Vec<_> = fs::read_dir(folder(target))
        .unwrap_or_else(|error| panic!("{}: {error}", target.name))
        .map(|found| found.unwrap().path())
        .collect();
    names.sort();
    names.iter().map(|name| fs::read(name).unwrap()).collect()
}

#[test]
fn seeds_are_read_as_what_they_are() {
    for target in TARGETS {
        let seeds = (target.seeds)();
        let taken = seeds.iter().filter(|seed| (target.run)(seed)).count();
        // One may be there for how it is refused.
        assert!(
            taken > 0 && taken + 1 >= seeds.len(),
            "{}: {taken} of {} seeds are taken",
            target.name,
            seeds.len()
        );
    }
}

#[test]
fn what_fuzzing_found_is_taken_or_refused() {
    let mut known = BTreeSet::new();
    for target in TARGETS {
        known.insert(target.name.to_owned());
        let inputs = corpus(&target);
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        for input in inputs {
            (target.run)(&input);
        }
    }
    let parent = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for found in fs::read_dir(parent).unwrap() {
        let name = found.unwrap().file_name().into_string().unwrap();
        assert!(known.contains(&name), "{name} is the corpus of no target");
    }
}

#[test]
fn changed_inputs_are_taken_or_refused() {
    for target in TARGETS {
        for (number, input) in (target.seeds)().iter().enumerate() {
            let step = (input.len() / CHANGES_PER_INPUT).max(1);
            for at in (0..input.len()).step_by(step) {
                (target.run)(&input[..at]);
                let mut changed = input.clone();
                // Any bit, another one at each place.
                changed[at] ^= 1 << ((at + number) % 8);
                (target.run)(&changed);
            }
        }
    }
}
