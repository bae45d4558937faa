//! For tests of single tasks: what they work with, over the kernel's own maps, without server and network.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use clustermesh_ebpf::abi::IdentitySplit;
use clustermesh_ebpf::{AttachMode, Datapath, Maps, Options};
use clustermesh_node_core::change::{Change, NodeRecord};
use clustermesh_node_core::progress::Position;
use clustermesh_node_core::{IPCACHE_WANTED_MAX, Model, Settings, UnderlayPath};
use prometheus_client::registry::Registry;

use crate::config::Config;
use crate::endpoints::Endpoints;
use crate::host::Underlay;
use crate::metrics::Metrics;
use crate::records::{Reconciler, read_tables};
use crate::signals::Signals;
use crate::state_files::{NodeFacts, StateFiles, StoredEndpoints};
use crate::{netlink, strict_mode};

/// Largest packet to another node of [`Fixture::add_node`], bytes.
pub const PATH_BYTES: u16 = 1_450;

/// An agent without its tasks: node `n1` of cluster `a`.
pub struct Fixture {
    pub config: Arc<Config>,
    pub files: Arc<StateFiles>,
    pub maps: Maps,
    pub metrics: Metrics,
    pub signals: Arc<Signals>,
    pub reconciler: Arc<Reconciler>,
    datapath: Arc<Mutex<Datapath>>,
    _bpffs: Bpffs,
    _dir: tempfile::TempDir,
}

/// A BPF file system of its own.
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount(at: &Path) -> Self {
        std::fs::create_dir(at).unwrap();
        let mut mount = Command::new("mount");
        assert!(
            mount
                .args(["-t", "bpf", "none"])
                .arg(at)
                .status()
                .unwrap()
                .success()
        );
        Self(at.to_owned())
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

impl Fixture {
    /// With these settings below `[encryption]`, and a model whose listing is complete and empty.
    pub fn new(encryption: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bpffs = Bpffs::mount(&dir.path().join("bpf"));
        let config = Config::parse(&format!(
            "node = \"n1\"\ncluster = \"a\"\n[server]\nendpoints = [\"https://127.0.0.1:2379\"]\n[encryption]\n{encryption}\n"
        ))
        .unwrap();
        let options = Options {
            bpffs: bpffs.0.clone(),
            attach_mode: AttachMode::detect(),
            cgroup: None,
        };
        let (datapath, _) = Datapath::open(&options).unwrap();
        let maps = datapath.maps().clone();
        let files = Arc::new(StateFiles::open(&dir.path().join("state")).unwrap());
        let metrics = Metrics::register(&mut Registry::default(), maps.clone());
        let reconciler = Arc::new(Reconciler::new(maps.clone(), metrics.clone()));
        *reconciler.model() = Some(model(&config, &maps));
        Self {
            config: Arc::new(config),
            files,
            maps,
            metrics,
            signals: Arc::new(Signals::new(underlay())),
            reconciler,
            datapath: Arc::new(Mutex::new(datapath)),
            _bpffs: bpffs,
            _dir: dir,
        }
    }

    /// What strict mode works with.
    pub fn guard_handles(&self) -> strict_mode::Handles {
        strict_mode::Handles {
            config: Arc::clone(&self.config),
            files: Arc::clone(&self.files),
            maps: self.maps.clone(),
            reconciler: Arc::clone(&self.reconciler),
            signals: Arc::clone(&self.signals),
            metrics: self.metrics.clone(),
        }
    }

    /// Endpoints that an earlier run has left; must be called on a runtime.
    pub fn endpoints(&self, stored: &StoredEndpoints) -> Arc<Endpoints> {
        self.files.store_endpoints(stored).unwrap();
        let endpoints = Endpoints::open(
            Arc::clone(&self.files),
            self.maps.clone(),
            Arc::clone(&self.datapath),
            netlink::connect().unwrap(),
        );
        Arc::new(endpoints.unwrap())
    }

    /// Node `nNUMBER` of the own cluster, with addresses of its number.
    pub fn add_node(&self, number: u8) {
        let record = NodeRecord {
            underlay: vec![[192, 0, 2, number].into()],
            health: vec![[10, 1, number, 2].into()],
            pod_cidrs: vec![format!("10.1.{number}.0/24").parse().unwrap()],
            ..NodeRecord::default()
        };
        self.put_node(number, Some(Box::new(record)));
    }

    /// As if its record was deleted.
    pub fn remove_node(&self, number: u8) {
        self.put_node(number, None);
    }

    fn put_node(&self, number: u8, node: Option<Box<NodeRecord>>) {
        let change = Change::Node {
            cluster: "a".into(),
            name: format!("n{number}").into(),
            node,
        };
        self.reconciler.model().as_mut().unwrap().apply(change);
    }

    /// The own cluster's records are all there.
    pub fn know_all(&self) {
        let position = Position {
            store_id: 1,
            revision: 1,
        };
        let mut model = self.reconciler.model();
        model.as_mut().unwrap().progress(&"a".into(), position);
    }

    /// What the server said of this node.
    pub fn facts() -> NodeFacts {
        NodeFacts {
            cluster_id: 1,
            max_connected_clusters: 255,
            pod_cidr_v4: Some("10.1.1.0/24".parse().unwrap()),
            pod_cidr_v6: None,
            cluster_pod_cidrs: vec!["10.1.0.0/16".parse().unwrap()],
        }
    }
}

fn path() -> UnderlayPath {
    UnderlayPath {
        egress_ifindex: 2,
        mtu_bytes: PATH_BYTES,
        encrypted_mtu_bytes: PATH_BYTES - 60,
    }
}

fn underlay() -> Underlay {
    Underlay {
        devices: Vec::new(),
        addresses: vec![[192, 0, 2, 1].into()],
        path_v4: Some(path()),
        path_v6: None,
        pod_mtu: PATH_BYTES.into(),
        pod_mtu_v6: PATH_BYTES.into(),
        wireguard_mtu: 1_440,
    }
}

fn model(config: &Config, maps: &Maps) -> Model {
    let settings = Settings {
        ipcache_wanted_max: IPCACHE_WANTED_MAX,
        cluster: "a".into(),
        cluster_id: 1,
        node: "n1".into(),
        underlay: vec![[192, 0, 2, 1].into()],
        split: IdentitySplit::CLUSTERS_255,
        direct_routing: false,
        path_v4: Some(path()),
        path_v6: None,
        encryption: config.encryption.for_model(),
    };
    let mut model = Model::new(settings, read_tables(maps).unwrap());
    model.begin_listing();
    model.end_listing();
    model
}
