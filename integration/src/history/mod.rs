//! Clients and watchers that put load on a group of replicas and record what they were told, and the judgement of it.
//!
//! Everything runs on one thread inside the cluster's network. Each written value is unique; an operation without an
//! answer has an unknown outcome. The oracle is the one that also judges the simulation.

mod client;
mod verdict;
mod watcher;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clustermesh_client::ClientConfig;
use clustermesh_oracle::{Operation, Watched};
use tokio::task::JoinHandle;

use crate::lab::cluster::Cluster;
use crate::lab::host::netns_path;
use crate::lab::tap::in_netns;

pub use verdict::Verdict;

/// Operations that one history may have.
const OPERATIONS_MAX: usize = 500_000;
/// Kinds of errors that are counted by name.
const ERROR_KINDS_MAX: usize = 64;
/// Longest that everything may take to go on after a fault has gone.
const GOES_ON_SECONDS_MAX: u64 = 30;
/// Pause between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How much load.
#[derive(Clone, Copy, Debug)]
pub struct LoadConfig {
    /// Clients at once, each with one operation under way.
    pub clients: usize,
    /// Watchers at once.
    pub watchers: usize,
    /// Longest pause between two operations of a client, ms.
    pub pause_ms_max: u64,
    /// Decides what they do.
    pub seed: u64,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            clients: 6,
            watchers: 3,
            pause_ms_max: 30,
            seed: 1,
        }
    }
}

/// One replica as its clients know it.
#[derive(Clone, Debug)]
struct Endpoint {
    config: ClientConfig,
    lives: Arc<AtomicU64>,
    /// Writes acknowledged through it.
    acknowledged: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Records {
    operations: Vec<Operation>,
    watched: Vec<Watched>,
    faults: Vec<String>,
    /// When each write was acknowledged.
    acknowledged_at: Vec<Duration>,
    errors: BTreeMap<String, usize>,
}

/// What all clients and watchers share.
#[derive(Debug)]
struct Shared {
    begun: Instant,
    endpoints: Vec<Endpoint>,
    moment: AtomicU64,
    newest: AtomicI64,
    /// Clients end.
    stops: AtomicBool,
    /// Clients that have not.
    clients: AtomicUsize,
    /// Watchers end once they have everything up to here; 0: not yet.
    last: AtomicI64,
    /// Nobody wants the history any more.
    abandoned: AtomicBool,
    records: Mutex<Records>,
}

impl Shared {
    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moment(&self) -> u64 {
        self.moment.fetch_add(1, Ordering::SeqCst)
    }

    fn stops(&self) -> bool {
        self.stops.load(Ordering::SeqCst) || self.abandoned()
    }

    fn abandoned(&self) -> bool {
        self.abandoned.load(Ordering::SeqCst)
    }

    fn count_error(&self, error: &str) {
        let mut records = self.records();
        if records.errors.len() < ERROR_KINDS_MAX || records.errors.contains_key(error) {
            *records.errors.entry(error.to_owned()).or_default() += 1;
        }
    }
}

/// Load that runs. It ends when dropped.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<()>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.abandoned.store(true, Ordering::SeqCst);
    }
}

