//! Removes what a lab made, also after it was killed: everything bears the lab's prefix.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::host::{cgroup2_root, sh};

/// All labs keep their files here, one folder each, named by prefix.
pub const LABS_DIR: &str = "/var/tmp/clustermesh-lab";

/// First letters of every name that a lab makes.
pub const PREFIX_START: &str = "cml";

/// By this a later run knows what a killed one left behind.
const OWNER: &str = "owner.pid";

/// Makes the folder of the lab `prefix`, which this process owns. It appears with its owner in it: others take one
/// without for abandoned.
///
/// # Errors
/// When it cannot be written.
pub fn make_folder(prefix: &str) -> Result<PathBuf> {
    let folder = Path::new(LABS_DIR).join(prefix);
    let begun = hidden("new", prefix);
    std::fs::create_dir_all(&begun)
        .and_then(|()| std::fs::write(begun.join(OWNER), std::process::id().to_string()))
        .and_then(|()| std::fs::rename(&begun, &folder))
        .with_context(|| folder.display().to_string())?;
    Ok(folder)
}

/// Removes the folder of a lab. It disappears with its owner still in it.
fn remove_folder(prefix: &str, folder: &Path) -> std::io::Result<()> {
    let gone = hidden("gone", prefix);
    std::fs::rename(folder, &gone)?;
    std::fs::remove_dir_all(&gone)
}

/// A name that is no lab's.
fn hidden(why: &str, prefix: &str) -> PathBuf {
    Path::new(LABS_DIR).join(format!(".{why}-{prefix}"))
}

/// Removes everything of the lab `prefix` and reports what could not be removed.
///
/// Goes on after a failure, and takes "already gone" for success.
pub async fn remove_lab(prefix: &str) -> Vec<String> {
    let mut failures = Vec::new();
    let mut note = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            failures.push(format!("{what}: {error:#}"));
        }
    };
    let namespaces: Vec<String> = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(&format!("{prefix}-")))
        .collect();
    let cgroup = cgroup2_root().map(|root| root.join(prefix));
    if let Ok(cgroup) = &cgroup {
        note("processes", end_processes(cgroup).await);
    }
    for namespace in &namespaces {
        note("processes", end_processes_in_netns(namespace).await);
        note(
            namespace,
            sh("ip", &["netns", "del", namespace]).await.map(drop),
        );
    }
    let folder = Path::new(LABS_DIR).join(prefix);
    for mount in mounts_below(&folder) {
        let path = mount.display().to_string();
        note(&path, sh("umount", &["-l", &path]).await.map(drop));
    }
    if let Ok(cgroup) = cgroup {
        note("cgroup", remove_cgroup(&cgroup).await);
    }
    if folder.exists() {
        note(
            &folder.display().to_string(),
            remove_folder(prefix, &folder).map_err(Into::into),
        );
    }
    failures
}

/// Prefixes of labs whose process is gone.
#[must_use]
pub fn abandoned() -> Vec<String> {
    std::fs::read_dir(LABS_DIR)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let prefix = entry.file_name().into_string().ok()?;
            let owner = std::fs::read_to_string(entry.path().join(OWNER)).ok();
            let alive = owner
                .and_then(|pid| pid.trim().parse().ok())
                .is_some_and(|pid| kill(Pid::from_raw(pid), None).is_ok());
            (prefix.starts_with(PREFIX_START) && !alive).then_some(prefix)
        })
        .collect()
}

/// Removes every lab of this very process.
pub async fn remove_own() -> Vec<String> {
    let own = std::process::id().to_string();
    let mut failures = Vec::new();
    for entry in std::fs::read_dir(LABS_DIR).into_iter().flatten().flatten() {
        let owner = std::fs::read_to_string(entry.path().join(OWNER));
        if owner.is_ok_and(|pid| pid.trim() == own)
            && let Ok(prefix) = entry.file_name().into_string()
        {
            failures.extend(remove_lab(&prefix).await);
        }
    }
    failures
}

async fn end_processes(cgroup: &Path) -> Result<()> {
    for folder in folders_deepest_first(cgroup) {
        let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        kill_all(text.lines().filter_map(|line| line.parse().ok())).await;
    }
    Ok(())
}

async fn end_processes_in_netns(netns: &str) -> Result<()> {
    let pids = sh("ip", &["netns", "pids", netns]).await?;
    kill_all(pids.lines().filter_map(|line| line.trim().parse().ok())).await;
    Ok(())
}

async fn kill_all(pids: impl Iterator<Item = i32>) {
    let pids: Vec<Pid> = pids.map(Pid::from_raw).collect();
    for pid in &pids {
        let _ = kill(*pid, Signal::SIGKILL);
    }
    for pid in pids {
        // Gone when the file is: a namespace is only freed after its last process.
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        for _ in 0..200 {
            if !path.exists() || std::fs::read_link(&path).is_err() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

fn folders_deepest_first(root: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(entry.path());
            }
        }
        all.push(folder);
    }
    all.reverse();
    all
}

async fn remove_cgroup(cgroup: &Path) -> Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    for folder in folders_deepest_first(cgroup) {
        let mut tries = 200;
        // A killed process leaves its cgroup after its namespaces: a device closes its queues in between.
        while let Err(error) = std::fs::remove_dir(&folder) {
            if error.kind() != std::io::ErrorKind::ResourceBusy || tries == 0 {
                return Err(error.into());
            }
            tries -= 1;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
    Ok(())
}

fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut below: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|path| path.starts_with(folder))
        .collect();
    below.reverse();
    below
}
