//! Growth: what a group takes on disk and in memory while the same keys are put over and over and history is compacted.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::{CompactionRequest, RangeRequest};
use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::store::{load, usage};
use crate::judges::group::{Group, Kind, Settings};
use crate::judges::programs::Programs;

/// Clients that put.
const CLIENTS: u32 = 8;
/// Revisions that a compaction leaves.
const KEPT_REVISIONS: i64 = 1_000;
/// How often history is compacted, and growth looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// The first part of the run is no measure of growth: logs and snapshots reach their sizes in it.
const WARM_UP_SHARE: f64 = 0.4;
/// The second half of the rest may take so much more than the first.
const GROWTH_MAX: f64 = 1.15;
/// Below so many looks nothing can be said.
const LOOKS_MIN: usize = 20;

/// How long, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    /// Replicas of the group.
    pub replicas: u8,
    /// Keys that are put in turn.
    pub keys: u32,
    /// The run ends after so many puts,
    pub puts: u64,
    /// or after this time.
    pub time: Duration,
    /// Where data folders are made.
    pub folder: PathBuf,
}

/// What the group took at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    /// Puts until then.
    pub puts: u64,
    /// Data folder of the replica with the largest, MiB.
    pub disk_mib: f64,
    /// Mean resident memory, MiB.
    pub resident_mib: f64,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Soaked {
    /// In their order.
    pub looks: Vec<Look>,
    /// Time that it took.
    pub time: Duration,
}

impl Soaked {
    /// That neither disk nor memory grew once the warm-up was over.
    ///
    /// # Errors
    /// What grew, and from what to what.
    pub fn check_flat(&self) -> Result<()> {
        ensure!(
            self.looks.len() >= LOOKS_MIN,
            "{} looks are too few",
            self.looks.len()
        );
        let disk = self.halves(|look| look.disk_mib);
        let memory = self.halves(|look| look.resident_mib);
        for (what, (early, late)) in [("disk", disk), ("memory", memory)] {
            ensure!(
                late <= early * GROWTH_MAX,
                "{what} grew from {early:.0} to {late:.0} MiB over {} puts",
                self.puts()
            );
        }
        Ok(())
    }

    /// Puts of the whole run.
    #[must_use]
    pub fn puts(&self) -> u64 {
        self.looks.last().map_or(0, |look| look.puts)
    }

    /// The most that was taken in the first and in the second half after the warm-up.
    fn halves(&self, value: fn(&Look) -> f64) -> (f64, f64) {
        let all = load::count(self.looks.len());
        let warm = (0..self.looks.len()).take_while(|n| load::count(*n) < all * WARM_UP_SHARE);
        let rest = &self.looks[warm.count()..];
        let (early, late) = rest.split_at(rest.len() / 2);
        let most = |looks: &[Look]| looks.iter().map(value).fold(0.0, f64::max);
        (most(early), most(late))
    }
}

impl std::fmt::Display for Soaked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:>10} {:>10} {:>10}", "puts", "disk MiB", "memory MiB")?;
        let step = self.looks.len().div_ceil(LOOKS_MIN).max(1);
        for look in self.looks.iter().step_by(step) {
            writeln!(
                f,
                "{:>10} {:>10.0} {:>10.0}",
                look.puts, look.disk_mib, look.resident_mib
            )?;
        }
        write!(
            f,
            "{} puts in {:.0} s",
            self.puts(),
            self.time.as_secs_f64()
        )
    }
}

