//! `encryption`: WireGuard between this machine and the other nodes, as its agent sees it.

use anyhow::{Result, anyhow, bail};
use clustermesh_api::v1::agent_client::AgentClient;
use clustermesh_api::v1::{
    EncryptionProof, EncryptionStatusRequest, EncryptionStatusResponse, RotateKeysRequest,
    VerifyEncryptionRequest, WireguardPeerStatus,
};
use clustermesh_client::local;
use serde_json::{Value, json};

use crate::{
    args::{EncryptionArgs, EncryptionCommand, GlobalArgs, Output},
    output::{self, Table},
};

pub async fn run(global: &GlobalArgs, args: &EncryptionArgs) -> Result<()> {
    let channel = local::connect(&args.socket)
        .await
        .map_err(|error| anyhow!(error))?;
    let mut agent = AgentClient::new(channel);
    match args.command {
        EncryptionCommand::Status { verify: true } => {
            let mut stream = agent
                .verify_encryption(VerifyEncryptionRequest {})
                .await?
                .into_inner();
            let mut proofs = Vec::new();
            while let Some(proof) = stream.message().await? {
                proofs.push(proof);
            }
            show_proofs(global, proofs)
        }
        EncryptionCommand::Status { verify: false } => {
            let status = agent
                .encryption_status(EncryptionStatusRequest {})
                .await?
                .into_inner();
            match global.output {
                Output::Json => output::json(&to_json(&status)),
                Output::Table => output::print(&to_text(&status)),
            }
        }
        EncryptionCommand::Rotate => {
            let epoch = agent
                .rotate_keys(RotateKeysRequest {})
                .await?
                .into_inner()
                .epoch;
            match global.output {
                Output::Json => output::json(&json!({ "epoch": epoch })),
                Output::Table => output::print(&format!(
                    "keys change to epoch {epoch}; `clustermesh encryption status` shows how far that is\n"
                )),
            }
        }
    }
}

/// Nodes by how their proof ended.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    encrypted: usize,
    exempt: usize,
    failed: usize,
}

/// Prints the proofs; an error if one is missing.
fn show_proofs(global: &GlobalArgs, mut proofs: Vec<EncryptionProof>) -> Result<()> {
    proofs.sort_by(|a, b| (&a.cluster, &a.node).cmp(&(&b.cluster, &b.node)));
    let counts = count(&proofs);
    match global.output {
        Output::Json => output::json(&proofs_to_json(&proofs, &counts))?,
        Output::Table => output::print(&proofs_to_text(&proofs, &counts))?,
    }
    if counts.failed > 0 {
        bail!(
            "{} of {} nodes: not proved that packets travel encrypted",
            counts.failed,
            proofs.len()
        );
    }
    Ok(())
}

/// What this command does not know is no proof.
fn count(proofs: &[EncryptionProof]) -> Counts {
    let mut counts = Counts::default();
    for proof in proofs {
        match proof.result.as_str() {
            "encrypted" => counts.encrypted += 1,
            "exempt" => counts.exempt += 1,
            _ => counts.failed += 1,
        }
    }
    counts
}

fn proofs_to_json(proofs: &[EncryptionProof], counts: &Counts) -> Value {
    let nodes: Vec<Value> = proofs
        .iter()
        .map(|proof| {
            json!({
                "cluster": proof.cluster, "node": proof.node, "result": proof.result, "address": proof.address,
                "answer_us": proof.answer_us, "sent_bytes": proof.sent_bytes,
                "received_bytes": proof.received_bytes, "problem": proof.problem,
            })
        })
        .collect();
    json!({
        "encrypted": counts.encrypted,
        "exempt": counts.exempt,
        "failed": counts.failed,
        "nodes": nodes,
    })
}

fn proofs_to_text(proofs: &[EncryptionProof], counts: &Counts) -> String {
    if proofs.is_empty() {
        return "There is no other node.\n".to_owned();
    }
    let mut table = Table::new(&[
        "CLUSTER", "NODE", "RESULT", "ADDRESS", "ANSWER", "SENT", "RECEIVED", "PROBLEM",
    ]);
    for proof in proofs {
        let answer = proof
            .answer_us
            .map(|us| format!("{:.1} ms", us as f64 / 1e3));
        table.row(vec![
            proof.cluster.clone(),
            proof.node.clone(),
            proof.result.clone(),
            proof.address.clone(),
            answer.unwrap_or_default(),
            proof.sent_bytes.to_string(),
            proof.received_bytes.to_string(),
            proof.problem.clone(),
        ]);
    }
    format!(
        "{}\n{} encrypted, {} exempt by configuration, {} failed\n",
        table.render(),
        counts.encrypted,
        counts.exempt,
        counts.failed
    )
}

