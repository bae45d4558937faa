//! Settings of a replica, with their limits.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clustermesh_core::limits::FEATURE_LEVEL;
use clustermesh_store::{DiskFaults, Identity, MemoryLog, Node, ReplicaId, SnapshotStore};
use parking_lot::Mutex;

use crate::error::StartError;

/// A stream to a replica that cannot be reached is opened again after this long.
pub(crate) const REOPEN_PAUSE: Duration = Duration::from_millis(100);

/// Proposals that may wait for an answer.
pub(crate) const MAX_WAITING_PROPOSALS: usize = 16_384;
/// Proposals in one log entry.
pub(crate) const MAX_BATCH_PROPOSALS: usize = 512;
/// Encoded proposals of one log entry, bytes; a larger one has an entry of its own.
pub(crate) const MAX_BATCH_BYTES: usize = 1 << 20;
/// One encoded proposal, bytes: the copy of a peer is the largest.
pub(crate) const MAX_PROPOSAL_BYTES: usize = 4 << 20;
/// Log entries on their way at once: one being synced while the next collects.
pub(crate) const MAX_ENTRIES_IN_FLIGHT: usize = 2;
/// Readers that may wait for a read index.
pub(crate) const MAX_WAITING_READERS: usize = 65_536;
/// Items that one watcher may have waiting; past it the watcher reads history instead.
pub(crate) const MAX_WATCHER_QUEUE_ITEMS: usize = 1024;
/// Encoded events that one watcher may have waiting, bytes.
pub(crate) const MAX_WATCHER_QUEUE_BYTES: usize = 8 << 20;
/// History that a watcher reads at once, bytes.
pub(crate) const MAX_CATCH_UP_BYTES: usize = 1 << 20;
/// Applied entries waiting for the watch hub.
pub(crate) const MAX_HUB_QUEUE_ENTRIES: usize = 1024;
/// Leases that one entry expires.
pub(crate) const MAX_EXPIRED_LEASES_PER_ENTRY: usize = 1000;
/// Wait before an expiry that failed is proposed again, ms.
pub(crate) const LEASE_RETRY_MS: u64 = 500;
/// One chunk of a snapshot, bytes.
pub(crate) const SNAPSHOT_CHUNK_BYTES: usize = 256 << 10;
/// Batches on their way to the leader at once.
pub(crate) const MAX_FORWARDS_IN_FLIGHT: usize = 8;
/// Members of a group, learners among them.
pub(crate) const MAX_MEMBERS: usize = 9;
/// Learners of a group.
pub(crate) const MAX_LEARNERS: usize = 3;
/// A learner this close to the leader's log has caught up, entries.
pub(crate) const CAUGHT_UP_ENTRIES: u64 = 128;
/// An answer to entries that is owed for longer ends the stream.
pub(crate) const APPEND_TIMEOUT: Duration = Duration::from_secs(5);
/// A follower's question for a read index; then the leader is looked for again.
pub(crate) const READ_INDEX_TIMEOUT: Duration = Duration::from_secs(1);
/// Wait before a leader is looked for again.
pub(crate) const ROUTE_RETRY_PAUSE: Duration = Duration::from_millis(20);
/// An answer of a leader that was deposed may come so late.
pub(crate) const LEADER_CHANGE_GRACE: Duration = Duration::from_millis(50);
/// A snapshot's stream without progress ends after this and the time for its size.
pub(crate) const SNAPSHOT_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// A receiver checks and loads a snapshot at least this fast, bytes/s.
pub(crate) const SNAPSHOT_BYTES_PER_SECOND_MIN: u64 = 4 << 20;
/// openraft's limit of one snapshot transfer: only ours counts.
const SNAPSHOT_TIMEOUT_MS: u64 = 24 * 3600 * 1000;
/// How often a replica that waits for its group asks the others.
pub(crate) const BOOTSTRAP_POLL: Duration = Duration::from_millis(200);
/// A removed replica stays so long, for a leader to hand over.
pub(crate) const LEAVE_DELAY: Duration = Duration::from_millis(1000);
/// How often the leader looks after its members.
pub(crate) const MEMBERS_POLL: Duration = Duration::from_millis(250);
/// How often the replicas' data is compared.
const COMPARE_INTERVAL: Duration = Duration::from_secs(600);
/// A replica hashes its data within this.
pub(crate) const COMPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// Wait before a comparison that found nobody, or no leader, is tried again.
pub(crate) const COMPARE_RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How long a stopped replica waits for its log to close, ms.
pub(crate) const CLOSE_TIMEOUT_MS: u64 = 5000;

