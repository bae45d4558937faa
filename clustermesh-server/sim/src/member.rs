//! Places for replicas: what runs there, on which disk and by which clock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use clustermesh_raft::{InitialMember, MemoryData, Node, Replica, ReplicaId};
use parking_lot::Mutex;

use crate::runtime::{Life, SimRuntime, draw, elapsed};

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
    /// A replica that is about to start on `data`.
    pub(crate) fn new(life: Life, data: &MemoryData) -> Self {
        Self {
            life,
            replica: None,
            gave_up: None,
            removed: false,
            spied: 1,
            disk_failed: None,
            refused_before: data.faults().refused_total(),
        }
    }

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

    /// Nobody belongs here any more, the disk is empty.
    pub(crate) fn vacate(&self) {
        *self.part.lock() = Part::Free;
        *self.data.lock() = new_data(&self.slow_disk);
    }

    /// Describes it to those that the group begins with.
    pub(crate) fn initial(&self) -> InitialMember {
        InitialMember {
            name: self.name.clone(),
            peer_url: self.url.clone(),
        }
    }
}
