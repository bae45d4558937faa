//! `status`: the cluster, its peers and nodes, and what every node's kernel holds; and waiting for it.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, bail};
use clustermesh_api::v1::{
    MeshStatusResponse, NodeStatus, PeerStatus, WaitProgress, node_status, peer_status,
};
use clustermesh_client::{Client, Messages};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    args::{GlobalArgs, Output, StatusArgs},
    connect::connect,
    output::{self, NONE, Table},
    replicas,
};

/// The server ends the wait itself; this much later we no longer believe that it will.
const WAIT_GRACE: Duration = Duration::from_secs(5);
/// Above everything that a replica says without a quorum.
const NO_QUORUM: &str =
    "NO QUORUM: nothing can be changed, and this is what the replica that answered knew last.\n\n";
/// Laggards that are named one by one.
const MAX_LAGGARDS_SHOWN: usize = 10;

pub async fn run(global: &GlobalArgs, args: &StatusArgs) -> Result<()> {
    let client = connect(global).await?;
    if args.wait {
        wait(&client, args.timeout).await?;
    }
    let (replicas, status) =
        tokio::join!(replicas::ask(global, &client), client.known_mesh_status());
    let (replicas, mut quorum) = replicas?;
    let (status, failed) = match status {
        Ok(status) => (Some(status), None),
        // A plain store is no cluster of a mesh.
        Err(error) if error.is_unimplemented() => (None, None),
        // A server of an older release knows nothing of the cluster without a quorum.
        Err(error) if error.is_transient() => (None, Some(error)),
        Err(error) => return Err(error.into()),
    };
    quorum &= !status.as_ref().is_some_and(|status| status.stale);
    match global.output {
        Output::Json => {
            let mut value = status.as_ref().map_or_else(|| json!({}), to_json);
            if let Some(value) = value.as_object_mut() {
                value.insert("quorum".to_owned(), quorum.into());
                value.insert("replicas".to_owned(), replicas::to_json(&replicas).into());
            }
            output::json(&value)?;
        }
        Output::Table => {
            let cluster = status.as_ref().map_or_else(String::new, to_text);
            let replicas = indent(&replicas::table(&replicas).render());
            let gap = if cluster.is_empty() { "" } else { "\n" };
            let remark = if quorum { "" } else { NO_QUORUM };
            output::print(&format!("{remark}{cluster}{gap}Replicas\n{replicas}"))?;
        }
    }
    if let Some(error) = failed {
        return Err(error.into());
    }
    if !quorum {
        bail!(
            "the store has no quorum: more than half of its replicas must run and reach each other"
        );
    }
    Ok(())
}

async fn wait(client: &Client, limit: Duration) -> Result<()> {
    let mut messages = client.wait(limit).await?;
    let mut last = None;
    let ended = timeout(limit + WAIT_GRACE, follow(&mut messages, &mut last)).await;
    let done = match ended {
        Ok(ended) => ended.context("the wait was cut off")?,
        Err(_) => false,
    };
    if done {
        if let Some(hint) = last.as_ref().and_then(nobody_to_wait_for) {
            output::note(hint);
        }
        return Ok(());
    }
    bail!(
        "not applied everywhere after {} s{}",
        limit.as_secs_f32(),
        laggards(last.as_ref())
    );
}

/// Follows the progress to its end; true when everything is applied.
async fn follow(
    messages: &mut Messages<WaitProgress>,
    last: &mut Option<WaitProgress>,
) -> Result<bool> {
    let mut shown = None;
    while let Some(progress) = messages.next().await? {
        let state = (progress.nodes_applied, progress.nodes_total);
        if shown != Some(state) {
            output::note(&progress_line(&progress));
            shown = Some(state);
        }
        let done = progress.done;
        *last = Some(progress);
        if done {
            return Ok(true);
        }
    }
    Ok(false)
}

fn progress_line(progress: &WaitProgress) -> String {
    let targets: Vec<String> = progress
        .targets
        .iter()
        .map(|target| format!("{}={}", target.cluster, target.revision))
        .collect();
    format!(
        "applied on {} of {} nodes ({})",
        progress.nodes_applied,
        progress.nodes_total,
        targets.join(" ")
    )
}

/// What a wait that ended well did not wait for.
fn nobody_to_wait_for(progress: &WaitProgress) -> Option<&'static str> {
    (progress.nodes_total == 0).then_some(
        "hint: no node of this cluster is on record, so nothing was waited for; a node is once its agent has connected",
    )
}

