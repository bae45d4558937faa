//! The sessions, in memory: who is connected to this replica or another one, and what each kernel holds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use clustermesh_api::limits::{MAX_PEERS, MAX_SESSIONS};
use clustermesh_api::v1::ReportApplied;
use clustermesh_raft::ReplicaId;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use super::elsewhere::{Elsewhere, MAX_SESSIONS_PER_MESSAGE, session_to_wire};
use super::report::Report;
use crate::wire::News;

/// Reasons of refused records that one report names.
const MAX_REASONS: usize = 64;
/// Longest name of a reason.
const MAX_REASON_BYTES: usize = 64;

/// All sessions; clones share them.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    nodes: Mutex<Nodes>,
    elsewhere: Elsewhere,
    /// Anything changed.
    changed: watch::Sender<u64>,
    /// Something of this replica changed.
    changed_here: watch::Sender<u64>,
    /// Tells this process from the one before it.
    epoch: u64,
}

/// The sessions of this replica, each with the version of its last change.
#[derive(Debug)]
struct Nodes {
    open: BTreeMap<String, Entry>,
    version: u64,
    /// Ends by version, for the other replicas; older ones than `forgotten` are not known any more.
    closed: BTreeMap<u64, String>,
    forgotten: u64,
}

impl Nodes {
    fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    fn close(&mut self, node: &str) {
        self.open.remove(node);
        let version = self.next_version();
        self.closed.insert(version, node.to_owned());
        while self.closed.len() > MAX_SESSIONS {
            if let Some((version, _)) = self.closed.pop_first() {
                self.forgotten = version;
            }
        }
    }
}

#[derive(Debug)]
struct Entry {
    serial: u64,
    version: u64,
    instance_id: String,
    /// Dropping it ends the session's task.
    replaced: Option<oneshot::Sender<()>>,
    report: Report,
}

/// Why a session cannot be opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OpenError {
    /// Another run of the agent holds the name.
    #[error(
        "node {node}: a session of agent instance {holder} is open; stop that agent, or give this machine its own node name and certificate"
    )]
    Held {
        /// The node.
        node: String,
        /// Who holds it.
        holder: String,
    },
    /// Too many nodes.
    #[error("{MAX_SESSIONS} sessions are open, which is the limit of one server")]
    Limit,
}

