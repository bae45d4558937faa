//! Durable files of the agent: written whole, to a temporary name, synced, renamed; and the lock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use clustermesh_node_core::ipam::{Attachment, Ipam};
use clustermesh_node_core::mesh_prefixes::MeshPrefix;
use ipnetwork::IpNetwork;
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What the server said of this node.
const NODE_FILE: &str = "node.json";
/// Endpoints and allocations.
const ENDPOINTS_FILE: &str = "endpoints.json";
/// Workloads, as ADD needs them.
const WORKLOADS_FILE: &str = "workloads.json";
/// The store of which the kernel's entries are.
const STORE_FILE: &str = "store.json";
/// Prefixes of the mesh, for strict mode.
const MESH_FILE: &str = "mesh.json";
/// All that [`StateFiles`] writes.
pub const FILES: [&str; 5] = [
    NODE_FILE,
    ENDPOINTS_FILE,
    WORKLOADS_FILE,
    STORE_FILE,
    MESH_FILE,
];

/// What the server said of this node when it last welcomed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Own cluster's id.
    pub cluster_id: u16,
    /// 255 or 511.
    pub max_connected_clusters: u32,
    /// IPv4 pod CIDR of this node.
    pub pod_cidr_v4: Option<IpNetwork>,
    /// IPv6 pod CIDR of this node.
    pub pod_cidr_v6: Option<IpNetwork>,
    /// All that is routed into the mesh.
    pub cluster_pod_cidrs: Vec<IpNetwork>,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredEndpoint {
    /// The attachment.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Namespace of the workload.
    pub namespace: String,
    /// Name of the workload.
    pub name: String,
    /// Network namespace of the container.
    pub netns: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Security identity.
    pub identity: u32,
    /// Host end of its pair.
    pub host_interface: String,
    /// Index of the host end.
    pub ifindex: u32,
    /// MAC of the host end.
    pub host_mac: [u8; 6],
    /// MAC of the container's end.
    pub pod_mac: [u8; 6],
    /// Largest packet, bytes.
    pub mtu: u32,
}

/// Endpoints and allocations: one file, so that they agree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredEndpoints {
    /// Addresses.
    pub ipam: Ipam,
    /// Pods.
    pub endpoints: Vec<StoredEndpoint>,
}

/// A workload as ADD needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredWorkload {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: std::collections::BTreeMap<String, String>,
    /// Security identity.
    pub identity: u32,
}

/// The agent's files.
#[derive(Debug)]
pub struct StateFiles {
    dir: PathBuf,
    writes: Mutex<()>,
    _lock: Flock<File>,
}

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A call failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another agent uses the folder.
    #[error(
        "another clustermesh-node uses the state folder {0}: stop it, or give this one another state_dir"
    )]
    Locked(PathBuf),
    /// The file is damaged.
    #[error(
        "{path} cannot be read ({source}): move it away, what it held is then learnt anew, and endpoints are attached anew"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io {
        action,
        path,
        source,
    }
}

impl StateFiles {
    /// Opens the folder and locks it for as long as the value lives.
    ///
    /// # Errors
    /// [`StateError::Locked`], or the folder cannot be made.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io_error("create", dir))?;
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StateError::Locked(dir.to_owned()))?;
        Ok(Self {
            dir: dir.to_owned(),
            writes: Mutex::default(),
            _lock: lock,
        })
    }

    /// What the server said last.
    ///
    /// # Errors
    /// [`StateError::Damaged`] or [`StateError::Io`].
    pub fn facts(&self) -> Result<Option<NodeFacts>, StateError> {
        self.read(NODE_FILE)
    }

    /// Stores what the server said.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn store_facts(&self, facts: &NodeFacts) -> Result<(), StateError> {
        self.write(NODE_FILE, facts)
    }

    /// Endpoints and allocations.
    ///
    /// # Errors
    /// [`StateError::Damaged`] or [`StateError::Io`].
    pub fn endpoints(&self) -> Result<StoredEndpoints, StateError> {
        Ok(self.read(ENDPOINTS_FILE)?.unwrap_or_default())
    }

    /// Stores endpoints and allocations.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn store_endpoints(&self, endpoints: &StoredEndpoints) -> Result<(), StateError> {
        self.write(ENDPOINTS_FILE, endpoints)
    }

    /// Workloads that were known last.
    ///
    /// # Errors
    /// [`StateError::Damaged`] or [`StateError::Io`].
    pub fn workloads(&self) -> Result<Vec<StoredWorkload>, StateError> {
        Ok(self.read(WORKLOADS_FILE)?.unwrap_or_default())
    }

    /// Stores the known workloads.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn store_workloads(&self, workloads: &[StoredWorkload]) -> Result<(), StateError> {
        self.write(WORKLOADS_FILE, &workloads)
    }

    /// The store of which the kernel's entries are.
    ///
    /// # Errors
    /// [`StateError::Damaged`] or [`StateError::Io`].
    pub fn store_id(&self) -> Result<Option<u64>, StateError> {
        self.read(STORE_FILE)
    }

    /// Stores of which store the kernel's entries are.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn store_store_id(&self, store_id: u64) -> Result<(), StateError> {
        self.write(STORE_FILE, &store_id)
    }

    /// Prefixes of the mesh that were learnt; `None` if none ever were.
    ///
    /// # Errors
    /// [`StateError::Damaged`] or [`StateError::Io`].
    pub fn mesh_prefixes(&self) -> Result<Option<Vec<MeshPrefix>>, StateError> {
        self.read(MESH_FILE)
    }

    /// Stores the prefixes of the mesh.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn store_mesh_prefixes(&self, prefixes: &[MeshPrefix]) -> Result<(), StateError> {
        self.write(MESH_FILE, &prefixes)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.dir.join(name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| StateError::Damaged { path, source })
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        // Two writers of one file would share its temporary name.
        let _writing = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.dir.join(name);
        let bytes = serde_json::to_vec(value)
            .map_err(io::Error::from)
            .map_err(io_error("write", &path))?;
        write_durably(&path, &bytes).map_err(io_error("write", &path))
    }
}

/// Replaces a file so that a crash at any moment leaves the old or the new contents.
///
/// # Errors
/// What the file system says.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_on_the_same_folder_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let _first = StateFiles::open(dir.path()).unwrap();
        let error = StateFiles::open(dir.path()).unwrap_err();
        assert!(matches!(error, StateError::Locked(_)), "{error}");
    }

    #[test]
    fn allocations_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let attachment = Attachment {
            container_id: "c".to_owned(),
            ifname: "eth0".to_owned(),
        };
        let mut stored = StoredEndpoints::default();
        stored.ipam.set_ranges("10.1.0.0/24".parse().ok(), None);
        let given = stored.ipam.allocate(&attachment, 7).unwrap();
        StateFiles::open(dir.path())
            .unwrap()
            .store_endpoints(&stored)
            .unwrap();
        let mut read = StateFiles::open(dir.path()).unwrap().endpoints().unwrap();
        assert_eq!(read, stored);
        assert_eq!(read.ipam.allocate(&attachment, 8).unwrap(), given);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("endpoints.json"), "{").unwrap();
        let files = StateFiles::open(dir.path()).unwrap();
        let error = files.endpoints().unwrap_err().to_string();
        assert!(error.contains("endpoints.json"), "{error}");
    }
}
