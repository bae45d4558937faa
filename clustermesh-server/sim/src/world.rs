//! One run: replicas, clients and watchers through chaos, then healing, then a look at whether everything goes on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use clustermesh_raft::{
    AutoCompaction, Data, InitialMember, MemoryData, Node, PeerHandler, Replica, ReplicaConfig,
    Start, StartError,
};
use openraft::async_runtime::AsyncRuntime;
use parking_lot::Mutex;

use crate::{
    client,
    history::History,
    network::{Network, Weather},
    runtime::{
        self, Life, SimRuntime, WORLD, begin_life, draw, elapsed, end_life, spawn_in, trace,
    },
    watcher,
};

/// The longest TTL of a lease, s.
pub const MAX_LEASE_TTL_S: i64 = 5;
/// How long an operation waits for its answer.
pub const PATIENCE: Duration = Duration::from_secs(8);
/// After healing everything must work within this.
const LIVENESS: Duration = Duration::from_secs(60);
/// A lease that nobody keeps alive is gone this long after its TTL.
const LEASE_GRACE: Duration = Duration::from_secs(4);
/// A clock is put forward or back by up to this, ms.
const MAX_CLOCK_STEP_MS: u64 = 3_600_000;
/// How often replicas are looked at.
const SPY_INTERVAL: Duration = Duration::from_millis(10);

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
    /// Operations of clients.
    pub operations: usize,
    /// Those with an answer.
    pub answered: usize,
    /// Revisions made.
    pub revisions: usize,
    /// Crashes of replicas.
    pub crashes: u64,
    /// Virtual time.
    pub time: Duration,
}

/// One replica through all its lives.
pub struct Member {
    /// Its place.
    pub index: usize,
    name: String,
    url: String,
    data: MemoryData,
    clock_step_ms: Arc<AtomicI64>,
    running: Mutex<Option<Running>>,
}

struct Running {
    life: Life,
    /// Once it has started.
    replica: Option<Replica<SimRuntime>>,
    /// It gave up waiting for a leader.
    gave_up: bool,
    /// Up to here its history was looked at.
    spied: i64,
}

/// Everything that clients, watchers and chaos share.
pub struct World {
    /// All replicas.
    pub members: Vec<Member>,
    network: Network,
    /// What happened.
    pub history: History,
    ended: AtomicBool,
    /// Compaction that was asked for, the furthest.
    pub compaction: AtomicI64,
}

impl Member {
    /// The replica and its life, if it has started.
    pub fn alive(&self) -> Option<(Life, Replica<SimRuntime>)> {
        let running = self.running.lock();
        let running = running.as_ref()?;
        Some((running.life, running.replica.clone()?))
    }

    /// The replica, if it has started.
    pub fn replica(&self) -> Option<Replica<SimRuntime>> {
        self.running.lock().as_ref()?.replica.clone()
    }
}

fn new_member(index: usize) -> Member {
    let name = format!("r{index}");
    Member {
        index,
        url: format!("https://{name}:2380"),
        name,
        data: MemoryData::on_disk(|| {
            draw(|random| {
                let slow = random.chance(5);
                random.time_ms(if slow { 20..200 } else { 0..3 })
            })
        }),
        clock_step_ms: Arc::default(),
        running: Mutex::new(None),
    }
}

