//! Convergence is not the agents' word: another program reads the maps of every node.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::net::IpAddr;
use std::path::PathBuf;

use clustermesh_ebpf_abi::FrontendKey;
use clustermesh_integration::lab::{Lab, LabConfig};
use clustermesh_integration::scenario::{
    Dice, NAMESPACE, bpftool_lookup, ipcache_identity, map_address, until, workload,
};
use nix::sys::signal::Signal;

/// Random changes, each looked for on every node.
const CHANGES: usize = 100;
/// Labels that a workload changes between.
const APPS: u64 = 8;
/// Longest that one change may take to be applied everywhere.
const CONVERGED_SECONDS_MAX: u32 = 20;
/// IP protocol number of TCP.
const TCP: u8 = 6;

fn service(name: &str, port: u64, target: u64) -> String {
    format!(
        "apiVersion: clustermesh.io/v1\nkind: Service\nmetadata:\n  namespace: {NAMESPACE}\n  name: {name}\n  annotations:\n    service.cilium.io/global: \"true\"\nspec:\n  selector:\n    app: none\n  ports:\n    - name: http\n      protocol: TCP\n      port: {port}\n      targetPort: {target}\n---\n"
    )
}

fn frontend(address: IpAddr, port: u64) -> Vec<u8> {
    let key = FrontendKey {
        address: map_address(address),
        port_be: u16::try_from(port).unwrap().to_be_bytes(),
        protocol: TCP,
        reserved: 0,
    };
    let mut bytes = key.address.to_vec();
    bytes.extend_from_slice(&key.port_be);
    bytes.extend_from_slice(&[key.protocol, key.reserved]);
    assert_eq!(bytes.len(), size_of::<FrontendKey>());
    bytes
}

fn map_folders(lab: &Lab, cluster: usize) -> Vec<PathBuf> {
    lab.cluster(cluster)
        .nodes()
        .iter()
        .map(clustermesh_integration::lab::node::Node::bpffs)
        .collect()
}

async fn lab_with_pods() -> (Lab, Vec<clustermesh_integration::lab::pod::Pod>) {
    let mut lab = Lab::build(LabConfig::two_by_two().unwrap()).await.unwrap();
    lab.start().await.unwrap();
    let a = lab.cluster(0);
    let mut pods = Vec::new();
    for (name, node) in [("w-1", 0), ("w-2", 1)] {
        a.apply(&workload(name, "app-0")).await.unwrap();
        pods.push(a.node(node).add_pod(NAMESPACE, name).await.unwrap());
    }
    for cluster in lab.clusters() {
        cluster.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    }
    (lab, pods)
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_wait_returns_every_nodes_maps_hold_each_of_100_random_changes() {
    let (lab, pods) = lab_with_pods().await;
    let (a, b) = (lab.cluster(0), lab.cluster(1));
    let mut dice = Dice::default();
    b.apply(&service("s", 80, 8080)).await.unwrap();
    let address: IpAddr = b
        .service_address(NAMESPACE, "s", false)
        .await
        .unwrap()
        .parse()
        .unwrap();
    let mut port = 80;
    let mut seen_identities = std::collections::BTreeSet::new();
    for change in 0..CHANGES {
        if dice.below(3) == 0 {
            // A service of cluster b gets another port.
            let old = port;
            while port == old {
                port = 80 + dice.below(1_000);
            }
            b.apply(&service("s", port, 8080)).await.unwrap();
            b.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
            for bpffs in map_folders(&lab, 1) {
                let new = bpftool_lookup(&bpffs, "frontends", &frontend(address, port)).await;
                let gone = bpftool_lookup(&bpffs, "frontends", &frontend(address, old)).await;
                assert!(
                    new.unwrap().is_some() && gone.unwrap().is_none(),
                    "change {change}: port {old} to {port} in {}",
                    bpffs.display()
                );
            }
            continue;
        }
        // A workload of cluster a gets other labels, so its pod gets another identity.
        let pod = &pods[usize::try_from(dice.below(2)).unwrap()];
        let app = format!("app-{}", dice.below(APPS));
        a.apply(&workload(pod.name(), &app)).await.unwrap();
        let identity = a.workload_identity(NAMESPACE, pod.name()).await.unwrap();
        seen_identities.insert(identity);
        b.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
        for bpffs in map_folders(&lab, 1) {
            for v6 in [false, true] {
                let address = pod.address(v6).unwrap().parse().unwrap();
                let held = ipcache_identity(&bpffs, address).await.unwrap();
                assert_eq!(
                    held.map(u64::from),
                    Some(identity),
                    "change {change}: {app} at {address} in {}",
                    bpffs.display()
                );
            }
        }
    }
    assert!(seen_identities.len() > 2, "{seen_identities:?}");
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_stands_still_is_named_and_never_counts_until_it_goes_on() {
    let (lab, pods) = lab_with_pods().await;
    let (a, b) = (lab.cluster(0), lab.cluster(1));
    let pod = &pods[0];
    let address: IpAddr = pod.address(false).unwrap().parse().unwrap();
    let before = a.workload_identity(NAMESPACE, pod.name()).await.unwrap();
    b.node(1).agent().unwrap().signal(Signal::SIGSTOP).unwrap();

    a.apply(&workload(pod.name(), "moved")).await.unwrap();
    let after = a.workload_identity(NAMESPACE, pod.name()).await.unwrap();
    assert_ne!(before, after);
    let wait = b
        .try_cli(&["status", "--wait", "--timeout", "3s"])
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&wait.stderr).into_owned();
    assert!(!wait.status.success(), "{said}");
    assert!(said.contains("applied on 1 of 2 nodes; n2: "), "{said}");
    // What it says is so: the other node has the change, this one has not.
    let held = |index: usize| ipcache_identity_of(&lab, index, address);
    assert_eq!(held(0).await, Some(after));
    assert_eq!(held(1).await, Some(before));
    let status = b.status().await.unwrap();
    let nodes = status["nodes"].as_array().unwrap();
    let behind = |name: &str| {
        nodes
            .iter()
            .find(|node| node["name"] == name)
            .map(|node| node["applied"]["a"]["behind"].clone())
    };
    assert_eq!(behind("n1"), Some(serde_json::json!(0)), "{status}");
    assert_ne!(behind("n2"), Some(serde_json::json!(0)), "{status}");

    b.node(1).agent().unwrap().signal(Signal::SIGCONT).unwrap();
    b.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    assert_eq!(held(1).await, Some(after));
    until("the agent's session", || async {
        let status = b.status().await?;
        let nodes = status["nodes"].as_array().into_iter().flatten();
        Ok(nodes
            .clone()
            .all(|node| node["state"] == "connected")
            .then_some(()))
    })
    .await
    .unwrap();
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

async fn ipcache_identity_of(lab: &Lab, node: usize, address: IpAddr) -> Option<u64> {
    let bpffs = lab.cluster(1).node(node).bpffs();
    ipcache_identity(&bpffs, address)
        .await
        .unwrap()
        .map(u64::from)
}
