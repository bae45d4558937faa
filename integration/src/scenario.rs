//! What the scenario tests share: bounded waiting, manifests, records written by hand.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::lab::cluster::Cluster;

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
