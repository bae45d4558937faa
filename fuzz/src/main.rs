//! libFuzzer's entry: the target is named by `FUZZ_TARGET`, its seeds go into the folder `FUZZ_SEEDS`.
#![no_main]

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use clustermesh_fuzz::Target;

static TARGET: OnceLock<Target> = OnceLock::new();

fn prepare() {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let Some(target) = clustermesh_fuzz::find(&name) else {
        eprintln!("FUZZ_TARGET is {name:?}; there are:");
        for target in clustermesh_fuzz::TARGETS {
            eprintln!("  {}", target.name);
        }
        std::process::exit(2);
    };
    if let Some(folder) = std::env::var_os("FUZZ_SEEDS") {
        let folder = Path::new(&folder);
        for (number, seed) in (target.seeds)().into_iter().enumerate() {
            if let Err(error) = fs::write(folder.join(format!("seed-{number}")), seed) {
                eprintln!("{}: {error}", folder.display());
                std::process::exit(2);
            }
        }
    }
    TARGET.get_or_init(|| target);
}

libfuzzer_sys::fuzz_target!(init: prepare(), |bytes: &[u8]| {
    if let Some(target) = TARGET.get() {
        (target.run)(bytes);
    }
});
