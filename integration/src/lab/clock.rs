//! Clocks of single processes: a wall clock that is put forward and back while the process runs.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tokio::process::Command;

use super::host::run;
use super::replica::Replica;

/// Source of the library that is preloaded.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clock/step.rs");

/// A wall clock of its own for a process.
#[derive(Debug)]
pub struct WallClock {
    library: PathBuf,
    step: PathBuf,
}

impl WallClock {
    /// A clock that goes as the machine's does; its files are made in `folder`.
    ///
    /// # Errors
    /// When `rustc` fails or a file cannot be written.
    pub async fn new(folder: &Path, name: &str) -> Result<Self> {
        let library = folder.join(format!("{name}-clock.so"));
        let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        rustc
            .args(["--edition=2024", "--crate-type=cdylib", "-Cpanic=abort"])
            .args(["-Copt-level=1", "-o"])
            .arg(&library)
            .arg(SOURCE);
        run(&mut rustc).await?;
        let step = folder.join(format!("{name}-clock.step"));
        std::fs::write(&step, 0_i64.to_ne_bytes()).with_context(|| step.display().to_string())?;
        Ok(Self { library, step })
    }

    /// The replica has this clock from its next start on.
    pub fn give_to(&self, replica: &mut Replica) {
        replica.set_variable("LD_PRELOAD", &self.library);
        replica.set_variable("CLOCK_STEP_FILE", &self.step);
    }

    /// From now on the clock is so far ahead of the machine's, or behind.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_ahead_seconds(&self, seconds: i64) -> Result<()> {
        // In place: the process has the file mapped.
        let file = std::fs::File::options().write(true).open(&self.step)?;
        file.write_all_at(&seconds.to_ne_bytes(), 0)?;
        Ok(())
    }
}
