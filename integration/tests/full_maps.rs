//! Maps without room for more: what does not fit is named and counted, nothing else notices, and it goes in later.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use clustermesh_api::etcd::rpc::PutRequest;
use clustermesh_api::limits::{MAX_ADDRESSES_PER_NODE, MAX_PORTS_PER_SERVICE};
use clustermesh_ebpf::Maps;
use clustermesh_ebpf_abi::{FRONTENDS_MAX, FrontendKey, FrontendValue, NODES_MAX};
use clustermesh_integration::lab::Lab;
use clustermesh_integration::lab::cluster::Cluster;
use clustermesh_integration::lab::host::run;
use clustermesh_integration::scenario::{
    NAMESPACE, bpftool_lookup, map_address, one_cluster, until, workload,
};
use serde_json::{Value, json};

/// Maps of thousands of entries are read and cleared meanwhile.
const CONVERGED_SECONDS_MAX: u32 = 60;

async fn refused(cluster: &Cluster) -> Value {
    let status = cluster.status().await.unwrap();
    status["nodes"][0]["refusedRecords"].clone()
}

/// Once the one agent holds what its store has now. The other nodes on record have none, so nobody can wait for them.
async fn until_applied(cluster: &Cluster) {
    let wanted = cluster.revision().await.unwrap();
    until("the agent has applied it", || async {
        let status = cluster.status().await?;
        let applied = &status["nodes"][0]["applied"]["a"]["revision"];
        Ok((applied.as_i64() >= Some(wanted)).then_some(()))
    })
    .await
    .unwrap();
}

async fn until_refused(cluster: &Cluster) {
    until("the refusal is counted", || async {
        let refused = refused(cluster).await["map-full"].as_u64();
        Ok(refused.filter(|count| *count > 0))
    })
    .await
    .unwrap();
}

fn log(cluster: &Cluster) -> String {
    std::fs::read_to_string(cluster.node(0).agent().unwrap().log()).unwrap()
}

/// Pods come and go all the same.
async fn pods_come_and_talk(cluster: &Cluster) {
    for name in ["near", "far"] {
        cluster.apply(&workload(name, "web")).await.unwrap();
    }
    let near = cluster.node(0).add_pod(NAMESPACE, "near").await.unwrap();
    let far = cluster.node(0).add_pod(NAMESPACE, "far").await.unwrap();
    near.ping(far.address(false).unwrap()).await.unwrap();
}

/// Frontends that an agent puts into the map: the rest is room for what changes.
const FRONTENDS_WANTED_MAX: usize = FRONTENDS_MAX as usize / 8 * 7;
/// Each port of a service counts once in each family.
const FRONTENDS_PER_SERVICE: usize = 2 * MAX_PORTS_PER_SERVICE;

fn big_services(count: usize) -> Vec<String> {
    let ports: String = (1..=MAX_PORTS_PER_SERVICE)
        .map(|port| format!("    - {{name: p{port}, protocol: TCP, port: {port}}}\n"))
        .collect();
    let service = |number: usize| {
        format!(
            "apiVersion: clustermesh.io/v1\nkind: Service\nmetadata:\n  namespace: {NAMESPACE}\n  name: s{number}\nspec:\n  selector:\n    app: none\n  ports:\n{ports}---\n"
        )
    };
    let all: Vec<String> = (0..count).map(service).collect();
    all.chunks(50).map(<[String]>::concat).collect()
}

