//! One run: replicas, clients and watchers through chaos, then healing, then a look at whether everything goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use clustermesh_raft::ReplicaId;
use openraft::async_runtime::AsyncRuntime;
use parking_lot::Mutex;

use crate::{
    access::{self, Access},
    chaos::Blow,
    client,
    copies::Copies,
    history::History,
    member::{Member, Part},
    network::{Network, Weather},
    runtime::{self, Life, SimRuntime, WORLD, draw, elapsed, spawn_in, trace},
    watcher,
};

/// The longest TTL of a lease, s.
pub const MAX_LEASE_TTL_S: i64 = 5;
/// How long an operation waits for its answer.
pub const PATIENCE: Duration = Duration::from_secs(8);
/// After healing everything must work within this.
pub const LIVENESS: Duration = Duration::from_secs(60);
/// A lease that nobody keeps alive is gone this long after its TTL.
const LEASE_GRACE: Duration = Duration::from_secs(4);
/// How often replicas are looked at.
const SPY_INTERVAL: Duration = Duration::from_millis(10);
/// Blows to a group that begins, most.
const MAX_EARLY_BLOWS: u64 = 12;
/// Places for replicas.
const PLACES: usize = 9;

/// What to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Decides everything.
    pub seed: u64,
    /// Blows of chaos.
    pub steps: u64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What must not have happened; empty for a good run.
    pub faults: Vec<String>,
    /// Everything that happened, as one number.
    pub trace: u64,
    /// Replicas that the group began with.
    pub replicas: usize,
    /// Operations of clients.
    pub operations: usize,
    /// Those with an answer.
    pub answered: usize,
    /// Revisions made.
    pub revisions: usize,
    /// Blows by kind.
    pub blows: BTreeMap<Blow, u64>,
    /// Changes of permissions.
    pub auth_revisions: u64,
    /// Virtual time.
    pub time: Duration,
    /// Tasks run.
    pub steps: u64,
}

/// Everything that clients, watchers and chaos share.
pub struct World {
    /// All places.
    pub members: Vec<Member>,
    /// Replicas that the group began with, in the first places.
    pub begun_with: usize,
    pub(crate) network: Network,
    /// What happened.
    pub history: History,
    begun: AtomicBool,
    ended: AtomicBool,
    /// Compaction that was asked for, the furthest.
    pub compaction: AtomicI64,
    /// Replicas that somebody asked to remove.
    pub removals: Mutex<BTreeSet<ReplicaId>>,
    /// When the disks of these lives failed.
    pub disk_failures: Mutex<BTreeMap<Life, Duration>>,
    pub(crate) paused: Mutex<BTreeSet<Life>>,
    pub(crate) changes_members: bool,
    /// Changes of the membership that were asked for and not answered.
    pub(crate) changes_pending: AtomicUsize,
    /// Permissions, where they are checked.
    pub access: Option<Access>,
    /// The copy of a peer, where there is one.
    pub copies: Option<Copies>,
}

impl World {
    fn new() -> Self {
        let begun_with = draw(|random| [1, 3, 3, 3, 5][random.place(5)]);
        let part = |index| {
            if index < begun_with {
                Part::First
            } else {
                Part::Free
            }
        };
        Self {
            members: (0..PLACES)
                .map(|index| Member::new(index, part(index)))
                .collect(),
            begun_with,
            network: Network::default(),
            history: History::default(),
            begun: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            compaction: AtomicI64::new(0),
            removals: Mutex::default(),
            disk_failures: Mutex::default(),
            paused: Mutex::default(),
            changes_members: draw(|random| random.chance(60)),
            changes_pending: AtomicUsize::new(0),
            access: draw(|random| random.chance(40)).then(Access::default),
            copies: draw(|random| random.chance(50)).then(Copies::default),
        }
    }

    /// Places that belong to the group.
    pub fn taken(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.is_taken())
    }

    /// Whether every replica that the group begins with was up once.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Whether clients stop.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Whether a life stands still.
    pub fn is_paused(&self, life: Life) -> bool {
        self.paused.lock().contains(&life)
    }

    fn all_up(&self) -> bool {
        self.taken().all(|member| member.replica().is_some())
    }

    /// Waits until `done`; a fault when that takes too long.
    async fn wait(self: &Arc<Self>, what: &str, done: impl Fn() -> bool) {
        let begun = elapsed();
        while !done() {
            if elapsed() > begun + LIVENESS {
                let missing: Vec<_> = self
                    .taken()
                    .map(|member| {
                        let running = member.running.lock();
                        let running = running.as_ref();
                        let reason = running.and_then(|running| running.gave_up.clone());
                        let replica = running.and_then(|running| running.replica.clone());
                        let status = replica.map(|replica| replica.status());
                        format!("{} {reason:?} {status:?}", member.index)
                    })
                    .collect();
                self.history.fault(format!(
                    "{what} not within {LIVENESS:?} after healing: {missing:#?}"
                ));
                return;
            }
            self.look_after_starts();
            SimRuntime::sleep(SPY_INTERVAL).await;
        }
    }

    async fn check_end(self: &Arc<Self>) {
        SimRuntime::sleep(Duration::from_secs(MAX_LEASE_TTL_S.unsigned_abs()) + LEASE_GRACE).await;
        let newest = self.history.newest();
        let same = || {
            let states: Vec<_> = self
                .taken()
                .filter_map(Member::replica)
                .map(|replica| replica.read(|state| (state.revision(), state.hash())))
                .collect();
            states.windows(2).all(|pair| pair.first() == pair.last())
                && states.iter().all(|(revision, _)| *revision >= newest)
        };
        self.wait("the same state everywhere", same).await;
        let mut hashes = BTreeSet::new();
        for (life, replica) in self.taken().filter_map(Member::alive) {
            let leases: Vec<_> = replica.read(|state| state.leases().collect());
            if !leases.is_empty() {
                self.history.fault(format!(
                    "leases are left that nobody keeps alive: {leases:?}"
                ));
            }
            if let Err(reason) = replica.read(|state| state.check()) {
                self.history
                    .fault(format!("a state is inconsistent: {reason}"));
            }
            let hashed = spawn_in(life, async move { replica.hash_kv(newest).await });
            if let Ok(Ok(Ok((hash, _)))) = hashed.await {
                hashes.insert((hash.hash, hash.compact_revision));
            }
        }
        if hashes.len() != 1 {
            self.history
                .fault(format!("HashKV at revision {newest} is {hashes:?}"));
        }
    }
}

