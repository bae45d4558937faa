//! One replica of a cluster's store: its namespace, its folder, its configuration, its process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::host::command_in;
use super::process::Process;

/// Longest that a replica may take to notice that it cannot go on.
const END_SECONDS_MAX: u64 = 60;

/// A replica.
#[derive(Debug)]
pub struct Replica {
    cluster: String,
    name: String,
    address: String,
    netns: String,
    folder: PathBuf,
    /// First part of its file names.
    stem: String,
    program: PathBuf,
    process: Option<Process>,
    /// Variables for its next start.
    environment: Vec<(String, PathBuf)>,
    /// Programs in front of it at its next start, such as `unshare`.
    wrapper: Vec<String>,
    lives: Arc<AtomicU64>,
}

impl Replica {
    /// The replica with this number, from 1, in a namespace that is there.
    pub(super) fn prepare(
        cluster: &str,
        number: usize,
        address: String,
        netns: String,
        folder: &Path,
        program: PathBuf,
    ) -> Self {
        let stem = match number {
            1 => "server".to_owned(),
            _ => format!("server-{number}"),
        };
        Self {
            cluster: cluster.to_owned(),
            name: format!("r{number}"),
            address,
            netns,
            folder: folder.to_owned(),
            stem,
            program,
            process: None,
            environment: Vec::new(),
            wrapper: Vec::new(),
            lives: Arc::default(),
        }
    }

    /// Starts it with the configuration that stands in its file and waits until it is ready.
    ///
    /// # Errors
    /// When it does not get ready; the message ends with its log.
    pub async fn start(&mut self) -> Result<()> {
        self.start_with(&[]).await
    }

    /// Starts it with further arguments.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with(&mut self, arguments: &[&str]) -> Result<()> {
        let mut command = self.command(arguments)?;
        // Before anybody can be answered by it.
        self.lives.fetch_add(1, Ordering::SeqCst);
        let started = Process::start_ready(&self.title(), &mut command, &self.log_path()).await;
        self.process = Some(started?);
        Ok(())
    }

    /// Starts it without waiting for anything.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn launch(&mut self) -> Result<()> {
        let mut command = self.command(&[])?;
        self.lives.fetch_add(1, Ordering::SeqCst);
        self.process = Some(Process::start(
            &self.title(),
            &mut command,
            &self.log_path(),
        )?);
        Ok(())
    }

    fn title(&self) -> String {
        format!("server {} of {}", self.name, self.cluster)
    }

    fn command(&self, arguments: &[&str]) -> Result<tokio::process::Command> {
        let mut words = self.wrapper.iter().map(PathBuf::from).collect::<Vec<_>>();
        words.push(self.program.clone());
        let (first, rest) = words.split_first().context("no program")?;
        let mut command = command_in(&self.netns, None, first);
        command
            .args(rest)
            .arg("--config")
            .arg(self.config_path())
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// Ends it by `signal`.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub async fn stop(&mut self, signal: Signal) -> Result<()> {
        let process = self.process.take();
        let process = process.with_context(|| format!("{} does not run", self.title()))?;
        process.stop(signal).await?;
        Ok(())
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When it does not run, or still does after a minute.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        let title = self.title();
        let process = self.process.take();
        let process = process.with_context(|| format!("{title} does not run"))?;
        let limit = Duration::from_secs(END_SECONDS_MAX);
        tokio::time::timeout(limit, process.wait())
            .await
            .with_context(|| format!("{title} still runs after {END_SECONDS_MAX} s"))?
    }

    /// Whether it was started and has ended by itself.
    ///
    /// # Errors
    /// When it was not started.
    pub fn has_ended(&mut self) -> Result<bool> {
        let title = self.title();
        let process = self.process.as_mut();
        process
            .with_context(|| format!("{title} does not run"))?
            .has_ended()
    }

    /// Its process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn process(&self) -> Result<&Process> {
        let process = self.process.as_ref();
        process.with_context(|| format!("{} does not run", self.title()))
    }

    /// Whether it was started and not ended.
    #[must_use]
    pub const fn is_started(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn take_process(&mut self) -> Option<Process> {
        self.process.take()
    }

    /// How often it was started.
    #[must_use]
    pub fn lives(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lives)
    }

    /// Another build of the program, from the next start on.
    pub fn set_program(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    /// A variable of its environment, from the next start on.
    pub fn set_variable(&mut self, name: &str, value: &Path) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Programs in front of it, from the next start on.
    pub fn set_wrapper(&mut self, words: &[&str]) {
        self.wrapper = words.iter().map(|word| (*word).to_owned()).collect();
    }

    /// Its configuration file.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.folder.join(format!("{}.toml", self.stem))
    }

    /// Changes its configuration file, which it reads when it starts again.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn edit_config(&self, edit: impl FnOnce(String) -> String) -> Result<()> {
        let path = self.config_path();
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        std::fs::write(&path, edit(text))?;
        Ok(())
    }

    /// Where it keeps its data.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.join(&self.stem)
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.stem))
    }

    /// All that it has said, through all its lives.
    ///
    /// # Errors
    /// When it was never started.
    pub fn log_text(&self) -> Result<String> {
        use std::io::Read as _;
        let path = self.log_path();
        let mut bytes = Vec::new();
        let opened = File::open(&path).and_then(|mut file| file.read_to_end(&mut bytes));
        opened.with_context(|| path.display().to_string())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Its name in the group.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// Where clients reach it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("https://{}:2379", self.address)
    }

    /// Where the other replicas reach it.
    #[must_use]
    pub fn peer_url(&self) -> String {
        format!("https://{}:2380", self.address)
    }

    /// Name of its certificate and key files.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.stem
    }
}
