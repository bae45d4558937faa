//! The sessions at the other replicas of the group, as these tell of them: in memory, and only while they are heard.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clustermesh_api::limits::MAX_SESSIONS;
use clustermesh_process::Drain;
use clustermesh_raft::{AsideError, ReplicaId};
use parking_lot::Mutex;
use prost::Message;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::registry::{Registry, Report};
use crate::store::Store;

/// What the build script made of sessions.proto.
pub(crate) mod wire {
    include!(concat!(env!("OUT_DIR"), "/clustermesh.server.v1.rs"));
}

/// A replica that said nothing for so long counts as gone, with its sessions.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(3);
/// Without a change, the others hear this often that this replica is there.
const TELL_INTERVAL: Duration = Duration::from_millis(500);
/// Changes of so long go into one message.
const COALESCE_INTERVAL: Duration = Duration::from_millis(20);
/// A message without answer after this is told again.
const TELL_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the members of the group are looked at.
const MEMBERS_INTERVAL: Duration = Duration::from_secs(1);
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
    pub fn take(&self, from: ReplicaId, message: Bytes) -> Result<bool, String> {
        let told = wire::Sessions::decode(message).map_err(|error| error.to_string())?;
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
    }
}

/// Tells every other replica of the sessions here, until the drain has begun.
pub async fn tell_others(store: Store, registry: Registry, drain: Drain) {
    let mut told: BTreeMap<ReplicaId, tokio::task::AbortHandle> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    loop {
        told.retain(|_, task| !task.is_finished());
        while tasks.try_join_next().is_some() {}
        for member in store.replica().status().members {
            if member.id != store.member_id() && !told.contains_key(&member.id) {
                let task = tell(store.clone(), registry.clone(), member.id);
                told.insert(member.id, tasks.spawn(task));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(MEMBERS_INTERVAL) => {}
            () = drain.draining() => return,
        }
    }
}

/// Ends when the group has no such replica any more.
async fn tell(store: Store, registry: Registry, to: ReplicaId) {
    let mut changes = registry.changes_here();
    let mut taken = 0;
    loop {
        changes.mark_unchanged();
        loop {
            let (message, more) = registry.since(taken);
            let version = message.to_version;
            let bytes = message.encode_to_vec().into();
            match store.replica().tell(to, bytes, TELL_TIMEOUT).await {
                Ok(()) => taken = version,
                Err(AsideError::Unknown) => return,
                Err(error) => {
                    debug!(replica = %format_args!("{to:016x}"), %error, "sessions are told again");
                    // Whether it was taken or not shows at the next one.
                    if matches!(error, AsideError::Refused(_)) {
                        taken = 0;
                    }
                    break;
                }
            }
            if !more {
                break;
            }
        }
        // The registry outlives this task.
        let _changed_or_time = timeout(TELL_INTERVAL, changes.changed()).await;
        tokio::time::sleep(COALESCE_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests;