fn laggards(progress: Option<&WaitProgress>) -> String {
    let Some(progress) = progress else {
        return ": the server reported no progress".to_owned();
    };
    let mut text = format!(
        ": applied on {} of {} nodes",
        progress.nodes_applied, progress.nodes_total
    );
    for laggard in progress.laggards.iter().take(MAX_LAGGARDS_SHOWN) {
        text.push_str(&format!("; {}: {}", laggard.node, laggard.reason));
    }
    if progress.laggards.len() > MAX_LAGGARDS_SHOWN {
        text.push_str(&format!(
            "; {} more",
            progress.laggards.len() - MAX_LAGGARDS_SHOWN
        ));
    }
    text
}

fn peer_state(peer: &PeerStatus) -> &'static str {
    match peer.state() {
        peer_status::State::Connecting => "connecting",
        peer_status::State::Syncing => "syncing",
        peer_status::State::Synced => "synced",
        peer_status::State::Unreachable => "unreachable",
        peer_status::State::Refused => "refused",
    }
}

fn node_state(node: &NodeStatus) -> &'static str {
    match node.state() {
        node_status::State::Connected => "connected",
        node_status::State::Stale => "stale",
    }
}

/// What every node should have applied: for each source cluster, store and revision that this server has.
fn targets(status: &MeshStatusResponse) -> BTreeMap<&str, (u64, i64)> {
    let own = (status.cluster.as_str(), (status.store_id, status.revision));
    let peers = status
        .peers
        .iter()
        .map(|peer| (peer.cluster.as_str(), (peer.store_id, peer.revision)));
    std::iter::once(own).chain(peers).collect()
}

/// Per source cluster: the applied revision, and how far it is behind.
fn applied(
    node: &NodeStatus,
    targets: &BTreeMap<&str, (u64, i64)>,
) -> Vec<(String, Option<i64>, Option<i64>)> {
    let row = |(cluster, (store_id, revision)): (&&str, &(u64, i64))| {
        // A revision of another store counts in another history.
        let found = node
            .applied
            .iter()
            .find(|source| source.cluster == **cluster && source.store_id == *store_id);
        let applied = found.map(|source| source.revision);
        let behind = applied.map(|applied| revision.saturating_sub(applied).max(0));
        ((**cluster).to_owned(), applied, behind)
    };
    targets.iter().map(row).collect()
}

fn to_text(status: &MeshStatusResponse) -> String {
    let targets = targets(status);
    let mut text = format!(
        "Cluster {} (id {}), store {:x}, revision {}, server {}\n",
        output::printable(&status.cluster),
        status.cluster_id,
        status.store_id,
        status.revision,
        output::printable(&status.server_version)
    );
    text.push_str("\nPeers\n");
    if status.peers.is_empty() {
        text.push_str("  none configured\n");
    } else {
        text.push_str(&indent(&peer_table(&status.peers).render()));
    }
    let is_current = |node: &&NodeStatus| {
        applied(node, &targets)
            .iter()
            .all(|(_, _, behind)| *behind == Some(0))
    };
    let current = status.nodes.iter().filter(is_current).count();
    text.push_str(&format!(
        "\nNodes: everything applied on {current} of {}\n",
        status.nodes.len()
    ));
    if !status.nodes.is_empty() {
        text.push_str(&indent(&node_table(&status.nodes, &targets).render()));
    }
    text
}

fn peer_table(peers: &[PeerStatus]) -> Table {
    let mut table = Table::new(&[
        "CLUSTER",
        "ID",
        "STATE",
        "REVISION",
        "NODES",
        "ENDPOINTS",
        "IDENTITIES",
        "SERVICES",
        "REFUSED",
        "LAST ERROR",
    ]);
    for peer in peers {
        table.row(vec![
            peer.cluster.clone(),
            peer.cluster_id.to_string(),
            peer_state(peer).to_owned(),
            peer.revision.to_string(),
            peer.nodes.to_string(),
            peer.endpoints.to_string(),
            peer.identities.to_string(),
            peer.services.to_string(),
            refused_of(peer),
            peer.last_error.clone(),
        ]);
    }
    table
}

