//! Workloads of this cluster as ADD needs them: by the records, and until those are listed by the last run's knowledge.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_node_core::change::WorkloadName;

use super::reconciler::Reconciler;
use crate::state_files::{StateError, StateFiles, StoredWorkload};

/// ADD waits so long for its workload.
pub const WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// The workloads and their identities.
pub struct Workloads {
    reconciler: Arc<Reconciler>,
    files: Arc<StateFiles>,
    /// Of an earlier run.
    cached: HashMap<WorkloadName, u32>,
}

impl Workloads {
    /// With those that an earlier run has stored.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open(files: &Arc<StateFiles>, reconciler: &Arc<Reconciler>) -> Result<Self, StateError> {
        let cached = files.workloads()?.into_iter().map(|workload| {
            let name = WorkloadName {
                namespace: workload.namespace.into(),
                name: workload.name.into(),
            };
            (name, workload.identity)
        });
        Ok(Self {
            reconciler: Arc::clone(reconciler),
            files: Arc::clone(files),
            cached: cached.collect(),
        })
    }

    /// The identity of a workload; from the last run's knowledge until the records have been listed.
    #[must_use]
    pub fn identity_of(&self, workload: &WorkloadName) -> Option<u32> {
        if let Some(model) = self.reconciler.model().as_ref().filter(|m| m.is_listed()) {
            return model.workload(workload)?.identity;
        }
        self.cached.get(workload).copied()
    }

    /// Waits for a workload and its identity, at most [`WORKLOAD_WAIT`].
    pub async fn wait_for(&self, workload: &WorkloadName) -> Option<u32> {
        let mut changes = self.reconciler.workload_changes.subscribe();
        let known = async {
            loop {
                if let Some(identity) = self.identity_of(workload) {
                    return Some(identity);
                }
                changes.changed().await.ok()?;
            }
        };
        tokio::time::timeout(WORKLOAD_WAIT, known)
            .await
            .ok()
            .flatten()
    }

    /// Stores the known workloads for the next start.
    ///
    /// # Errors
    /// The state folder cannot be written.
    pub fn store(&self) -> Result<(), StateError> {
        let mut workloads: Vec<StoredWorkload> = {
            let model = self.reconciler.model();
            let Some(model) = model.as_ref().filter(|model| model.is_listed()) else {
                return Ok(());
            };
            model
                .workloads()
                .filter_map(|(name, declaration)| {
                    Some(StoredWorkload {
                        namespace: name.namespace.to_string(),
                        name: name.name.to_string(),
                        labels: declaration.labels.clone(),
                        identity: declaration.identity?,
                    })
                })
                .collect()
        };
        workloads.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        self.files.store_workloads(&workloads)
    }
}
