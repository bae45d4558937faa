//! Everything that clients, watchers and chaos share.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    time::Duration,
};

use clustermesh_raft::ReplicaId;
use parking_lot::Mutex;

use crate::{
    access::Access,
    copies::Copies,
    history::History,
    member::{Member, Part},
    network::Network,
    runtime::{Life, draw},
};

/// The longest TTL of a lease, s.
pub const MAX_LEASE_TTL_S: i64 = 5;
/// How long an operation waits for its answer.
pub const PATIENCE: Duration = Duration::from_secs(8);
/// After healing everything must work within this.
pub const LIVENESS: Duration = Duration::from_secs(60);
/// How often replicas are looked at.
pub(crate) const SPY_INTERVAL: Duration = Duration::from_millis(10);
/// Places for replicas.
const PLACES: usize = 9;

/// Everything that clients, watchers and chaos share.
pub struct World {
    /// All places.
    pub members: Vec<Member>,
    /// Replicas that the group began with, in the first places.
    pub begun_with: usize,
    pub(crate) network: Network,
    /// What happened.
    pub history: History,
    pub(crate) begun: AtomicBool,
    pub(crate) ended: AtomicBool,
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
    pub(crate) fn new() -> Self {
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

    pub(crate) fn all_up(&self) -> bool {
        self.taken().all(|member| member.replica().is_some())
    }
}