/// Percent of what goes between nodes that is encrypted; `None` if nothing went.
fn encrypted_percent(status: &EncryptionStatusResponse) -> Option<f64> {
    let all = status.encrypted_bytes.saturating_add(status.clear_bytes);
    (all > 0).then(|| status.encrypted_bytes as f64 / all as f64 * 100.0)
}

fn to_json(status: &EncryptionStatusResponse) -> Value {
    let devices: Vec<Value> = status
        .devices
        .iter()
        .map(|device| {
            json!({
                "name": device.name, "backend": device.backend, "public_key": device.public_key,
                "port": device.port, "epoch": device.epoch, "counters": device.counters,
            })
        })
        .collect();
    let peers: Vec<Value> = status
        .peers
        .iter()
        .map(|peer| {
            json!({
                "cluster": peer.cluster, "node": peer.node, "traffic": peer.traffic, "session": peer.session,
                "public_key": peer.public_key, "epoch": peer.epoch, "endpoint": peer.endpoint,
                "allowed_ips": peer.allowed_ips, "device": peer.device,
                "last_handshake_age_seconds": peer.last_handshake_age_seconds,
                "received_bytes": peer.received_bytes, "sent_bytes": peer.sent_bytes,
            })
        })
        .collect();
    let black_holes: Vec<Value> = status
        .black_holes
        .iter()
        .map(|path| {
            json!({
                "cluster": path.cluster, "node": path.node, "mtu_bytes": path.mtu_bytes,
                "device_mtu_bytes": path.device_mtu_bytes,
            })
        })
        .collect();
    json!({
        "node": status.node,
        "cluster": status.cluster,
        "mode": status.mode,
        "strict": status.strict,
        "nodes": status.nodes,
        "fault": status.fault,
        "encrypted_bytes": status.encrypted_bytes,
        "clear_bytes": status.clear_bytes,
        "encrypted_percent": encrypted_percent(status),
        "devices": devices,
        "peers": peers,
        "black_holes": black_holes,
    })
}

fn to_text(status: &EncryptionStatusResponse) -> String {
    use std::fmt::Write as _;

    let on = |on: bool| if on { "yes" } else { "no" };
    let share = encrypted_percent(status).map_or_else(
        || "nothing sent yet".to_owned(),
        |percent| {
            format!(
                "{percent:.2} % of {} bytes encrypted",
                status.encrypted_bytes.saturating_add(status.clear_bytes)
            )
        },
    );
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "Node {} of cluster {}: mode {}, strict {}, nodes themselves {}; {share}",
        output::printable(&status.node),
        output::printable(&status.cluster),
        status.mode,
        on(status.strict),
        on(status.nodes),
    );
    if !status.fault.is_empty() {
        let _ = writeln!(text, "FAULT: {}", output::printable(&status.fault));
    }
    for path in &status.black_holes {
        let _ = writeln!(
            text,
            "BLACK HOLE: {}/{} to {}/{}: packets over {} bytes vanish, the devices take {}; give the underlay's devices \
             the MTU that the network has, or set `mtu`",
            output::printable(&status.cluster),
            output::printable(&status.node),
            output::printable(&path.cluster),
            output::printable(&path.node),
            path.mtu_bytes,
            path.device_mtu_bytes,
        );
    }
    if status.devices.is_empty() {
        return text;
    }
    let mut devices = Table::new(&["DEVICE", "BACKEND", "PORT", "EPOCH", "PUBLIC KEY"]);
    for device in &status.devices {
        devices.row(vec![
            device.name.clone(),
            device.backend.clone(),
            device.port.to_string(),
            device.epoch.to_string(),
            device.public_key.clone(),
        ]);
    }
    let mut peers = Table::new(&[
        "CLUSTER",
        "NODE",
        "TRAFFIC",
        "SESSION",
        "HANDSHAKE",
        "RECEIVED",
        "SENT",
        "ENDPOINT",
        "EPOCH",
        "PUBLIC KEY",
    ]);
    for peer in &status.peers {
        peers.row(peer_row(peer));
    }
    let _ = write!(text, "\n{}\n{}", devices.render(), peers.render());
    text
}