/// An open session; dropping it ends it.
#[derive(Debug)]
pub struct OpenSession {
    registry: Registry,
    node: String,
    serial: u64,
    /// Resolves when the same instance has opened a newer session.
    pub replaced: oneshot::Receiver<()>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// No session.
    #[must_use]
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                nodes: Mutex::new(Nodes {
                    open: BTreeMap::new(),
                    version: 1,
                    closed: BTreeMap::new(),
                    forgotten: 1,
                }),
                elsewhere: Elsewhere::default(),
                changed: watch::Sender::new(0),
                changed_here: watch::Sender::new(0),
                epoch: rand::random(),
            }),
        }
    }

    /// Opens a session of `node`. The same instance replaces its own older one (its connection may have died unseen).
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        &self,
        node: &str,
        instance_id: &str,
        report: Report,
    ) -> Result<OpenSession, OpenError> {
        let (keep, replaced) = oneshot::channel();
        if let Some(holder) = self.inner.elsewhere.other_holder(node, instance_id) {
            return Err(OpenError::Held {
                node: node.to_owned(),
                holder,
            });
        }
        let mut nodes = self.inner.nodes.lock();
        let mut serial = 0;
        match nodes.open.get(node) {
            Some(entry) if entry.instance_id != instance_id => {
                return Err(OpenError::Held {
                    node: node.to_owned(),
                    holder: entry.instance_id.clone(),
                });
            }
            Some(entry) => serial = entry.serial + 1,
            None if nodes.open.len() >= MAX_SESSIONS => return Err(OpenError::Limit),
            None => {}
        }
        let version = nodes.next_version();
        nodes.open.insert(
            node.to_owned(),
            Entry {
                serial,
                version,
                instance_id: instance_id.to_owned(),
                replaced: Some(keep),
                report,
            },
        );
        drop(nodes);
        self.bump_here();
        Ok(OpenSession {
            registry: self.clone(),
            node: node.to_owned(),
            serial,
            replaced,
        })
    }

    /// Whether a session of `node` is open, here or at another replica.
    #[must_use]
    pub fn is_open(&self, node: &str) -> bool {
        self.inner.nodes.lock().open.contains_key(node)
            || self.inner.elsewhere.report(node).is_some()
    }

    /// What is known of `node`, if it is connected to this or another replica.
    #[must_use]
    pub fn report(&self, node: &str) -> Option<Report> {
        let nodes = self.inner.nodes.lock();
        let here = nodes.open.get(node).map(|entry| entry.report.clone());
        drop(nodes);
        here.or_else(|| self.inner.elsewhere.report(node))
    }

    /// Takes what replica `from` tells of its sessions.
    ///
    /// # Errors
    /// A text, upon which the sender begins anew.
    pub(crate) fn take_from(&self, from: ReplicaId, told: News) -> Result<(), String> {
        if self.inner.elsewhere.take(from, told)? {
            self.bump();
        }
        Ok(())
    }

    /// What changed at this replica since version `taken` (0: everything), and whether there is more than goes into one message.
    pub(crate) fn since(&self, taken: u64) -> (News, bool) {
        let nodes = self.inner.nodes.lock();
        // Ends that are forgotten cannot be told: all begins anew.
        let taken = if taken < nodes.forgotten { 0 } else { taken };
        let open = nodes.open.iter().map(|(node, entry)| (entry.version, node));
        let closed = nodes
            .closed
            .range(taken..)
            .map(|(version, node)| (*version, node));
        let closed = closed.filter(|_| taken != 0);
        let mut changed: Vec<_> = open
            .chain(closed)
            .filter(|(version, _)| *version > taken)
            .collect();
        changed.sort_unstable();
        let more = changed.len() > MAX_SESSIONS_PER_MESSAGE;
        changed.truncate(MAX_SESSIONS_PER_MESSAGE);
        let mut message = News {
            epoch: self.inner.epoch,
            from_version: taken,
            to_version: match changed.last() {
                Some((last, _)) if more => *last,
                _ => nodes.version,
            },
            ..News::default()
        };
        for (version, node) in changed {
            match nodes.open.get(node) {
                Some(entry) if entry.version == version => {
                    let open = session_to_wire(node, &entry.instance_id, &entry.report);
                    message.open.push(open);
                }
                // Opened again since: that is told too.
                Some(_) => {}
                None => message.closed.push(node.clone()),
            }
        }
        (message, more)
    }

    /// Fires at each opening, end and report.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// Fires at what changes at this replica.
    pub(crate) fn changes_here(&self) -> watch::Receiver<u64> {
        self.inner.changed_here.subscribe()
    }

    fn bump_here(&self) {
        self.inner
            .changed_here
            .send_modify(|count| *count = count.wrapping_add(1));
        self.bump();
    }

    fn bump(&self) {
        self.inner
            .changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl OpenSession {
    /// Takes a report.
    pub fn applied(&self, told: ReportApplied) {
        let ReportApplied {
            sources,
            refused_records,
            encryption,
        } = told;
        // An honest agent has no more to say; another one shall not fill this server's memory.
        let sources = sources.into_iter().take(MAX_PEERS + 1).collect();
        let refused_records = refused_records
            .into_iter()
            .filter(|(reason, _)| reason.len() <= MAX_REASON_BYTES)
            .take(MAX_REASONS)
            .collect();
        let encryption = encryption.filter(|told| told.backend.len() <= MAX_REASON_BYTES);
        let mut nodes = self.registry.inner.nodes.lock();
        let version = nodes.next_version();
        if let Some(entry) = nodes
            .open
            .get_mut(&self.node)
            .filter(|entry| entry.serial == self.serial)
        {
            entry.version = version;
            entry.report.applied = sources;
            entry.report.refused_records = refused_records;
            entry.report.encryption = encryption;
            entry.report.reported = Some(Instant::now());
        }
        drop(nodes);
        self.registry.bump_here();
    }
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        let mut nodes = self.registry.inner.nodes.lock();
        if nodes
            .open
            .get(&self.node)
            .is_some_and(|entry| entry.serial == self.serial)
        {
            nodes.close(&self.node);
        }
        drop(nodes);
        self.registry.bump_here();
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(replaced) = self.replaced.take() {
            // The session's task may have ended before.
            let _ = replaced.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_api::v1::SourceRevision;

    use super::*;

    fn report(sources: Vec<SourceRevision>) -> ReportApplied {
        ReportApplied {
            sources,
            ..ReportApplied::default()
        }
    }

    #[test]
    fn a_second_instance_is_refused_while_the_first_lives() {
        let registry = Registry::new();
        let first = registry.open("w1", "a", Report::default()).unwrap();
        let error = registry.open("w1", "b", Report::default()).unwrap_err();
        assert!(error.to_string().contains("instance a"), "{error}");
        drop(first);
        assert!(registry.open("w1", "b", Report::default()).is_ok());
    }

    #[test]
    fn the_same_instance_takes_over_and_the_old_session_touches_nothing() {
        let registry = Registry::new();
        let mut old = registry.open("w1", "a", Report::default()).unwrap();
        let mut new = registry.open("w1", "a", Report::default()).unwrap();
        assert!(old.replaced.try_recv().is_ok() && new.replaced.try_recv().is_err());
        old.applied(report(vec![SourceRevision::default()]));
        drop(old);
        assert!(registry.report("w1").unwrap().applied.is_empty());
        drop(new);
        assert!(!registry.is_open("w1"));
    }

    #[test]
    fn a_report_counts_only_for_its_store() {
        let registry = Registry::new();
        let session = registry.open("w1", "a", Report::default()).unwrap();
        let source = |store_id, revision| SourceRevision {
            cluster: "c2".into(),
            store_id,
            revision,
        };
        session.applied(report(vec![source(1, 10)]));
        let report = registry.report("w1").unwrap();
        assert!(report.has_applied(&source(1, 10)));
        assert!(!report.has_applied(&source(1, 11)));
        assert!(!report.has_applied(&source(2, 5)));
    }
}
