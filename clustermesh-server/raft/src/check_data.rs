//! A data folder looked through while no server runs on it: log, vote, snapshots, identity. Nothing in it is changed.

mod folder;

use std::path::{Path, PathBuf};

use clustermesh_core::{State, pb};
use clustermesh_store::{DataDir, Identity, LogId, SledLog, SnapshotFile};
use openraft::{
    EntryPayload,
    async_runtime::AsyncRuntime,
    entry::RaftEntry,
    storage::{RaftLogReader, RaftLogStorage},
};
use prost::Message;

use crate::{
    Answer,
    backup_file::count_keys,
    replica::{close, recover_state},
    state_machine::load,
};

/// Entries read from the log at once.
const READ_ENTRIES: u64 = 256;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is lost, and a server repairs it when it starts.
    Warning,
    /// A server does not start on it, or what was acknowledged is lost.
    Error,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file, or the part of the data.
    pub object: String,
    /// What is wrong, and what to do.
    pub text: String,
}

/// A snapshot in the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFound {
    /// The file.
    pub path: PathBuf,
    /// Last log entry in it.
    pub last_log_id: Option<LogId>,
    /// Newest revision in it; `None` when it cannot be read.
    pub revision: Option<i64>,
    /// Length, bytes.
    pub bytes: u64,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Whose folder it is.
    pub identity: Option<Identity>,
    /// First entry of the log.
    pub first_index: Option<u64>,
    /// Last entry of the log, or what was purged last.
    pub last_log_id: Option<LogId>,
    /// Last entry that this replica knows to be committed.
    pub committed: Option<LogId>,
    /// Term of its vote.
    pub vote_term: Option<u64>,
    /// The snapshots, newest first.
    pub snapshots: Vec<SnapshotFound>,
    /// Revision after all committed entries.
    pub revision: Option<i64>,
    /// Keys at that revision.
    pub keys: Option<u64>,
    /// What is wrong, in the order of the search.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Whether a server can serve from this folder all that was acknowledged.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.severity < Severity::Error)
    }

    fn add(&mut self, severity: Severity, object: impl Into<String>, text: impl ToString) {
        self.findings.push(Finding {
            severity,
            object: object.into(),
            text: text.to_string(),
        });
    }

    fn error(&mut self, object: impl Into<String>, text: impl ToString) {
        self.add(Severity::Error, object, text);
    }
}

const RESTORE: &str =
    "empty this folder and let the replica join its group again, or restore a backup";

/// Looks through the data folder `path` of a server that is not running. With `cluster_name` it must be of that cluster ("" for a plain
/// store). The log is copied into `scratch`, an empty folder, and read there: reading it in place would change it. All of the state is read
/// into memory once.
pub async fn check_data<R: AsyncRuntime>(
    path: &Path,
    cluster_name: Option<&str>,
    scratch: &Path,
) -> CheckReport {
    let mut report = CheckReport::default();
    let data_dir = match DataDir::open_to_read(path) {
        Ok(data_dir) => data_dir,
        Err(error) => {
            report.error("data folder", error);
            return report;
        }
    };
    let identity = data_dir.identity().clone();
    if let Some(wanted) = cluster_name.filter(|wanted| *wanted != identity.cluster_name) {
        let name = |name: &str| {
            if name.is_empty() {
                "a plain store".to_owned()
            } else {
                format!("cluster {name:?}")
            }
        };
        report.error(
            "identity",
            format!(
                "{} belongs to {}, not to {}; point data_dir to the folder of this server",
                path.display(),
                name(&identity.cluster_name),
                name(wanted)
            ),
        );
    }
    report.identity = Some(identity.clone());
    let newest = snapshots(&mut report, &data_dir.snapshots_path(), identity.cluster_id);
    let log_path = data_dir.log_path();
    if !log_path.exists() {
        if identity.cluster_id != 0 {
            report.error(
                "log",
                format!("{} is not there; {RESTORE}", log_path.display()),
            );
        }
        return report;
    }
    let copy = scratch.join("log");
    let log = folder::copy(&log_path, &copy).and_then(|()| SledLog::<R, Answer>::open(&copy));
    match log {
        Ok(mut log) => {
            check_log(&mut report, &mut log).await;
            check_state(&mut report, &mut log, newest.as_ref()).await;
            close(log).await;
        }
        Err(error) => report.error(log_path.display().to_string(), error),
    }
    report
}