async fn holds_first_port(lab: &Lab, name: &str) -> bool {
    let address = lab.cluster(0).service_address(NAMESPACE, name, false).await;
    let address: IpAddr = address.unwrap().parse().unwrap();
    let mut key = map_address(address).to_vec();
    // Port 1, TCP.
    key.extend_from_slice(&[0, 1, 6, 0]);
    let bpffs = lab.cluster(0).node(0).bpffs();
    let held = bpftool_lookup(&bpffs, "frontends", &key).await.unwrap();
    held.is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn services_beyond_the_map_are_named_counted_and_taken_when_there_is_room() {
    let lab = one_cluster(1).await.unwrap();
    let a = lab.cluster(0);
    let fitting = FRONTENDS_WANTED_MAX / FRONTENDS_PER_SERVICE;
    for batch in big_services(fitting) {
        a.apply(&batch).await.unwrap();
    }
    a.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    assert_eq!(refused(a).await, json!({}));
    let late = big_services(1).concat().replace("name: s0", "name: late");
    a.apply(&late).await.unwrap();
    a.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    until_refused(a).await;
    let log = std::fs::read_to_string(a.node(0).agent().unwrap().log()).unwrap();
    assert!(
        log.contains("service shop/late")
            && log.contains(&format!("the maps take {FRONTENDS_WANTED_MAX} frontends")),
        "{log}"
    );
    assert!(!holds_first_port(&lab, "late").await);
    assert!(holds_first_port(&lab, "s0").await);

    pods_come_and_talk(a).await;

    // One service less: the refused one has its room, without being touched.
    a.run_cli(&["delete", "service", "shop/s7"]).await.unwrap();
    a.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    assert!(holds_first_port(&lab, "late").await);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

/// Addresses of nodes that an agent puts into the map.
const NODE_ADDRESSES_WANTED_MAX: usize = NODES_MAX as usize / 8 * 7;
/// Nodes that together have a few addresses more.
const NODES: usize = NODE_ADDRESSES_WANTED_MAX / MAX_ADDRESSES_PER_NODE + 4;

fn node_address(node: usize, place: usize) -> Ipv4Addr {
    let first = u32::from(Ipv4Addr::new(100, 64, 0, 0));
    Ipv4Addr::from(first + u32::try_from(node * MAX_ADDRESSES_PER_NODE + place).unwrap())
}

/// A node with as many addresses as a record may have; its name has five digits.
fn node_with_many_addresses(node: usize) -> PutRequest {
    let addresses: Vec<Value> = (0..MAX_ADDRESSES_PER_NODE)
        .map(|place| json!({"Type": "InternalIP", "IP": node_address(node, place)}))
        .collect();
    let record = json!({
        "Name": format!("w{node:05}"), "Cluster": "a", "ClusterID": 1, "IPAddresses": addresses,
        "Source": "custom-resource",
    });
    PutRequest {
        key: format!("cilium/state/nodes/v1/a/w{node:05}").into(),
        value: record.to_string().into(),
        ..PutRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_of_nodes_beyond_the_map_are_named_counted_and_taken_when_there_is_room() {
    let lab = one_cluster(1).await.unwrap();
    let a = lab.cluster(0);
    let store = a.store().unwrap();
    store
        .call(|client| async move {
            for node in 0..NODES {
                client.put(node_with_many_addresses(node)).await?;
            }
            Ok(())
        })
        .await
        .unwrap();
    until_applied(a).await;
    until_refused(a).await;
    let log = log(a);
    assert!(
        log.contains("node address 100.") && log.contains(" of node a/w0"),
        "{log}"
    );
    let maps = Maps::open_pinned(&a.node(0).bpffs()).unwrap();
    let held = || -> HashSet<_> {
        let entries = maps.node_addresses.entries().unwrap();
        entries.into_iter().map(|(address, _)| address).collect()
    };
    let before = held();
    assert_eq!(before.len(), NODE_ADDRESSES_WANTED_MAX);
    // A node is known by its first address before another is by its second.
    let end = |node| map_address(node_address(node, 0).into());
    assert!((0..NODES).all(|node| before.contains(&end(node))));
    pods_come_and_talk(a).await;

    // Five nodes less: there is room for all addresses of the others, none of which was touched.
    for node in 0..5 {
        let key = format!("cilium/state/nodes/v1/a/w{node:05}");
        store.delete(&key).await.unwrap();
    }
    until_applied(a).await;
    let after = held();
    let missing = (5..NODES)
        .flat_map(|node| (0..MAX_ADDRESSES_PER_NODE).map(move |place| node_address(node, place)))
        .filter(|address| !after.contains(&map_address((*address).into())))
        .count();
    assert_eq!((missing, after.contains(&end(0))), (0, false));
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

/// A frontend that no agent has made.
fn foreign_frontend(number: u32) -> (FrontendKey, FrontendValue) {
    let mut address = map_address(Ipv4Addr::UNSPECIFIED.into());
    address[12..].copy_from_slice(&number.to_be_bytes());
    let key = FrontendKey {
        address,
        port_be: [0, 1],
        protocol: 6,
        reserved: 0,
    };
    let value = FrontendValue {
        list_id: 0,
        backend_count: 0,
        flags: 0,
    };
    (key, value)
}

async fn map_failures(lab: &Lab, map: &str) -> f64 {
    let node = lab.cluster(0).node(0);
    let mut command = node.command(Path::new("curl"));
    let output = run(command.args(["-sf", "http://127.0.0.1:9964/metrics"]))
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .filter(|line| line.contains("map_failures") && line.contains(&format!("\"{map}\"")))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_that_somebody_else_has_filled_is_named_counted_and_cleared() {
    let lab = one_cluster(1).await.unwrap();
    let a = lab.cluster(0);
    // Before, what the kernel has counts as an earlier store's; and while the node is not on record a wait is for nobody.
    until_applied(a).await;
    let bpffs = a.node(0).bpffs();
    let maps = Maps::open_pinned(&bpffs).unwrap();
    let held = u32::try_from(maps.frontends.entries().unwrap().len()).unwrap();
    let foreign: Vec<_> = (0..FRONTENDS_MAX - held).map(foreign_frontend).collect();
    maps.frontends.upsert(&foreign).unwrap();

    let web = big_services(1).concat().replace("name: s0", "name: web");
    a.apply(&web).await.unwrap();
    until("the failure is counted", || async {
        Ok((map_failures(&lab, "frontends").await > 0.0).then_some(()))
    })
    .await
    .unwrap();
    a.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    let said = format!("the map frontends is full: it holds {FRONTENDS_MAX} entries at most");
    assert!(log(a).contains(&said), "{}", log(a));
    assert!(holds_first_port(&lab, "web").await);
    let left = maps.frontends.entries().unwrap();
    assert_eq!(left.len(), FRONTENDS_PER_SERVICE);
    pods_come_and_talk(a).await;
    assert_eq!(lab.remove().await, Vec::<String>::new());
}
