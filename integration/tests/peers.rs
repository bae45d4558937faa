//! What a peer may say, and what becomes of what it may not: refused, counted, and without effect on the rest.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::path::Path;

use clustermesh_api::limits::{MAX_IDENTITY_LABELS_BYTES, MAX_VALUE_BYTES};
use clustermesh_integration::lab::host::{command_in, run};
use clustermesh_integration::lab::{Lab, LabConfig};
use clustermesh_integration::scenario::{
    ip_record, node_record, peer, until, until_peer, workload,
};
use serde_json::{Value, json};

/// First identity of cluster 1 that can be a workload's.
const IDENTITY: u32 = (1 << 16) + 256;
/// An identity of a cluster that is neither of the two.
const FOREIGN_IDENTITY: u32 = (7 << 16) + 256;

/// Two clusters with servers only.
async fn two_servers() -> Lab {
    let config = LabConfig {
        nodes_per_cluster: 1,
        agents_per_cluster: 0,
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.start().await.unwrap();
    until_peer(lab.cluster(1), "a", |peer| peer["state"] == "synced")
        .await
        .unwrap();
    lab
}

async fn write(lab: &Lab, (key, value): (String, Value)) {
    let store = lab.cluster(0).store().unwrap();
    store.put(&key, value.to_string()).await.unwrap();
}

async fn refused(lab: &Lab, name: &str) -> Value {
    peer(lab.cluster(1), name).await.unwrap()["refusedRecords"].clone()
}

fn node(name: &str, host: u8, pod_network: &str) -> (String, Value) {
    node_record(
        "state",
        ("a", 1),
        name,
        &format!("172.30.1.{host}"),
        pod_network,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_of_a_peer_are_refused_and_counted_and_good_ones_beside_them_copied() {
    let lab = two_servers().await;
    let (a, b) = (lab.cluster(0), lab.cluster(1));
    let (at_a, at_b) = (a.store().unwrap(), b.store().unwrap());
    let own_before = at_b.list("cilium/state/").await.unwrap();

    write(&lab, node("w1", 11, "10.1.1.0")).await;
    // Fields that this version does not know pass through, at any depth.
    let (key, mut newer) = ip_record("10.1.1.4", IDENTITY, "172.30.1.11", "web-1");
    newer["FromTheFuture"] = json!({"deep": [1, {"x": null}]});
    newer["clustermesh.io"] = json!({"alsoUnknown": true});
    at_a.put(&key, newer.to_string()).await.unwrap();

    // Not JSON; JSON of another shape; text that is not UTF-8.
    at_a.put("cilium/state/nodes/v1/a/w2", "{\"Name\":")
        .await
        .unwrap();
    at_a.put("cilium/state/ip/v1/default/10.1.1.5", "[1, 2]")
        .await
        .unwrap();
    at_a.put("cilium/state/services/v1/a/shop/cart", vec![0xff, 0xfe, 0])
        .await
        .unwrap();
    // Too large for its kind.
    let labels = format!(
        "k8s:io.cilium.k8s.policy.cluster=a;k8s:app={};",
        "x".repeat(MAX_IDENTITY_LABELS_BYTES)
    );
    at_a.put(&format!("cilium/state/identities/v1/id/{IDENTITY}"), labels)
        .await
        .unwrap();
    // Identities of somebody else.
    write(
        &lab,
        ip_record("10.1.1.6", FOREIGN_IDENTITY, "172.30.1.11", "thief"),
    )
    .await;
    at_a.put(
        &format!("cilium/state/identities/v1/id/{FOREIGN_IDENTITY}"),
        "k8s:io.cilium.k8s.policy.cluster=a;k8s:app=thief;",
    )
    .await
    .unwrap();
    // The host identity is nobody's but this machine's, whatever the address.
    write(&lab, ip_record("10.1.1.7", 1, "172.30.1.11", "root")).await;
    // Pod CIDRs of this cluster, exactly and as a part; an address behind no node; one outside every pod CIDR.
    write(&lab, node("w3", 12, "10.2.1.0")).await;
    write(&lab, ip_record("10.1.1.8", IDENTITY, "172.30.1.99", "lost")).await;
    write(
        &lab,
        ip_record("10.2.0.9", IDENTITY, "172.30.1.11", "thief"),
    )
    .await;
    // A name that its key does not have.
    let (_, misnamed) = node("w5", 14, "10.1.5.0");
    at_a.put("cilium/state/nodes/v1/a/w4", misnamed.to_string())
        .await
        .unwrap();
    // The last one is good again: when it is there, all others were judged.
    write(
        &lab,
        ip_record("10.1.1.200", IDENTITY, "172.30.1.11", "web-2"),
    )
    .await;

    let copied = until("the good records", || async {
        let copied = at_b.list("cilium/cache/ip/v1/a/").await?;
        Ok((copied.len() == 2).then_some(copied))
    })
    .await
    .unwrap();
    assert_eq!(
        copied[1].value,
        newer.to_string().into_bytes(),
        "byte for byte"
    );
    let nodes = at_b.list("cilium/cache/nodes/v1/a/").await.unwrap();
    assert_eq!(nodes.len(), 1, "{nodes:?}");
    for kind in ["identities", "services"] {
        let copied = at_b.list(&format!("cilium/cache/{kind}/v1/a/")).await;
        assert!(copied.unwrap().is_empty(), "{kind}");
    }
    assert_eq!(
        refused(&lab, "a").await,
        json!({
            "malformed": 4, "identity-range": 2, "reserved-identity": 1, "overlap": 1, "unknown-host": 1,
            "not-owned": 1, "key-mismatch": 1,
        })
    );
    let mut command = command_in(b.server_netns(), None, Path::new("curl"));
    let output = run(command.args(["-sf", "http://127.0.0.1:9962/metrics"])).await;
    let metrics = String::from_utf8_lossy(&output.unwrap().stdout).into_owned();
    assert!(
        metrics.lines().any(|line| line.contains("records_refused")
            && line.contains("cluster=\"a\"")
            && line.contains("reason=\"overlap\"")),
        "{metrics}"
    );
    let seen = peer(b, "a").await.unwrap();
    assert_eq!(
        (&seen["state"], &seen["lastError"]),
        (&json!("synced"), &json!(""))
    );
    // Nothing of this cluster's own was touched.
    let own: Vec<_> = at_b.list("cilium/state/").await.unwrap();
    let keys = |list: &[clustermesh_api::etcd::mvcc::KeyValue]| -> Vec<_> {
        list.iter().map(|record| record.key.clone()).collect()
    };
    assert_eq!(keys(&own), keys(&own_before));
    b.apply(&workload("still-works", "web")).await.unwrap();

    // What is put right is taken, and no longer counted.
    write(&lab, node("w3", 12, "10.1.3.0")).await;
    at_a.delete("cilium/state/nodes/v1/a/w2").await.unwrap();
    until_peer(b, "a", |peer| {
        peer["refusedRecords"]["overlap"].is_null() && peer["refusedRecords"]["malformed"] == 3
    })
    .await
    .unwrap();
    let taken = at_b.get("cilium/cache/nodes/v1/a/w3").await.unwrap();
    assert!(taken.is_some());
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_beyond_the_limit_is_refused_where_it_is_written() {
    let lab = two_servers().await;
    let at_a = lab.cluster(0).store().unwrap();
    let key = "cilium/state/nodes/v1/a/big";
    let error = at_a
        .put(key, vec![b' '; MAX_VALUE_BYTES + 1])
        .await
        .unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("request is too large"), "{text}");
    assert_eq!(at_a.get(key).await.unwrap(), None);
    at_a.put(key, vec![b' '; MAX_VALUE_BYTES / 2])
        .await
        .unwrap();
    // Not even that is a node; the other side says so.
    until_peer(lab.cluster(1), "a", |peer| {
        peer["refusedRecords"] == json!({"malformed": 1})
    })
    .await
    .unwrap();
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_cidr_of_one_peer_is_not_given_to_another_until_it_is_free() {
    let mut lab = two_servers().await;
    write(&lab, node("w1", 11, "10.1.1.0")).await;
    let at_b = lab.cluster(1).store().unwrap();
    until("the first owner's node", || async {
        at_b.get("cilium/cache/nodes/v1/a/w1").await
    })
    .await
    .unwrap();

    // A third cluster, whose records the first one's store holds as a hub would.
    let at_a = lab.cluster(0).store().unwrap();
    at_a.put(
        "cilium/cluster-config/c",
        r#"{"id":3,"capabilities":{"syncedCanaries":true,"cached":true}}"#,
    )
    .await
    .unwrap();
    let (key, claim) = node_record("cache", ("c", 3), "x1", "192.0.2.1", "10.1.1.0");
    at_a.put(&key, claim.to_string()).await.unwrap();
    let (key, honest) = node_record("cache", ("c", 3), "x2", "192.0.2.2", "10.3.2.0");
    at_a.put(&key, honest.to_string()).await.unwrap();
    lab.cluster(1)
        .edit_server_config(|text| {
            let peer_a = text.split("[[peers]]").nth(1).unwrap_or_default();
            let peer_c = peer_a
                .replace("name = \"a\"", "name = \"c\"")
                .replace("/b/remote.", "/a/admin.");
            format!("{text}\n[[peers]]{peer_c}")
        })
        .unwrap();
    let b = lab.cluster_mut(1);
    b.stop_server(nix::sys::signal::Signal::SIGTERM)
        .await
        .unwrap();
    b.restart_server().await.unwrap();
    let b = lab.cluster(1);
    until_peer(b, "c", |peer| peer["nodes"] == 1).await.unwrap();
    until_peer(b, "c", |peer| {
        peer["refusedRecords"] == json!({"overlap": 1})
    })
    .await
    .unwrap();
    let held = at_b.list("cilium/cache/nodes/v1/").await.unwrap();
    let held: Vec<String> = held
        .iter()
        .map(|record| String::from_utf8_lossy(&record.key).into_owned())
        .collect();
    assert_eq!(
        held,
        ["cilium/cache/nodes/v1/a/w1", "cilium/cache/nodes/v1/c/x2"]
    );
    assert_eq!(refused(&lab, "a").await, json!({}));

    // The incumbent lets go: the refused claim is looked at again.
    at_a.delete("cilium/state/nodes/v1/a/w1").await.unwrap();
    until_peer(lab.cluster(1), "c", |peer| {
        peer["nodes"] == 2 && peer["refusedRecords"] == json!({})
    })
    .await
    .unwrap();

    // A cluster id that another peer has.
    at_a.put(
        "cilium/cluster-config/c",
        r#"{"id":1,"capabilities":{"syncedCanaries":true,"cached":true}}"#,
    )
    .await
    .unwrap();
    let seen = until_peer(lab.cluster(1), "c", |peer| peer["state"] == "refused")
        .await
        .unwrap();
    let text = seen["lastError"].as_str().unwrap();
    assert!(
        text.contains("peer c has cluster id 1, which peer a has already"),
        "{text}"
    );
    let incumbent = peer(lab.cluster(1), "a").await.unwrap();
    assert_eq!(incumbent["state"], "synced", "{incumbent}");
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_our_id_or_another_name_is_refused_with_the_remedy_and_its_copy_kept_out() {
    let mut lab = two_servers().await;
    write(&lab, node("w1", 11, "10.1.1.0")).await;
    let at_b = lab.cluster(1).store().unwrap();
    until("the node", || async {
        at_b.get("cilium/cache/nodes/v1/a/w1").await
    })
    .await
    .unwrap();
    let at_a = lab.cluster(0).store().unwrap();
    let config = "cilium/cluster-config/a";
    let good = at_a.get(config).await.unwrap().unwrap();

    at_a.put(
        config,
        r#"{"id":2,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255}}"#,
    )
    .await
    .unwrap();
    let seen = until_peer(lab.cluster(1), "a", |peer| peer["state"] == "refused")
        .await
        .unwrap();
    let text = seen["lastError"].as_str().unwrap();
    assert!(
        text.contains("peer a has cluster id 2, which is this cluster's")
            && text.contains("give every cluster its own id"),
        "{text}"
    );
    // The cluster without the fault works on, and says that it does not have everything.
    lab.cluster(1).apply(&workload("w", "web")).await.unwrap();
    let wait = lab
        .cluster(1)
        .try_cli(&["status", "--wait", "--timeout", "1s"])
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&wait.stderr).into_owned();
    assert!(!wait.status.success() && said.contains("peer a"), "{said}");

    at_a.put(config, good).await.unwrap();
    until_peer(lab.cluster(1), "a", |peer| peer["state"] == "synced")
        .await
        .unwrap();

    // Configured under a name that the other side does not have.
    lab.cluster(1)
        .edit_server_config(|text| text.replace("name = \"a\"", "name = \"other\""))
        .unwrap();
    let b = lab.cluster_mut(1);
    b.stop_server(nix::sys::signal::Signal::SIGTERM)
        .await
        .unwrap();
    b.restart_server().await.unwrap();
    let seen = until_peer(lab.cluster(1), "other", |peer| {
        peer["lastError"] != "" && peer["state"] != "connecting"
    })
    .await
    .unwrap();
    let text = seen["lastError"].as_str().unwrap();
    assert!(
        text.contains("check that the peer's cluster name is really other"),
        "{seen}"
    );
    assert_eq!(seen["state"], "refused");
    assert_eq!(seen["nodes"], 0, "{seen}");
    assert_eq!(lab.remove().await, Vec::<String>::new());
}
