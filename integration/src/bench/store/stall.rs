//! Very many watchers, one of which takes nothing: what the others notice of it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clustermesh_api::etcd::rpc::PutRequest;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::PERCENTILE;
use super::load::Load;
use super::watch::{self, Plan};
use crate::judges::group::Group;

/// One event is on its way at a time: what waits for others is then no part of the latency.
const PLAN: Plan = Plan {
    watchers: 10_000,
    writers: 1,
};
/// Turns with and without the stalled one.
const TURNS: u32 = 2;
/// Beside what all watch, the stalled one watches this key, which fills what lies between it and the server.
const FILLER: &str = "bench/filler";
const FILLERS: u32 = 64;
const FILLER_BYTES: usize = 256 << 10;
/// How soon it is looked again whether the stalled one watches.
const ASKED: Duration = Duration::from_millis(50);

/// Rows `watch-stall` and `watch-stall-mem`, with what they are compared with.
pub async fn measure(
    group: &Group,
    etcdctl: &Path,
    time: Duration,
) -> Result<Vec<(&'static str, f64)>> {
    let mut latencies = [Vec::new(), Vec::new()];
    let mut memory = [0.0_f64; 2];
    let time = time / TURNS;
    for _ in 0..TURNS {
        for stalled in [false, true] {
            let one = match stalled {
                true => Some(stall(group, etcdctl).await?),
                false => None,
            };
            let seen = watch::run(group, PLAN, time).await?;
            let place = usize::from(stalled);
            latencies[place].extend(seen.load.latencies_us());
            memory[place] = memory[place].max(seen.resident_mib);
            if let Some(mut one) = one {
                one.kill().await?;
            }
        }
    }
    let [without, with] =
        latencies.map(|latencies| Load::new(time * TURNS, latencies).percentile_ms(PERCENTILE));
    Ok(vec![
        ("watch-stall", with),
        ("watch-stall-none", without),
        ("watch-stall-mem", memory[1]),
        ("watch-stall-mem-none", memory[0]),
    ])
}

/// A watcher of everything that is stopped, with more on its way to it than anything in between holds.
async fn stall(group: &Group, etcdctl: &Path) -> Result<Child> {
    let (cert, key) = group.pki().operator();
    let mut watcher = Command::new(etcdctl)
        .args(["watch", "--prefix", "bench/"])
        .args(["--endpoints", &group.members()[0].endpoint()])
        .arg("--cacert")
        .arg(group.pki().authority())
        .arg("--cert")
        .arg(cert)
        .arg("--key")
        .arg(key)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()?;
    let mut kv = KvClient::new(group.connect(0).await?.channel());
    let put = |value: Bytes| PutRequest {
        key: FILLER.into(),
        value,
        ..PutRequest::default()
    };
    // Its first line says that it watches.
    let out = watcher.stdout.take().context("standard output")?;
    let mut lines = BufReader::new(out).lines();
    loop {
        kv.put(put(Bytes::from_static(b"first"))).await?;
        if let Ok(line) = timeout(ASKED, lines.next_line()).await {
            ensure!(line?.is_some(), "etcdctl watch ended");
            break;
        }
    }
    if let Some(pid) = watcher.id() {
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGSTOP)?;
    }
    for _ in 0..FILLERS {
        kv.put(put(vec![b'f'; FILLER_BYTES].into())).await?;
    }
    Ok(watcher)
}
