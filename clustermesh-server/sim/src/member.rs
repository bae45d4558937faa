//! Places for replicas: what runs there, on which disk and by which clock, from one life to the next.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use clustermesh_raft::{
    AutoCompaction, Data, InitialMember, MemoryData, Node, PeerHandler, Replica, ReplicaConfig,
    ReplicaId, Start, StartError,
};
use parking_lot::Mutex;

use crate::{
    copies,
    runtime::{
        Life, SimRuntime, begin_life, draw, elapsed, end_life, resume_life, set_clock_rate,
        spawn_in,
    },
    world::World,
};

/// A clock runs faster or slower by up to this, parts per million.
pub const MAX_CLOCK_RATE_PPM: u64 = 5000;

/// What a place is to the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Nothing: it is free.
    Free,
    /// One of those that the group began with.
    First,
    /// It joined, or does.
    Joined,
}

/// A place for a replica.
pub struct Member {
    /// Its number.
    pub index: usize,
    /// Where it is reached.
    pub url: String,
    name: String,
    part: Mutex<Part>,
    data: Mutex<MemoryData>,
    slow_disk: Arc<AtomicBool>,
    /// How far its wall clock is off, ms.
    pub clock_step_ms: Arc<AtomicI64>,
    pub(crate) running: Mutex<Option<Running>>,
}

/// What runs at a place.
pub struct Running {
    /// From its start to its crash.
    pub life: Life,
    /// Once it has started.
    pub replica: Option<Replica<SimRuntime>>,
    /// Why it did not start, or is to be started again.
    pub gave_up: Option<String>,
    /// It was told that the group removed it.
    pub removed: bool,
    /// Up to here its history was looked at.
    pub spied: i64,
    /// When its disk was first seen to refuse a write.
    pub disk_failed: Option<Duration>,
    refused_before: u64,
}

impl Running {
    /// Whether its disk has refused a write.
    pub fn look_at_disk(&mut self, data: &MemoryData) {
        if self.disk_failed.is_none() && data.faults().refused_total() > self.refused_before {
            self.disk_failed = Some(elapsed());
        }
    }
}

fn new_data(slow: &Arc<AtomicBool>) -> MemoryData {
    let slow = slow.clone();
    MemoryData::on_disk(move || {
        let slow = slow.load(Ordering::Relaxed);
        draw(|random| {
            let range = match (slow, random.chance(5)) {
                (true, _) => 100..900,
                (false, true) => 20..200,
                (false, false) => 0..3,
            };
            random.time_ms(range)
        })
    })
}

impl Member {
    /// A place that nobody has yet.
    pub fn new(index: usize, part: Part) -> Self {
        let name = format!("r{index}");
        let slow_disk = Arc::new(AtomicBool::new(false));
        Self {
            index,
            url: format!("https://{name}:2380"),
            name,
            part: Mutex::new(part),
            data: Mutex::new(new_data(&slow_disk)),
            slow_disk,
            clock_step_ms: Arc::default(),
            running: Mutex::new(None),
        }
    }

    /// What it is to the group.
    pub fn part(&self) -> Part {
        *self.part.lock()
    }

    /// Whether a replica belongs here.
    pub fn is_taken(&self) -> bool {
        self.part() != Part::Free
    }

    /// Its disk.
    pub fn data(&self) -> MemoryData {
        self.data.lock().clone()
    }

    /// Id of the replica that lives here.
    pub fn replica_id(&self) -> Option<ReplicaId> {
        self.data.lock().replica_id()
    }

    /// Whether its disk takes long.
    pub fn set_slow_disk(&self, slow: bool) {
        self.slow_disk.store(slow, Ordering::Relaxed);
    }

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

    /// Whether something runs here.
    pub fn is_up(&self) -> bool {
        self.running.lock().is_some()
    }

    /// The life that runs here.
    pub fn life(&self) -> Option<Life> {
        self.running.lock().as_ref().map(|running| running.life)
    }

    /// Describes it to the group.
    pub fn node(&self) -> Node {
        Node {
            name: self.name.clone(),
            peer_url: self.url.clone(),
            ..Node::default()
        }
    }

    /// A replica that is to join is expected here, with an empty disk.
    pub fn take(&self) {
        *self.data.lock() = new_data(&self.slow_disk);
        *self.part.lock() = Part::Joined;
    }

    fn config(&self, world: &World) -> ReplicaConfig {
        let mut config = ReplicaConfig::new(Data::Memory(self.data()), "sim");
        config.heartbeat = Duration::from_millis(50);
        config.election_timeout = Duration::from_millis(300);
        config.request_timeout = Duration::from_secs(6);
        config.start_timeout = Duration::from_secs(20);
        config.snapshot_log_bytes = 2000;
        config.auto_compaction = AutoCompaction::Off;
        config.node = self.node();
        let first = |member: &&Member| member.index < world.begun_with;
        config.start = if self.part() == Part::First {
            let first = world.members.iter().filter(first);
            Start::Static(
                first
                    .map(|member| InitialMember {
                        name: member.name.clone(),
                        peer_url: member.url.clone(),
                    })
                    .collect(),
            )
        } else {
            let others = world.taken().filter(|other| other.index != self.index);
            Start::Join(others.map(|other| other.url.clone()).collect())
        };
        let step = self.clock_step_ms.clone();
        config.wall_clock_unix_ms = Arc::new(move || {
            let elapsed = i64::try_from(elapsed().as_millis()).unwrap_or(0);
            1_700_000_000_000 + elapsed + step.load(Ordering::Relaxed)
        });
        config
    }
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
        *member.running.lock() = Some(Running {
            life,
            replica: None,
            gave_up: None,
            removed: false,
            spied: 1,
            disk_failed: None,
            refused_before: member.data().faults().refused_total(),
        });
        let handler = PeerHandler::default();
        self.network.listen(&member.url, handler.clone(), life);
        let transport = self.network.transport(&member.url);
        let config = member.config(self);
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
        *member.part.lock() = Part::Free;
        *member.data.lock() = new_data(&member.slow_disk);
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
}
