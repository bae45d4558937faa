//! Many power cuts in a row: a process writes, power fails, the next process finds what must be there.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{model::Model, mount::PowerDisk, protocol::Message, workload::Durability};

/// The replica's folder on the disk.
const FOLDER: &str = "data";
/// Cuts that one disk sees before an empty one takes its place.
const CUTS_PER_DISK: u64 = 20;
/// One cut in this many comes while the folder is being opened.
const EARLY_CUTS_ONE_IN: u32 = 3;
const EARLY_CHANGES: u64 = 150;
const LATE_CHANGES: u64 = 1_500;
/// A process that has not come to its power cut by now hangs.
const CUT_TIMEOUT: Duration = Duration::from_secs(60);
const EXIT_POLL: Duration = Duration::from_millis(20);

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Program whose sub-command `replica` is the workload.
    pub program: PathBuf,
    /// Decides everything that is random.
    pub seed: u64,
    /// Power cuts.
    pub cuts: u64,
    /// How the log is written.
    pub durability: Durability,
}

/// What was survived.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Power cuts.
    pub cuts: u64,
    /// Acknowledged operations, all of them found again.
    pub acknowledged: u64,
    /// The most that one file had written without a sync while a replica ran, bytes.
    pub most_volatile_bytes: u64,
}

/// Why a run ended early.
#[derive(Debug)]
pub enum Failure {
    /// What was acknowledged is not there, or the folder does not open.
    Lost(String),
    /// The rig itself does not work.
    Rig(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Rig(error)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lost(what) => f.write_str(what),
            Self::Rig(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for Failure {}

/// A process on the disk, with all that it said so far.
struct Replica {
    child: Child,
    messages: JoinHandle<Vec<Message>>,
    complaints: JoinHandle<String>,
}

impl Replica {
    fn start(options: &Options, disk: &Arc<PowerDisk>, seed: u64) -> anyhow::Result<Self> {
        let mut command = Command::new(&options.program);
        let folder = disk.path().join(FOLDER);
        command.arg("replica").arg(folder).arg(seed.to_string());
        if options.durability == Durability::FlushOnly {
            command.arg("--flush-only");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env("RUST_BACKTRACE", "0")
            .spawn()
            .with_context(|| format!("start {}", options.program.display()))?;
        let said = child.stdout.take().context("stdout of the replica")?;
        let disk = disk.clone();
        let complained = child.stderr.take().context("stderr of the replica")?;
        Ok(Self {
            child,
            messages: std::thread::spawn(move || {
                BufReader::new(said)
                    .lines()
                    .map_while(Result::ok)
                    // The last line may be cut short by the kill.
                    .map_while(|line| serde_json::from_str(&line).ok())
                    .inspect(|message| {
                        // Opening clears whole segments, which hold nothing yet.
                        if matches!(message, Message::Found(_)) {
                            disk.measure_volatile_bytes();
                        }
                    })
                    .collect()
            }),
            complaints: std::thread::spawn(move || {
                let mut text = String::new();
                // What cannot be read cannot be shown.
                let _ = BufReader::new(complained).read_to_string(&mut text);
                text
            }),
        })
    }

    fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Kills it and returns what it said, and its complaints.
    fn end(mut self) -> anyhow::Result<(Vec<Message>, String)> {
        // It may have ended by itself.
        let _ = self.child.kill();
        self.child.wait().context("wait for the replica")?;
        let messages = self.messages.join();
        let complaints = self.complaints.join();
        match (messages, complaints) {
            (Ok(messages), Ok(complaints)) => Ok((messages, complaints)),
            _ => bail!("a reader of the replica's output has panicked"),
        }
    }
}

/// Runs until all cuts are survived or one is not.
///
/// # Errors
/// [`Failure`], which says what is lost.
pub fn run(options: &Options) -> Result<Outcome, Failure> {
    let mount_point = tempfile::tempdir().context("make a folder to mount at")?;
    let disk = PowerDisk::mount(mount_point.path()).context("mount the disk")?;
    let disk = Arc::new(disk);
    let mut outcome = Outcome::default();
    let mut model = Model::default();
    let mut rng = StdRng::seed_from_u64(options.seed);
    for cut in 0..options.cuts {
        if cut % CUTS_PER_DISK == 0 {
            outcome.acknowledged += model.acknowledged();
            disk.replace();
            model = Model::default();
        }
        let in_cut = |what: String| Failure::Lost(format!("power cut {cut}: {what}"));
        let early = rng.random_ratio(1, EARLY_CUTS_ONE_IN);
        let changes = if early { EARLY_CHANGES } else { LATE_CHANGES };
        disk.cut_at(rng.random_range(1..=changes));
        let mut replica = Replica::start(options, &disk, rng.random())?;
        let started = Instant::now();
        let mut off = false;
        while !off && started.elapsed() < CUT_TIMEOUT && !replica.has_ended()? {
            off = disk.wait_until_off(EXIT_POLL);
        }
        let off = off || disk.wait_until_off(Duration::ZERO);
        let hangs = !off && !replica.has_ended()?;
        let (messages, complaints) = replica.end()?;
        if matches!(messages.first(), Some(Message::Found(_))) {
            outcome.most_volatile_bytes =
                outcome.most_volatile_bytes.max(disk.most_volatile_bytes());
        }
        for message in &messages {
            model.take(message).map_err(in_cut)?;
        }
        if hangs {
            return Err(in_cut(format!("the replica hangs: {complaints}")));
        }
        if !off {
            return Err(in_cut(format!(
                "the replica ended with power on: {:?} {complaints}",
                messages
                    .last()
                    .filter(|last| matches!(last, Message::Failed(_)))
            )));
        }
        disk.power_cycle(rng.random());
        outcome.cuts += 1;
    }
    outcome.acknowledged += model.acknowledged();
    Ok(outcome)
}
