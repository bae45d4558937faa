//! The demo: every row can fail, an interrupted run leaves nothing, a machine that lacks something is told so.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clustermesh_integration::demo::row_ids;
use clustermesh_integration::lab::binaries_folder;
use clustermesh_integration::lab::host::{run_unchecked, sh};
use clustermesh_integration::lab::teardown::{LABS_DIR, PREFIX_START};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

fn demo() -> PathBuf {
    binaries_folder().unwrap().join("clustermesh-demo")
}

/// Names of namespaces, mounts and folders of the labs of one process.
async fn traces_of(pid: u32) -> Vec<String> {
    let prefix = format!("{PREFIX_START}{pid:x}x");
    let mut traces = Vec::new();
    let namespaces = sh("ip", &["netns", "list"]).await.unwrap();
    traces.extend(namespaces.lines().map(str::to_owned));
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    traces.extend(mounts.lines().map(str::to_owned));
    for folder in std::fs::read_dir(LABS_DIR).into_iter().flatten().flatten() {
        traces.push(folder.path().display().to_string());
    }
    traces.retain(|trace| trace.contains(&prefix));
    traces
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_fails_when_its_ground_is_pulled_away() {
    let results = tempfile::tempdir().unwrap();
    let child = Command::new(demo())
        .arg("--sabotage")
        .arg("--results")
        .arg(results.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let rows = std::fs::read(results.path().join("demo.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&rows).unwrap();
    let ids: Vec<&str> = rows.iter().filter_map(|row| row["id"].as_str()).collect();
    assert_eq!(ids, row_ids().collect::<Vec<_>>());
    let passed: Vec<&Value> = rows.iter().filter(|row| row["passed"] != false).collect();
    assert!(passed.is_empty(), "passed without ground: {passed:?}");
    let numbers: Vec<&Value> = rows.iter().filter(|row| !row["ours"].is_null()).collect();
    assert!(numbers.is_empty(), "measured without ground: {numbers:?}");
    assert_eq!(traces_of(pid).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_leaves_nothing_behind() {
    let results = tempfile::tempdir().unwrap();
    let mut child = Command::new(demo())
        .arg("--results")
        .arg(results.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    let mut progress = BufReader::new(child.stderr.take().unwrap()).lines();
    // In the middle of it: clusters run and pods are being attached.
    while let Some(line) = progress.next_line().await.unwrap() {
        if line.contains("host to pod") {
            break;
        }
    }
    assert_ne!(traces_of(pid).await, Vec::<String>::new());
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGINT).unwrap();
    let drain = tokio::spawn(async move { while let Ok(Some(_)) = progress.next_line().await {} });
    let status = tokio::time::timeout(Duration::from_secs(30), child.wait())
        .await
        .unwrap()
        .unwrap();
    drain.await.unwrap();
    assert_eq!(status.code(), Some(130));
    assert_eq!(traces_of(pid).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_that_is_kept_can_be_entered_and_ends_well_when_it_is_told_to() {
    let results = tempfile::tempdir().unwrap();
    let mut child = Command::new(demo())
        .args(["--keep", "--until", "up", "--results"])
        .arg(results.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = Vec::new();
    while let Some(line) = output.next_line().await.unwrap() {
        let last = line.contains("Ctrl-C");
        said.push(line);
        if last {
            break;
        }
    }
    let command = |of: &str| {
        let line = said.iter().find(|line| line.trim_start().starts_with(of));
        let (_, command) = line
            .unwrap_or_else(|| panic!("{said:#?}"))
            .split_once(": ")
            .unwrap();
        command.to_owned()
    };
    let status = sh("sh", &["-c", &command("cluster ")]).await.unwrap();
    assert!(status.contains("n1"), "{status}");
    let inside = format!("{} ip -brief link", command("node n1"));
    let links = sh("sh", &["-c", &inside]).await.unwrap();
    assert!(links.contains("cm_host"), "{links}");

    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGINT).unwrap();
    let status = tokio::time::timeout(Duration::from_secs(30), child.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    assert_eq!(traces_of(pid).await, Vec::<String>::new());
    let rows = std::fs::read(results.path().join("demo.json")).unwrap();
    let rows: Value = serde_json::from_slice(&rows).unwrap();
    assert_eq!(rows[0]["passed"], true);
    assert!(rows[0]["ours"].as_f64().unwrap() > 0.0, "{rows}");
}

#[tokio::test]
async fn without_root_the_demo_says_what_is_missing_and_exits_with_2() {
    // The target folder may not be readable for others: run a copy.
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let copy = folder.path().join("demo");
    std::fs::copy(demo(), &copy).unwrap();
    run_unchecked(
        Command::new("chmod")
            .args(["-R", "a+rx"])
            .arg(folder.path()),
    )
    .await
    .unwrap();
    let output = run_unchecked(
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&copy)
            .current_dir(Path::new("/")),
    )
    .await
    .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("root"), "{said}");
}