/// Live and historic data of a group unless set otherwise, bytes (etcd's default quota).
pub const DEFAULT_QUOTA_BYTES: u64 = 2 << 30;
/// Bytes of log after which a snapshot is taken, unless configured.
pub const DEFAULT_SNAPSHOT_LOG_BYTES: u64 = 64 << 20;

/// Where a replica keeps its data.
#[derive(Debug, Clone)]
pub enum Data {
    /// In a folder on disk.
    Folder(PathBuf),
    /// In memory: for simulation and tests.
    Memory(MemoryData),
}

/// A replica's data in memory. A clone given to the next replica is a restart.
#[derive(Debug, Clone)]
pub struct MemoryData {
    pub(crate) log: MemoryLog,
    pub(crate) snapshots: SnapshotStore,
    pub(crate) identity: Arc<Mutex<Option<Identity>>>,
    faults: DiskFaults,
}

impl Default for MemoryData {
    fn default() -> Self {
        Self {
            log: MemoryLog::default(),
            snapshots: SnapshotStore::memory(),
            identity: Arc::default(),
            faults: DiskFaults::default(),
        }
    }
}

impl MemoryData {
    /// Data on a simulated disk: a sync of the log takes what `sync_time` says, [`MemoryData::crash`] loses what was not synced, and
    /// [`MemoryData::faults`] break it.
    pub fn on_disk(sync_time: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        let faults = DiskFaults::default();
        Self {
            log: MemoryLog::on_disk(sync_time, faults.clone()),
            snapshots: SnapshotStore::on_disk(faults.clone()),
            identity: Arc::default(),
            faults,
        }
    }

    /// What is left after a crash: of the entries and other changes of the log that were not synced, as many of the oldest as `keep` says,
    /// given their number. The disk works again. All tasks of the replica must have ended.
    pub fn crash(&self, keep: impl FnOnce(usize) -> usize) {
        self.log.crash(keep);
        self.faults.set(None);
    }

    /// The disk's state.
    #[must_use]
    pub const fn faults(&self) -> &DiskFaults {
        &self.faults
    }

    /// The replica that lives here.
    #[must_use]
    pub fn replica_id(&self) -> Option<ReplicaId> {
        self.identity.lock().as_ref().map(|own| own.replica_id)
    }
}

/// A replica that a new group begins with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct InitialMember {
    /// Its name, unique in the group.
    pub name: String,
    /// Where other replicas reach it.
    pub peer_url: String,
}

/// Whether a new group begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// The data must be empty: a new group of this one replica begins.
    NewGroup,
    /// The data must be a replica's: it goes on.
    Existing,
    /// Goes on where there is data, else begins a new group.
    NewOrExisting,
    /// Goes on where there is data, else begins a group with these replicas, itself among them by name. The one with the lowest name makes the
    /// group once it has reached all.
    Static(Vec<InitialMember>),
    /// Goes on where there is data, else asks the group at one of these addresses for an id, and joins it.
    Join(Vec<String>),
}

/// What the leader compacts by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Nothing.
    Off,
    /// All but the newest revisions.
    Revisions {
        /// How many to keep.
        keep: u64,
        /// How often to look.
        every: Duration,
    },
    /// What is older.
    Age {
        /// How long to keep revisions.
        keep: Duration,
    },
}

impl Default for AutoCompaction {
    /// What kube-apiserver's own compaction keeps: five minutes.
    fn default() -> Self {
        Self::Age {
            keep: Duration::from_secs(300),
        }
    }
}

