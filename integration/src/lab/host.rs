//! Runs commands on the machine and inside namespaces; the one place that names `ip` and `nsenter`.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Longest that a command of the lab may take.
const COMMAND_SECONDS_MAX: u64 = 150;

/// Where `ip netns` keeps its handles.
const NETNS_DIR: &str = "/run/netns";

/// Path of a named network namespace.
#[must_use]
pub fn netns_path(netns: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(netns)
}

/// A command that runs in `netns` and, where given, in the cgroup `cgroup`.
///
/// `nsenter` replaces itself with the program, so the pid is the program's.
#[must_use]
pub fn command_in(netns: &str, cgroup: Option<&Path>, program: &Path) -> Command {
    let enter = format!("--net={}", netns_path(netns).display());
    let mut command = match cgroup {
        Some(cgroup) => {
            let mut shell = Command::new("sh");
            shell
                .arg("-c")
                .arg("echo $$ > \"$0/cgroup.procs\" && exec nsenter \"$@\"")
                .arg(cgroup)
                .arg(enter)
                .arg("--")
                .arg(program);
            shell
        }
        None => {
            let mut nsenter = Command::new("nsenter");
            nsenter.arg(enter).arg("--").arg(program);
            nsenter
        }
    };
    command.kill_on_drop(true);
    command
}

/// Runs a command to its end; an error carries its name, exit code and what it printed.
///
/// # Errors
/// When it cannot be started, takes longer than a minute, or fails.
pub async fn run(command: &mut Command) -> Result<Output> {
    let output = run_unchecked(command).await?;
    if !output.status.success() {
        bail!(
            "{:?} failed ({}): {}{}",
            command.as_std(),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// Runs a command to its end, whatever its exit code.
///
/// # Errors
/// When it cannot be started or takes longer than a minute.
pub async fn run_unchecked(command: &mut Command) -> Result<Output> {
    let shown = format!("{:?}", command.as_std());
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    tokio::time::timeout(Duration::from_secs(COMMAND_SECONDS_MAX), output)
        .await
        .with_context(|| format!("{shown} took longer than {COMMAND_SECONDS_MAX} s"))?
        .with_context(|| format!("cannot start {shown}"))
}

/// Runs a program of the system with arguments.
///
/// # Errors
/// As [`run`].
pub async fn sh(program: &str, arguments: &[&str]) -> Result<String> {
    let output = run(Command::new(program).args(arguments)).await?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs many `ip` commands, one a line, inside `netns` (or outside of any) by one process.
///
/// # Errors
/// When one of them fails; the message holds `ip`'s own, with the line number.
pub async fn ip_batch(netns: Option<&str>, lines: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start ip (package iproute2)")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(lines.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    if !output.status.success() {
        bail!(
            "ip -batch in {} failed: {}\n{lines}",
            netns.unwrap_or("the root namespace"),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Where cgroup version 2 is mounted.
///
/// # Errors
/// When it is not.
pub fn cgroup2_root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let path = fields.nth(1)?;
            (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
        })
        .next()
        .context("no cgroup2 mount: mount -t cgroup2 none /sys/fs/cgroup/unified")
}
