//! What the scenario tests share: bounded waiting, manifests, records written by hand.

pub mod encrypted;

use std::future::Future;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clustermesh_ebpf_abi::{
    Address, IPCACHE_PREFIX_BASE_BITS, LAYOUT_VERSION, SHARED_ADDRESS_SPACE, v4_mapped,
};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::lab::cluster::Cluster;
use crate::lab::host::run_unchecked;
use crate::lab::{Lab, LabConfig};

/// Namespace of everything in the scenarios.
pub const NAMESPACE: &str = "shop";
/// Longest that anything which the tests wait for may take.
pub const WAIT_SECONDS_MAX: u64 = 20;
/// Pause between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(25);

/// Looks until `look` gives a value, at most [`WAIT_SECONDS_MAX`].
///
/// # Errors
/// The last error of `look`, or that `what` did not happen.
pub async fn until<T, F>(what: &str, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let begun = Instant::now();
    loop {
        let seen = look().await;
        if let Ok(Some(value)) = seen {
            return Ok(value);
        }
        if begun.elapsed() > Duration::from_secs(WAIT_SECONDS_MAX) {
            return match seen {
                Err(error) => Err(error.context(format!("waited for: {what}"))),
                _ => bail!("after {WAIT_SECONDS_MAX} s still not: {what}"),
            };
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// One cluster of two nodes, of which the first `agents` run their agents.
///
/// # Errors
/// When the lab cannot be built or started.
pub async fn one_cluster(agents: usize) -> Result<Lab> {
    let config = LabConfig {
        clusters: vec!["a".to_owned()],
        agents_per_cluster: agents,
        ..LabConfig::two_by_two()?
    };
    let mut lab = Lab::build(config).await?;
    lab.start().await?;
    Ok(lab)
}

/// What `cluster` says of its peer `name`.
///
/// # Errors
/// When the cluster does not answer or has no such peer.
pub async fn peer(cluster: &Cluster, name: &str) -> Result<Value> {
    let status = cluster.status().await?;
    status["peers"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|peer| peer["cluster"] == name)
        .cloned()
        .with_context(|| format!("no peer {name} in {status}"))
}

/// Waits until what `cluster` says of its peer `name` is as wanted.
///
/// # Errors
/// When that does not happen in time; the message has what it said last.
pub async fn until_peer(
    cluster: &Cluster,
    name: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let seen = until("the peer's state", || async {
        let peer = peer(cluster, name).await?;
        Ok(wanted(&peer).then_some(peer))
    })
    .await;
    match seen {
        Ok(peer) => Ok(peer),
        Err(error) => Err(error.context(peer(cluster, name).await?.to_string())),
    }
}

/// A manifest of a workload with one label.
#[must_use]
pub fn workload(name: &str, app: &str) -> String {
    format!(
        "apiVersion: clustermesh.io/v1\nkind: Workload\nmetadata:\n  namespace: {NAMESPACE}\n  name: {name}\n  labels:\n    app: {app}\n---\n"
    )
}

/// A node record as its key and value: one IPv4 underlay address, one IPv4 pod CIDR of 24 bits.
#[must_use]
pub fn node_record(
    tree: &str,
    cluster: (&str, u32),
    name: &str,
    address: &str,
    pod_network: &str,
) -> (String, Value) {
    (
        format!("cilium/{tree}/nodes/v1/{}/{name}", cluster.0),
        json!({
            "Name": name, "Cluster": cluster.0, "ClusterID": cluster.1,
            "IPAddresses": [{"Type": "InternalIP", "IP": address}],
            "IPv4AllocCIDR": {"IP": pod_network, "Mask": "////AA=="},
            "Source": "custom-resource",
        }),
    )
}

/// An address record as its key and value, in the tree of the cluster that owns it.
#[must_use]
pub fn ip_record(address: &str, identity: u32, host: &str, pod: &str) -> (String, Value) {
    (
        format!("cilium/state/ip/v1/default/{address}"),
        json!({
            "IP": address, "Mask": null, "HostIP": host, "ID": identity, "Key": 0, "Metadata": "",
            "K8sNamespace": NAMESPACE, "K8sPodName": pod,
        }),
    )
}

/// Numbers that differ from run to run; the seed is printed, so that a failure can be repeated.
#[derive(Debug)]
pub struct Dice(u64);

impl Default for Dice {
    fn default() -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = now.map_or(1, |now| now.as_secs() | 1);
        println!("seed {seed}");
        Self(seed)
    }
}

impl Dice {
    /// A number below `limit` (xorshift64*; Vigna, 2016).
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit.max(1)
    }
}

/// Looks up a key in a pinned map with `bpftool`, a program that is not ours; `None`: no such key.
///
/// # Errors
/// When `bpftool` cannot be run or prints something else.
pub async fn bpftool_lookup(bpffs: &Path, map: &str, key: &[u8]) -> Result<Option<Vec<u8>>> {
    let pin = bpffs
        .join("clustermesh")
        .join(format!("{map}_v{LAYOUT_VERSION}"));
    let mut command = Command::new("bpftool");
    command
        .args(["-j", "map", "lookup", "pinned"])
        .arg(&pin)
        .args(["key", "hex"])
        .args(key.iter().map(|byte| format!("{byte:02x}")));
    let output = run_unchecked(&mut command).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let answer: Value = serde_json::from_str(&text)
        .with_context(|| format!("bpftool: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
    let Some(bytes) = answer["value"].as_array() else {
        return Ok(None);
    };
    bytes
        .iter()
        .map(|byte| {
            let text = byte.as_str().context("bpftool: a byte that is no text")?;
            Ok(u8::from_str_radix(text.trim_start_matches("0x"), 16)?)
        })
        .collect::<Result<Vec<u8>>>()
        .map(Some)
}

/// An address as the maps hold it.
#[must_use]
pub fn map_address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => v4_mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The identity of a single address in the ipcache that is pinned below `bpffs`.
///
/// # Errors
/// As [`bpftool_lookup`].
pub async fn ipcache_identity(bpffs: &Path, address: IpAddr) -> Result<Option<u32>> {
    let mut key = (IPCACHE_PREFIX_BASE_BITS + 128).to_ne_bytes().to_vec();
    key.extend_from_slice(&SHARED_ADDRESS_SPACE.to_be_bytes());
    key.extend_from_slice(&[0; 2]);
    key.extend_from_slice(&map_address(address));
    let value = bpftool_lookup(bpffs, "ipcache", &key).await?;
    Ok(value.and_then(|value| Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?))))
}
