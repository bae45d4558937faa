//! The sessions at the other replicas of the group, as these tell of them: in memory, and only while they are heard.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_api::limits::MAX_SESSIONS;
use clustermesh_raft::ReplicaId;
use parking_lot::Mutex;

use super::report::Report;
use crate::wire::{self, SILENCE_MAX};

/// Sessions in one message.
pub(super) const MAX_SESSIONS_PER_MESSAGE: usize = 1_000;
/// Replicas that are listened to.
const MAX_REPLICAS: usize = 16;

/// What one other replica told.
#[derive(Debug)]
struct Replica {
    epoch: u64,
    version: u64,
    heard: Instant,
    sessions: BTreeMap<String, Session>,
}

#[derive(Debug)]
struct Session {
    instance_id: String,
    report: Report,
}

impl Replica {
    fn is_heard(&self) -> bool {
        self.heard.elapsed() < SILENCE_MAX
    }
}

/// Sessions at other replicas; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Elsewhere {
    replicas: Arc<Mutex<BTreeMap<ReplicaId, Replica>>>,
}

impl Elsewhere {
    /// Takes what replica `from` tells; whether it changed anything.
    ///
    /// # Errors
    /// A text: the message cannot be taken, and its sender must begin anew.
    pub(super) fn take(&self, from: ReplicaId, told: wire::News) -> Result<bool, String> {
        let mut replicas = self.replicas.lock();
        if told.from_version == 0 {
            replicas.retain(|id, replica| *id == from || replica.is_heard());
            if replicas.len() >= MAX_REPLICAS && !replicas.contains_key(&from) {
                return Err(format!("{MAX_REPLICAS} replicas are heard already"));
            }
            let fresh = Replica {
                epoch: told.epoch,
                version: 0,
                heard: Instant::now(),
                sessions: BTreeMap::new(),
            };
            replicas.insert(from, fresh);
        }
        let replica = replicas
            .get_mut(&from)
            .filter(|known| known.epoch == told.epoch && known.version == told.from_version)
            .ok_or_else(|| "something is missing in between".to_owned())?;
        let changed = told.from_version == 0 || !told.open.is_empty() || !told.closed.is_empty();
        for node in told.closed {
            replica.sessions.remove(&node);
        }
        for open in told.open {
            if replica.sessions.len() >= MAX_SESSIONS && !replica.sessions.contains_key(&open.node)
            {
                return Err(format!("more than {MAX_SESSIONS} sessions"));
            }
            let (node, session) = session_from_wire(open);
            replica.sessions.insert(node, session);
        }
        replica.version = told.to_version;
        replica.heard = Instant::now();
        Ok(changed)
    }

    /// What is known of `node`, if it is connected to another replica that is heard: the newest word.
    pub(super) fn report(&self, node: &str) -> Option<Report> {
        let replicas = self.replicas.lock();
        let reports = replicas
            .values()
            .filter(|replica| replica.is_heard())
            .filter_map(|replica| replica.sessions.get(node));
        reports
            .max_by_key(|session| session.report.reported)
            .map(|session| session.report.clone())
    }

    /// Another instance than `instance_id` that holds a session of `node`.
    pub(super) fn other_holder(&self, node: &str, instance_id: &str) -> Option<String> {
        let replicas = self.replicas.lock();
        replicas
            .values()
            .filter(|replica| replica.is_heard())
            .filter_map(|replica| replica.sessions.get(node))
            .find(|session| session.instance_id != instance_id)
            .map(|session| session.instance_id.clone())
    }
}

fn session_from_wire(open: wire::OpenSession) -> (String, Session) {
    let age = u64::try_from(open.report_age_ms).ok();
    let report = Report {
        agent_version: open.agent_version,
        map_layout_version: open.map_layout_version,
        underlay_addresses: open.underlay_addresses,
        applied: open.applied,
        reported: age.and_then(|age| Instant::now().checked_sub(Duration::from_millis(age))),
        refused_records: open.refused_records.into_iter().collect(),
        encryption: open.encryption,
    };
    let session = Session {
        instance_id: open.instance_id,
        report,
    };
    (open.node, session)
}

pub(super) fn session_to_wire(node: &str, instance_id: &str, report: &Report) -> wire::OpenSession {
    wire::OpenSession {
        node: node.to_owned(),
        instance_id: instance_id.to_owned(),
        agent_version: report.agent_version.clone(),
        map_layout_version: report.map_layout_version,
        underlay_addresses: report.underlay_addresses.clone(),
        applied: report.applied.clone(),
        report_age_ms: report
            .age()
            .and_then(|age| i64::try_from(age.as_millis()).ok())
            .unwrap_or(-1),
        refused_records: report.refused_records.clone().into_iter().collect(),
        encryption: report.encryption.clone(),
    }
}

#[cfg(test)]
mod tests;
