//! The demo: the main job on one machine, row by row, each a real check with its figure.

mod connectivity;
mod continuity;
mod encryption;
mod identity;
pub mod report;
mod scene;
mod services;
mod setup;
mod wan;

use std::time::Instant;

use anyhow::Result;

pub use report::{Measured, Row};
pub use scene::{BACKEND_PORT, PODS, Sabotage, Scene};

use crate::lab::{Lab, LabConfig};

/// One row: its name, its statement, how it is checked.
type Check =
    for<'a> fn(&'a mut Scene) -> std::pin::Pin<Box<dyn Future<Output = Result<Measured>> + 'a>>;

macro_rules! rows {
    ($($id:literal, $text:literal => $check:path;)*) => {
        &[$(($id, $text, {
            fn boxed(scene: &mut Scene) -> std::pin::Pin<Box<dyn Future<Output = Result<Measured>> + '_>> {
                Box::pin($check(scene))
            }
            boxed as Check
        })),*]
    };
}

/// All rows, in the order in which they are checked.
const ROWS: &[(&str, &str, Check)] = rows! {
    "up", "two clusters of two nodes up, every node has applied every cluster" => setup::up;
    "attach", "pods attached through the CNI plugin" => setup::attach;
    "host-to-pod", "host to pod, IPv4 and IPv6, ping and TCP" => connectivity::host_to_pod;
    "pod-same-node", "pod to pod on one node, IPv4 and IPv6, ping and TCP" => connectivity::same_node;
    "pod-across-nodes", "pod to pod across nodes, IPv4 and IPv6, ping and TCP" => connectivity::across_nodes;
    "pod-across-clusters", "pod to pod across clusters, IPv4 and IPv6, ping and TCP" => connectivity::across_clusters;
    "encrypted", "all of it encrypted between machines, by what the wire shows" => encryption::wire;
    "encrypted-stream", "one TCP stream, encrypted" => encryption::throughput;
    "identity", "identity of the sender, as the receiving program recorded it" => identity::sender;
    "forged-identity", "a forged VNI is dropped and counted" => identity::forged_vni;
    "forged-source", "a forged source is dropped and counted" => identity::forged_source;
    "global-service", "global service reached from both clusters, spread over both" => services::spread;
    "failover-cni-del", "affinity=local fails over: backend's pod deleted" => services::failover_pod_deleted;
    "failover-killed", "affinity=local fails over: backend's process killed" => services::failover_process_killed;
    "failover-closed", "affinity=local fails over: backend's listener closed" => services::failover_listener_closed;
    "wan-cut", "WAN cut: nothing lost inside a cluster, no record deleted" => wan::cut;
    "wan-healed", "WAN healed: converged again" => wan::healed;
    "agent-sigterm", "agent stopped by SIGTERM and started under traffic" => continuity::agent_terminated;
    "agent-sigkill", "agent killed with -9 and started under traffic" => continuity::agent_killed;
    "agent-layout", "agent replaced by a build with another map layout under traffic" => continuity::agent_replaced;
    "server-killed", "server killed and restarted: nothing lost, watches resume" => continuity::server_killed;
};

/// Names of all rows.
pub fn row_ids() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|(id, _, _)| *id)
}

/// Runs every row on a fresh lab, or those up to `until`: each stands on what the ones before it have set up.
/// `progress` is told before each.
///
/// A row that fails does not keep the later ones from being checked.
///
/// # Errors
/// When the lab cannot be built or started at all.
pub async fn run(
    config: LabConfig,
    sabotage: Sabotage,
    until: Option<&str>,
    progress: impl Fn(&str),
) -> Result<(Scene, Vec<Row>)> {
    progress("building two clusters of two nodes");
    let begun = Instant::now();
    let lab = Lab::build(config).await?;
    let mut scene = Scene::new(lab, sabotage, begun);
    if let Err(error) = scene.lab.start().await {
        scene.lab.remove().await;
        return Err(error);
    }
    let mut rows = Vec::with_capacity(ROWS.len());
    for (id, text, check) in ROWS {
        progress(text);
        rows.push(Row::new(id, text, check(&mut scene).await));
        if until == Some(*id) {
            break;
        }
    }
    Ok((scene, rows))
}
