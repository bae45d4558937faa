//! Processes of the lab: started by handle, ready by notification, ended by pid.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};

/// Longest that a process may take from start to ready.
const READY_SECONDS_MAX: u64 = 30;
/// Longest that a process may take to end after SIGTERM.
const STOP_SECONDS_MAX: u64 = 15;

/// A running process with its log file.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    pid: Pid,
}

impl Process {
    /// Starts `command` with standard output and error appended to `log`.
    ///
    /// # Errors
    /// When the log or the program cannot be opened.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| log.display().to_string())?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name}: {:?}", command.as_std()))?;
        let pid = child.id().context("process ended at once")?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            pid: Pid::from_raw(i32::try_from(pid)?),
        })
    }

    /// Starts `command` and waits until it reports `READY=1` on the notification socket
    /// (`sd_notify(3)`), which is made beside the log.
    ///
    /// # Errors
    /// When it ends or does not report within half a minute; the message ends with its log.
    pub async fn start_ready(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let socket_path = log.with_extension("notify");
        let _ = std::fs::remove_file(&socket_path);
        let socket =
            UnixDatagram::bind(&socket_path).with_context(|| socket_path.display().to_string())?;
        command.env("NOTIFY_SOCKET", &socket_path);
        let mut process = Self::start(name, command, log)?;
        let ready = async {
            let mut message = [0; 4_096];
            loop {
                tokio::select! {
                    length = socket.recv(&mut message) => {
                        let text = String::from_utf8_lossy(&message[..length?]).into_owned();
                        if text.lines().any(|line| line == "READY=1") {
                            return anyhow::Ok(());
                        }
                    }
                    status = process.child.wait() => {
                        bail!("{name} ended before it was ready: {}", status?);
                    }
                }
            }
        };
        let result = tokio::time::timeout(Duration::from_secs(READY_SECONDS_MAX), ready)
            .await
            .map_err(|_| anyhow::anyhow!("{name} was not ready after {READY_SECONDS_MAX} s"))
            .and_then(|ended| ended);
        if let Err(error) = result {
            let tail = process.log_tail();
            return Err(error.context(format!("log of {name}:\n{tail}")));
        }
        Ok(process)
    }

    /// The process id.
    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// The log file.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Ends the process by `signal` and waits for its end; SIGKILL after a quarter of a minute.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub async fn stop(mut self, signal: Signal) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(signal)?;
        match tokio::time::timeout(Duration::from_secs(STOP_SECONDS_MAX), self.child.wait()).await {
            Ok(status) => Ok(status?),
            Err(_) => {
                self.signal(Signal::SIGKILL)?;
                self.child.wait().await?;
                bail!(
                    "{} did not end within {STOP_SECONDS_MAX} s of {signal}",
                    self.name
                )
            }
        }
    }

    /// Ends a traffic tool by SIGTERM and returns the report that it prints last.
    ///
    /// # Errors
    /// When it does not end, or its last line is no JSON.
    pub async fn finish(self) -> Result<serde_json::Value> {
        let (log, name) = (self.log.clone(), self.name.clone());
        self.stop(Signal::SIGTERM).await?;
        let text = std::fs::read_to_string(&log)?;
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("report of {name}: {last:?}"))
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub async fn wait(mut self) -> Result<ExitStatus> {
        Ok(self.child.wait().await?)
    }
}