impl World {
    /// Whether clients stop.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    fn config(&self, member: &Member) -> ReplicaConfig {
        let mut config = ReplicaConfig::new(Data::Memory(member.data.clone()), "sim");
        config.heartbeat = Duration::from_millis(50);
        config.election_timeout = Duration::from_millis(300);
        config.request_timeout = Duration::from_secs(6);
        config.start_timeout = Duration::from_secs(20);
        config.snapshot_log_bytes = 2000;
        config.auto_compaction = AutoCompaction::Off;
        config.node = Node {
            name: member.name.clone(),
            peer_url: member.url.clone(),
            ..Node::default()
        };
        let first = |member: &Member| InitialMember {
            name: member.name.clone(),
            peer_url: member.url.clone(),
        };
        config.start = Start::Static(self.members.iter().map(first).collect());
        let step = member.clock_step_ms.clone();
        config.wall_clock_unix_ms = Arc::new(move || {
            let elapsed = i64::try_from(elapsed().as_millis()).unwrap_or(0);
            1_700_000_000_000 + elapsed + step.load(Ordering::Relaxed)
        });
        config
    }

    fn start(self: &Arc<Self>, index: usize) {
        let Some(member) = self.members.get(index) else {
            return;
        };
        let life = begin_life();
        *member.running.lock() = Some(Running {
            life,
            replica: None,
            gave_up: false,
            spied: 1,
        });
        let handler = PeerHandler::default();
        self.network.listen(&member.url, handler.clone(), life);
        let transport = self.network.transport(&member.url);
        let config = self.config(member);
        let world = self.clone();
        drop(spawn_in(life, async move {
            let started = Replica::start_with(config, transport, &handler).await;
            let Some(member) = world.members.get(index) else {
                return;
            };
            let mut running = member.running.lock();
            let Some(running) = running.as_mut().filter(|running| running.life == life) else {
                return;
            };
            match started {
                Ok(replica) => running.replica = Some(replica),
                Err(StartError::NoLeader { .. }) => running.gave_up = true,
                Err(error) => {
                    running.gave_up = true;
                    let fault = format!("replica {index} does not start: {error}");
                    world.history.fault(fault);
                }
            }
        }));
    }

    fn crash(&self, member: &Member) {
        let Some(running) = member.running.lock().take() else {
            return;
        };
        self.network.silence(&member.url);
        end_life(running.life);
        drop(running);
        member
            .data
            .crash(|volatile| draw(|random| random.place(volatile + 1)));
    }

    fn is_up(&self, member: &Member) -> bool {
        member.running.lock().is_some()
    }

    fn restart_those_that_gave_up(self: &Arc<Self>) {
        for member in &self.members {
            let gave_up = member
                .running
                .lock()
                .as_ref()
                .is_some_and(|running| running.gave_up);
            if gave_up {
                self.crash(member);
                self.start(member.index);
            }
        }
    }

    /// Looks at what every replica has applied since the last look.
    fn spy(&self) {
        for member in &self.members {
            let mut running = member.running.lock();
            let Some(running) = running.as_mut() else {
                continue;
            };
            let Some(replica) = &running.replica else {
                continue;
            };
            let (revision, compact_revision, history) = replica.read(|state| {
                let after = running.spied.max(state.compact_revision() - 1);
                (
                    state.revision(),
                    state.compact_revision(),
                    state.history(after, usize::MAX),
                )
            });
            let index = member.index;
            if compact_revision > self.compaction.load(Ordering::Relaxed).max(1) {
                self.history.fault(format!(
                    "replica {index} is compacted at {compact_revision}, which nobody asked for"
                ));
            }
            if revision < running.spied {
                self.history.fault(format!(
                    "replica {index} went back from revision {} to {revision}",
                    running.spied
                ));
            }
            let Ok(groups) = history else {
                self.history
                    .fault(format!("replica {index} has no history"));
                continue;
            };
            let mut next = running.spied.max(compact_revision - 1) + 1;
            for group in &groups {
                if group.revision != next {
                    self.history.fault(format!(
                        "replica {index} has no revision {next}, but {}",
                        group.revision
                    ));
                }
                next = group.revision + 1;
            }
            if next != revision + 1 {
                self.history.fault(format!(
                    "replica {index} is at revision {revision}, its history ends before {next}"
                ));
            }
            self.history.note_applied(index, &groups, compact_revision);
            if let Some(failure) = replica.status().failure {
                self.history
                    .fault(format!("replica {index} has stopped: {failure}"));
            }
            running.spied = revision;
        }
    }

    fn leader(&self) -> Option<usize> {
        let leads = |member: &&Member| {
            member
                .replica()
                .is_some_and(|replica| replica.status().is_leader)
        };
        self.members.iter().find(leads).map(|member| member.index)
    }

    fn cut_off(&self, index: usize, both_ways: bool) {
        let Some(alone) = self.members.get(index) else {
            return;
        };
        let outwards = draw(|random| random.chance(50));
        for other in self.members.iter().filter(|other| other.index != index) {
            if both_ways || outwards {
                self.network.cut(&alone.url, &other.url);
            }
            if both_ways || !outwards {
                self.network.cut(&other.url, &alone.url);
            }
        }
    }

    /// A leader hears no answer, then is cut off; when it comes back the others have forgotten the log that it needs.
    async fn deafen(self: Arc<Self>, index: usize) {
        let Some(deaf) = self.members.get(index) else {
            return;
        };
        let others = || self.members.iter().filter(|other| other.index != index);
        others().for_each(|other| self.network.cut(&other.url, &deaf.url));
        SimRuntime::sleep(draw(|random| random.time_ms(50..300))).await;
        self.cut_off(index, true);
        SimRuntime::sleep(draw(|random| random.time_ms(800..1800))).await;
        for _ in 0..2 {
            for replica in others().filter_map(Member::replica) {
                let _late = SimRuntime::timeout(PATIENCE, replica.snapshot()).await;
            }
            SimRuntime::sleep(draw(|random| random.time_ms(100..400))).await;
        }
        self.network.heal();
    }

    /// One blow; whether a replica crashed.
    fn blow(self: &Arc<Self>) -> bool {
        let place = draw(|random| random.place(self.members.len()));
        let Some(member) = self.members.get(place) else {
            return false;
        };
        match draw(|random| random.below(100)) {
            0..18 if self.is_up(member) => {
                self.crash(member);
                let world = self.clone();
                drop(spawn_in(WORLD, async move {
                    SimRuntime::sleep(draw(|random| random.time_ms(50..2500))).await;
                    if !world
                        .members
                        .get(place)
                        .is_some_and(|member| world.is_up(member))
                    {
                        world.start(place);
                    }
                }));
                return true;
            }
            18..30 => self.cut_off(place, true),
            30..38 => self.cut_off(place, false),
            38..50 => self.cut_off(self.leader().unwrap_or(place), true),
            50..70 => self.network.heal(),
            70..78 => self.network.set_weather(
                draw(|random| {
                    Some(Weather {
                        loss_percent: random.below(4),
                        repeat_percent: random.below(10),
                        delay_ms: 1 + random.below(120),
                    })
                })
                .unwrap_or_default(),
            ),
            78..84 => {
                let step = draw(|random| random.below(2 * MAX_CLOCK_STEP_MS));
                let step = i64::try_from(step).unwrap_or(0) - 3_600_000;
                member.clock_step_ms.store(step, Ordering::Relaxed);
            }
            84..88 => {
                if let Some(replica) = member.replica() {
                    drop(spawn_in(
                        WORLD,
                        async move { drop(replica.snapshot().await) },
                    ));
                }
            }
            88..92 => {
                if let Some(replica) = member.replica() {
                    drop(spawn_in(WORLD, async move {
                        let _late = SimRuntime::timeout(PATIENCE, replica.resign()).await;
                    }));
                }
            }
            _ => drop(spawn_in(
                WORLD,
                self.clone().deafen(self.leader().unwrap_or(place)),
            )),
        }
        false
    }

    fn heal(self: &Arc<Self>) {
        self.network.heal();
        self.network.set_weather(Weather {
            delay_ms: 5,
            ..Weather::default()
        });
        for member in &self.members {
            if !self.is_up(member) {
                self.start(member.index);
            }
        }
    }

    /// Waits until `done`; a fault when that takes too long.
    async fn wait(self: &Arc<Self>, what: &str, done: impl Fn() -> bool) {
        let begun = elapsed();
        while !done() {
            if elapsed() > begun + LIVENESS {
                self.history
                    .fault(format!("{what} not within {LIVENESS:?} after healing"));
                return;
            }
            self.restart_those_that_gave_up();
            SimRuntime::sleep(SPY_INTERVAL).await;
        }
    }

    async fn check_end(self: &Arc<Self>) {
        SimRuntime::sleep(Duration::from_secs(MAX_LEASE_TTL_S.unsigned_abs()) + LEASE_GRACE).await;
        let newest = self.history.newest();
        let same = || {
            let states: Vec<_> = self
                .members
                .iter()
                .filter_map(Member::replica)
                .map(|replica| replica.read(|state| (state.revision(), state.hash())))
                .collect();
            states.windows(2).all(|pair| pair.first() == pair.last())
                && states.iter().all(|(revision, _)| *revision >= newest)
        };
        self.wait("the same state everywhere", same).await;
        for replica in self.members.iter().filter_map(Member::replica) {
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
        }
    }
}

