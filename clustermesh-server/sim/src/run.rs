//! One run: replicas, clients and watchers through chaos, then healing, then a look at whether everything goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use openraft::async_runtime::AsyncRuntime;

use crate::{
    access::Access,
    access_changes,
    chaos::Blow,
    client,
    member::Member,
    network::Weather,
    runtime::{self, SimRuntime, WORLD, draw, elapsed, spawn_in, trace},
    watcher,
    world::{MAX_LEASE_TTL_S, SPY_INTERVAL, World},
};

/// A lease that nobody keeps alive is gone this long after its TTL.
const LEASE_GRACE: Duration = Duration::from_secs(4);
/// Blows to a group that begins, most.
const MAX_EARLY_BLOWS: u64 = 12;

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

async fn check_end(world: &Arc<World>) {
    SimRuntime::sleep(Duration::from_secs(MAX_LEASE_TTL_S.unsigned_abs()) + LEASE_GRACE).await;
    let newest = world.history.newest();
    let same = || {
        let states: Vec<_> = world
            .taken()
            .filter_map(Member::replica)
            .map(|replica| replica.read(|state| (state.revision(), state.hash())))
            .collect();
        states.windows(2).all(|pair| pair.first() == pair.last())
            && states.iter().all(|(revision, _)| *revision >= newest)
    };
    world.wait("the same state everywhere", same).await;
    let mut hashes = BTreeSet::new();
    for (life, replica) in world.taken().filter_map(Member::alive) {
        let leases: Vec<_> = replica.read(|state| state.leases().collect());
        if !leases.is_empty() {
            world.history.fault(format!(
                "leases are left that nobody keeps alive: {leases:?}"
            ));
        }
        if let Err(reason) = replica.read(|state| state.check()) {
            world
                .history
                .fault(format!("a state is inconsistent: {reason}"));
        }
        let hashed = spawn_in(life, async move { replica.hash_kv(newest).await });
        if let Ok(Ok(Ok((hash, _)))) = hashed.await {
            hashes.insert((hash.hash, hash.compact_revision));
        }
    }
    if hashes.len() != 1 {
        world
            .history
            .fault(format!("HashKV at revision {newest} is {hashes:?}"));
    }
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
        access_changes::set_up(&world).await;
        clients.push(spawn_in(WORLD, access_changes::run(world.clone())));
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
        check_end(&world).await;
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
