//! Starting a replica: data, recovery, openraft, tasks.

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use clustermesh_core::pb;
use clustermesh_store::{DataDir, Identity, LogId, SledLog, SnapshotStore};
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Mpsc},
    storage::{RaftLogReader, RaftLogStorage},
};
use parking_lot::Mutex;
use rand::Rng;

use super::{Inner, LogHandle, Replica, bootstrap};
use crate::{
    Types,
    batcher::Batcher,
    compaction,
    config::{
        Data, MAX_HUB_QUEUE_ENTRIES, MAX_WATCHER_QUEUE_ITEMS, MemoryData, ReplicaConfig, Start,
    },
    divergence::{Comparer, stand_aside},
    entries::Entries,
    error::StartError,
    expiry,
    forward::Router,
    handler::{Bound, PeerHandler, Refused},
    identity::{IdentityKeeper, Kept, random_id},
    maintenance,
    membership::Members,
    metrics::Metrics,
    network::Network,
    peer::{Incoming, Links, NoPeers, Transport},
    reads::ReadIndexer,
    shared::{Observers, Reports},
    state_machine::StateMachine,
    task::{Stopper, spawn},
    watch::{Hub, distribute},
};

/// Data that is open and locked.
struct Opened<R: AsyncRuntime> {
    identity: Identity,
    log: LogHandle<R>,
    purged: Option<LogId>,
    snapshots: SnapshotStore,
    kept: Kept,
}

/// Whether a replica lives in the data already.
fn is_used(data: &Data) -> Result<bool, StartError> {
    Ok(match data {
        Data::Folder(path) => DataDir::is_used(path)?,
        Data::Memory(data) => data.identity.lock().is_some(),
    })
}

/// `new` is the identity of a replica that begins here; `None` where one must live already.
fn open_folder<R: AsyncRuntime>(
    path: &Path,
    new: Option<Identity>,
    cluster_name: &str,
) -> Result<Opened<R>, StartError> {
    let data_dir = match new {
        Some(identity) => DataDir::create(path, identity)?,
        None => DataDir::open(path, cluster_name)?,
    };
    let log = SledLog::open(&data_dir.log_path())?;
    Ok(Opened {
        identity: data_dir.identity().clone(),
        purged: log.purged(),
        log: LogHandle::Sled(log),
        snapshots: SnapshotStore::folder(&data_dir.snapshots_path())?,
        kept: Kept::Folder(data_dir),
    })
}

fn open_memory<R: AsyncRuntime>(
    data: &MemoryData,
    new: Option<Identity>,
) -> Result<Opened<R>, StartError> {
    let mut kept = data.identity.lock();
    let refused = |reason: &str| StartError::Config {
        name: "start",
        reason: reason.into(),
    };
    let identity = match (&*kept, new) {
        (Some(_), Some(_)) => return Err(refused("the data in memory is not empty")),
        (None, None) => return Err(refused("the data in memory holds no replica")),
        (Some(identity), None) => identity.clone(),
        (None, Some(identity)) => identity,
    };
    *kept = Some(identity.clone());
    drop(kept);
    Ok(Opened {
        identity,
        purged: data.log.purged(),
        log: LogHandle::Memory(data.log.clone()),
        snapshots: data.snapshots.clone(),
        kept: Kept::Memory(data.identity.clone()),
    })
}

async fn open<R: AsyncRuntime>(
    config: &ReplicaConfig,
    transport: &dyn Transport,
) -> Result<Opened<R>, StartError> {
    let fresh = |replica_id, cluster_id| Identity {
        replica_id,
        cluster_name: config.cluster_name.clone(),
        cluster_id,
    };
    let used = is_used(&config.data)?;
    let new = match &config.start {
        Start::Existing => None,
        Start::NewGroup => Some(fresh(random_id::<R>(), 0)),
        _ if used => None,
        Start::NewOrExisting | Start::Static(_) => Some(fresh(random_id::<R>(), 0)),
        Start::Join(urls) => {
            let (replica_id, cluster_id) =
                bootstrap::ask_to_join::<R>(config, transport, urls).await?;
            Some(fresh(replica_id, cluster_id))
        }
    };
    let mut opened: Opened<R> = match &config.data {
        Data::Folder(path) => open_folder(path, new, &config.cluster_name)?,
        Data::Memory(data) => open_memory(data, new)?,
    };
    if let Start::Join(urls) = &config.start
        && opened.never_began().await?
    {
        // It waited for a group that begins without it, or was refused there: nobody knows its id.
        let (replica_id, cluster_id) = bootstrap::ask_to_join::<R>(config, transport, urls).await?;
        opened.identity = fresh(replica_id, cluster_id);
        opened.kept.replace(opened.identity.clone())?;
    }
    Ok(opened)
}

