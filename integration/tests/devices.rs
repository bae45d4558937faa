//! WireGuard devices that hang, vanish or are cut off under the agent, and the proof that packets travel encrypted.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clustermesh_integration::lab::host::{run_unchecked, sh};
use clustermesh_integration::lab::node::Node;
use clustermesh_integration::lab::process::Process;
use clustermesh_integration::lab::{Lab, LabConfig};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

/// Longest wait for anything; a device that hangs is replaced within half of it.
const PATIENCE: Duration = Duration::from_secs(90);
/// Longest that a call of the agent may take while a device hangs: far less than such a device is waited for.
const CALL_MAX: Duration = Duration::from_secs(15);

/// Looks until `look` gives a value.
async fn until<T, F: Future<Output = Result<Option<T>>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        let seen = look().await;
        if let Ok(Some(value)) = seen {
            return Ok(value);
        }
        if begun.elapsed() > PATIENCE {
            seen.with_context(|| format!("waited for: {what}"))?;
            bail!("waited {PATIENCE:?} for: {what}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn one_cluster(encryption: &'static str) -> Lab {
    let config = LabConfig {
        clusters: vec!["a".to_owned()],
        encryption,
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.start().await.unwrap();
    lab
}

/// `clustermesh encryption status --verify`: whether it passed, and what it said.
async fn verify(node: &Node) -> Result<(bool, Value)> {
    let mut command = node.command(&node.binaries().join("clustermesh"));
    command.args(["encryption", "status", "--verify", "-o", "json", "--socket"]);
    let output = run_unchecked(command.arg(node.socket())).await?;
    Ok((
        output.status.success(),
        serde_json::from_slice(&output.stdout)?,
    ))
}

/// Waits until the node knows so many others, and has proved that packets to all of them travel as they should.
async fn until_proved(node: &Node, others: usize) -> Value {
    let wait = until("every other node proved", || async {
        let (has_passed, report) = verify(node).await?;
        let known = report["nodes"].as_array().map_or(0, Vec::len);
        Ok((has_passed && known == others).then_some(report))
    });
    match wait.await {
        Ok(report) => report,
        Err(error) => panic!("{error:#}: {:?}", verify(node).await),
    }
}

/// What the agent says of its node's devices.
async fn devices(node: &Node) -> Result<Vec<Value>> {
    let status = node.encryption_status().await?;
    Ok(status["devices"].as_array().cloned().unwrap_or_default())
}

async fn until_fault(node: &Node, word: &str) {
    let wait = until("a fault", || async {
        let status = node.encryption_status().await?;
        let fault = status["fault"].as_str().unwrap_or_default().to_owned();
        let is_there = if word.is_empty() {
            fault.is_empty()
        } else {
            fault.contains(word)
        };
        Ok(is_there.then_some(()))
    });
    if let Err(error) = wait.await {
        panic!(
            "{error:#}: {word:?} in {:#}",
            node.encryption_status().await.unwrap()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_hangs_is_a_fault_with_a_remedy_and_hangs_nothing_else() {
    let lab = one_cluster("mode = \"all\"\nstrict = true").await;
    let node = lab.cluster(0).node(0);
    until_proved(node, 1).await;
    let device = node.wireguard_pid().unwrap();
    kill(device, Signal::SIGSTOP).unwrap();
    until_fault(node, "gives no answer").await;
    for _ in 0..5 {
        let begun = Instant::now();
        node.agent_status().await.unwrap();
        node.encryption_status().await.unwrap();
        assert!(begun.elapsed() < CALL_MAX, "{:?}", begun.elapsed());
    }
    kill(device, Signal::SIGCONT).unwrap();
    until_fault(node, "").await;
    until_proved(node, 1).await;
    assert_eq!(
        node.wireguard_pid().unwrap(),
        device,
        "it goes on by itself"
    );
    // One that does not come back is replaced.
    kill(device, Signal::SIGSTOP).unwrap();
    until_fault(node, "gives no answer").await;
    until("another device", || async {
        let pid = node.wireguard_pid();
        Ok(pid.is_ok_and(|pid| pid != device).then_some(()))
    })
    .await
    .unwrap();
    until_fault(node, "").await;
    until_proved(node, 1).await;
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_starts_over_a_device_that_hangs() {
    let mut lab = one_cluster("mode = \"all\"").await;
    let node = lab.cluster(0).node(0);
    until_proved(node, 1).await;
    let device = node.wireguard_pid().unwrap();
    kill(device, Signal::SIGSTOP).unwrap();
    let node = lab.cluster_mut(0).node_mut(0);
    node.stop_agent(Signal::SIGKILL).await.unwrap();
    node.start_agent().await.unwrap();
    assert_ne!(node.wireguard_pid().unwrap(), device);
    until_proved(lab.cluster(0).node(0), 1).await;
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

/// Holds a UDP port, as soon as nobody else does.
const HOLD_PORT: &str = "import socket,time\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\nwhile True:\n try:\n  \
                         s.bind(('',51872))\n  break\n except OSError: time.sleep(0.05)\n\
                         print('held',flush=True)\ntime.sleep(600)";

#[tokio::test(flavor = "multi_thread")]
async fn a_next_key_whose_device_is_not_to_be_had_at_a_start_is_kept_until_it_is() {
    let mut lab = one_cluster("mode = \"all\"\nstrict = true").await;
    until_proved(lab.cluster(0).node(0), 1).await;
    // Nobody follows: the change stays in its middle.
    let other = lab.cluster_mut(0).node_mut(1);
    other.stop_agent(Signal::SIGKILL).await.unwrap();
    let node = lab.cluster(0).node(0);
    node.rotate_keys().await.unwrap();
    let next = until("a device for the next key", || async {
        let devices = devices(node).await?;
        Ok(devices.get(1).map(|device| device["public_key"].clone()))
    })
    .await
    .unwrap();
    let node = lab.cluster_mut(0).node_mut(0);
    node.stop_agent(Signal::SIGKILL).await.unwrap();
    sh("ip", &["-n", node.netns(), "link", "del", "cm_wg1"])
        .await
        .unwrap();
    let mut command = node.command(Path::new("python3"));
    let log = node.folder().join("hold.log");
    let holder = Process::start("holder", command.args(["-c", HOLD_PORT]), &log).unwrap();
    until("the port is held", || async {
        Ok(holder.log_tail().contains("held").then_some(()))
    })
    .await
    .unwrap();
    node.start_agent().await.unwrap();
    until_fault(node, "the device of the next key").await;
    assert_eq!(devices(node).await.unwrap().len(), 1);
    holder.stop(Signal::SIGKILL).await.unwrap();
    until("the device of the same key", || async {
        let devices = devices(node).await?;
        let held = devices.get(1).map(|device| &device["public_key"]);
        Ok((held == Some(&next)).then_some(()))
    })
    .await
    .unwrap();
    until_fault(node, "").await;
    let other = lab.cluster_mut(0).node_mut(1);
    other.start_agent().await.unwrap();
    let node = lab.cluster(0).node(0);
    until("the change ends", || async {
        let devices = devices(node).await?;
        Ok((devices.len() == 1 && devices[0]["public_key"] == next).then_some(()))
    })
    .await
    .unwrap();
    until_proved(node, 1).await;
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_is_removed_is_made_again() {
    let lab = one_cluster("mode = \"all\"\nstrict = true").await;
    let node = lab.cluster(0).node(0);
    until_proved(node, 1).await;
    let device = node.wireguard_pid().unwrap();
    sh("ip", &["-n", node.netns(), "link", "del", "cm_wg0"])
        .await
        .unwrap();
    until("another device", || async {
        let pid = node.wireguard_pid();
        Ok(pid.is_ok_and(|pid| pid != device).then_some(()))
    })
    .await
    .unwrap();
    until_proved(node, 1).await;
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_names_who_is_not_reached_and_who_is_exempt() {
    let config = LabConfig {
        encryption: "mode = \"all\"\nclusters = { b = \"off\" }",
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.start().await.unwrap();
    let node = lab.cluster(0).node(0);
    let report = until_proved(node, 3).await;
    let counts = (&report["encrypted"], &report["exempt"], &report["failed"]);
    assert_eq!(
        counts,
        (&Value::from(1), &Value::from(2), &Value::from(0)),
        "{report:#}"
    );
    // What the cluster's status says of it.
    until("the node's report at the server", || async {
        let text = lab.cluster(0).run_cli(&["status", "-o", "json"]).await?;
        let status: Value = serde_json::from_str(&text)?;
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        let told = nodes.iter().find(|told| told["name"] == node.name());
        let told = told
            .map(|told| told["encryption"].clone())
            .unwrap_or_default();
        let is_right = told["backend"] == report_backend(node).await?
            && told["encrypted"] == 1
            && told["clear"] == 2;
        Ok(is_right.then_some(()))
    })
    .await
    .unwrap();
    // A firewall comes up on the other node.
    let other = lab.cluster(0).node(1);
    let rules = "add table inet cut; add chain inet cut in { type filter hook input priority 0; }; \
                 add rule inet cut in udp dport 51871 drop";
    sh("ip", &["netns", "exec", other.netns(), "nft", rules])
        .await
        .unwrap();
    let (has_passed, report) = verify(node).await.unwrap();
    assert!(!has_passed, "{report:#}");
    let failed = report["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["result"] == "failed");
    let failed = failed.unwrap();
    assert_eq!(failed["node"], other.name());
    let problem = failed["problem"].as_str().unwrap();
    assert!(problem.contains("no answer came"), "{problem}");
    sh(
        "ip",
        &[
            "netns",
            "exec",
            other.netns(),
            "nft",
            "delete table inet cut",
        ],
    )
    .await
    .unwrap();
    until_proved(node, 3).await;
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

async fn report_backend(node: &Node) -> Result<Value> {
    Ok(node.encryption_status().await?["devices"][0]["backend"].clone())
}
