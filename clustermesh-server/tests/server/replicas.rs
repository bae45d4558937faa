//! Three real processes on loopback: the leader is killed, nothing that was acknowledged is lost.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clustermesh_api::etcd::rpc::cluster_client::ClusterClient;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::{MemberListRequest, RangeRequest, StatusRequest, StatusResponse};
use clustermesh_api::v1::peer_status::State;
use clustermesh_api::v1::session_request::Message;
use clustermesh_api::v1::{
    NodeStatus, PeerStatus, ReportApplied, SourceRevision, WaitProgress, node_status,
};
use clustermesh_client::{Client, ClientConfig};
use clustermesh_process::TlsPaths;

use crate::agents::{hello, welcome};
use crate::support::{Cluster, Pki, binary, client, put, soon};

const REPLICAS: usize = 3;

/// Ports below those that the kernel gives to connections, which would take one between its choice and its use.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A free port, never the same twice in this process.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let span = PORTS.end - PORTS.start;
    // Other processes of this test begin elsewhere.
    let begin = u16::try_from(std::process::id() % u32::from(span)).unwrap();
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORTS.start + begin.wrapping_add(step) % span;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

struct Replica {
    child: Option<Child>,
    config: PathBuf,
    address: SocketAddr,
}

impl Replica {
    fn start(&mut self) {
        let child = Command::new(binary())
            .args(["--config".as_ref(), self.config.as_os_str()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// kill -9.
    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Group {
    replicas: Vec<Replica>,
    operator: TlsPaths,
    _dir: tempfile::TempDir,
}

impl Group {
    fn start(pki: &Pki) -> Self {
        Self::start_with(pki, "")
    }

    /// With further sections in each replica's configuration.
    fn start_with(pki: &Pki, sections: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let peers: Vec<u16> = (0..REPLICAS).map(|_| free_port()).collect();
        let list: Vec<String> = (0..REPLICAS)
            .zip(&peers)
            .map(|(index, port)| format!("\"r{index}=https://127.0.0.1:{port}\""))
            .collect();
        let tls = pki.issue("server", "c1", "server");
        let mut replicas: Vec<Replica> = (0..REPLICAS)
            .zip(&peers)
            .map(|(index, peer)| {
                let port = free_port();
                let text = format!(
                    "data_dir = \"data{index}\"\nlisten_client = \"127.0.0.1:{port}\"\nlisten_admin = \"127.0.0.1:0\"\n\
                     [replica]\nname = \"r{index}\"\nlisten_peer = \"127.0.0.1:{peer}\"\ninitial_cluster = [{}]\n\
                     [cluster]\nname = \"c1\"\nid = 1\npod_cidr_v4 = \"10.1.0.0/16\"\n[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n{sections}",
                    list.join(", "),
                    tls.ca,
                    tls.cert,
                    tls.key
                );
                let config = dir.path().join(format!("r{index}.toml"));
                std::fs::write(&config, text).unwrap();
                Replica {
                    child: None,
                    config,
                    address: SocketAddr::from(([127, 0, 0, 1], port)),
                }
            })
            .collect();
        replicas.iter_mut().for_each(Replica::start);
        Self {
            replicas,
            operator: pki.issue("operator", "c1", "admin-c1"),
            _dir: dir,
        }
    }

    fn client(&self, index: usize) -> Client {
        client(self.replicas[index].address, self.operator.clone())
    }

    /// A client of all replicas that moves on when its own fails, beginning with `first`.
    fn client_of_all(&self, first: usize) -> Client {
        let endpoints = (0..REPLICAS)
            .map(|step| {
                let address = self.replicas[(first + step) % REPLICAS].address;
                format!("https://{address}")
            })
            .collect();
        Client::new(&ClientConfig {
            endpoints,
            tls: Some(self.operator.clone()),
            server_name: None,
        })
        .unwrap()
    }

    async fn status(&self, index: usize) -> Option<StatusResponse> {
        let channel = self.client(index).channel();
        let asked = MaintenanceClient::new(channel)
            .status(StatusRequest {})
            .await;
        asked.ok().map(tonic::Response::into_inner)
    }

    /// The one that the replicas which are up agree on.
    async fn leader(&self, among: &[usize]) -> usize {
        soon("a leader", async {
            loop {
                let mut own = Vec::new();
                let mut leaders = Vec::new();
                for index in among {
                    if let Some(status) = self.status(*index).await {
                        own.push((*index, status.header.unwrap().member_id));
                        leaders.push(status.leader);
                    }
                }
                let agreed =
                    leaders.len() == among.len() && leaders.windows(2).all(|w| w[0] == w[1]);
                let leader = own.iter().find(|(_, id)| Some(id) == leaders.first());
                if let (true, Some((leader, _))) = (agreed, leader) {
                    return *leader;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }
}

/// Writes keys of its own until told to end: what was acknowledged, and the longest time without an acknowledgement.
async fn write(
    client: Client,
    name: usize,
    until: tokio::sync::watch::Receiver<bool>,
    written: Arc<AtomicUsize>,
) -> (Vec<String>, Duration) {
    let mut acknowledged = Vec::new();
    let mut last = Instant::now();
    let mut gap = Duration::ZERO;
    let mut next = 0;
    while !*until.borrow() {
        // Every key is written once: an unknown outcome is left as it is.
        let key = format!("w{name}-{next}");
        next += 1;
        if client.put(put(key.clone(), "x")).await.is_ok() {
            gap = gap.max(last.elapsed());
            last = Instant::now();
            acknowledged.push(key);
            written.fetch_add(1, Ordering::Relaxed);
        } else {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    (acknowledged, gap)
}

/// Returns once each writer has had `more` further writes acknowledged.
async fn all_wrote(written: &[Arc<AtomicUsize>], more: usize) {
    let goals: Vec<usize> = written
        .iter()
        .map(|count| count.load(Ordering::Relaxed) + more)
        .collect();
    soon("writes of every writer", async {
        let there =
            |(count, goal): (&Arc<AtomicUsize>, &usize)| count.load(Ordering::Relaxed) >= *goal;
        while !written.iter().zip(&goals).all(there) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_the_leader_loses_nothing_that_was_acknowledged() {
    let pki = Pki::new();
    let mut group = Group::start(&pki);
    let all = [0, 1, 2];
    let leader = group.leader(&all).await;
    let (stop, until) = tokio::sync::watch::channel(false);
    let written: Vec<Arc<AtomicUsize>> = (0..6).map(|_| Arc::default()).collect();
    let writers: Vec<_> = (0..6)
        .map(|name| {
            let client = group.client_of_all(name);
            tokio::spawn(write(client, name, until.clone(), written[name].clone()))
        })
        .collect();
    all_wrote(&written, 10).await;
    group.replicas[leader].kill();
    let rest: Vec<usize> = all.into_iter().filter(|index| *index != leader).collect();
    let next = group.leader(&rest).await;
    assert_ne!(next, leader);
    // The gap closes: everyone writes again.
    all_wrote(&written, 10).await;
    group.replicas[leader].start();
    group.leader(&all).await;
    stop.send_replace(true);
    let mut acknowledged = Vec::new();
    let mut longest = Duration::ZERO;
    for writer in writers {
        let (keys, gap) = soon("a writer's end", writer).await.unwrap();
        acknowledged.extend(keys);
        longest = longest.max(gap);
    }
    println!(
        "{} writes acknowledged, longest gap {} ms",
        acknowledged.len(),
        longest.as_millis()
    );
    assert!(longest < Duration::from_secs(15), "{longest:?}");
    for index in all {
        let client = group.client(index);
        for key in &acknowledged {
            assert!(
                client.get(key.clone()).await.unwrap().is_some(),
                "replica {index} lost {key}"
            );
        }
    }
    let members = ClusterClient::new(group.client(0).channel())
        .member_list(MemberListRequest { linearizable: true })
        .await
        .unwrap()
        .into_inner()
        .members;
    let names: std::collections::BTreeSet<_> =
        members.iter().map(|member| member.name.as_str()).collect();
    assert_eq!(names, ["r0", "r1", "r2"].into());
    assert!(members.iter().all(|member| !member.is_learner));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_without_a_quorum_serves_what_it_has_and_more_later() {
    let pki = Pki::new();
    let mut group = Group::start(&pki);
    group.leader(&[0, 1, 2]).await;
    group.client(0).put(put("k", "v")).await.unwrap();
    group.replicas.iter_mut().for_each(Replica::kill);
    group.replicas[0].start();
    // What it had applied; whether the rest was committed only a quorum can say.
    soon("a serializable read", async {
        loop {
            let request = RangeRequest {
                key: "k".into(),
                serializable: true,
                ..RangeRequest::default()
            };
            let channel = group.client(0).channel();
            if KvClient::new(channel).range(request).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert!(group.client(0).get("k").await.is_err());
    let known = group.client(0).known_mesh_status().await.unwrap();
    assert!(known.stale && known.revision > 0, "{known:?}");
    group.replicas[1].start();
    group.leader(&[0, 1]).await;
    let value = soon("the value", async {
        loop {
            if let Ok(value) = group.client(0).get("k").await {
                return value;
            }
        }
    });
    assert_eq!(value.await.unwrap().value, "v");
    let known = group.client(0).known_mesh_status().await.unwrap();
    assert!(!known.stale, "a quorum runs");
    soon("a write", async {
        while group.client(0).put(put("k", "w")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

/// What `asked` says of node `w1`.
async fn node(operator: &Client) -> Option<NodeStatus> {
    let nodes = operator.mesh_status().await.ok()?.nodes;
    nodes.into_iter().find(|node| node.node == "w1")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_knows_who_is_connected_to_another_and_the_leader_who_is_lost() {
    let pki = Pki::new();
    let mut group = Group::start(&pki);
    let all = [0, 1, 2];
    let leader = group.leader(&all).await;
    let serving = (leader + 1) % REPLICAS;
    let agent = client(
        group.replicas[serving].address,
        pki.issue("node", "c1", "w1"),
    );

    let hello = hello("w1", "i", "192.0.2.1");
    let (session, _) = welcome(&agent, hello).await;
    let applied = SourceRevision {
        cluster: "c1".into(),
        store_id: 7,
        revision: 9,
    };
    let report = ReportApplied {
        sources: vec![applied.clone()],
        ..ReportApplied::default()
    };
    session
        .sender
        .send(Message::ReportApplied(report))
        .await
        .unwrap();
    for index in all {
        let operator = group.client(index);
        soon("the report at every replica", async {
            loop {
                if let Some(node) = node(&operator).await
                    && node.applied == [applied.clone()]
                {
                    assert_eq!(node.state(), node_status::State::Connected);
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    // Nobody but the leader is left to notice.
    group.replicas[serving].kill();
    let operator = group.client(leader);
    soon("a stale node", async {
        loop {
            if let Some(node) = node(&operator).await
                && node.state() == node_status::State::Stale
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
}

/// Once `asked` says that its only peer is `wanted`.
async fn until_peer(asked: &Client, wanted: State) -> PeerStatus {
    soon(&format!("a peer that is {wanted:?}"), async {
        loop {
            if let Ok(status) = asked.mesh_status().await
                && let Some(peer) = status.peers.first()
                && peer.state() == wanted
            {
                return peer.clone();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

/// What a wait of `asked` says first that `wanted` takes.
async fn until_progress(asked: &Client, wanted: impl Fn(&WaitProgress) -> bool) -> WaitProgress {
    soon("a wait's progress", async {
        let mut progress = asked.wait(Duration::from_secs(30)).await.unwrap();
        loop {
            let now = progress.next().await.unwrap().unwrap();
            if wanted(&now) {
                return now;
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_knows_how_the_leaders_peers_are_and_waits_for_them() {
    let pki = Pki::new();
    let mut peer = Cluster::start(&pki, 2, &[]).await;
    let tls = pki.issue("peer", "c1", "remote-c2");
    let section = format!(
        "[[peers]]\nname = \"c2\"\nendpoints = [\"{}\"]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
        peer.address(),
        tls.ca,
        tls.cert,
        tls.key
    );
    let mut group = Group::start_with(&pki, &section);
    let all = [0, 1, 2];
    let killed = group.leader(&all).await;
    for index in all {
        let operator = group.client(index);
        let status = until_peer(&operator, State::Synced).await;
        assert_eq!((status.cluster_id, &*status.cluster), (2, "c2"), "{index}");
        let done = until_progress(&operator, |progress| progress.done).await;
        assert!(done.targets.iter().any(|target| target.cluster == "c2"));
    }
    // The next leader begins anew, and the others hear of it.
    group.replicas[killed].kill();
    let rest: Vec<usize> = all.into_iter().filter(|index| *index != killed).collect();
    group.leader(&rest).await;
    for index in &rest {
        let operator = group.client(*index);
        until_peer(&operator, State::Synced).await;
        until_progress(&operator, |progress| progress.done).await;
    }
    peer.stop().await;
    for index in rest {
        let operator = group.client(index);
        let status = until_peer(&operator, State::Unreachable).await;
        assert!(!status.last_error.is_empty());
        let waiting = until_progress(&operator, |progress| {
            progress.laggards.iter().any(|laggard| {
                let text = "cluster c2 is not connected: ";
                laggard.node.is_empty()
                    && laggard.reason.len() > text.len()
                    && laggard.reason.starts_with(text)
            })
        });
        assert!(!waiting.await.done);
    }
}