fn peer_row(peer: &WireguardPeerStatus) -> Vec<String> {
    let has_key = !peer.public_key.is_empty();
    let known = |text: String| if has_key { text } else { String::new() };
    vec![
        peer.cluster.clone(),
        peer.node.clone(),
        peer.traffic.clone(),
        peer.session.clone(),
        peer.last_handshake_age_seconds
            .map(|seconds| format!("{seconds} s ago"))
            .unwrap_or_default(),
        known(peer.received_bytes.to_string()),
        known(peer.sent_bytes.to_string()),
        peer.endpoint.clone(),
        known(peer.epoch.to_string()),
        peer.public_key.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use clustermesh_api::v1::PathStatus;

    use super::*;

    #[test]
    fn a_node_without_a_key_is_shown_with_how_its_packets_travel() {
        let peer = |node: &str, traffic: &str, session: &str| WireguardPeerStatus {
            cluster: "b".to_owned(),
            node: node.to_owned(),
            traffic: traffic.to_owned(),
            session: session.to_owned(),
            ..Default::default()
        };
        let status = EncryptionStatusResponse {
            mode: "all".to_owned(),
            devices: vec![Default::default()],
            peers: vec![
                peer("n1", "clear", "no-key"),
                WireguardPeerStatus {
                    public_key: "key".to_owned(),
                    last_handshake_age_seconds: Some(7),
                    ..peer("n2", "encrypted", "established")
                },
            ],
            encrypted_bytes: 3,
            clear_bytes: 1,
            ..Default::default()
        };
        let text = to_text(&status);
        assert!(text.contains("75.00 % of 4 bytes encrypted"), "{text}");
        let line = text.lines().find(|line| line.contains("n1")).unwrap();
        let cells: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(cells[..5], ["b", "n1", "clear", "no-key", "-"]);
        assert!(text.contains("7 s ago"), "{text}");
        assert_eq!(to_json(&status)["encrypted_percent"], 75.0);
    }

    #[test]
    fn what_is_not_proved_is_counted_and_named() {
        let proof = |node: &str, result: &str, problem: &str| EncryptionProof {
            cluster: "b".to_owned(),
            node: node.to_owned(),
            result: result.to_owned(),
            answer_us: (result == "encrypted").then_some(1_250),
            problem: problem.to_owned(),
            ..Default::default()
        };
        let proofs = [
            proof("n1", "encrypted", ""),
            proof("n2", "exempt", ""),
            proof("n3", "failed", "it has no key"),
            proof("n4", "word of a later release", ""),
        ];
        let counts = count(&proofs);
        let expected = Counts {
            encrypted: 1,
            exempt: 1,
            failed: 2,
        };
        assert_eq!(counts, expected);
        let text = proofs_to_text(&proofs, &counts);
        assert!(
            text.contains("1.2 ms") && text.contains("it has no key"),
            "{text}"
        );
        assert!(
            text.ends_with("1 encrypted, 1 exempt by configuration, 2 failed\n"),
            "{text}"
        );
        let json = proofs_to_json(&proofs, &counts);
        assert_eq!(
            (&json["failed"], &json["nodes"][2]["problem"]),
            (&json!(2), &json!("it has no key"))
        );
        assert!(proofs_to_text(&[], &count(&[])).contains("no other node"));
    }

    #[test]
    fn a_black_hole_stands_in_the_status_with_both_ends() {
        let status = EncryptionStatusResponse {
            cluster: "a".to_owned(),
            node: "n1".to_owned(),
            black_holes: vec![PathStatus {
                cluster: "b".to_owned(),
                node: "n2".to_owned(),
                mtu_bytes: 1_280,
                device_mtu_bytes: 1_390,
                ..Default::default()
            }],
            ..Default::default()
        };
        let text = to_text(&status);
        assert!(
            text.contains("BLACK HOLE: a/n1 to b/n2: packets over 1280 bytes"),
            "{text}"
        );
        let json = to_json(&status);
        assert_eq!(json["black_holes"][0]["device_mtu_bytes"], 1_390);
    }

    #[test]
    fn a_fault_of_the_devices_stands_in_the_status() {
        let status = EncryptionStatusResponse {
            fault: "the device gives no answer".to_owned(),
            ..Default::default()
        };
        assert!(to_text(&status).contains("FAULT: the device gives no answer"));
        assert_eq!(to_json(&status)["fault"], status.fault);
    }
}
