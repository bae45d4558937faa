//! `snapshot`: backups of a cluster's store, what is in them, and a new store made of one.

mod save;

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use clustermesh_raft::{BackupFile, BackupSummary, InitialMember, Restore};
use openraft_rt_tokio::TokioRuntime;
use serde_json::json;

use crate::{
    args::{GlobalArgs, Output, RestoreArgs, SnapshotArgs, SnapshotCommand, parse_peer_url},
    connect::connect,
    output,
};

pub async fn run(global: &GlobalArgs, args: &SnapshotArgs) -> Result<()> {
    match &args.command {
        SnapshotCommand::Save { file } => {
            let client = connect(global).await?;
            let saved = save::run(&client, file).await?;
            match global.output {
                Output::Table => output::print(&format!(
                    "{}: {} bytes, SHA-256 {}\n",
                    file.display(),
                    saved.bytes,
                    hex(&saved.sha256)
                )),
                Output::Json => output::json(&json!({
                    "file": file,
                    "bytes": saved.bytes,
                    "sha256": hex(&saved.sha256),
                })),
            }
        }
        SnapshotCommand::Status { file } => status(file, global.output),
        SnapshotCommand::Restore(args) => restore(args, global.output).await,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn status(file: &Path, form: Output) -> Result<()> {
    let summary = BackupFile::open(file)?.summary()?;
    match form {
        Output::Table => output::print(&to_text(&summary)),
        Output::Json => output::json(&to_json(&summary)),
    }
}

fn to_text(summary: &BackupSummary) -> String {
    let members: Vec<String> = summary
        .members
        .iter()
        .map(|(id, node)| format!("{} ({id:016x})", node.name))
        .collect();
    let rows = [
        ("Cluster id", format!("{:016x}", summary.cluster_id)),
        ("Revision", summary.revision.to_string()),
        ("Compacted at", summary.compact_revision.to_string()),
        ("Keys", summary.keys.to_string()),
        ("Leases", summary.leases.to_string()),
        ("Users", summary.users.to_string()),
        ("Hash (HashKV)", format!("{:08x}", summary.hash_kv)),
        ("Data", format!("{} bytes", summary.state_bytes)),
        ("File", format!("{} bytes", summary.bytes)),
        ("SHA-256", hex(&summary.sha256)),
        ("Format", summary.format.to_string()),
        ("Feature level", summary.feature_level.to_string()),
        ("Replicas", members.join(", ")),
    ];
    rows.iter()
        .map(|(name, value)| format!("{name:<14} {}\n", output::printable(value)))
        .collect()
}

fn to_json(summary: &BackupSummary) -> serde_json::Value {
    let members: Vec<_> = summary
        .members
        .iter()
        .map(|(id, node)| {
            json!({
                "id": format!("{id:016x}"),
                "name": node.name,
                "peerUrl": node.peer_url,
            })
        })
        .collect();
    json!({
        "clusterID": format!("{:016x}", summary.cluster_id),
        "revision": summary.revision,
        "compactRevision": summary.compact_revision,
        "keys": summary.keys,
        "leases": summary.leases,
        "users": summary.users,
        "hashKV": summary.hash_kv,
        "dataBytes": summary.state_bytes,
        "bytes": summary.bytes,
        "sha256": hex(&summary.sha256),
        "format": summary.format,
        "featureLevel": summary.feature_level,
        "members": members,
    })
}

/// `NAME=https://HOST:PORT`, several separated by commas.
fn members(list: &[String]) -> Result<Vec<InitialMember>> {
    let parse = |entry: &String| {
        let (name, peer_url) = entry
            .split_once('=')
            .filter(|(name, url)| !name.is_empty() && parse_peer_url(url).is_ok())
            .with_context(|| {
                format!("--initial-cluster: {entry:?} is not NAME=https://HOST:PORT")
            })?;
        Ok(InitialMember {
            name: name.to_owned(),
            peer_url: peer_url.to_owned(),
        })
    };
    let members: Vec<InitialMember> = list.iter().map(parse).collect::<Result<_>>()?;
    if !matches!(members.len(), 0 | 1 | 3 | 5) {
        bail!(
            "--initial-cluster: {} replicas; a group begins with 1, 3 or 5",
            members.len()
        );
    }
    Ok(members)
}

async fn restore(args: &RestoreArgs, form: Output) -> Result<()> {
    let members = members(&args.initial_cluster)?;
    let wanted = Restore {
        data_dir: args.data_dir.clone(),
        cluster_name: args.cluster.clone(),
        name: args.name.clone(),
        token: args.token.clone(),
        revision_bump: args.bump_revision,
        members,
    };
    let backup = BackupFile::open(&args.file)?;
    let restored = backup.restore::<TokioRuntime>(&wanted).await?;
    match form {
        Output::Table => {
            let mut text = format!(
                "{}: replica {} ({:016x}) of the new group {:016x}, revision {}\n",
                args.data_dir.display(),
                args.name,
                restored.replica_id,
                restored.cluster_id,
                restored.revision
            );
            if wanted.members.len() > 1 && args.token.is_none() {
                text.push_str(&format!(
                    "On the machines of the other replicas, with the same file and list, each with its own --name:\n  --token {}\n",
                    restored.token
                ));
            }
            output::print(&text)
        }
        Output::Json => output::json(&json!({
            "dataDir": args.data_dir,
            "name": args.name,
            "replicaID": format!("{:016x}", restored.replica_id),
            "clusterID": format!("{:016x}", restored.cluster_id),
            "revision": restored.revision,
            "token": restored.token,
        })),
    }
}

#[cfg(test)]
mod tests;
