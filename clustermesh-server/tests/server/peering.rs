//! Two servers: what one writes, the other copies, through cuts and restarts.

mod claims;

use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, DeleteRangeRequest, RequestOp, TxnRequest, request_op,
};
use clustermesh_api::v1::agent_watch_response::Message;
use clustermesh_api::v1::peer_status::State;
use clustermesh_client::Client;

use crate::support::{Cluster, Gate, Pki, http_get, put, soon, until};

fn node(cluster: u32, name: &str, third: u32) -> (String, String) {
    let key = format!("cilium/state/nodes/v1/c{cluster}/{name}");
    let value = format!(
        r#"{{"Name":"{name}","Cluster":"c{cluster}","IPAddresses":[{{"Type":"InternalIP","IP":"192.0.2.{third}"}}],"IPv4AllocCIDR":{{"IP":"10.{cluster}.{third}.0","Mask":"////AA=="}},"IPv4SecondaryAllocCIDRs":null,"IPv6AllocCIDR":null,"IPv6SecondaryAllocCIDRs":null,"IPv4HealthIP":"","IPv6HealthIP":"","IPv4IngressIP":"","IPv6IngressIP":"","ClusterID":{cluster},"Source":"test","EncryptionKey":0,"Labels":null,"Annotations":null,"WireguardPubKey":"","BootID":""}}"#
    );
    (key, value)
}

fn address(cluster: u32, third: u32, host: u32, id: u32) -> (String, String) {
    let key = format!("cilium/state/ip/v1/default/10.{cluster}.{third}.{host}");
    let value = format!(
        r#"{{"IP":"10.{cluster}.{third}.{host}","Mask":null,"HostIP":"192.0.2.{third}","ID":{id},"Key":0,"Metadata":"","K8sNamespace":"shop","K8sPodName":"p"}}"#
    );
    (key, value)
}

async fn write(client: &Client, (key, value): (String, String)) -> i64 {
    client
        .put(put(key, value))
        .await
        .unwrap()
        .header
        .unwrap()
        .revision
}

async fn delete(client: &Client, key: &str) {
    let request = DeleteRangeRequest {
        key: key.to_owned().into(),
        ..Default::default()
    };
    client.delete_range(request).await.unwrap();
}

