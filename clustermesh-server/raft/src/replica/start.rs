//! Starting a replica: data, recovery, openraft, tasks, and the first entry of a new group.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use clustermesh_core::{KvError, limits::FEATURE_LEVEL, pb, pb::proposal::Command};
use clustermesh_store::{
    DataDir, Identity, LogId, ReplicaId, SledLog, SnapshotFile, SnapshotStore,
};
use openraft::{
    Raft, RaftNetworkFactory,
    async_runtime::{AsyncRuntime, Mpsc, Watch},
    network::NetSnapshot,
};
use parking_lot::Mutex;
use rand::Rng;

use super::{Inner, LogHandle, Replica};
use crate::{
    Types,
    batcher::Batcher,
    compaction,
    config::{
        Data, MAX_HUB_QUEUE_ENTRIES, MAX_WATCHER_QUEUE_ITEMS, MemoryData, ReplicaConfig, Start,
    },
    error::StartError,
    lease, maintenance,
    metrics::Metrics,
    network::NoPeers,
    reads::ReadIndexer,
    state_machine::{Progress, StateMachine},
    task::{Stopper, spawn},
    watch::{Hub, distribute},
};

/// Data that is open and locked.
struct Opened<R: AsyncRuntime> {
    identity: Identity,
    log: LogHandle<R>,
    purged: Option<LogId>,
    snapshots: SnapshotStore,
    data_dir: Option<DataDir>,
}

fn random_id<R: AsyncRuntime>() -> u64 {
    loop {
        let id = R::thread_rng().next_u64();
        if id != 0 {
            return id;
        }
    }
}

fn open_folder<R: AsyncRuntime>(
    path: &Path,
    start: Start,
    cluster_name: &str,
) -> Result<Opened<R>, StartError> {
    let create = match start {
        Start::NewGroup => true,
        Start::Existing => false,
        Start::NewOrExisting => !DataDir::is_used(path)?,
    };
    let data_dir = if create {
        DataDir::create(
            path,
            Identity {
                replica_id: random_id::<R>(),
                cluster_name: cluster_name.to_owned(),
                cluster_id: 0,
            },
        )?
    } else {
        DataDir::open(path, cluster_name)?
    };
    let log = SledLog::open(&data_dir.log_path())?;
    Ok(Opened {
        identity: data_dir.identity().clone(),
        purged: log.purged(),
        log: LogHandle::Sled(log),
        snapshots: SnapshotStore::folder(&data_dir.snapshots_path())?,
        data_dir: Some(data_dir),
    })
}

fn open_memory<R: AsyncRuntime>(
    data: &MemoryData,
    start: Start,
    cluster_name: &str,
) -> Result<Opened<R>, StartError> {
    let mut kept = data.identity.lock();
    let refused = |reason: &str| StartError::Config {
        name: "start",
        reason: reason.into(),
    };
    let identity = match (&*kept, start) {
        (Some(_), Start::NewGroup) => return Err(refused("the data in memory is not empty")),
        (None, Start::Existing) => return Err(refused("the data in memory holds no replica")),
        (Some(identity), _) => identity.clone(),
        (None, _) => Identity {
            replica_id: random_id::<R>(),
            cluster_name: cluster_name.to_owned(),
            cluster_id: 0,
        },
    };
    *kept = Some(identity.clone());
    Ok(Opened {
        identity,
        purged: data.log.purged(),
        log: LogHandle::Memory(data.log.clone()),
        snapshots: data.snapshots.clone(),
        data_dir: None,
    })
}

