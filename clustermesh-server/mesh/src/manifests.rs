//! Apply and Delete of manifests: one transaction for the whole list, or the list of what is wrong.

use std::collections::BTreeSet;
use std::net::IpAddr;

use bytes::Bytes;
use clustermesh_api::limits::MAX_MANIFESTS_PER_APPLY;
use clustermesh_api::manifest::{
    KIND_SERVICE, KIND_WORKLOAD, Manifest, ManifestError, ServiceManifest, ServiceStatus,
    StoredService, StoredWorkload, WorkloadManifest, WorkloadStatus,
};
use clustermesh_api::records::{Identity, IdentityError, IpIdentityPair};
use clustermesh_api::v1::object_outcome::Action;
use clustermesh_api::v1::{ObjectOutcome, ObjectRef};

use crate::allocate::{
    AllocateError, Plan, VirtualAddressRequest, identity, release_virtual_addresses,
    virtual_addresses,
};
use crate::claims::{ClaimError, KIND_NODE, clear_endpoints, remove_node};
use crate::draft::Draft;
use crate::holders::Holders;
use crate::keys;
use crate::settings::ClusterSettings;
use crate::step::{MAX_STEP_WRITES, Step};
use crate::view::View;

/// Why one object of a list cannot be applied or deleted; nothing of the list is.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// More objects than one call may have.
    #[error("{0} objects in one call, at most {MAX_MANIFESTS_PER_APPLY} are taken: split the list")]
    TooMany(usize),
    /// The manifest itself is wrong.
    #[error("object {index}: {source}")]
    Manifest {
        /// Place in the list, from 0.
        index: usize,
        /// What is wrong.
        source: ManifestError,
    },
    /// Two manifests of one object.
    #[error("{object} occurs twice in the list")]
    Duplicate {
        /// Kind, namespace and name.
        object: String,
    },
    /// The server could not decide its part.
    #[error("{object}: {source}")]
    Allocate {
        /// Kind, namespace and name.
        object: String,
        /// What is missing.
        source: AllocateError,
    },
    /// Labels that make no identity.
    #[error("{object}: {source}")]
    Identity {
        /// Kind, namespace and name.
        object: String,
        /// What is wrong.
        source: IdentityError,
    },
    /// What is stored under its key cannot be read.
    #[error("{object}: the stored object is damaged: {reason}")]
    Damaged {
        /// Kind, namespace and name.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// Only some kinds can be deleted.
    #[error("{object}: kind is not known, expected {KIND_SERVICE}, {KIND_WORKLOAD} or {KIND_NODE}")]
    Kind {
        /// Kind, namespace and name.
        object: String,
    },
    /// A node that cannot be removed.
    #[error("{object}: {source}")]
    Node {
        /// Kind and name.
        object: String,
        /// Why.
        source: ClaimError,
    },
}

