//! `etcdctl` itself, against etcd and against ours: what it prints and how it ends must be the same.

mod cases;
mod shown;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

pub use cases::all;
use shown::Shown;

use super::group::{Group, Kind, Settings};
use super::programs::Programs;

/// Longest run of one command.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(20);
/// Longest wait for lines of a command that runs on.
const LINES_TIME_MAX: Duration = Duration::from_secs(10);
/// Looks of a poll.
const POLLS_MAX: u32 = 100;
/// Pause between two looks.
const POLL_PAUSE: Duration = Duration::from_millis(100);

/// One command of a case.
#[derive(Clone, Debug)]
pub enum Step {
    /// Runs to its end; output and exit code are compared.
    Run {
        /// Arguments of `etcdctl`.
        arguments: String,
        /// Standard input.
        input: &'static str,
        /// Whether only the form counts: numbers are replaced.
        form_only: bool,
    },
    /// Runs until it has printed so many lines, which are compared, and is ended then.
    Lines {
        /// Arguments.
        arguments: String,
        /// Standard input.
        input: &'static str,
        /// How many.
        lines: usize,
    },
    /// Runs beside the following steps.
    Background {
        /// Arguments.
        arguments: String,
    },
    /// Repeats until it prints so many lines, then compares them.
    Poll {
        /// Arguments.
        arguments: String,
        /// How many.
        lines: usize,
    },
    /// `etcdutl` on a file of the case; only the form counts.
    Util {
        /// Arguments.
        arguments: String,
    },
}

/// Commands that belong together, on a server that earlier cases left without keys of theirs.
#[derive(Clone, Debug)]
pub struct Case {
    /// Name in the table: the command.
    pub name: &'static str,
    /// What is run.
    pub steps: Vec<Step>,
}

/// What a case came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The same output and exit codes.
    Equal,
    /// Something else.
    Differs,
    /// Ours has no such call.
    Missing,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Equal => "equal",
            Self::Differs => "differs",
            Self::Missing => "missing",
        })
    }
}

/// All cases with what they came to, and for those that are not equal what was printed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// By name.
    pub verdicts: BTreeMap<&'static str, Verdict>,
    /// For people.
    pub details: String,
}

impl Outcome {
    /// The table as it is checked in.
    #[must_use]
    pub fn table(&self) -> String {
        self.verdicts
            .iter()
            .map(|(name, verdict)| format!("{verdict:<8}{name}\n"))
            .collect()
    }
}

/// Runs all cases on both.
///
/// # Errors
/// When a server or `etcdctl` cannot be run; differences are verdicts.
pub async fn run(programs: &Programs, folder: &Path) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut pair: Option<Pair> = None;
    for (number, case) in all().into_iter().enumerate() {
        let mut sides = match pair.take() {
            Some(pair) => pair,
            None => Pair::start(programs, &folder.join(number.to_string())).await?,
        };
        let (etcd, ours) = tokio::join!(sides.etcd.run(&case), sides.ours.run(&case));
        let (etcd, ours) = (
            etcd.with_context(|| format!("{} on etcd", case.name))?,
            ours.with_context(|| format!("{} on ours", case.name))?,
        );
        let verdict = if etcd == ours {
            Verdict::Equal
        } else if ours.iter().any(|shown| shown.is_unimplemented()) {
            Verdict::Missing
        } else {
            Verdict::Differs
        };
        if verdict == Verdict::Equal {
            // Both are in the same state still.
            pair = Some(sides);
        } else {
            for (step, (etcd, ours)) in etcd.iter().zip(&ours).enumerate() {
                if etcd != ours {
                    outcome.details.push_str(&format!(
                        "{} ({verdict}), {:?}:\n--- etcd\n{etcd}--- ours\n{ours}\n",
                        case.name, case.steps[step]
                    ));
                }
            }
        }
        outcome.verdicts.insert(case.name, verdict);
    }
    Ok(outcome)
}

struct Pair {
    etcd: Ctl,
    ours: Ctl,
}

impl Pair {
    async fn start(programs: &Programs, folder: &Path) -> Result<Self> {
        let settings = Settings {
            replicas: 1,
            durable: false,
            snapshot_log_bytes: None,
        };
        let (etcd_folder, our_folder) = (folder.join("etcd"), folder.join("ours"));
        let (etcd, ours) = tokio::try_join!(
            Group::start(Kind::Etcd, settings, programs, &etcd_folder),
            Group::start(Kind::Ours, settings, programs, &our_folder),
        )?;
        Ok(Self {
            etcd: Ctl::new(etcd, programs, etcd_folder),
            ours: Ctl::new(ours, programs, our_folder),
        })
    }
}

/// `etcdctl` for one group.
struct Ctl {
    group: Group,
    programs: Programs,
    folder: std::path::PathBuf,
    /// First id that the last command printed.
    id: String,
}