impl<R: AsyncRuntime> Replica<R> {
    /// Starts the only replica of a group; see [`Replica::start_with`].
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: ReplicaConfig) -> Result<Self, StartError> {
        Self::start_with(config, NoPeers).await
    }

    /// Opens the data, recovers the state, begins a new group where there is none, and returns once a leader is known and
    /// everything committed is applied.
    ///
    /// # Errors
    /// [`StartError`]: the data cannot be used, a setting is wrong, or there is no leader in time.
    pub async fn start_with<N>(config: ReplicaConfig, network: N) -> Result<Self, StartError>
    where
        N: RaftNetworkFactory<Types<R>>,
        N::Network: NetSnapshot<Types<R>, SnapshotData = SnapshotFile>,
    {
        let raft_config = Arc::new(config.raft()?);
        let opened: Opened<R> = match &config.data {
            Data::Folder(path) => open_folder(path, config.start, &config.cluster_name)?,
            Data::Memory(data) => open_memory(data, config.start, &config.cluster_name)?,
        };
        let replica_id = opened.identity.replica_id;
        let metrics = Arc::new(Metrics::default());
        let (hub_sender, publications) = R::Mpsc::channel(MAX_HUB_QUEUE_ENTRIES);
        let (progress_sender, progress) = R::Watch::channel(Progress::default());
        let machine = StateMachine::open(
            opened.snapshots.clone(),
            metrics.clone(),
            hub_sender,
            progress_sender,
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

        let started = match &opened.log {
            LogHandle::Sled(log) => {
                Raft::new(replica_id, raft_config, network, log.clone(), machine).await
            }
            LogHandle::Memory(log) => {
                Raft::new(replica_id, raft_config, network, log.clone(), machine).await
            }
        };
        let raft = started.map_err(|error| StartError::Raft(error.to_string()))?;

        let (proposer, batcher) = Batcher::new(metrics.clone());
        let (readers, indexer) = ReadIndexer::new(metrics);
        spawn::<R>(batcher.run(
            raft.clone(),
            config.wall_clock_unix_ms.clone(),
            stop.clone(),
        ));
        spawn::<R>(indexer.run(raft.clone(), progress.clone(), stop.clone()));
        spawn::<R>(maintenance::follow_leadership(
            raft.clone(),
            shared.clone(),
            stop.clone(),
        ));
        spawn::<R>(maintenance::take_snapshots(
            raft.clone(),
            progress,
            opened.snapshots,
            config.snapshot_log_bytes,
            stop.clone(),
        ));
        spawn::<R>(lease::expire(
            shared.clone(),
            proposer.clone(),
            stop.clone(),
        ));
        spawn::<R>(compaction::run(
            config.auto_compaction,
            shared.clone(),
            proposer.clone(),
            stop,
        ));

        let inner = Inner {
            replica_id,
            raft,
            shared,
            hub,
            proposer,
            readers,
            stopper,
            log: Mutex::new(Some((opened.log, opened.data_dir))),
        };
        let replica = Self {
            inner: Arc::new(inner),
        };
        if let Err(error) = replica.join_group(&config).await {
            replica.shutdown().await;
            return Err(error);
        }
        Ok(replica)
    }

    /// Begins the group if it never began, and waits until this replica is up to date.
    async fn join_group(&self, config: &ReplicaConfig) -> Result<(), StartError> {
        let raft = &self.inner.raft;
        let failed = |error: &dyn std::fmt::Display| StartError::Raft(error.to_string());
        if !raft
            .is_initialized()
            .await
            .map_err(|error| failed(&error))?
        {
            let members: BTreeMap<ReplicaId, _> =
                [(self.inner.replica_id, config.node.clone())].into();
            raft.initialize(members)
                .await
                .map_err(|error| failed(&error))?;
        }
        raft.wait(Some(config.start_timeout))
            .metrics(|metrics| metrics.current_leader.is_some(), "a leader")
            .await
            .map_err(|_| StartError::NoLeader {
                seconds: config.start_timeout.as_secs(),
            })?;
        if !raft.is_leader() {
            return Ok(());
        }
        self.linearize().await.map_err(|error| failed(&error))?;
        if self.read(|state| state.cluster_id()) == 0 {
            let command = Command::Bootstrap(pb::Bootstrap {
                cluster_id: random_id::<R>(),
                feature_level: FEATURE_LEVEL,
            });
            let refused = |reason: String| StartError::Bootstrap(reason);
            let committed = self
                .propose(pb::Proposal::system(command))
                .await
                .map_err(|error| refused(error.to_string()))?;
            match committed.outcome {
                Ok(_) | Err(KvError::ClusterIdAlreadySet) => {}
                Err(error) => return Err(refused(error.to_string())),
            }
        }
        Ok(())
    }
}
