//! A new group from a backup: each of its replicas is made by itself, on its machine, from the same file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use clustermesh_core::{KvError, State};
use clustermesh_store::{Identity, NewDataDir, Node, ReplicaId, StoreError};
use openraft::async_runtime::AsyncRuntime;
use sha2::{Digest, Sha256};

use super::{BackupError, BackupFile};
use crate::{
    config::InitialMember,
    error::StartError,
    identity::random_id,
    replica::{write_empty_log, write_snapshot},
};

/// Users of this name and the cluster's are ready-made in every cluster's store.
const ADMIN_PREFIX: &str = "admin-";

/// One replica of the new group.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Its data folder: empty, or not there.
    pub data_dir: PathBuf,
    /// Name of the cluster; empty for a plain store.
    pub cluster_name: String,
    /// Its name.
    pub name: String,
    /// All replicas of the new group, this one among them; empty for this one alone.
    pub members: Vec<InitialMember>,
    /// Makes the ids of the new group: the same for all of its replicas, another for every group. `None` chooses one.
    pub token: Option<String>,
    /// What the revision grows by.
    pub revision_bump: i64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Id of the new group.
    pub cluster_id: u64,
    /// Id of this replica.
    pub replica_id: ReplicaId,
    /// Revision that it begins with; everything below is compacted.
    pub revision: i64,
    /// For the other replicas.
    pub token: String,
}

impl BackupFile {
    /// Makes the data folder of one replica of a new group.
    ///
    /// # Errors
    /// [`BackupError`]; then the folder is as it was, or, if the machine stopped meanwhile, no server starts with it.
    pub async fn restore<R: AsyncRuntime>(
        &self,
        wanted: &Restore,
    ) -> Result<Restored, BackupError> {
        check_members(wanted)?;
        // Before the work.
        let data_dir = NewDataDir::prepare(&wanted.data_dir).map_err(StartError::from)?;
        let mut state = self.load()?;
        self.check_cluster(&state, &wanted.cluster_name)?;
        let token = wanted.token.clone().unwrap_or_else(|| {
            let half = random_id::<R>;
            format!("{:016x}{:016x}", half(), half())
        });
        let ids = Ids::new(&token, &self.sha256, &wanted.members);
        let cluster_id = ids.of("");
        let nodes = ids.nodes(wanted);
        let replica_id = ids.of(&wanted.name);
        state
            .recover(cluster_id, wanted.revision_bump)
            .map_err(|reason: KvError| BackupError::Bump {
                bump: wanted.revision_bump,
                reason,
            })?;
        let last = self.snapshot.meta().last_log_id;
        let (log, snapshots) = (data_dir.log_path(), data_dir.snapshots_path());
        let written = async {
            write_snapshot(&snapshots, &state, last, nodes)?;
            write_empty_log::<R>(&log, last, replica_id).await
        };
        if let Err(error) = written.await {
            for folder in [log, snapshots] {
                remove(folder)?;
            }
            return Err(error.into());
        }
        let identity = Identity {
            replica_id,
            cluster_name: wanted.cluster_name.clone(),
            cluster_id,
        };
        data_dir.finish(identity).map_err(StartError::from)?;
        Ok(Restored {
            cluster_id,
            replica_id,
            revision: state.revision(),
            token,
        })
    }

    /// A server of cluster X with the records of cluster Y would deny its own nodes.
    fn check_cluster(&self, state: &State, name: &str) -> Result<(), BackupError> {
        let refused = |reason: String| {
            Err(BackupError::Cluster {
                path: self.path.clone(),
                reason,
            })
        };
        if !state.auth().is_seeded() {
            return Ok(());
        }
        let admins: Vec<&str> = state
            .auth()
            .users()
            .filter_map(|user| user.strip_prefix(ADMIN_PREFIX))
            .collect();
        if name.is_empty() {
            return refused(format!(
                "is of a cluster's store, not of a plain one: give --cluster NAME ({})",
                admins.join(" or ")
            ));
        }
        if !admins.is_empty() && !admins.contains(&name) {
            return refused(format!(
                "is of cluster {}, not of {name}: give its name with --cluster, or take the backup of {name}",
                admins.join(" or ")
            ));
        }
        Ok(())
    }
}

fn check_members(wanted: &Restore) -> Result<(), BackupError> {
    let members = &wanted.members;
    let names: BTreeSet<&str> = members.iter().map(|member| member.name.as_str()).collect();
    let urls: BTreeSet<&str> = members
        .iter()
        .map(|member| member.peer_url.as_str())
        .collect();
    if names.len() != members.len() || urls.len() != members.len() {
        return Err(BackupError::Members(
            "a name or an address is listed twice".to_owned(),
        ));
    }
    if !members.is_empty() && !names.contains(wanted.name.as_str()) {
        return Err(BackupError::Members(format!(
            "{:?} (--name) is not in the list",
            wanted.name
        )));
    }
    Ok(())
}

fn remove(folder: PathBuf) -> Result<(), BackupError> {
    match fs::remove_dir_all(&folder) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(BackupError::Folder(StartError::Store(StoreError::Io {
                action: "remove folder",
                path: folder,
                source,
            })))
        }
        _ => Ok(()),
    }
}

/// Ids that every replica of one restore finds by itself, and no other restore.
struct Ids(Sha256);

impl Ids {
    fn new(token: &str, backup: &[u8], members: &[InitialMember]) -> Self {
        let mut members: Vec<&InitialMember> = members.iter().collect();
        members.sort_unstable();
        let mut hash = Sha256::new();
        let names = members
            .iter()
            .flat_map(|member| [&member.name, &member.peer_url]);
        for part in std::iter::once(token.as_bytes())
            .chain([backup])
            .chain(names.map(String::as_bytes))
        {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash)
    }

    /// The replica of this name; the group's for none.
    fn of(&self, name: &str) -> u64 {
        let hash = self.0.clone().chain_update(name.as_bytes()).finalize();
        hash.first_chunk::<8>()
            .map_or(1, |bytes| u64::from_le_bytes(*bytes).max(1))
    }

    fn nodes(&self, wanted: &Restore) -> BTreeMap<ReplicaId, Node> {
        let alone = [InitialMember {
            name: wanted.name.clone(),
            peer_url: String::new(),
        }];
        let members = if wanted.members.is_empty() {
            alone.as_slice()
        } else {
            &wanted.members
        };
        let node = |member: &InitialMember| Node {
            name: member.name.clone(),
            peer_url: member.peer_url.clone(),
            ..Node::default()
        };
        members
            .iter()
            .map(|member| (self.of(&member.name), node(member)))
            .collect()
    }
}