async fn play(options: Options) -> Report {
    let replicas = 3;
    let world = Arc::new(World {
        members: (0..replicas).map(new_member).collect(),
        network: Network::default(),
        history: History::default(),
        ended: AtomicBool::new(false),
        compaction: AtomicI64::new(0),
    });
    world.network.set_weather(Weather {
        delay_ms: 10,
        ..Weather::default()
    });
    (0..replicas).for_each(|index| world.start(index));
    let spy = world.clone();
    drop(spawn_in(WORLD, async move {
        loop {
            spy.spy();
            SimRuntime::sleep(SPY_INTERVAL).await;
        }
    }));
    let up = |world: &World| {
        world
            .members
            .iter()
            .all(|member| member.replica().is_some())
    };
    world.wait("every replica up", || up(&world)).await;
    let clients: Vec<_> = (0..client::CLIENTS)
        .map(|client| spawn_in(WORLD, client::run(world.clone(), client)))
        .collect();
    let stop_watchers = Arc::new(AtomicBool::new(false));
    let watchers: Vec<_> = (0..watcher::WATCHERS)
        .map(|_| spawn_in(WORLD, watcher::run(world.clone(), stop_watchers.clone())))
        .collect();
    let mut crashes = 0;
    for _ in 0..options.steps {
        SimRuntime::sleep(draw(|random| random.time_ms(20..400))).await;
        crashes += u64::from(world.blow());
        world.restart_those_that_gave_up();
        if !world.history.faults().is_empty() {
            break;
        }
    }
    world.heal();
    world.wait("every replica up", || up(&world)).await;
    SimRuntime::sleep(Duration::from_secs(1)).await;
    world.ended.store(true, Ordering::Relaxed);
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
        operations: operations.len(),
        answered: operations
            .iter()
            .filter(|operation| operation.answer != clustermesh_oracle::Answer::Unknown)
            .count(),
        revisions: committed.len(),
        crashes,
        time: elapsed(),
    }
}

/// Runs it.
///
/// # Panics
/// When a task of a replica panics.
#[must_use]
pub fn run(options: Options) -> Report {
    runtime::block_on(options.seed, play(options))
}
