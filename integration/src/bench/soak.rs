//! Growth: what a group takes on disk and in memory while the same keys are put over and over and history is compacted.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
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
/// The first part of the looks is no measure of growth: logs and snapshots reach their sizes in it.
const WARM_UP_SHARE: f64 = 0.4;
/// The second half of the rest may take so much more than the first.
const GROWTH_MAX: f64 = 1.15;
/// And so much: the log's file grows by segments of 8 MiB, a few of them while a snapshot is written.
const SLACK_MIB: f64 = 24.0;
/// Below so many looks nothing can be said.
const LOOKS_MIN: usize = 20;

/// What is put to, and for how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// Replicas of the group.
    pub replicas: u8,
    /// Keys that are put in turn: each client has some of them.
    pub keys: u32,
    /// Revisions that a compaction leaves.
    pub kept_revisions: i64,
    /// Bytes of log after which a replica takes a snapshot; `None` for what it does unless told.
    pub snapshot_log_bytes: Option<u64>,
    /// A soak that takes longer has failed.
    pub time: Duration,
    /// Where data folders are made.
    pub folder: PathBuf,
}

/// Whether history goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// It is compacted before each look.
    Compacted,
    /// All of it stays: what every soak must notice.
    Kept,
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

/// What was seen.
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
        if let Some((what, early, late)) = self.grown().first() {
            bail!(
                "{what} grew from {early:.0} to {late:.0} MiB over {} puts",
                self.puts()
            );
        }
        Ok(())
    }

    /// Which of disk and memory grew, with what was taken early and late, MiB.
    #[must_use]
    pub fn grown(&self) -> Vec<(&'static str, f64, f64)> {
        let all = [("disk", self.disk()), ("memory", self.memory())];
        all.into_iter()
            .map(|(what, (early, late))| (what, early, late))
            .filter(|(_, early, late)| *late > early * GROWTH_MAX + SLACK_MIB)
            .collect()
    }

    /// Puts of the whole soak.
    #[must_use]
    pub fn puts(&self) -> u64 {
        self.looks.last().map_or(0, |look| look.puts)
    }

    fn disk(&self) -> (f64, f64) {
        self.halves(|look| look.disk_mib)
    }

    fn memory(&self) -> (f64, f64) {
        self.halves(|look| look.resident_mib)
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

/// A group that is put to and looked at.
#[derive(Debug)]
pub struct Soak {
    options: Options,
    group: Group,
    clients: Vec<Client>,
    kv: KvClient<Channel>,
    start: Instant,
    puts: u64,
    looks: Vec<Look>,
}

impl Soak {
    /// Starts the group.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn start(options: Options, programs: &Programs) -> Result<Self> {
        let settings = Settings {
            replicas: options.replicas,
            durable: true,
            snapshot_log_bytes: options.snapshot_log_bytes,
        };
        let group = Group::start(Kind::Ours, settings, programs, &options.folder).await?;
        let mut clients = Vec::new();
        for number in 0..CLIENTS {
            let channel = group.connect(usize::try_from(number)?).await?.channel();
            clients.push(Client {
                kv: KvClient::new(channel),
                number,
                keys: options.keys,
                batches: load::Batches::new(number, CLIENTS),
            });
        }
        Ok(Self {
            kv: KvClient::new(group.connect(0).await?.channel()),
            group,
            clients,
            options,
            start: Instant::now(),
            puts: 0,
            looks: Vec::new(),
        })
    }

    /// Puts about so often, and looks so many times meanwhile.
    ///
    /// # Errors
    /// When the group does not answer, or takes too long for it.
    pub async fn put(&mut self, puts: u64, looks: u64, history: History) -> Result<()> {
        let each = u64::from(CLIENTS) * u64::from(load::PUTS_PER_TXN) * looks;
        let txns = puts.div_ceil(each.max(1));
        for _ in 0..looks {
            let mut putting = JoinSet::new();
            for client in self.clients.drain(..) {
                putting.spawn(client.put(txns));
            }
            while let Some(put) = putting.join_next().await {
                let (client, count) = put??;
                self.clients.push(client);
                self.puts += count;
            }
            if history == History::Compacted {
                self.compact().await?;
            }
            self.looks.push(self.look()?);
            ensure!(
                self.start.elapsed() < self.options.time,
                "only {} puts in {:?}",
                self.puts,
                self.options.time
            );
        }
        Ok(())
    }

    /// What was seen until now.
    #[must_use]
    pub fn seen(&self) -> Soaked {
        Soaked {
            looks: self.looks.clone(),
            time: self.start.elapsed(),
        }
    }

    /// Ends the group.
    ///
    /// # Errors
    /// When a replica does not end in order.
    pub async fn end(mut self) -> Result<Soaked> {
        let seen = self.seen();
        for member in 0..self.group.members().len() {
            self.group.stop(member, Signal::SIGTERM).await?;
        }
        Ok(seen)
    }

    /// As kube-apiserver does, the client decides how much history there is.
    async fn compact(&mut self) -> Result<()> {
        let asked = RangeRequest {
            key: load::key(0),
            count_only: true,
            ..RangeRequest::default()
        };
        let header = self.kv.range(asked).await?.into_inner().header;
        let newest = header.context("an answer without a header")?.revision;
        let request = CompactionRequest {
            revision: newest - self.options.kept_revisions,
            ..CompactionRequest::default()
        };
        match self.kv.compact(request).await {
            Ok(_) => Ok(()),
            // There is no more than what is to be kept.
            Err(status) if status.code() == tonic::Code::OutOfRange => Ok(()),
            Err(status) => Err(status.into()),
        }
    }

    fn look(&self) -> Result<Look> {
        let mut disk_mib = 0.0_f64;
        for member in self.group.members() {
            disk_mib = disk_mib.max(folder_mib(&member.data())?);
        }
        Ok(Look {
            puts: self.puts,
            disk_mib,
            resident_mib: usage::resident_mib(&self.group)?,
        })
    }
}

/// Puts its share of the keys in turn.
#[derive(Debug)]
struct Client {
    kv: KvClient<Channel>,
    number: u32,
    keys: u32,
    batches: load::Batches,
}

impl Client {
    /// Sends so many transactions; with the number of puts in them.
    async fn put(mut self, txns: u64) -> Result<(Self, u64)> {
        let mut puts = 0;
        for _ in 0..txns {
            let next = self.batches.next(self.keys, 0).or_else(|| {
                self.batches = load::Batches::new(self.number, CLIENTS);
                self.batches.next(self.keys, 0)
            });
            let (count, request) = next.context("fewer keys than clients")?;
            self.kv.txn(request).await.context("puts")?;
            puts += count;
        }
        Ok((self, puts))
    }
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
        let grown = soaked(|puts| 100.0 + 10.0 * f64::from(u32::try_from(puts).unwrap()));
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