fn node_table(nodes: &[NodeStatus], targets: &BTreeMap<&str, (u64, i64)>) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "STATE",
        "APPLIED",
        "REPORT",
        "POD CIDRS",
        "ENCRYPTION",
        "REFUSED",
        "VERSION",
    ]);
    for node in nodes {
        let cell = |(cluster, applied, behind): (String, Option<i64>, Option<i64>)| match (
            applied, behind,
        ) {
            (Some(revision), Some(0)) => format!("{cluster}={revision}"),
            (Some(revision), Some(behind)) => format!("{cluster}={revision} ({behind} behind)"),
            _ => format!("{cluster}={NONE}"),
        };
        let cells: Vec<String> = applied(node, targets).into_iter().map(cell).collect();
        table.row(vec![
            node.node.clone(),
            node_state(node).to_owned(),
            cells.join(" "),
            age(node.last_report_age_ms),
            node.pod_cidrs.join(","),
            encryption(node),
            reasons(&node.refused_records),
            node.agent_version.clone(),
        ]);
    }
    table
}

/// Who runs the node's device, and to how many others its packets travel in which way.
fn encryption(node: &NodeStatus) -> String {
    let Some(report) = &node.encryption else {
        return String::new();
    };
    let ways = [
        (report.encrypted, "encrypted"),
        (report.clear, "clear"),
        (report.withheld, "withheld"),
    ];
    let mut parts: Vec<String> = ways
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, way)| format!("{count} {way}"))
        .collect();
    parts.extend(report.fault.then(|| "fault".to_owned()));
    match (report.backend.as_str(), parts.join(", ")) {
        (backend, parts) if parts.is_empty() => backend.to_owned(),
        (backend, parts) => format!("{backend}: {parts}"),
    }
}

fn age(ms: i64) -> String {
    match ms {
        ..0 => NONE.to_owned(),
        0..1000 => format!("{ms} ms ago"),
        _ => format!("{} s ago", ms / 1000),
    }
}

/// What stands for a count that the server does not know.
const UNKNOWN: &str = "unknown";

/// Refused records of a peer by reason; how many it refused before it was listed, a server does not know.
fn refused_of(peer: &PeerStatus) -> String {
    match (reasons(&peer.refused_records), peer.refused_incomplete) {
        (reasons, false) => reasons,
        (reasons, true) if reasons.is_empty() => UNKNOWN.to_owned(),
        (reasons, true) => format!("{reasons},{UNKNOWN}"),
    }
}

fn reasons(refused: &BTreeMap<String, u64>) -> String {
    let parts: Vec<String> = refused
        .iter()
        .map(|(reason, count)| format!("{reason}:{count}"))
        .collect();
    parts.join(",")
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn to_json(status: &MeshStatusResponse) -> Value {
    let targets = targets(status);
    let peer = |peer: &PeerStatus| {
        json!({
            "cluster": peer.cluster,
            "clusterID": peer.cluster_id,
            "state": peer_state(peer),
            "storeID": hex(peer.store_id),
            "revision": peer.revision,
            "nodes": peer.nodes,
            "endpoints": peer.endpoints,
            "identities": peer.identities,
            "services": peer.services,
            "reconnects": peer.reconnects,
            "lastContactUnixMs": peer.last_contact_unix_ms,
            "lastError": peer.last_error,
            "refusedRecords": peer.refused_records,
            "refusedIncomplete": peer.refused_incomplete,
        })
    };
    let node = |node: &NodeStatus| {
        let applied: BTreeMap<String, Value> = applied(node, &targets)
            .into_iter()
            .map(|(cluster, revision, behind)| {
                (cluster, json!({ "revision": revision, "behind": behind }))
            })
            .collect();
        json!({
            "name": node.node,
            "state": node_state(node),
            "applied": applied,
            "lastReportAgeMs": node.last_report_age_ms,
            "agentVersion": node.agent_version,
            "mapLayoutVersion": node.map_layout_version,
            "podCIDRs": node.pod_cidrs,
            "underlayAddresses": node.underlay_addresses,
            "refusedRecords": node.refused_records,
            "encryption": node.encryption.as_ref().map(|report| json!({
                "backend": report.backend,
                "encrypted": report.encrypted,
                "clear": report.clear,
                "withheld": report.withheld,
                "fault": report.fault,
            })),
        })
    };
    json!({
        "cluster": status.cluster,
        "clusterID": status.cluster_id,
        "storeID": hex(status.store_id),
        "revision": status.revision,
        "serverVersion": status.server_version,
        "peers": status.peers.iter().map(peer).collect::<Vec<_>>(),
        "nodes": status.nodes.iter().map(node).collect::<Vec<_>>(),
    })
}

/// Store ids need 64 bits, which many JSON readers do not have.
fn hex(store_id: u64) -> String {
    format!("{store_id:x}")
}

#[cfg(test)]
mod tests;