/// Puts until the end of the run, with compactions.
///
/// # Errors
/// When the group cannot be run or does not answer.
pub async fn run(options: &Options, programs: &Programs) -> Result<Soaked> {
    let settings = Settings {
        replicas: options.replicas,
        durable: true,
    };
    let mut group = Group::start(Kind::Ours, settings, programs, &options.folder).await?;
    let start = Instant::now();
    let put = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let channel = group.connect(usize::try_from(client)?).await?.channel();
        let (put, stop) = (Arc::clone(&put), Arc::clone(&stop));
        clients.spawn(put_in_turn(channel, client, options.keys, put, stop));
    }
    let mut kv = KvClient::new(group.connect(0).await?.channel());
    let mut looks = Vec::new();
    while put.load(Ordering::Relaxed) < options.puts && start.elapsed() < options.time {
        tokio::time::sleep(LOOK_INTERVAL).await;
        compact(&mut kv).await?;
        looks.push(look(&group, put.load(Ordering::Relaxed))?);
        if let Some(ended) = clients.try_join_next() {
            ended??;
        }
    }
    let time = start.elapsed();
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    for member in 0..group.members().len() {
        group.stop(member, Signal::SIGTERM).await?;
    }
    Ok(Soaked { looks, time })
}

async fn put_in_turn(
    channel: Channel,
    client: u32,
    keys: u32,
    put: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> Result<()> {
    let mut batches = load::Batches::new(client, CLIENTS);
    let mut kv = KvClient::new(channel);
    while !stop.load(Ordering::Relaxed) {
        let Some((count, request)) = batches.next(keys, 0) else {
            batches = load::Batches::new(client, CLIENTS);
            continue;
        };
        kv.txn(request).await.context("puts")?;
        put.fetch_add(count, Ordering::Relaxed);
    }
    Ok(())
}

/// As kube-apiserver does, the client decides how much history there is.
async fn compact(kv: &mut KvClient<Channel>) -> Result<()> {
    let asked = RangeRequest {
        key: load::key(0),
        count_only: true,
        ..RangeRequest::default()
    };
    let header = kv.range(asked).await?.into_inner().header;
    let revision = header.map_or(0, |header| header.revision) - KEPT_REVISIONS;
    let request = CompactionRequest {
        revision,
        ..CompactionRequest::default()
    };
    match kv.compact(request).await {
        Ok(_) => Ok(()),
        // Nothing was put since.
        Err(status) if status.code() == tonic::Code::OutOfRange => Ok(()),
        Err(status) => Err(status.into()),
    }
}

fn look(group: &Group, puts: u64) -> Result<Look> {
    let mut disk_mib = 0.0_f64;
    for member in group.members() {
        disk_mib = disk_mib.max(folder_mib(&member.data())?);
    }
    Ok(Look {
        puts,
        disk_mib,
        resident_mib: usage::resident_mib(group)?,
    })
}

/// What the files below a folder take on disk; some may go while it is looked at.
fn folder_mib(folder: &Path) -> Result<f64> {
    use std::os::unix::fs::MetadataExt;
    let mut blocks = 0;
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            match std::fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => folders.push(path),
                Ok(found) => blocks += found.blocks(),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            }
        }
    }
    // stat(2) counts in units of 512 bytes.
    Ok(load::count(usize::try_from(blocks / 2)?) / 1_024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soaked(disk: impl Fn(u64) -> f64) -> Soaked {
        let look = |puts| Look {
            puts,
            disk_mib: disk(puts),
            resident_mib: 100.0,
        };
        Soaked {
            looks: (0..100).map(look).collect(),
            time: Duration::from_secs(1),
        }
    }

    #[test]
    fn growth_is_told_from_saw_teeth_and_from_the_warm_up() {
        let teeth = |puts| f64::from(u32::try_from(puts % 10).unwrap());
        soaked(|puts| 100.0 + teeth(puts)).check_flat().unwrap();
        soaked(|puts| if puts < 40 { teeth(puts) } else { 100.0 })
            .check_flat()
            .unwrap();
        let grown = soaked(|puts| 100.0 + f64::from(u32::try_from(puts).unwrap()));
        let told = grown.check_flat().unwrap_err().to_string();
        assert!(told.contains("disk grew from"), "{told}");
    }

    #[test]
    fn too_short_a_run_proves_nothing() {
        let mut short = soaked(|_| 1.0);
        short.looks.truncate(LOOKS_MIN - 1);
        assert!(short.check_flat().is_err());
    }
}
