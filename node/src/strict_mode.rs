//! Strict mode: keeps the mesh's prefixes in the kernel and in the state folder, so that they are guarded before any record
//! is read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clustermesh_ebpf::Maps;
use clustermesh_ebpf::abi::{MeshKey, MeshValue};
use clustermesh_node_core::mesh_prefixes::{FixedPrefixes, MESH_PREFIXES_LEARNT_MAX, MeshPrefixes};
use clustermesh_process::Drain;
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::metrics::{Metrics, label};
use crate::records::{RETRY_AFTER, Reconciler};
use crate::signals::Signals;
use crate::state_files::{NodeFacts, StateError, StateFiles};

/// Changes of records are carried out together, at most this often.
const GATHER: Duration = Duration::from_millis(200);
/// Prefixes that wait for their end are looked at so often.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What the guard works with.
#[derive(Clone)]
pub struct Handles {
    /// Settings.
    pub config: Arc<Config>,
    /// Keeps what was learnt.
    pub files: Arc<StateFiles>,
    /// Keeps the entries.
    pub maps: Maps,
    /// Knows what the records name.
    pub reconciler: Arc<Reconciler>,
    /// The server's word about this node, its underlay, and whether there is a session.
    pub signals: Arc<Signals>,
    /// Counters.
    pub metrics: Metrics,
}

/// What this node knows of the mesh's prefixes; only where strict mode is on.
pub struct MeshGuard {
    handles: Handles,
    inner: Mutex<Inner>,
    /// True as soon as pods may come up: programs are attached, and prefixes have been learnt, now or in an earlier run.
    ready: watch::Sender<bool>,
}

struct Inner {
    prefixes: MeshPrefixes,
    /// What has been learnt stands in the state folder.
    is_stored: bool,
    /// Something has been learnt, now or in an earlier run.
    has_learnt: bool,
    /// The programs are attached.
    is_attached: bool,
    /// As the map has it.
    written: HashMap<MeshKey, MeshValue>,
    left_out: usize,
}