impl<R: AsyncRuntime> Opened<R> {
    /// No group has ever addressed this replica, and it has promised nothing to any.
    async fn never_began(&mut self) -> Result<bool, StartError> {
        if self.identity.cluster_id != 0 {
            return Ok(false);
        }
        match &mut self.log {
            LogHandle::Sled(log) => is_blank::<R, _>(log).await,
            LogHandle::Memory(log) => is_blank::<R, _>(log).await,
        }
    }
}

/// Whether a log has neither entries nor a vote.
async fn is_blank<R: AsyncRuntime, L: RaftLogStorage<Types<R>> + RaftLogReader<Types<R>>>(
    log: &mut L,
) -> Result<bool, StartError> {
    let unreadable = |error: std::io::Error| StartError::Raft(error.to_string());
    let state = log.get_log_state().await.map_err(unreadable)?;
    let vote = log.read_vote().await.map_err(unreadable)?;
    Ok(state.last_log_id.is_none() && vote.is_none())
}

impl<R: AsyncRuntime> Replica<R> {
    /// Starts the only replica of a group; see [`Replica::start_with`].
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: ReplicaConfig) -> Result<Self, StartError> {
        Self::start_with(config, Arc::new(NoPeers), &PeerHandler::default()).await
    }

    /// Opens the data, recovers the state, begins or joins the group where there is none, and returns once a leader is known and everything
    /// committed is applied. What other replicas send goes into `handler` from before this is called on.
    ///
    /// # Errors
    /// [`StartError`]: the data cannot be used, a setting is wrong, the group refuses this replica, or there is no leader in time.
    pub async fn start_with(
        config: ReplicaConfig,
        transport: Arc<dyn Transport>,
        handler: &PeerHandler<R>,
    ) -> Result<Self, StartError> {
        let raft_config = Arc::new(config.raft()?);
        let opened: Opened<R> = open(&config, &*transport).await?;
        let replica_id = opened.identity.replica_id;
        let metrics = Arc::new(Metrics::default());
        let (hub_sender, publications) = R::Mpsc::channel(MAX_HUB_QUEUE_ENTRIES);
        let (reports, observers) = Reports::new(config.snapshot_log_bytes);
        let Observers {
            progress,
            milestones,
        } = observers;
        let machine = StateMachine::open(
            opened.snapshots.clone(),
            metrics.clone(),
            hub_sender,
            reports,
            replica_id,
            // Far from the end, so that counting up does not reach it.
            R::thread_rng().next_u64() >> 1,
        )?;
        if let Some(purged) = opened.purged
            && machine.last_applied().map(|last| last.index) < Some(purged.index)
        {
            let snapshot = machine
                .last_applied()
                .map_or_else(|| "nothing".to_owned(), |last| last.to_string());
            return Err(StartError::Gap { purged, snapshot });
        }
        let shared = machine.shared();
        let (stopper, stop) = Stopper::new();
        let hub = Arc::new(Hub::new(
            metrics.clone(),
            shared.applied.read().state.revision(),
            MAX_WATCHER_QUEUE_ITEMS,
        ));
        // Recovery applies entries already, so the hub must run before.
        spawn::<R>(distribute(hub.clone(), publications, stop.clone()));

        let identity = Arc::new(IdentityKeeper::new(opened.kept, opened.identity.cluster_id));
        let links = Arc::new(Links::new(transport, replica_id, identity.shared_id()));
        let network = Network::new(links.clone());
        let started = match &opened.log {
            LogHandle::Sled(log) => {
                Raft::new(replica_id, raft_config, network, log.clone(), machine).await
            }
            LogHandle::Memory(log) => {
                Raft::new(replica_id, raft_config, network, log.clone(), machine).await
            }
        };
        let raft = started.map_err(|error| StartError::Raft(error.to_string()))?;

        let leader = {
            let (shared, clock) = (shared.clone(), config.wall_clock_unix_ms.clone());
            let quota_bytes = config.quota_bytes;
            move || pb::Leader {
                id: replica_id,
                time_unix_ms: clock(),
                quota_bytes,
                feature_level: shared.group.feature_level(),
            }
        };
        let timeout = config.request_timeout;
        let router = Arc::new(Router {
            own: replica_id,
            raft: raft.clone(),
            links: links.clone(),
            entries: Entries {
                raft: raft.clone(),
                leader: Box::new(leader),
                metrics: metrics.clone(),
            },
            pending: shared.pending.clone(),
            progress: progress.clone(),
        });
        let (proposer, batcher) = Batcher::new(metrics.clone(), timeout);
        let (readers, indexer) = ReadIndexer::new(metrics, raft.clone(), progress.clone());
        let members = Members {
            router: router.clone(),
            shared: shared.clone(),
            readers: readers.clone(),
            proposer: proposer.clone(),
            feature_level: config.feature_level,
            timeout,
            silence: 2 * config.election_timeout,
        };
        let bound = Arc::new(Bound {
            own: replica_id,
            cluster_name: config.cluster_name.clone(),
            node: config.node.clone(),
            feature_level: config.feature_level,
            asides: handler.asides(),
            raft: raft.clone(),
            shared: shared.clone(),
            proposer: proposer.clone(),
            readers: readers.clone(),
            identity,
            links: links.clone(),
            members: members.clone(),
            incoming: Incoming::new(opened.snapshots.clone()),
            refused: Refused::default(),
            ending: AtomicBool::new(false),
        });
        handler.bind(&bound);
        spawn::<R>(batcher.run(router.clone(), stop.clone()));
        spawn::<R>(indexer.run(router.clone(), timeout, stop.clone()));
        spawn::<R>(maintenance::follow_leadership(
            raft.clone(),
            shared.clone(),
            links.clone(),
            stop.clone(),
        ));
        spawn::<R>(maintenance::take_snapshots(
            raft.clone(),
            milestones.clone(),
            opened.snapshots,
            stop.clone(),
        ));
        spawn::<R>(maintenance::leave(
            raft.clone(),
            shared.clone(),
            links,
            milestones.clone(),
            stop.clone(),
        ));
        spawn::<R>(expiry::expire(
            shared.clone(),
            proposer.clone(),
            stop.clone(),
        ));
        spawn::<R>(compaction::run(
            config.auto_compaction,
            shared.clone(),
            proposer.clone(),
            stop.clone(),
        ));
        spawn::<R>(members.clone().run(stop.clone()));
        spawn::<R>(stand_aside(
            shared.clone(),
            milestones,
            hub.clone(),
            members.clone(),
            stop.clone(),
        ));
        let comparer = Comparer {
            router: router.clone(),
            shared: shared.clone(),
            members: members.clone(),
            proposer: proposer.clone(),
            every: config.compare_every,
        };
        spawn::<R>(comparer.run(stop.clone()));
        if matches!(config.start, Start::Static(_) | Start::Join(_)) {
            spawn::<R>(members.publish(config.node.clone(), stop));
        }

        let inner = Inner {
            replica_id,
            quota_bytes: config.quota_bytes,
            raft,
            shared,
            hub,
            bound,
            router,
            timeout,
            proposer,
            readers,
            stopper,
            log: Mutex::new(Some(opened.log)),
        };
        let replica = Self {
            inner: Arc::new(inner),
        };
        if let Err(error) = replica.enter_group(&config).await {
            replica.shutdown().await;
            return Err(error);
        }
        Ok(replica)
    }
}