/// Settings of a replica.
#[derive(Clone)]
pub struct ReplicaConfig {
    /// Where the data lives.
    pub data: Data,
    /// Whether a new group begins.
    pub start: Start,
    /// Name of the cluster, checked against the data; empty for a plain store.
    pub cluster_name: String,
    /// This replica as others reach it.
    pub node: Node,
    /// Time between heartbeats of the leader.
    pub heartbeat: Duration,
    /// A follower stands for election after about this long without the leader: from 0.9 to 1.0 of it, at random. At least
    /// three heartbeats; below seven, a follower waits for up to six heartbeats.
    pub election_timeout: Duration,
    /// A proposal or read without answer after this long is given up.
    pub request_timeout: Duration,
    /// How long start-up waits for a leader.
    pub start_timeout: Duration,
    /// A snapshot is taken after this many bytes of log. The log keeps up to three times as much.
    pub snapshot_log_bytes: u64,
    /// What the leader compacts by itself.
    pub auto_compaction: AutoCompaction,
    /// While this replica leads, live and historic data stay below so many bytes; 0 for no limit.
    pub quota_bytes: u64,
    /// How often the leader compares the replicas' data, which each also does when it starts.
    pub compare_every: Duration,
    /// Kinds of entry that this replica knows; less than the build's own only to act as an older release.
    pub feature_level: u32,
    /// Wall clock, ms since 1970, for the time in log entries.
    pub wall_clock_unix_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
}

impl ReplicaConfig {
    /// Defaults for data in `data`.
    pub fn new(data: Data, cluster_name: impl Into<String>) -> Self {
        Self {
            data,
            start: Start::NewOrExisting,
            cluster_name: cluster_name.into(),
            node: Node::default(),
            heartbeat: Duration::from_millis(100),
            election_timeout: Duration::from_secs(1),
            // etcd's: 5 s and two election timeouts.
            request_timeout: Duration::from_secs(7),
            start_timeout: Duration::from_secs(60),
            snapshot_log_bytes: DEFAULT_SNAPSHOT_LOG_BYTES,
            auto_compaction: AutoCompaction::default(),
            quota_bytes: DEFAULT_QUOTA_BYTES,
            compare_every: COMPARE_INTERVAL,
            feature_level: FEATURE_LEVEL,
            wall_clock_unix_ms: Arc::new(wall_clock),
        }
    }

    pub(crate) fn raft(&self) -> Result<openraft::Config, StartError> {
        let ms = |name, duration: Duration| {
            u64::try_from(duration.as_millis())
                .ok()
                .filter(|ms| (1..=600_000).contains(ms))
                .ok_or_else(|| StartError::Config {
                    name,
                    reason: format!("{duration:?} is not within 1 ms and 10 min"),
                })
        };
        let silence = ms("election timeout", self.election_timeout)?;
        let heartbeat_interval = ms("heartbeat", self.heartbeat)?;
        if silence < 3 * heartbeat_interval {
            return Err(StartError::Config {
                name: "election timeout",
                reason: format!(
                    "{silence} ms are less than three heartbeats of {heartbeat_interval} ms"
                ),
            });
        }
        openraft::Config {
            cluster_name: self.cluster_name.clone(),
            heartbeat_interval,
            // A follower of openraft stands after its leader's lease, which is the longest timeout, and a random timeout
            // together. The shorter one is also what an answer to a vote may take, the longer one how old a leader's last
            // heartbeat may be that a quorum answered: neither may come near the time between two heartbeats.
            election_timeout_min: (2 * silence / 5).max(2 * heartbeat_interval),
            election_timeout_max: (silence / 2).max(3 * heartbeat_interval),
            // Snapshots and purges go by bytes of log, see `maintenance`.
            snapshot_policy: openraft::SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            install_snapshot_timeout: SNAPSHOT_TIMEOUT_MS,
            backoff: "50ms 100ms 200ms ...500ms".to_owned(),
            enable_pre_vote: Some(true),
            allow_log_reversion: Some(false),
            // A leader that goes on in its old term after a restart knows less to be committed than it has answered: it would serve stale reads.
            enable_leader_restore: Some(false),
            ..openraft::Config::default()
        }
        .validate()
        .map_err(|error| StartError::Config {
            name: "raft timing",
            reason: error.to_string(),
        })
    }
}

/// The system's clock, ms since 1970.
#[must_use]
pub fn wall_clock() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}