async fn until_state(client: &Client, wanted: State) -> clustermesh_api::v1::PeerStatus {
    soon(&format!("peer {wanted:?}"), async {
        loop {
            let status = client.mesh_status().await.unwrap();
            if status.peers[0].state() == wanted {
                return status.peers[0].clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
}

/// Cluster 1 with node `w1`, and its operator.
async fn with_a_node(pki: &Pki) -> (Cluster, Client) {
    let cluster = Cluster::start(pki, 1, &[]).await;
    let operator = cluster.operator(pki);
    write(&operator, node(1, "w1", 1)).await;
    (cluster, operator)
}

/// Cluster 2, which reaches its peer through `gate`.
async fn behind(pki: &Pki, peer: &Cluster, gate: &Gate) -> Cluster {
    let mut cluster = Cluster::start(pki, 2, &[]).await;
    cluster.stop().await;
    cluster.add_peer_behind(peer, gate);
    cluster.restart(pki).await;
    cluster
}

async fn until_there(client: &Client, key: &str) {
    until(client, key, |value| value.is_some()).await;
}

async fn until_gone(client: &Client, key: &str) {
    until(client, key, |value| value.is_none()).await;
}

/// Puts in one transaction.
async fn write_all(client: &Client, records: impl Iterator<Item = (String, String)>) {
    let operation = |(key, value)| RequestOp {
        request: Some(request_op::Request::RequestPut(put(key, value))),
    };
    let request = TxnRequest {
        success: records.map(operation).collect(),
        ..Default::default()
    };
    client.txn(request).await.unwrap();
}

const COPY: &str = "cilium/cache/ip/v1/c1/10.1.1.";

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_is_copied_kept_through_a_cut_and_resumed_by_difference() {
    let pki = Pki::new();
    let (mut a, at_a) = with_a_node(&pki).await;
    for host in 4..30 {
        write(&at_a, address(1, 1, host, 65_600)).await;
    }
    let b = Cluster::start(&pki, 2, &[&a]).await;
    let at_b = b.operator(&pki);
    let synced = until_state(&at_b, State::Synced).await;
    assert_eq!(
        (synced.cluster_id, synced.nodes, synced.endpoints),
        (1, 1, 26),
        "{synced:?}"
    );
    assert_eq!(synced.store_id, a.server().store().cluster_id());
    let original = at_a
        .get("cilium/state/ip/v1/default/10.1.1.4")
        .await
        .unwrap()
        .unwrap();
    let copy = at_b.get(format!("{COPY}4")).await.unwrap().unwrap();
    assert_eq!(copy.value, original.value, "byte for byte");
    let config = at_b.get("cilium/cluster-config/c1").await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&config.value).contains("\"cached\":true"));
    for kind in ["nodes", "ip", "identities", "services", "endpointslices"] {
        let key = format!("cilium/synced/c1/cilium/cache/{kind}/v1");
        assert!(at_b.get(key.clone()).await.unwrap().is_some(), "{key}");
    }

    // Live changes.
    write(&at_a, address(1, 1, 40, 65_601)).await;
    until_there(&at_b, &format!("{COPY}40")).await;
    delete(&at_a, "cilium/state/ip/v1/default/10.1.1.5").await;
    until_gone(&at_b, &format!("{COPY}5")).await;

    // A cut deletes nothing.
    a.stop().await;
    until_state(&at_b, State::Unreachable).await;
    assert!(at_b.get(format!("{COPY}4")).await.unwrap().is_some());
    let unchanged = at_b
        .get(format!("{COPY}7"))
        .await
        .unwrap()
        .unwrap()
        .mod_revision;

    // Healed: what happened meanwhile arrives, what did not change is not written again.
    a.restart(&pki).await;
    let at_a = a.operator(&pki);
    delete(&at_a, "cilium/state/ip/v1/default/10.1.1.6").await;
    write(&at_a, address(1, 1, 41, 65_601)).await;
    until_there(&at_b, &format!("{COPY}41")).await;
    until_gone(&at_b, &format!("{COPY}6")).await;
    assert_eq!(
        at_b.get(format!("{COPY}7"))
            .await
            .unwrap()
            .unwrap()
            .mod_revision,
        unchanged
    );
    let status = until_state(&at_b, State::Synced).await;
    assert!(
        status.reconnects > 0 && status.last_error.is_empty(),
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_store_of_the_peer_is_listed_and_only_differences_are_written() {
    let pki = Pki::new();
    let (mut a, at_a) = with_a_node(&pki).await;
    for host in 4..8 {
        write(&at_a, address(1, 1, host, 65_600)).await;
    }
    let b = Cluster::start(&pki, 2, &[&a]).await;
    let at_b = b.operator(&pki);
    until_state(&at_b, State::Synced).await;
    let kept = at_b.get(format!("{COPY}4")).await.unwrap().unwrap();
    a.stop().await;
    std::fs::remove_dir_all(a.dir.path().join("data")).unwrap();
    a.restart(&pki).await;
    // As soon as the empty store says that it is complete, what it does not have is gone.
    until_gone(&at_b, &format!("{COPY}4")).await;
    let at_a = a.operator(&pki);
    write(&at_a, node(1, "w1", 1)).await;
    write(&at_a, address(1, 1, 4, 65_600)).await;
    until_there(&at_b, &format!("{COPY}4")).await;
    assert!(
        at_b.get(format!("{COPY}4"))
            .await
            .unwrap()
            .unwrap()
            .mod_revision
            > kept.mod_revision
    );
    let status = until_state(&at_b, State::Synced).await;
    assert_eq!(status.store_id, a.server().store().cluster_id());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_store_takes_nothing_away_before_it_has_settled() {
    let pki = Pki::new();
    let mut a = Cluster::start(&pki, 1, &[]).await;
    write(&a.operator(&pki), node(1, "w1", 1)).await;
    let gate = Gate::before(a.address()).await;
    let b = behind(&pki, &a, &gate).await;
    let at_b = b.operator(&pki);
    until_state(&at_b, State::Synced).await;

    // Behind the cut the peer loses its store; the new one does not say yet that it is complete.
    gate.set_open(false);
    until_state(&at_b, State::Unreachable).await;
    a.stop().await;
    std::fs::remove_dir_all(a.dir.path().join("data")).unwrap();
    a.settle_seconds = 3_600;
    a.restart(&pki).await;
    let at_a = a.operator(&pki);
    write(&at_a, node(1, "w2", 2)).await;
    gate.set_open(true);
    until_there(&at_b, "cilium/cache/nodes/v1/c1/w2").await;
    // Later than the listing.
    write(&at_a, node(1, "w3", 3)).await;
    until_there(&at_b, "cilium/cache/nodes/v1/c1/w3").await;
    let kept = at_b.get("cilium/cache/nodes/v1/c1/w1").await.unwrap();
    assert!(kept.is_some(), "absence was taken for a deletion");
    let status = at_b.mesh_status().await.unwrap();
    assert_eq!(status.peers[0].state(), State::Syncing);

    let canaries = at_a.list_prefix("cilium/synced/c1/").collect(10).await;
    assert!(canaries.unwrap().kvs.is_empty(), "said before it settled");

    // Its agents had the time to come back: now it says so, and once only.
    a.stop().await;
    a.settle_seconds = 0;
    a.restart(&pki).await;
    until_gone(&at_b, "cilium/cache/nodes/v1/c1/w1").await;
    until_state(&at_b, State::Synced).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn synced_is_said_only_of_a_copy_that_has_caught_up() {
    let pki = Pki::new();
    let (a, at_a) = with_a_node(&pki).await;
    let gate = Gate::before(a.address()).await;
    let b = behind(&pki, &a, &gate).await;
    let at_b = b.operator(&pki);
    until_state(&at_b, State::Synced).await;
    gate.set_open(false);
    until_state(&at_b, State::Unreachable).await;
    for hosts in (4..244).collect::<Vec<_>>().chunks(60) {
        let records = hosts.iter().map(|host| address(1, 1, *host, 65_600));
        write_all(&at_a, records).await;
    }
    gate.set_open(true);
    // Without a pause: the first time that it is said counts.
    let status = soon("synced", async {
        loop {
            let status = at_b.mesh_status().await.unwrap();
            if status.peers[0].state() == State::Synced {
                return status.peers[0].clone();
            }
        }
    })
    .await;
    assert_eq!(status.endpoints, 240, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_compaction_only_what_changed_is_read_again() {
    let pki = Pki::new();
    let (a, at_a) = with_a_node(&pki).await;
    for host in 4..54 {
        write(&at_a, address(1, 1, host, 65_600)).await;
    }
    // Refused, so that the copy does not have it.
    write(&at_a, address(1, 9, 9, 65_600)).await;
    let mut b = Cluster::start(&pki, 2, &[&a]).await;
    until_state(&b.operator(&pki), State::Synced).await;
    b.stop().await;

    write(&at_a, address(1, 1, 4, 65_601)).await;
    delete(&at_a, "cilium/state/ip/v1/default/10.1.1.5").await;
    write(&at_a, address(1, 1, 60, 65_601)).await;
    let revision = at_a
        .put(put("clustermesh.io/alloc/x", "x"))
        .await
        .unwrap()
        .header
        .unwrap()
        .revision;
    KvClient::new(at_a.channel())
        .compact(CompactionRequest {
            revision,
            physical: false,
        })
        .await
        .unwrap();
    b.restart(&pki).await;
    let at_b = b.operator(&pki);
    let status = until_state(&at_b, State::Synced).await;
    assert_eq!((status.nodes, status.endpoints), (1, 50), "{status:?}");
    assert!(at_b.get(format!("{COPY}5")).await.unwrap().is_none());
    let changed = at_b.get(format!("{COPY}4")).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&changed.value).contains("65601"));
    assert_eq!(status.refused_records.values().sum::<u64>(), 1);
    let operator = pki.issue("operator", "c2", "admin-c2");
    let metrics = http_get(b.address(), &operator, "/metrics").await;
    let line = metrics
        .lines()
        .find(|line| line.contains("listing_values_read_total{"))
        .unwrap();
    let values: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    // Two addresses that changed, one that was refused.
    assert_eq!(values, 3, "{line}");
    // The node, its addresses, and what says that the copy is complete.
    let held = r#"clustermesh_server_peer_copy_records{cluster="c1"} "#;
    let records = metrics.lines().find_map(|line| line.strip_prefix(held));
    let records: usize = records.unwrap().parse().unwrap();
    let copied = at_b.list_prefix("cilium/cache/").collect(1_000).await;
    assert_eq!(records, copied.unwrap().kvs.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_hear_the_watermark_and_a_former_peer_leaves_nothing_behind() {
    let pki = Pki::new();
    let (a, at_a) = with_a_node(&pki).await;
    let mut b = Cluster::start(&pki, 2, &[&a]).await;
    let agent = b.node(&pki, "n1");
    let mut watch = agent.agent_watch(0, 0).await.unwrap();
    // Also when nothing that is exported changed.
    let wanted = at_a
        .put(put("clustermesh.io/alloc/x", "x"))
        .await
        .unwrap()
        .header
        .unwrap()
        .revision;
    loop {
        let response = soon("the watermark", watch.next()).await.unwrap().unwrap();
        if let Some(Message::Watermark(mark)) = response.message
            && mark.revision >= wanted
        {
            assert_eq!(
                (mark.cluster.as_str(), mark.store_id),
                ("c1", a.server().store().cluster_id())
            );
            break;
        }
    }
    b.stop().await;
    b.forget_peers();
    b.restart(&pki).await;
    let at_b = b.operator(&pki);
    until_gone(&at_b, "cilium/cache/nodes/v1/c1/w1").await;
    until_gone(&at_b, "cilium/cluster-config/c1").await;
    let synced = at_b
        .list_prefix("cilium/synced/c1/")
        .collect(10)
        .await
        .unwrap();
    assert!(synced.kvs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_that_copy_each_other_come_to_rest() {
    let pki = Pki::new();
    let mut a = Cluster::start(&pki, 1, &[]).await;
    let b = Cluster::start(&pki, 2, &[&a]).await;
    a.stop().await;
    a.add_peer(&b);
    a.restart(&pki).await;
    let (at_a, at_b) = (a.operator(&pki), b.operator(&pki));
    let written = write(&at_a, node(1, "w1", 1)).await;
    write(&at_b, node(2, "w1", 2)).await;
    until_there(&at_a, "cilium/cache/nodes/v1/c2/w1").await;
    until_there(&at_b, "cilium/cache/nodes/v1/c1/w1").await;
    until_state(&at_a, State::Synced).await;
    until_state(&at_b, State::Synced).await;
    let mut watch = b.node(&pki, "n1").agent_watch(0, 0).await.unwrap();
    // Until the copies have told each other all that there is, then twice the idle interval.
    let mut told = 0;
    while told < written {
        let response = soon("the watermark", watch.next()).await.unwrap().unwrap();
        if let Some(Message::Watermark(mark)) = response.message {
            told = mark.revision;
        }
    }
    let (before_a, before_b) = (a.server().store().revision(), b.server().store().revision());
    let mut marks = 0;
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(3);
    while let Ok(response) = tokio::time::timeout_at(deadline, watch.next()).await {
        match response.unwrap().unwrap().message {
            Some(Message::Watermark(_)) => marks += 1,
            other => panic!("nothing changes here: {other:?}"),
        }
    }
    assert!(marks <= 1, "{marks} watermarks while nothing changed");
    assert_eq!(a.server().store().revision(), before_a);
    assert_eq!(b.server().store().revision(), before_b);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_that_compactions_overtake_goes_on_without_a_new_connection() {
    /// Several pages of one kind.
    const ADDRESSES: u32 = 1_500;
    let pki = Pki::new();
    let a = Cluster::start(&pki, 1, &[]).await;
    let at_a = a.operator(&pki);
    for third in 1..=ADDRESSES / 250 {
        write(&at_a, node(1, &format!("w{third}"), third)).await;
        let hosts: Vec<u32> = (4..254).collect();
        for part in hosts.chunks(125) {
            let records = part.iter().map(|host| address(1, third, *host, 65_600));
            write_all(&at_a, records).await;
        }
    }
    let gate = Gate::before(a.address()).await;
    gate.set_open(false);
    let b = behind(&pki, &a, &gate).await;
    gate.set_open(true);
    until_state(&b.operator(&pki), State::Syncing).await;
    let before = b.operator(&pki).mesh_status().await.unwrap().peers[0].reconnects;
    // What is being listed is gone again and again, but not for ever.
    let mut kv = KvClient::new(at_a.channel());
    for round in 0..6 {
        let revision = write(&at_a, ("test".to_owned(), round.to_string())).await;
        let request = CompactionRequest {
            revision,
            physical: false,
        };
        kv.compact(request).await.unwrap();
    }
    let status = until_state(&b.operator(&pki), State::Synced).await;
    assert_eq!(status.endpoints, u64::from(ADDRESSES));
    assert_eq!(status.reconnects, before, "{status:?}");
}
