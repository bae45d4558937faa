//! One identity number for one label set.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use bytes::Bytes;
use clustermesh_api::keys::WORKLOADS_PREFIX;
use clustermesh_api::limits::IDENTITY_QUARANTINE_MS;
use clustermesh_api::manifest::StoredWorkload;
use clustermesh_api::records::{Identity, IpIdentityPair};
use serde::{Deserialize, Serialize};

use super::{AllocateError, Plan, keys, plan, read_json, write_json};
use crate::draft::Draft;
use crate::keys as schema;
use crate::settings::ClusterSettings;
use crate::view::View;

/// Identities that one release frees at most: three keys each must fit one transaction.
pub const IDENTITIES_PER_RELEASE: usize = 30;

/// A freed number. Its label set may have it back at any time, another one only after the quarantine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Quarantine {
    freed_at_unix_ms: i64,
    labels: String,
}

/// Who has, or last had, a number.
#[derive(Debug, Serialize, Deserialize)]
struct LabelSet {
    id: u32,
    labels: String,
}

/// Gives the label set its number, within a larger plan. The same labels always get the same number.
///
/// `now_unix_ms` ends quarantines.
///
/// # Errors
/// All numbers are taken or in quarantine, or the labels are not ones of this cluster.
pub fn identity(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    labels: &Identity,
    now_unix_ms: i64,
) -> Result<u32, AllocateError> {
    if labels.cluster() != Some(settings.name.as_str()) {
        return Err(AllocateError::ForeignLabels {
            labels: labels.to_string(),
            cluster: settings.name.clone(),
        });
    }
    let text = labels.to_string();
    let label_key = keys::label_set(&text);
    draft.guard(label_key.clone());
    if let Some(kv) = draft.get(&label_key) {
        let known: LabelSet = read_json(&kv.key, &kv.value)?;
        if known.labels != text {
            return Err(AllocateError::HashCollision { labels: text });
        }
        let record_key = schema::identity(known.id);
        draft.guard(record_key.clone());
        draft.guard(keys::quarantined_identity(known.id));
        draft.delete(keys::quarantined_identity(known.id));
        draft.put(record_key, labels.encode());
        return Ok(known.id);
    }

    let id = free_number(draft, settings, now_unix_ms)?;
    let record_key = schema::identity(id);
    let quarantine_key = keys::quarantined_identity(id);
    draft.guard(record_key.clone());
    draft.guard(quarantine_key.clone());
    if let Some(kv) = draft.get(&quarantine_key) {
        let old: Quarantine = read_json(&kv.key, &kv.value)?;
        draft.delete(keys::label_set(&old.labels));
        draft.delete(quarantine_key);
    }
    draft.put(record_key, labels.encode());
    draft.put(label_key, write_json(&LabelSet { id, labels: text }));
    draft.put(keys::IDENTITY_CURSOR, id.to_string());
    Ok(id)
}

/// Numbers are tried in a circle from the last one given out, so that the search is short and reuse is late.
fn free_number(
    draft: &Draft<'_>,
    settings: &ClusterSettings,
    now_unix_ms: i64,
) -> Result<u32, AllocateError> {
    let (first, last) = number_range(settings)?;
    let cursor = draft
        .get(keys::IDENTITY_CURSOR.as_bytes())
        .and_then(|kv| std::str::from_utf8(&kv.value).ok()?.parse::<u32>().ok())
        .filter(|id| (first..last).contains(id));
    let start = cursor.map_or(first, |id| id + 1);
    for id in (start..=last).chain(first..start) {
        if draft.get(&schema::identity(id)).is_some() {
            continue;
        }
        let Some(kv) = draft.get(&keys::quarantined_identity(id)) else {
            return Ok(id);
        };
        let quarantine: Quarantine = read_json(&kv.key, &kv.value)?;
        if now_unix_ms.saturating_sub(quarantine.freed_at_unix_ms) >= IDENTITY_QUARANTINE_MS {
            return Ok(id);
        }
    }
    Err(AllocateError::IdentitiesExhausted {
        cluster: settings.name.clone(),
        capacity: settings.split.max_local(),
    })
}

/// Numbers for label sets; local number 0 is not one.
fn number_range(settings: &ClusterSettings) -> Result<(u32, u32), AllocateError> {
    let range = settings.split.identities_of(settings.id)?;
    Ok((range.start() + 1, *range.end()))
}

/// [`identity`] as a plan of its own.
///
/// # Errors
/// As [`identity`].
pub fn plan_identity(
    view: &dyn View,
    settings: &ClusterSettings,
    labels: &Identity,
    now_unix_ms: i64,
) -> Result<Plan<u32>, AllocateError> {
    plan(view, |draft| identity(draft, settings, labels, now_unix_ms))
}

/// What a release frees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Numbers that went into quarantine.
    pub identities: Vec<u32>,
    /// More wait for the next plan.
    pub more: bool,
}

/// Frees identities of this cluster that no Workload and no address record uses any more.
///
/// # Errors
/// Bookkeeping is damaged.
pub fn plan_release(
    view: &dyn View,
    settings: &ClusterSettings,
    now_unix_ms: i64,
) -> Result<Plan<Released>, AllocateError> {
    let (first, last) = number_range(settings)?;
    let mut used = BTreeSet::new();
    view.scan(WORKLOADS_PREFIX.as_bytes(), &mut |kv| {
        used.extend(
            StoredWorkload::decode(&kv.value)
                .ok()
                .map(|workload| workload.status.identity),
        );
        ControlFlow::Continue(())
    });
    view.scan(schema::OWN_ADDRESSES_PREFIX.as_bytes(), &mut |kv| {
        used.extend(IpIdentityPair::decode(&kv.value).ok().map(|pair| pair.id));
        ControlFlow::Continue(())
    });
    let mut unused: Vec<(u32, Bytes)> = Vec::new();
    let mut more = false;
    view.scan(schema::OWN_IDENTITIES_PREFIX.as_bytes(), &mut |kv| {
        let Some(id) = schema::identity_of(&kv.key) else {
            return ControlFlow::Continue(());
        };
        if !(first..=last).contains(&id) || used.contains(&id) {
            return ControlFlow::Continue(());
        }
        if unused.len() == IDENTITIES_PER_RELEASE {
            more = true;
            return ControlFlow::Break(());
        }
        unused.push((id, kv.value));
        ControlFlow::Continue(())
    });
    plan(view, |draft| {
        if !unused.is_empty() {
            // A Workload stored meanwhile may use one of them again. Address records need a Workload first.
            draft.guard_prefix(WORKLOADS_PREFIX);
        }
        for (id, value) in &unused {
            let key = schema::identity(*id);
            draft.guard(key.clone());
            draft.delete(key);
            let labels = String::from_utf8_lossy(value).into_owned();
            draft.put(
                keys::quarantined_identity(*id),
                write_json(&Quarantine {
                    freed_at_unix_ms: now_unix_ms,
                    labels,
                }),
            );
        }
        Ok(Released {
            identities: unused.into_iter().map(|(id, _)| id).collect(),
            more,
        })
    })
}