/// Plans Apply: each manifest (JSON) is validated, gets its identity or virtual addresses, and is stored.
///
/// # Errors
/// Everything that is wrong with the list; nothing is stored then.
pub fn plan_apply(
    view: &dyn View,
    settings: &ClusterSettings,
    manifests: &[Bytes],
    now_unix_ms: i64,
) -> Result<Plan<Vec<ObjectOutcome>>, Vec<ApplyError>> {
    check_count(manifests.len())?;
    let mut draft = Draft::new(view);
    let (mut outcomes, mut errors, mut seen) = (
        Vec::with_capacity(manifests.len()),
        Vec::new(),
        BTreeSet::new(),
    );
    for (index, json) in manifests.iter().enumerate() {
        let manifest = match Manifest::from_json(json) {
            Ok(manifest) => manifest,
            Err(source) => {
                errors.push(ApplyError::Manifest { index, source });
                continue;
            }
        };
        let metadata = manifest.metadata();
        let object = object_name(manifest.kind(), &metadata.namespace, &metadata.name);
        if !seen.insert(object.clone()) {
            errors.push(ApplyError::Duplicate { object });
            continue;
        }
        let outcome = match manifest {
            Manifest::Service(service) => apply_service(&mut draft, settings, service, now_unix_ms),
            Manifest::Workload(workload) => {
                apply_workload(&mut draft, settings, workload, now_unix_ms)
            }
        };
        match outcome {
            Ok(outcome) => outcomes.push(outcome),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() {
        Ok(Plan {
            txn: draft.into_txn(),
            result: outcomes,
        })
    } else {
        Err(errors)
    }
}

/// Plans Delete of Services, Workloads and Nodes. What does not exist is reported, not an error.
///
/// # Errors
/// Everything that is wrong with the list; nothing is deleted then.
pub fn plan_delete(
    view: &dyn View,
    settings: &ClusterSettings,
    objects: &[ObjectRef],
    now_unix_ms: i64,
) -> Result<Plan<Vec<ObjectOutcome>>, Vec<ApplyError>> {
    check_count(objects.len())?;
    let mut draft = Draft::new(view);
    let (mut outcomes, mut errors) = (Vec::with_capacity(objects.len()), Vec::new());
    for reference in objects {
        match delete(&mut draft, settings, reference, now_unix_ms) {
            Ok(existed) => outcomes.push(ObjectOutcome {
                kind: reference.kind.clone(),
                namespace: reference.namespace.clone(),
                name: reference.name.clone(),
                action: if existed {
                    Action::Deleted
                } else {
                    Action::NotFound
                }
                .into(),
                ..Default::default()
            }),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() {
        Ok(Plan {
            txn: draft.into_txn(),
            result: outcomes,
        })
    } else {
        Err(errors)
    }
}

/// [`plan_delete`] in steps: endpoints of a node that has many go first. The whole list is judged before each.
///
/// # Errors
/// As [`plan_delete`].
pub fn plan_delete_step(
    view: &dyn View,
    settings: &ClusterSettings,
    objects: &[ObjectRef],
    now_unix_ms: i64,
) -> Result<Plan<Step<Vec<ObjectOutcome>, ()>>, Vec<ApplyError>> {
    let Plan { txn, result } = plan_delete(view, settings, objects, now_unix_ms)?;
    if txn.writes().len() > MAX_STEP_WRITES {
        let mut draft = Draft::new(view);
        for node in objects.iter().filter(|object| object.kind == KIND_NODE) {
            // What was judged of it: that it is not connected.
            draft.guard(keys::session(&node.name));
            clear_endpoints(&mut draft, &node.name, MAX_STEP_WRITES);
        }
        if draft.writes() > 0 {
            return Ok(Plan {
                txn: draft.into_txn(),
                result: Step::More(()),
            });
        }
    }
    Ok(Plan {
        txn,
        result: Step::Done(result),
    })
}

fn check_count(count: usize) -> Result<(), Vec<ApplyError>> {
    if count > MAX_MANIFESTS_PER_APPLY {
        Err(vec![ApplyError::TooMany(count)])
    } else {
        Ok(())
    }
}

fn object_name(kind: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        format!("{kind} {name}")
    } else {
        format!("{kind} {namespace}/{name}")
    }
}

fn apply_workload(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    manifest: WorkloadManifest,
    now_unix_ms: i64,
) -> Result<ObjectOutcome, ApplyError> {
    let (namespace, name) = (
        manifest.metadata.namespace.clone(),
        manifest.metadata.name.clone(),
    );
    let object = || object_name(KIND_WORKLOAD, &namespace, &name);
    let account = manifest.spec.service_account.clone();
    let labels = Identity::of_workload(
        &settings.name,
        &namespace,
        account.as_deref(),
        &manifest.metadata.labels,
    )
    .map_err(|source| ApplyError::Identity {
        object: object(),
        source,
    })?;
    let number =
        identity(draft, settings, &labels, now_unix_ms).map_err(|source| ApplyError::Allocate {
            object: object(),
            source,
        })?;
    let stored = StoredWorkload {
        object: manifest,
        status: WorkloadStatus { identity: number },
    };
    let action = store(draft, keys::workload(&namespace, &name), stored.encode());
    if action != Action::Unchanged {
        rewrite_addresses(draft, &stored);
    }
    Ok(ObjectOutcome {
        kind: KIND_WORKLOAD.to_owned(),
        namespace,
        name,
        action: action.into(),
        addresses: Vec::new(),
        identity: number,
    })
}

/// Endpoints that the Workload has already get its identity in the same transaction.
fn rewrite_addresses(draft: &mut Draft<'_>, workload: &StoredWorkload) {
    let metadata = &workload.object.metadata;
    let holders = Holders::read(draft, &metadata.namespace, &metadata.name);
    for address in holders.addresses() {
        let key = keys::address(address);
        let Some(kv) = draft.get(&key) else { continue };
        let Ok(mut pair) = IpIdentityPair::decode(&kv.value) else {
            continue;
        };
        if pair.k8s_namespace != metadata.namespace || pair.k8s_pod_name != metadata.name {
            continue;
        }
        pair.id = workload.status.identity;
        pair.k8s_service_account = workload
            .object
            .spec
            .service_account
            .clone()
            .unwrap_or_default();
        draft.guard(key.clone());
        draft.put(key, pair.encode());
    }
}

fn apply_service(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    manifest: ServiceManifest,
    now_unix_ms: i64,
) -> Result<ObjectOutcome, ApplyError> {
    let (namespace, name) = (
        manifest.metadata.namespace.clone(),
        manifest.metadata.name.clone(),
    );
    let object = || object_name(KIND_SERVICE, &namespace, &name);
    let key = keys::stored_service(&namespace, &name);
    let current = stored_service(draft, &key, &object)?
        .map(|stored| stored.status.cluster_ips)
        .unwrap_or_default();
    let request = VirtualAddressRequest {
        service: &format!("{namespace}/{name}"),
        families: &manifest.spec.ip_families,
        current: &current,
    };
    let cluster_ips =
        virtual_addresses(draft, settings, request, now_unix_ms).map_err(|source| {
            ApplyError::Allocate {
                object: object(),
                source,
            }
        })?;
    let addresses = cluster_ips.iter().map(IpAddr::to_string).collect();
    let stored = StoredService {
        object: manifest,
        status: ServiceStatus { cluster_ips },
    };
    let action = store(draft, key, stored.encode());
    Ok(ObjectOutcome {
        kind: KIND_SERVICE.to_owned(),
        namespace,
        name,
        action: action.into(),
        addresses,
        identity: 0,
    })
}

fn stored_service(
    view: &dyn View,
    key: &Bytes,
    object: &dyn Fn() -> String,
) -> Result<Option<StoredService>, ApplyError> {
    view.get(key)
        .map(|kv| StoredService::decode(&kv.value))
        .transpose()
        .map_err(|error| ApplyError::Damaged {
            object: object(),
            reason: error.to_string(),
        })
}

fn store(draft: &mut Draft<'_>, key: Bytes, value: Bytes) -> Action {
    draft.guard(key.clone());
    let existed = draft.get(&key).is_some();
    match (existed, draft.put(key, value)) {
        (false, _) => Action::Created,
        (true, true) => Action::Configured,
        (true, false) => Action::Unchanged,
    }
}

fn delete(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    reference: &ObjectRef,
    now_unix_ms: i64,
) -> Result<bool, ApplyError> {
    let ObjectRef {
        kind,
        namespace,
        name,
    } = reference;
    let object = || object_name(kind, namespace, name);
    match kind.as_str() {
        KIND_WORKLOAD => {
            // Its endpoints keep their records until their node gives them up.
            let key = keys::workload(namespace, name);
            draft.guard(key.clone());
            Ok(draft.delete(key))
        }
        KIND_SERVICE => {
            let key = keys::stored_service(namespace, name);
            let Some(stored) = stored_service(draft, &key, &object)? else {
                return Ok(false);
            };
            let service = format!("{namespace}/{name}");
            release_virtual_addresses(draft, &service, &stored.status.cluster_ips, now_unix_ms)
                .map_err(|source| ApplyError::Allocate {
                    object: object(),
                    source,
                })?;
            draft.guard(key.clone());
            Ok(draft.delete(key))
        }
        KIND_NODE => remove_node(draft, settings, name).map_err(|source| ApplyError::Node {
            object: object(),
            source,
        }),
        _ => Err(ApplyError::Kind { object: object() }),
    }
}

#[cfg(test)]
mod tests;
