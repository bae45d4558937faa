//! Starts, crashes and new starts of the replicas at their places.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clustermesh_raft::{
    AutoCompaction, Data, PeerHandler, Replica, ReplicaConfig, ReplicaId, Start, StartError,
};
use openraft::async_runtime::AsyncRuntime;

use crate::{
    copies,
    member::{Member, Part, Running},
    runtime::{
        Life, SimRuntime, begin_life, draw, elapsed, end_life, resume_life, set_clock_rate,
        spawn_in,
    },
    world::{LIVENESS, SPY_INTERVAL, World},
};

/// A clock runs faster or slower by up to this, parts per million.
const MAX_CLOCK_RATE_PPM: u64 = 5000;

fn config(member: &Member, world: &World) -> ReplicaConfig {
    let mut config = ReplicaConfig::new(Data::Memory(member.data()), "sim");
    config.heartbeat = Duration::from_millis(50);
    config.election_timeout = Duration::from_millis(300);
    config.request_timeout = Duration::from_secs(6);
    config.start_timeout = Duration::from_secs(20);
    config.snapshot_log_bytes = 2000;
    config.auto_compaction = AutoCompaction::Off;
    config.node = member.node();
    config.start = if member.part() == Part::First {
        let first = world.members.iter().take(world.begun_with);
        Start::Static(first.map(Member::initial).collect())
    } else {
        let others = world.taken().filter(|other| other.index != member.index);
        Start::Join(others.map(|other| other.url.clone()).collect())
    };
    let step = member.clock_step_ms.clone();
    config.wall_clock_unix_ms = Arc::new(move || {
        let elapsed = i64::try_from(elapsed().as_millis()).unwrap_or(0);
        1_700_000_000_000 + elapsed + step.load(Ordering::Relaxed)
    });
    config
}

impl World {
    /// Starts what belongs to a place.
    pub fn start(self: &Arc<Self>, index: usize) {
        let Some(member) = self.members.get(index) else {
            return;
        };
        let life = begin_life();
        let rate = draw(|random| random.below(2 * MAX_CLOCK_RATE_PPM)).cast_signed();
        set_clock_rate(life, rate - MAX_CLOCK_RATE_PPM.cast_signed());
        *member.running.lock() = Some(Running::new(life, &member.data()));
        let handler = PeerHandler::default();
        self.network.listen(&member.url, handler.clone(), life);
        let transport = self.network.transport(&member.url);
        let config = config(member, self);
        let world = self.clone();
        drop(spawn_in(life, async move {
            let started = Replica::start_with(config, transport, &handler).await;
            world.note_started(index, life, started);
        }));
    }

    fn note_started(
        self: &Arc<Self>,
        index: usize,
        life: Life,
        started: Result<Replica<SimRuntime>, StartError>,
    ) {
        let Some(member) = self.members.get(index) else {
            return;
        };
        let data = member.data();
        let mut running = member.running.lock();
        let Some(running) = running.as_mut().filter(|running| running.life == life) else {
            return;
        };
        running.look_at_disk(&data);
        match started {
            Ok(replica) => {
                if let Some(copies) = &self.copies {
                    let copier = copies::run(copies.clone(), replica.clone());
                    drop(spawn_in(life, copier));
                }
                running.replica = Some(replica);
            }
            Err(StartError::Removed { id }) => {
                running.removed = true;
                self.check_asked_to_remove(index, id);
            }
            Err(error) => {
                let expected = matches!(
                    error,
                    StartError::NoLeader { .. } | StartError::Join(_) | StartError::Bootstrap(_)
                );
                if !expected && running.disk_failed.is_none() && !data.faults().is_faulty() {
                    self.history
                        .fault(format!("replica {index} does not start: {error}"));
                }
                running.gave_up = Some(error.to_string());
            }
        }
    }

    /// A replica holds that it was removed: somebody must have asked for that.
    pub fn check_asked_to_remove(&self, index: usize, id: ReplicaId) {
        if !self.removals.lock().contains(&id) {
            self.history.fault(format!(
                "replica {index} was removed, which nobody asked for"
            ));
        }
    }

    /// Ends what runs at a place; of what its disk was given and did not sync, some is lost.
    pub fn crash(&self, member: &Member) {
        let Some(running) = member.running.lock().take() else {
            return;
        };
        self.network.silence(&member.url);
        resume_life(running.life);
        end_life(running.life);
        drop(running);
        member
            .data()
            .crash(|volatile| draw(|random| random.place(volatile + 1)));
    }

    /// A place whose replica was removed is free, its disk empty.
    pub fn free(&self, member: &Member) {
        self.crash(member);
        member.vacate();
    }

    /// Those that did not come up are started again, those that were removed make room.
    pub fn look_after_starts(self: &Arc<Self>) {
        for member in self.taken() {
            let (gave_up, removed) =
                member
                    .running
                    .lock()
                    .as_ref()
                    .map_or((false, false), |running| {
                        let reason = running.gave_up.as_deref();
                        // The group has no room for one more learner.
                        let refused = reason.is_some_and(|reason| reason.contains("at most"));
                        (reason.is_some(), running.removed || refused)
                    });
            if removed {
                self.free(member);
            } else if gave_up {
                self.crash(member);
                self.start(member.index);
            }
        }
    }

    /// Waits until `done`; a fault when that takes too long.
    pub(crate) async fn wait(self: &Arc<Self>, what: &str, done: impl Fn() -> bool) {
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
}