async fn settle(world: &Arc<World>) {
    world.heal();
    let settled = || {
        world.free_removed();
        world.all_up()
            && world.changes_pending.load(Ordering::Relaxed) == 0
            && world.members_settled()
    };
    world
        .wait("every replica up and the membership settled", settled)
        .await;
    SimRuntime::sleep(Duration::from_secs(1)).await;
    world.ended.store(true, Ordering::Relaxed);
    if let Some(copies) = &world.copies {
        copies.end();
    }
}

/// The first replicas come to be a group, often under blows already.
async fn begin(world: &Arc<World>, blows: &mut BTreeMap<Blow, u64>) {
    (0..world.begun_with).for_each(|index| world.start(index));
    if draw(|random| random.chance(50)) {
        for _ in 0..draw(|random| 1 + random.below(MAX_EARLY_BLOWS)) {
            strike(world, blows).await;
        }
        world.heal();
    }
    world.wait("every replica up", || world.all_up()).await;
    world.begun.store(true, Ordering::Relaxed);
}

async fn strike(world: &Arc<World>, blows: &mut BTreeMap<Blow, u64>) {
    SimRuntime::sleep(World::pause_between_blows()).await;
    *blows.entry(world.blow().await).or_default() += 1;
    world.look_after_starts();
}

async fn play(options: Options) -> Report {
    let world = Arc::new(World::new());
    world.network.set_weather(Weather {
        delay_ms: 10,
        ..Weather::default()
    });
    let mut blows: BTreeMap<Blow, u64> = BTreeMap::new();
    let spy = world.clone();
    drop(spawn_in(WORLD, async move {
        loop {
            spy.spy();
            SimRuntime::sleep(SPY_INTERVAL).await;
        }
    }));
    begin(&world, &mut blows).await;
    let mut clients = Vec::new();
    if world.access.is_some() {
        access::set_up(&world).await;
        clients.push(spawn_in(WORLD, access::run(world.clone())));
    }
    let numbers = 0..client::CLIENTS;
    clients.extend(numbers.map(|number| spawn_in(WORLD, client::run(world.clone(), number))));
    let stop_watchers = Arc::new(AtomicBool::new(false));
    let watchers: Vec<_> = (0..watcher::WATCHERS)
        .map(|_| spawn_in(WORLD, watcher::run(world.clone(), stop_watchers.clone())))
        .collect();
    for _ in 0..options.steps {
        strike(&world, &mut blows).await;
        if !world.history.faults().is_empty() {
            break;
        }
    }
    settle(&world).await;
    for client in clients {
        let _done = client.await;
    }
    if world.history.faults().is_empty() {
        client::check_liveness(&world).await;
        world.check_end().await;
    }
    stop_watchers.store(true, Ordering::Relaxed);
    for watcher in watchers {
        let _done = watcher.await;
    }
    world.spy();
    let mut faults = world.history.faults();
    let (operations, watched, committed) = world.history.end();
    let compaction = world.compaction.load(Ordering::Relaxed);
    if faults.is_empty() {
        faults.extend(clustermesh_oracle::check(
            &operations,
            &watched,
            &committed,
            compaction,
        ));
    }
    trace(operations.len() as u64);
    Report {
        faults,
        trace: runtime::trace_hash(),
        replicas: world.begun_with,
        operations: operations.len(),
        answered: operations
            .iter()
            .filter(|operation| operation.answer != clustermesh_oracle::Answer::Unknown)
            .count(),
        revisions: committed.len(),
        blows,
        auth_revisions: world.access.as_ref().map_or(0, Access::floor),
        time: elapsed(),
        steps: runtime::steps(),
    }
}

/// Runs it.
///
/// # Panics
/// When a task of a replica panics, or the run is stuck.
#[must_use]
pub fn run(options: Options) -> Report {
    runtime::block_on(options.seed, play(options))
}