impl MeshGuard {
    /// Reads what earlier runs have learnt. `None` where strict mode is off.
    ///
    /// # Errors
    /// The file or the map cannot be read.
    pub fn open(handles: Handles) -> anyhow::Result<Option<Arc<Self>>> {
        if !handles.config.encryption.strict {
            return Ok(None);
        }
        let stored = handles.files.mesh_prefixes()?;
        let inner = Inner {
            has_learnt: stored.is_some(),
            // Empty is to be stored too: it is known then.
            is_stored: stored.is_some(),
            prefixes: MeshPrefixes::restored(stored.unwrap_or_default()),
            is_attached: false,
            written: handles.maps.mesh.entries()?.into_iter().collect(),
            left_out: 0,
        };
        Ok(Some(Arc::new(Self {
            handles,
            inner: Mutex::new(inner),
            ready: watch::Sender::new(false),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until pods may come up, at most so long; false if they may not.
    pub async fn wait_ready(&self, limit: Duration) -> bool {
        let mut ready = self.ready.subscribe();
        let wait = ready.wait_for(|ready| *ready);
        matches!(tokio::time::timeout(limit, wait).await, Ok(Ok(_)))
    }

    /// The programs that ask for the prefixes are attached.
    pub fn set_attached(&self) {
        self.lock().is_attached = true;
        self.publish_ready();
    }

    fn publish_ready(&self) {
        let is_ready = {
            let inner = self.lock();
            inner.is_attached && inner.has_learnt
        };
        self.ready
            .send_if_modified(|held| std::mem::replace(held, is_ready) != is_ready);
    }

    /// Makes the map say what is known. What is new goes in before anything goes out.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn fill(&self, facts: &NodeFacts) -> Result<(), clustermesh_ebpf::Error> {
        let Handles {
            config,
            maps,
            signals,
            ..
        } = &self.handles;
        let settings = &config.encryption;
        let underlay = signals.underlay.borrow().addresses.clone();
        let mut inner = self.lock();
        let fixed = FixedPrefixes {
            cluster: &config.cluster,
            ranges: &facts.cluster_pod_cidrs,
            listed: &settings.strict_cidrs,
            addresses: &underlay,
        };
        let wanted = inner.prefixes.entries(&settings.for_model(), &fixed);
        let mut upserts: Vec<_> = wanted
            .iter()
            .filter(|(key, value)| inner.written.get(*key) != Some(*value))
            .map(|(key, value)| (*key, *value))
            .collect();
        upserts.sort_unstable();
        let mut deletes: Vec<_> = inner
            .written
            .keys()
            .filter(|key| !wanted.contains_key(key))
            .copied()
            .collect();
        deletes.sort_unstable();
        let done = maps.mesh.upsert(&upserts);
        let done = done.and_then(|()| maps.mesh.delete(&deletes));
        inner.written = match done {
            Ok(()) => wanted,
            // Some may be there and some not.
            Err(_) => maps.mesh.entries()?.into_iter().collect(),
        };
        done
    }

    /// Takes what the records name now; true if the kernel and the state folder are to follow.
    fn learn(&self, now_ms: u64) -> bool {
        let mut guard = self.handles.reconciler.model();
        let Some(model) = guard.as_mut() else {
            return false;
        };
        let mut inner = self.lock();
        let has_news = model.take_mesh_changed();
        if !model.is_listed() {
            return false;
        }
        // Whoever cuts the node off from the records must not make it forget.
        if !*self.handles.signals.connected.borrow() {
            inner.prefixes.restart_grace(now_ms);
        }
        if !has_news && !inner.prefixes.has_absent() {
            // There may be something left to do of the last time.
            return !inner.is_stored;
        }
        let named = model.mesh_prefixes();
        let is_complete = |cluster: &str| model.is_complete(cluster);
        if inner.prefixes.learn(named, is_complete, now_ms) {
            inner.is_stored = false;
        }
        let left_out = inner.prefixes.left_out();
        if left_out > 0 && inner.left_out == 0 {
            error!(
                prefixes = left_out,
                "strict mode does not guard all of the mesh's prefixes: it holds {MESH_PREFIXES_LEARNT_MAX}; list ranges \
                 in encryption.strict_cidrs that cover the rest"
            );
        }
        inner.left_out = left_out;
        !inner.is_stored
    }

    fn store(&self) -> Result<(), StateError> {
        let prefixes: Vec<_> = self.lock().prefixes.iter().cloned().collect();
        self.handles.files.store_mesh_prefixes(&prefixes)?;
        let mut inner = self.lock();
        inner.is_stored = true;
        inner.has_learnt = true;
        Ok(())
    }

    fn follow(&self, now_ms: u64) -> anyhow::Result<()> {
        let facts = self.handles.signals.facts.borrow().clone();
        if let Some(facts) = facts
            && self.learn(now_ms)
        {
            self.fill(&facts)
                .context("prefixes of the mesh in the kernel")?;
            self.store()
                .context("prefixes of the mesh in the state folder")?;
            self.publish_ready();
        }
        Ok(())
    }
}

/// Keeps the prefixes as the records name them, until the drain.
pub async fn run(guard: Arc<MeshGuard>, drain: Drain) {
    let started = Instant::now();
    let Handles {
        reconciler,
        metrics,
        ..
    } = &guard.handles;
    let mut changes = reconciler.mesh_changes.subscribe();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last_fault = String::new();
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            Ok(()) = changes.changed() => tokio::time::sleep(GATHER).await,
            () = drain.draining() => return,
        }
        changes.mark_unchanged();
        let now_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        match tokio::task::block_in_place(|| guard.follow(now_ms)) {
            Ok(()) => {
                if !std::mem::take(&mut last_fault).is_empty() {
                    info!("the prefixes of the mesh are kept again");
                }
            }
            Err(fault) => {
                let text = format!("{fault:#}");
                if text != last_fault {
                    warn!(
                        fault = text,
                        "the prefixes of the mesh are not kept, trying again"
                    );
                }
                last_fault = text;
                metrics
                    .map_failures
                    .get_or_create(&label("map", "mesh"))
                    .inc();
                tokio::time::sleep(RETRY_AFTER).await;
                reconciler.mesh_changes.send_replace(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_ebpf::abi::{MESH_LISTED, MESH_NODES, MESH_PODS};
    use clustermesh_node_core::mesh_prefixes::{MESH_PREFIX_GRACE_MS, mesh_key};

    use super::*;
    use crate::fixture::Fixture;

    const STRICT: &str = "mode = \"all\"\nstrict = true\nstrict_cidrs = [\"10.9.0.0/16\"]";

    fn guard(fixture: &Fixture) -> Arc<MeshGuard> {
        MeshGuard::open(fixture.guard_handles()).unwrap().unwrap()
    }

    fn flags(fixture: &Fixture, prefix: &str) -> Option<u32> {
        let key = mesh_key(prefix.parse().unwrap());
        let entries = fixture.maps.mesh.entries().unwrap();
        let mut found = entries.into_iter().filter(|(held, _)| *held == key);
        found.next().map(|(_, value)| value.flags)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn pods_come_up_once_programs_are_attached_and_prefixes_known_here_or_from_before() {
        let fixture = Fixture::new(STRICT);
        let (guard, signals) = (guard(&fixture), &fixture.signals);
        let now = Duration::ZERO;
        guard.set_attached();
        assert!(!guard.wait_ready(now).await, "nothing is known");
        // Without the server's word about this node nothing is learnt.
        guard.follow(0).unwrap();
        assert!(!guard.wait_ready(now).await);
        signals.facts.send_replace(Some(Fixture::facts()));
        fixture.add_node(2);
        guard.follow(0).unwrap();
        assert!(guard.wait_ready(now).await);
        // Another run knows it without any record.
        let again = self::guard(&fixture);
        assert!(!again.wait_ready(now).await, "not attached");
        again.set_attached();
        assert!(again.wait_ready(now).await);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_map_has_what_is_learnt_listed_and_ones_own_as_an_exception() {
        let fixture = Fixture::new(STRICT);
        let (guard, signals) = (guard(&fixture), &fixture.signals);
        signals.facts.send_replace(Some(Fixture::facts()));
        fixture.add_node(2);
        guard.follow(0).unwrap();
        for (prefix, expected) in [
            ("10.1.2.0/24", Some(MESH_PODS)),
            ("192.0.2.2/32", Some(MESH_NODES)),
            ("10.1.0.0/16", Some(MESH_PODS)),
            ("10.9.0.0/16", Some(MESH_LISTED)),
            ("192.0.2.1/32", Some(0)),
            ("10.1.3.0/24", None),
        ] {
            assert_eq!(flags(&fixture, prefix), expected, "{prefix}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_gone_stays_for_a_grace_that_runs_only_with_the_records_at_hand() {
        let fixture = Fixture::new(STRICT);
        let (guard, signals) = (guard(&fixture), &fixture.signals);
        signals.facts.send_replace(Some(Fixture::facts()));
        fixture.add_node(2);
        fixture.know_all();
        signals.connected.send_replace(true);
        guard.follow(0).unwrap();
        fixture.remove_node(2);
        guard.follow(1_000).unwrap();
        assert!(flags(&fixture, "10.1.2.0/24").is_some());
        // Cut off for all of it.
        signals.connected.send_replace(false);
        guard.follow(2 * MESH_PREFIX_GRACE_MS).unwrap();
        signals.connected.send_replace(true);
        guard.follow(3 * MESH_PREFIX_GRACE_MS - 1).unwrap();
        assert!(flags(&fixture, "10.1.2.0/24").is_some());
        guard.follow(3 * MESH_PREFIX_GRACE_MS).unwrap();
        assert_eq!(flags(&fixture, "10.1.2.0/24"), None);
        let stored = fixture.files.mesh_prefixes().unwrap().unwrap();
        assert!(stored.is_empty(), "{stored:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn there_is_no_guard_without_strict_mode() {
        let fixture = Fixture::new("mode = \"all\"");
        let guard = MeshGuard::open(fixture.guard_handles()).unwrap();
        assert!(guard.is_none());
    }
}