impl Ctl {
    fn new(group: Group, programs: &Programs, folder: std::path::PathBuf) -> Self {
        Self {
            group,
            programs: programs.clone(),
            folder,
            id: String::new(),
        }
    }

    /// Words of a command line; `{id}`, `{endpoint}`, `{file}` and the names of certificates are filled in.
    fn words(&self, arguments: &str) -> Vec<String> {
        let (cert, key) = self.group.pki().operator();
        let filled = [
            ("{id}", self.id.clone()),
            ("{endpoint}", self.group.members()[0].endpoint()),
            ("{file}", self.folder.join("file").display().to_string()),
            ("{ca}", self.group.pki().authority().display().to_string()),
            ("{cert}", cert.display().to_string()),
            ("{key}", key.display().to_string()),
        ];
        arguments
            .split_whitespace()
            .map(|word| {
                filled.iter().fold(word.to_owned(), |word, (name, text)| {
                    word.replace(name, text)
                })
            })
            // An empty argument is written as two quotes.
            .map(|word| if word == "''" { String::new() } else { word })
            .collect()
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(self.programs.etcdctl());
        command
            .args(self.words(
                "--endpoints={endpoint} --cacert={ca} --cert={cert} --key={key} --command-timeout=10s",
            ))
            .args(self.words(arguments))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn run(&mut self, case: &Case) -> Result<Vec<Shown>> {
        let mut all = Vec::new();
        let mut background = Vec::new();
        for step in &case.steps {
            let shown = match step {
                Step::Run {
                    arguments,
                    input,
                    form_only,
                } => {
                    let shown = self.finish(self.command(arguments), input).await?;
                    if *form_only { shown.form() } else { shown }
                }
                Step::Lines {
                    arguments,
                    input,
                    lines,
                } => self.lines(arguments, input, *lines).await?,
                Step::Background { arguments } => {
                    let child = self
                        .command(arguments)
                        .stdout(Stdio::null())
                        .stderr(Stdio::null())
                        .spawn()?;
                    background.push(child);
                    continue;
                }
                Step::Poll { arguments, lines } => self.poll(arguments, *lines).await?,
                Step::Util { arguments } => {
                    let mut command = Command::new(self.programs.etcdutl());
                    command
                        .args(self.words(arguments))
                        .stdin(Stdio::piped())
                        .stdout(Stdio::piped())
                        .stderr(Stdio::piped())
                        .kill_on_drop(true);
                    self.finish(command, "").await?.form()
                }
            };
            if let Some(id) = shown.first_id() {
                self.id = id.to_owned();
            }
            all.push(shown);
        }
        for mut child in background {
            child.kill().await?;
        }
        Ok(all)
    }

    async fn finish(&self, mut command: Command, input: &str) -> Result<Shown> {
        let mut child = command.spawn().context("etcdctl")?;
        let mut stdin = child.stdin.take().context("stdin")?;
        // A command that does not read its input may be gone already.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        Ok(
            match timeout(COMMAND_TIME_MAX, child.wait_with_output()).await {
                Ok(output) => {
                    let output = output?;
                    Shown::new(
                        &self.group,
                        &String::from_utf8_lossy(&output.stdout)
                            .replace(&self.folder.display().to_string(), "FOLDER"),
                        &String::from_utf8_lossy(&output.stderr),
                        output.status.code(),
                    )
                }
                Err(_) => Shown::new(&self.group, "", "Error: does not end", None),
            },
        )
    }

    async fn lines(&self, arguments: &str, input: &str, lines: usize) -> Result<Shown> {
        let mut child = self.command(arguments).spawn().context("etcdctl")?;
        let mut stdin = child.stdin.take().context("stdin")?;
        let _ = stdin.write_all(input.as_bytes()).await;
        let mut reader = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let mut printed = String::new();
        let reading = async {
            for _ in 0..lines {
                match reader.next_line().await? {
                    Some(line) => {
                        printed.push_str(&line);
                        printed.push('\n');
                    }
                    None => break,
                }
            }
            anyhow::Ok(())
        };
        // What did not come is missing in what is compared.
        if let Ok(read) = timeout(LINES_TIME_MAX, reading).await {
            read?;
        }
        child.start_kill()?;
        let output = child.wait_with_output().await?;
        let errors = String::from_utf8_lossy(&output.stderr);
        Ok(Shown::new(&self.group, &printed, &errors, None))
    }

    async fn poll(&self, arguments: &str, lines: usize) -> Result<Shown> {
        let mut shown = self.finish(self.command(arguments), "").await?;
        for _ in 0..POLLS_MAX {
            if shown.lines() >= lines {
                break;
            }
            tokio::time::sleep(POLL_PAUSE).await;
            shown = self.finish(self.command(arguments), "").await?;
        }
        Ok(shown)
    }
}
