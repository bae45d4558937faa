//! Several replicas in one process, over a network in memory that can be cut.

mod divergence;
mod listing;
mod network;
mod releases;
mod removal;
mod starts;

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use clustermesh_core::{
    KvError, Outcome,
    pb::{AlarmKind, MemberAlarm, Proposal},
};
use clustermesh_store::{Node, ReplicaId};
use openraft::async_runtime::WatchReceiver;
use parking_lot::Mutex;

use self::network::MemoryNetwork;
use crate::{
    AsideError, Data, InitialMember, MemberError, MemoryData, PeerHandler, ProposeError, ReadError,
    Replica, ReplicaConfig, Start, StartError, Target, WatchEnd,
    test_support::{R, config, everything, grant, put, value},
    wire::{
        CallRequest, Forward, ForwardedProposal, Header, Hello, ReadIndex, call_request::Call,
        call_response, refusal,
    },
};

const PATIENCE: Duration = Duration::from_secs(20);

fn url(name: &str) -> String {
    format!("https://{name}:2380")
}

fn replica_config(name: &str, data: &MemoryData, start: Start) -> ReplicaConfig {
    let mut config = config(Data::Memory(data.clone()));
    config.heartbeat = Duration::from_millis(50);
    config.election_timeout = Duration::from_millis(300);
    config.request_timeout = Duration::from_secs(4);
    config.start = start;
    config.node = Node {
        name: name.into(),
        peer_url: url(name),
        ..Node::default()
    };
    config
}

async fn start(network: &MemoryNetwork, config: ReplicaConfig) -> Result<Replica<R>, StartError> {
    let handler = PeerHandler::default();
    network.listen(&config.node.peer_url, handler.clone());
    let transport = network.transport(&config.node.peer_url);
    Replica::start_with(config, transport, &handler).await
}

fn first_members(names: &[&str]) -> Start {
    let member = |name: &&str| InitialMember {
        name: (*name).to_owned(),
        peer_url: url(name),
    };
    Start::Static(names.iter().map(member).collect())
}

struct Group {
    network: MemoryNetwork,
    names: Vec<&'static str>,
    data: Vec<MemoryData>,
    replicas: Vec<Replica<R>>,
}

impl Group {
    async fn three() -> Self {
        Self::three_with(|_| {}).await
    }

    async fn three_with(adjust: impl Fn(&mut ReplicaConfig)) -> Self {
        let network = MemoryNetwork::default();
        let names = vec!["a", "b", "c"];
        let data: Vec<MemoryData> = names.iter().map(|_| MemoryData::default()).collect();
        let starting: Vec<_> = names
            .iter()
            .zip(&data)
            .map(|(name, data)| {
                let mut config = replica_config(name, data, first_members(&names));
                adjust(&mut config);
                let network = network.clone();
                tokio::spawn(async move { start(&network, config).await.unwrap() })
            })
            .collect();
        let mut replicas = Vec::new();
        for replica in starting {
            replicas.push(replica.await.unwrap());
        }
        Self {
            network,
            names,
            data,
            replicas,
        }
    }

    async fn leader(&self, among: &[usize]) -> usize {
        wait("a leader", || {
            among.iter().copied().find(|index| {
                let status = self.replicas[*index].status();
                status.is_leader
                    && among.iter().all(|other| {
                        self.replicas[*other].status().leader == Some(status.replica_id)
                    })
            })
        })
        .await
    }

    fn others(&self, index: usize) -> Vec<usize> {
        (0..self.replicas.len())
            .filter(|other| *other != index)
            .collect()
    }

    async fn same_state(&self, among: &[usize]) {
        wait("the same state everywhere", || {
            let hashes: BTreeSet<_> = among
                .iter()
                .map(|index| self.replicas[*index].read(|state| (state.revision(), state.hash())))
                .collect();
            (hashes.len() == 1).then_some(())
        })
        .await;
    }

    async fn shutdown(self) {
        for replica in &self.replicas {
            replica.shutdown().await;
        }
    }
}

async fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let waiting = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("no {what} in time"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_are_one_group_and_each_reads_what_it_acknowledged() {
    let group = Group::three().await;
    let ids: BTreeSet<_> = group
        .replicas
        .iter()
        .map(|replica| replica.read(|state| state.cluster_id()))
        .collect();
    assert_eq!(ids.len(), 1);
    assert!(!ids.contains(&0));
    let mut revision = 1;
    for round in 0..10 {
        for (index, replica) in group.replicas.iter().enumerate() {
            let written = format!("{round}-{index}");
            let committed = replica.propose(put("k", written.clone(), 0)).await.unwrap();
            // Without another round trip: it was applied here before it was answered.
            assert_eq!(value(replica, "k").unwrap(), written);
            assert_eq!(committed.revision, revision + 1);
            revision += 1;
        }
    }
    let last = group.replicas[0]
        .propose(put("k", "last", 0))
        .await
        .unwrap();
    for replica in &group.replicas {
        replica.linearize().await.unwrap();
        assert!(replica.read(|state| state.revision()) >= last.revision);
        assert_eq!(value(replica, "k").unwrap(), "last");
    }
    let leader = group.leader(&[0, 1, 2]).await;
    for index in group.others(leader) {
        let status = group.replicas[index].status();
        assert!(status.last_leader_contact.unwrap() < PATIENCE);
        let forwards = &group.replicas[index].metrics().forwards_total;
        assert!(forwards.load(Ordering::Relaxed) >= 10);
    }
    group.same_state(&[0, 1, 2]).await;
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_ends_the_others_go_on_and_lose_nothing() {
    let group = Group::three().await;
    let leader = group.leader(&[0, 1, 2]).await;
    let rest = group.others(leader);
    let asked = &group.replicas[rest[0]];
    for n in 0..20 {
        asked.propose(put(&format!("k{n}"), "v", 0)).await.unwrap();
    }
    group.network.cut(&url(group.names[leader]));
    group.replicas[leader].shutdown().await;
    // Waits for the new leader: nothing was proposed before there was one.
    let mut committed = asked.propose(put("after", "v", 0)).await;
    while matches!(
        committed,
        Err(ProposeError::Unknown | ProposeError::Timeout)
    ) {
        committed = asked.propose(put("after", "v", 0)).await;
    }
    committed.unwrap();
    let next = group.leader(&rest).await;
    for index in &rest {
        group.replicas[*index].linearize().await.unwrap();
        for n in 0..20 {
            assert!(value(&group.replicas[*index], &format!("k{n}")).is_some());
        }
    }
    assert_ne!(next, leader);
    group.same_state(&rest).await;

    // It comes back with its data and catches up.
    group.network.heal(&url(group.names[leader]));
    let name = group.names[leader];
    let again = replica_config(name, &group.data[leader], first_members(&group.names));
    let again = start(&group.network, again).await.unwrap();
    again.linearize().await.unwrap();
    assert!(value(&again, "after").is_some());
    again.shutdown().await;
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_alone_acknowledges_nothing_and_steps_down_when_it_is_back() {
    let group = Group::three().await;
    let old = group.leader(&[0, 1, 2]).await;
    let rest = group.others(old);
    group.network.cut(&url(group.names[old]));
    let alone = group.replicas[old].clone();
    let lost = tokio::spawn(async move {
        let answer = alone.propose(put("lost", "v", 0)).await;
        (answer, alone.linearize().await)
    });
    let new = group.leader(&rest).await;
    group.replicas[new]
        .propose(put("kept", "v", 0))
        .await
        .unwrap();
    let (answer, read) = lost.await.unwrap();
    assert!(
        matches!(answer, Err(ProposeError::Unknown | ProposeError::Timeout)),
        "{answer:?}"
    );
    assert!(read.is_err());
    let silence = group.replicas[old].status().last_quorum_ack.unwrap();
    assert!(silence > Duration::from_secs(1), "{silence:?}");
    group.network.heal(&url(group.names[old]));
    group.leader(&[0, 1, 2]).await;
    group.replicas[old].linearize().await.unwrap();
    assert_eq!(value(&group.replicas[old], "kept").unwrap(), "v");
    assert_eq!(value(&group.replicas[old], "lost"), None);
    group.same_state(&[0, 1, 2]).await;
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_cut_off_does_not_disturb_the_leader() {
    let group = Group::three().await;
    let leader = group.leader(&[0, 1, 2]).await;
    let term = group.replicas[leader].status().term;
    let follower = group.others(leader)[0];
    group.network.cut(&url(group.names[follower]));
    // Several of its election timeouts.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(group.replicas[follower].status().term, term);
    group.network.heal(&url(group.names[follower]));
    group.replicas[follower]
        .propose(put("k", "v", 0))
        .await
        .unwrap();
    let status = group.replicas[leader].status();
    assert!(status.is_leader);
    assert_eq!(status.term, term);
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_lags_behind_the_log_gets_a_snapshot() {
    let small = |config: &mut ReplicaConfig| config.snapshot_log_bytes = 20_000;
    let group = Group::three_with(small).await;
    let leader = group.leader(&[0, 1, 2]).await;
    fill_until_purged(&group.replicas[leader], 0).await;
    // The log no longer begins where an empty replica does.
    let mut joins = replica_config("d", &MemoryData::default(), Start::Join(vec![url("a")]));
    small(&mut joins);
    let joined = start(&group.network, joins).await.unwrap();
    joined.linearize().await.unwrap();
    assert!(joined.status().snapshot_index > 0);
    assert_eq!(value(&joined, "k0").unwrap(), vec![b'x'; 15_000]);
    let committed = joined.propose(put("more", "v", 0)).await.unwrap();
    assert!(matches!(committed.outcome, Ok(Outcome::Put(_))));
    assert_eq!(value(&joined, "more").unwrap(), "v");
    joined.shutdown().await;
    group.shutdown().await;
}

fn purged(replica: &Replica<R>) -> u64 {
    let metrics = replica.inner.raft.metrics();
    let purged = metrics.borrow_watched().purged;
    purged.map_or(0, |purged| purged.index)
}

/// Writes 600 KB, in 40 keys over and over, until the log begins after `index`.
async fn fill_until_purged(replica: &Replica<R>, index: u64) {
    let filling = async {
        let mut n = 0;
        while purged(replica) <= index {
            let write = put(&format!("k{}", n % 40), vec![b'x'; 15_000], 0);
            replica.propose(write).await.unwrap();
            n += 1;
        }
    };
    tokio::time::timeout(PATIENCE, filling)
        .await
        .expect("the log is purged");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_away_takes_a_snapshot_that_goes_on_where_it_broke() {
    let small = |config: &mut ReplicaConfig| config.snapshot_log_bytes = 200_000;
    let group = Group::three_with(small).await;
    let leader = group.leader(&[0, 1, 2]).await;
    let away = group.others(leader)[0];
    group.network.cut(&url(group.names[away]));
    let last = group.replicas[away].status().last_log_index;
    fill_until_purged(&group.replicas[leader], last + 1).await;
    // Every stream of a snapshot breaks after its beginning and one chunk, of three.
    group.network.break_snapshots_after(Some(2));
    group.network.heal(&url(group.names[away]));
    wait("a snapshot taken in pieces", || {
        let index = group.replicas[away].status().snapshot_index;
        (index > last).then_some(())
    })
    .await;
    let streams = group.network.snapshot_streams();
    assert!(streams > 1, "{streams} streams");
    group.network.break_snapshots_after(None);
    group.replicas[away].linearize().await.unwrap();
    assert_eq!(
        value(&group.replicas[away], "k0").unwrap(),
        vec![b'x'; 15_000]
    );
    group.same_state(&[0, 1, 2]).await;
    let revision = group.replicas[leader].read(|state| state.revision());
    let mut hashes = BTreeSet::new();
    for replica in &group.replicas {
        replica.linearize().await.unwrap();
        let (hash, _) = replica.hash_kv(revision).await.unwrap().unwrap();
        hashes.insert((hash.hash, hash.compact_revision));
    }
    assert_eq!(hashes.len(), 1, "{hashes:?}");
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_process_tells_another_ones_arrives_with_its_name() {
    let network = MemoryNetwork::default();
    let names = ["a", "b"];
    let mut starting = Vec::new();
    let heard = Arc::new(Mutex::new(Vec::new()));
    for name in names {
        let config = replica_config(name, &MemoryData::default(), first_members(&names));
        let handler = PeerHandler::default();
        if name == "b" {
            let heard = heard.clone();
            handler.on_aside(move |from, message| {
                heard.lock().push((from, message));
                Err("no more".to_owned())
            });
        }
        network.listen(&config.node.peer_url, handler.clone());
        let transport = network.transport(&config.node.peer_url);
        starting.push(tokio::spawn(async move {
            Replica::<R>::start_with(config, transport, &handler)
                .await
                .unwrap()
        }));
    }
    let mut replicas = Vec::new();
    for replica in starting {
        replicas.push(replica.await.unwrap());
    }
    let told = replicas[0]
        .tell(replicas[1].id(), Bytes::from_static(b"hear"), PATIENCE)
        .await;
    let answer = told.unwrap_err().to_string();
    assert!(answer.contains("no more"), "{answer}");
    assert_eq!(
        *heard.lock(),
        [(replicas[0].id(), Bytes::from_static(b"hear"))]
    );
    // Nobody listens there.
    let told = replicas[1]
        .tell(replicas[0].id(), Bytes::new(), PATIENCE)
        .await;
    assert!(matches!(told, Err(AsideError::Refused(_))), "{told:?}");
    for replica in replicas {
        replica.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_join_vote_once_they_caught_up_and_are_removed_for_good() {
    let network = MemoryNetwork::default();
    let first = replica_config("a", &MemoryData::default(), first_members(&["a"]));
    let first = start(&network, first).await.unwrap();
    for n in 0..50 {
        first.propose(put(&format!("k{n}"), "v", 0)).await.unwrap();
    }
    let mut joined = Vec::new();
    for name in ["b", "c"] {
        let data = MemoryData::default();
        let config = replica_config(name, &data, Start::Join(vec![url("a")]));
        let replica = start(&network, config).await.unwrap();
        assert!(value(&replica, "k49").is_some());
        let voters = || {
            first
                .status()
                .members
                .iter()
                .filter(|member| member.voter)
                .count()
        };
        let wanted = joined.len() + 2;
        wait("another voter", || (voters() == wanted).then_some(())).await;
        joined.push((replica, data));
    }
    let names: BTreeSet<String> = first
        .status()
        .members
        .into_iter()
        .map(|member| member.node.name)
        .collect();
    assert_eq!(names, ["a", "b", "c"].map(String::from).into());

    // Any replica takes the change.
    let (b, b_data) = &joined[0];
    let (c, _) = &joined[1];
    let leave: ReplicaId = b.id();
    // A voter that answers late, as under load, counts as down.
    while let Err(error) = c.remove_member(leave).await {
        assert_eq!(error, MemberError::NoQuorum);
    }
    tokio::time::timeout(PATIENCE, b.stopped()).await.unwrap();
    let failure = b.status().failure.unwrap();
    assert!(failure.contains("was removed"), "{failure}");
    assert_eq!(c.status().members.len(), 2);
    assert_eq!(c.remove_member(leave).await, Err(MemberError::NotFound));
    b.shutdown().await;

    // Its old data does not bring it back; as a new one it is welcome.
    let old = replica_config("b", b_data, Start::Join(vec![url("a")]));
    let refused = start(&network, old).await;
    assert!(matches!(refused, Err(StartError::Removed { .. })));
    let new = replica_config("b", &MemoryData::default(), Start::Join(vec![url("c")]));
    let new = start(&network, new).await.unwrap();
    assert_ne!(new.id(), leave);
    assert!(value(&new, "k0").is_some());
    for replica in [&first, c, &new] {
        replica.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_with_an_emptied_folder_is_refused() {
    let group = Group::three().await;
    let leader = group.leader(&[0, 1, 2]).await;
    let emptied = group.others(leader)[0];
    group.replicas[emptied].shutdown().await;
    let name = group.names[emptied];
    let data = MemoryData::default();
    let again = replica_config(name, &data, first_members(&group.names));
    let refused = start(&group.network, again).await.err().unwrap();
    assert!(matches!(refused, StartError::Emptied { .. }), "{refused}");
    let joins = replica_config(
        name,
        &MemoryData::default(),
        Start::Join(vec![url("a"), url("b"), url("c")]),
    );
    let refused = start(&group.network, joins).await.err().unwrap();
    assert!(
        refused.to_string().contains("remove that member"),
        "{refused}"
    );
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_on_request_and_leases_are_kept_alive_anywhere() {
    let group = Group::three().await;
    let leader = group.leader(&[0, 1, 2]).await;
    let next = group.others(leader)[0];
    let follower = &group.replicas[group.others(leader)[1]];
    let granted = follower.propose(grant(100)).await.unwrap();
    let Ok(Outcome::LeaseGrant(lease)) = granted.outcome else {
        panic!("a grant")
    };
    let kept = follower.keep_alive(lease.id).await.unwrap().unwrap();
    assert!(kept > Duration::from_secs(95), "{kept:?}");
    assert_eq!(follower.keep_alive(lease.id + 1).await.unwrap(), None);
    follower
        .transfer_leader(group.replicas[next].id())
        .await
        .unwrap();
    assert_eq!(group.leader(&[0, 1, 2]).await, next);
    // The new leader gives the lease its full time.
    let left = follower.time_to_live(lease.id).await.unwrap().unwrap();
    assert!(left.remaining > Duration::from_secs(95), "{left:?}");
    group.replicas[next].resign().await;
    assert_ne!(group.leader(&[0, 1, 2]).await, next);
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_another_group_or_for_another_replica_are_refused() {
    let group = Group::three().await;
    let transport = group.network.transport("https://stranger:2380");
    let cluster_id = group.replicas[0].read(|state| state.cluster_id());
    let target = Target {
        id: group.replicas[0].id(),
        peer_url: url("a"),
    };
    let ask = |cluster_id, to, call| {
        let header = Some(Header {
            cluster_id,
            from: 1,
            to,
        });
        let call = Some(call);
        transport.call(target.clone(), CallRequest { header, call })
    };
    let reason = |response: crate::wire::CallResponse| match response.answer {
        Some(call_response::Answer::Refusal(refusal)) => Some(refusal.reason()),
        _ => None,
    };
    let read = || Call::ReadIndex(ReadIndex {});
    let wrong = ask(cluster_id ^ 1, target.id, read()).await.unwrap();
    assert_eq!(reason(wrong), Some(refusal::Reason::WrongCluster));
    let wrong = ask(cluster_id, target.id ^ 1, read()).await.unwrap();
    assert_eq!(reason(wrong), Some(refusal::Reason::WrongReplica));
    let hello = ask(0, 0, Call::Hello(Hello {})).await.unwrap();
    assert_eq!(reason(hello), None);
    // Of a newer release: what cannot be read whole would stop every replica once it is in the log.
    let unknown = Call::Forward(Forward {
        proposals: vec![ForwardedProposal {
            request_id: 1,
            proposal: Some(Proposal::default()),
        }],
    });
    let leader = group.leader(&[0, 1, 2]).await;
    let target = Target {
        id: group.replicas[leader].id(),
        peer_url: url(group.names[leader]),
    };
    let header = Some(Header {
        cluster_id,
        from: group.replicas[group.others(leader)[0]].id(),
        to: target.id,
    });
    let call = Some(unknown);
    let refused = transport.call(target, CallRequest { header, call });
    assert_eq!(
        reason(refused.await.unwrap()),
        Some(refusal::Reason::Invalid)
    );
    group.replicas[leader]
        .propose(put("k", "v", 0))
        .await
        .unwrap();
    group.shutdown().await;
}
