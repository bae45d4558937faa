//! `check-data`: tells of a data folder, as text or JSON, whether a server can serve from it.

use std::path::Path;

use anyhow::Context;
use clustermesh_raft::{CheckReport, Severity, check_data};
use openraft_rt_tokio::TokioRuntime;
use serde_json::{Value, json};

/// The folder where logs are copied to, below the system's temporary one; removed at the end.
const SCRATCH_PREFIX: &str = "clustermesh-check-data";

/// Form of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// For people.
    Text,
    /// For programs; fields are only ever added.
    Json,
}

/// Looks through `data_dir`; with `cluster_name` it must be that cluster's ("" for a plain store).
///
/// # Errors
/// When there is no such folder, or no place for a copy of the log.
pub async fn run(data_dir: &Path, cluster_name: Option<&str>) -> anyhow::Result<CheckReport> {
    anyhow::ensure!(
        data_dir.is_dir(),
        "there is no folder {}; give the `data_dir` of the server",
        data_dir.display()
    );
    let scratch = std::env::temp_dir().join(format!("{SCRATCH_PREFIX}-{}", std::process::id()));
    std::fs::create_dir(&scratch).with_context(|| {
        format!(
            "cannot make {} for a copy of the log; set TMPDIR to a folder with room for it",
            scratch.display()
        )
    })?;
    let report = check_data::<TokioRuntime>(data_dir, cluster_name, &scratch).await;
    std::fs::remove_dir_all(&scratch)
        .with_context(|| format!("cannot remove {}", scratch.display()))?;
    Ok(report)
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

/// The report for people.
#[must_use]
pub fn to_text(data_dir: &Path, report: &CheckReport) -> String {
    let mut text = format!("{}\n", data_dir.display());
    let mut row = |name: &str, value: String| text.push_str(&format!("  {name:<10} {value}\n"));
    if let Some(identity) = &report.identity {
        let of = match identity.cluster_name.as_str() {
            "" => "a plain store".to_owned(),
            name => format!("cluster {name}"),
        };
        row(
            "replica",
            format!(
                "{:016x} of group {:016x}, {of}",
                identity.replica_id, identity.cluster_id
            ),
        );
    }
    if let Some(last) = report.last_log_id {
        let entries = report.first_index.map_or_else(
            || "no entries".to_owned(),
            |first| format!("entries {first} to {}", last.index),
        );
        let committed = report
            .committed
            .map_or_else(|| "nothing".to_owned(), |id| id.index.to_string());
        row(
            "log",
            format!(
                "{entries}, term {}, committed {committed}",
                last.leader_id.term
            ),
        );
    }
    if let Some(term) = report.vote_term {
        row("vote", format!("term {term}"));
    }
    for snapshot in &report.snapshots {
        let revision = snapshot.revision.map_or_else(
            || "unreadable".to_owned(),
            |found| format!("revision {found}"),
        );
        row(
            "snapshot",
            format!(
                "{}: {revision}, {} bytes",
                snapshot.path.display(),
                snapshot.bytes
            ),
        );
    }
    if let (Some(revision), Some(keys)) = (report.revision, report.keys) {
        row("state", format!("revision {revision}, {keys} keys"));
    }
    for finding in &report.findings {
        text.push_str(&format!(
            "{}: {}: {}\n",
            severity(finding.severity).to_uppercase(),
            finding.object,
            finding.text
        ));
    }
    text.push_str(if report.is_good() {
        "good: a server can start from this folder\n"
    } else {
        "NOT GOOD: see the errors above\n"
    });
    text
}

/// The report for programs. Ids are hexadecimal: they need 64 bits, which many readers of JSON do not have.
#[must_use]
pub fn to_json(data_dir: &Path, report: &CheckReport) -> Value {
    let findings: Vec<Value> = report
        .findings
        .iter()
        .map(|finding| {
            json!({
                "severity": severity(finding.severity),
                "object": finding.object,
                "text": finding.text,
            })
        })
        .collect();
    let snapshots: Vec<Value> = report
        .snapshots
        .iter()
        .map(|snapshot| {
            json!({
                "path": snapshot.path,
                "lastIndex": snapshot.last_log_id.map(|id| id.index),
                "revision": snapshot.revision,
                "bytes": snapshot.bytes,
            })
        })
        .collect();
    json!({
        "dataDir": data_dir,
        "good": report.is_good(),
        "cluster": report.identity.as_ref().map(|identity| &identity.cluster_name),
        "clusterID": report.identity.as_ref().map(|identity| format!("{:016x}", identity.cluster_id)),
        "replicaID": report.identity.as_ref().map(|identity| format!("{:016x}", identity.replica_id)),
        "firstIndex": report.first_index,
        "lastIndex": report.last_log_id.map(|id| id.index),
        "lastTerm": report.last_log_id.map(|id| id.leader_id.term),
        "committedIndex": report.committed.map(|id| id.index),
        "voteTerm": report.vote_term,
        "snapshots": snapshots,
        "revision": report.revision,
        "keys": report.keys,
        "findings": findings,
    })
}