impl Load {
    /// Starts clients and watchers on the replicas that `cluster` has now, and waits until each replica took writes.
    ///
    /// # Errors
    /// When a replica takes none.
    pub async fn start(cluster: &Cluster, config: LoadConfig) -> Result<Self> {
        let endpoints = cluster
            .replicas()
            .iter()
            .map(|replica| {
                Ok(Endpoint {
                    config: cluster.client_config(vec![replica.endpoint()], "admin")?,
                    lives: replica.lives(),
                    acknowledged: Arc::default(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        ensure!(!endpoints.is_empty(), "a cluster without replicas");
        let from = cluster.store()?.revision().await? + 1;
        let shared = Arc::new(Shared {
            begun: Instant::now(),
            endpoints,
            moment: AtomicU64::new(1),
            newest: AtomicI64::new(from),
            stops: AtomicBool::new(false),
            clients: AtomicUsize::new(config.clients),
            last: AtomicI64::new(0),
            abandoned: AtomicBool::new(false),
            records: Mutex::default(),
        });
        let netns = netns_path(cluster.router_netns());
        let inside = Arc::clone(&shared);
        let thread = tokio::task::spawn_blocking(move || {
            in_netns(&netns, move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                runtime.block_on(run(&inside, config, from));
                Ok(())
            })
        });
        let load = Self { shared, thread };
        load.goes_on_everywhere().await?;
        Ok(load)
    }

    /// Time since the load began, as in its report.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.shared.begun.elapsed()
    }

    fn acknowledged(&self) -> Vec<u64> {
        let endpoints = self.shared.endpoints.iter();
        endpoints
            .map(|endpoint| endpoint.acknowledged.load(Ordering::SeqCst))
            .collect()
    }

    /// Waits until each of these replicas has acknowledged further writes; how long that took.
    ///
    /// # Errors
    /// When one does not within half a minute.
    pub async fn goes_on(&self, replicas: &[usize]) -> Result<Duration> {
        /// The one that was under way may be from before.
        const FURTHER: u64 = 3;
        let begun = Instant::now();
        let before = self.acknowledged();
        loop {
            let now = self.acknowledged();
            let stuck: Vec<usize> = replicas
                .iter()
                .copied()
                .filter(|index| now[*index] < before[*index] + FURTHER)
                .collect();
            if stuck.is_empty() {
                return Ok(begun.elapsed());
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(GOES_ON_SECONDS_MAX),
                "after {GOES_ON_SECONDS_MAX} s no writes are acknowledged by the replicas at {stuck:?} (from 0); errors: {:?}",
                self.shared.records().errors
            );
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// As [`Self::goes_on`], for all replicas.
    ///
    /// # Errors
    /// As [`Self::goes_on`].
    pub async fn goes_on_everywhere(&self) -> Result<Duration> {
        let all: Vec<usize> = (0..self.shared.endpoints.len()).collect();
        self.goes_on(&all).await
    }

    /// Lets the load go on for a while.
    pub async fn run_for(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Writes acknowledged by a replica so far.
    #[must_use]
    pub fn acknowledged_by(&self, replica: usize) -> u64 {
        self.shared.endpoints[replica]
            .acknowledged
            .load(Ordering::SeqCst)
    }

    /// Ends the load and judges it, by what the replicas that run have.
    ///
    /// # Errors
    /// When what happened cannot be read; faults are in the verdict.
    pub async fn finish(mut self, cluster: &Cluster) -> Result<Verdict> {
        self.shared.stops.store(true, Ordering::SeqCst);
        // What is still under way may yet be acknowledged.
        while self.shared.clients.load(Ordering::SeqCst) > 0 && !self.thread.is_finished() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        let last = verdict::last_revision(cluster).await?;
        self.shared.last.store(last, Ordering::SeqCst);
        (&mut self.thread)
            .await
            .context("the thread of the load")??;
        verdict::judge(cluster, &self.shared, last).await
    }
}

/// All clients and watchers, until they are told to end.
async fn run(shared: &Arc<Shared>, config: LoadConfig, from: i64) {
    let mut all = tokio::task::JoinSet::new();
    for number in 0..config.clients {
        let shared = Arc::clone(shared);
        all.spawn(async move {
            client::run(Arc::clone(&shared), config, number).await;
            shared.clients.fetch_sub(1, Ordering::SeqCst);
        });
    }
    for number in 0..config.watchers {
        all.spawn(watcher::run(Arc::clone(shared), config, number, from));
    }
    loop {
        tokio::select! {
            ended = all.join_next() => match ended {
                Some(Ok(())) => {}
                Some(Err(error)) => shared.records().faults.push(format!("a client or watcher: {error}")),
                None => return,
            },
            () = tokio::time::sleep(LOOK_INTERVAL) => {
                if shared.abandoned() {
                    return;
                }
            }
        }
    }
}