/// Reads every snapshot as a server would; the newest that is good.
fn snapshots(report: &mut CheckReport, path: &Path, cluster_id: u64) -> Option<SnapshotFile> {
    let files = match folder::snapshots(path) {
        Ok(files) => files,
        Err(error) => {
            report.error("snapshots", error);
            return None;
        }
    };
    let mut newest = None;
    for path in files.unfinished {
        report.add(
            Severity::Warning,
            path.display().to_string(),
            "was being written when the process ended; a start removes it",
        );
    }
    for path in files.set_aside {
        report.add(
            Severity::Warning,
            path.display().to_string(),
            "was found damaged before and set aside; it goes once there are two good ones",
        );
    }
    for path in files.complete {
        let object = path.display().to_string();
        let opened = SnapshotFile::open(&path);
        let bytes = opened.as_ref().map_or(0, SnapshotFile::size_bytes);
        let last_log_id = opened
            .as_ref()
            .ok()
            .and_then(|file| file.meta().last_log_id);
        let loaded = opened
            .map_err(|error| error.to_string())
            .and_then(|file| Ok((load(&file).map_err(|error| error.to_string())?, file)));
        let mut revision = None;
        match loaded {
            Ok((state, file)) => {
                revision = Some(state.revision());
                if cluster_id != 0 && state.cluster_id() != cluster_id {
                    report.error(
                        object,
                        format!(
                            "is of group {:016x}, the identity says {cluster_id:016x}: files of two folders are mixed; {RESTORE}",
                            state.cluster_id()
                        ),
                    );
                }
                newest.get_or_insert(file);
            }
            Err(reason) => report.error(object, reason),
        }
        report.snapshots.push(SnapshotFound {
            path,
            last_log_id,
            revision,
            bytes,
        });
    }
    newest
}

/// Opening has compared every checksum and the order of the indexes already.
async fn check_log<R: AsyncRuntime>(report: &mut CheckReport, log: &mut SledLog<R, Answer>) {
    if let Some(index) = log.torn() {
        report.add(
            Severity::Warning,
            "log",
            format!(
                "the record at entry {index} was being written when the process ended; it was never acknowledged, a start drops it"
            ),
        );
    }
    let vote = log.read_vote().await.ok().flatten();
    report.vote_term = vote.map(|vote| vote.leader_id.term);
    let last = log
        .get_log_state()
        .await
        .ok()
        .and_then(|state| state.last_log_id);
    report.last_log_id = last;
    report.committed = log.recorded_committed();
    if let Some(committed) = report.committed
        && last < Some(committed)
    {
        report.error(
            "log",
            format!(
                "ends at {}, but {committed} was committed: acknowledged writes are lost; {RESTORE}",
                last.map_or_else(|| "nothing".to_owned(), |last| last.to_string())
            ),
        );
    }
    let last_term = last.map_or(0, |last| last.leader_id.term);
    match report.vote_term {
        Some(term) if term < last_term => report.error(
            "vote",
            format!("is of term {term}, the log goes on to term {last_term}: it could be given twice; {RESTORE}"),
        ),
        None if last.is_some() => report.error(
            "vote",
            format!("is not there, though the log has entries: it could be given twice; {RESTORE}"),
        ),
        _ => {}
    }
    let stats = log.stats();
    let mut next = stats.first_index;
    let mut term = 0;
    while last.is_some_and(|last| next <= last.index) {
        let entries = match log.try_get_log_entries(next..next + READ_ENTRIES).await {
            Ok(entries) => entries,
            Err(error) => return report.error("log", error),
        };
        let (Some(first), Some(end)) = (entries.first(), entries.last()) else {
            break;
        };
        report.first_index.get_or_insert(first.log_id().index);
        next = end.log_id().index + 1;
        for entry in &entries {
            let id = entry.log_id();
            if id.leader_id.term < term {
                report.error(
                    "log",
                    format!(
                        "entry {id} follows one of term {term}: terms never go back; {RESTORE}"
                    ),
                );
            }
            term = id.leader_id.term;
            if let EntryPayload::Normal(command) = &entry.payload
                && let Err(reason) = pb::Batch::decode(command.batch.clone())
            {
                report.error(
                    "log",
                    format!("entry {id} cannot be decoded: {reason}; {RESTORE}"),
                );
            }
        }
    }
}

/// Applies what a start would apply.
async fn check_state<R: AsyncRuntime>(
    report: &mut CheckReport,
    log: &mut SledLog<R, Answer>,
    newest: Option<&SnapshotFile>,
) {
    let covered = newest.and_then(|file| file.meta().last_log_id);
    if let Some(purged) = log.purged()
        && covered.map(|id| id.index) < Some(purged.index)
    {
        return report.error(
            "log",
            format!(
                "begins after {purged}, but the newest good snapshot ends at {}; {RESTORE}",
                covered.map_or_else(|| "nothing".to_owned(), |id| id.to_string())
            ),
        );
    }
    let applied = match recover_state(log, newest).await {
        Ok(applied) => applied,
        Err(error) => return report.error("log", error),
    };
    let state: &State = &applied.state;
    report.revision = Some(state.revision());
    report.keys = count_keys(state).ok();
    let Some(identity) = report.identity.clone() else {
        return;
    };
    let (group, own) = (identity.cluster_id, identity.replica_id);
    if group != 0 && state.cluster_id() != 0 && state.cluster_id() != group && newest.is_none() {
        report.error(
            "log",
            format!(
                "is of group {:016x}, the identity says {group:016x}: files of two folders are mixed; {RESTORE}",
                state.cluster_id()
            ),
        );
    }
    let has_members = applied.membership.nodes().next().is_some();
    if state.is_removed_member(own) {
        report.error(
            "identity",
            format!("replica {own:016x} was removed from its group and cannot come back; empty this folder and let it join as a new one"),
        );
    } else if has_members && !applied.membership.nodes().any(|(id, _)| *id == own) {
        report.error(
            "identity",
            format!("replica {own:016x} is none of the group's: the identity is of another folder; {RESTORE}"),
        );
    }
}

#[cfg(test)]
mod tests;
