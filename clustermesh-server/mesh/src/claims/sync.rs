//! The complete set of a machine's endpoints, as it says it when a session begins: in steps, however many there are.

use std::collections::BTreeSet;
use std::net::IpAddr;

use clustermesh_api::keys::READINESS_PREFIX;
use clustermesh_api::limits::MAX_ENDPOINTS_PER_NODE;
use clustermesh_api::records::IpIdentityPair;
use clustermesh_api::v1::SyncEndpoints;

use super::{ClaimError, NodeMemo, endpoint};
use crate::allocate::Plan;
use crate::draft::Draft;
use crate::keys;
use crate::settings::ClusterSettings;
use crate::step::Step;
use crate::view::View;

/// How far a sync has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncProgress {
    /// Claims that were taken or refused.
    judged: usize,
    /// Addresses of those that were taken.
    kept: BTreeSet<IpAddr>,
    refused: Vec<ClaimError>,
}

/// Plans the next step of the complete set of a machine's endpoints; in the last ones the records of others that it
/// holds go. The result lists the claims that were refused; they do not stop the others.
///
/// # Errors
/// The node is unknown or claims too many endpoints.
pub fn plan_sync(
    view: &dyn View,
    settings: &ClusterSettings,
    node: &str,
    memo: &mut NodeMemo,
    sync: &SyncEndpoints,
    progress: &SyncProgress,
) -> Result<Plan<Step<Vec<ClaimError>, SyncProgress>>, ClaimError> {
    let key = keys::node(&settings.name, node);
    let record = memo.stored(view, &key, node)?;
    let count = sync.endpoints.len();
    if count > MAX_ENDPOINTS_PER_NODE {
        return Err(ClaimError::Count {
            object: format!("node {node}"),
            what: "endpoints",
            count,
            limit: MAX_ENDPOINTS_PER_NODE,
        });
    }
    let mut draft = Draft::new(view);
    draft.guard(key);
    let mut progress = progress.clone();
    for claim in sync.endpoints.iter().skip(progress.judged) {
        if draft.is_full_step() {
            return Ok(more(draft, progress));
        }
        match endpoint::upsert(&mut draft, record, claim) {
            Ok(addresses) => progress.kept.extend(addresses),
            Err(error) => progress.refused.push(error),
        }
        progress.judged += 1;
    }
    for address in view.addresses_of(node) {
        let is_surplus = !progress.kept.contains(&address)
            && draft
                .get(&keys::address(address))
                .and_then(|kv| IpIdentityPair::decode(&kv.value).ok())
                .is_some_and(|pair| pair.node() == Some(node));
        if is_surplus {
            if draft.is_full_step() {
                return Ok(more(draft, progress));
            }
            endpoint::delete(&mut draft, node, address)?;
        }
    }
    // Readiness of addresses that went while the server did not hear of it.
    let prefix = format!("{READINESS_PREFIX}{node}/");
    for kv in view.list(prefix.as_bytes()) {
        let address = std::str::from_utf8(&kv.key[prefix.len()..])
            .ok()
            .and_then(|text| text.parse::<IpAddr>().ok());
        if address.is_none_or(|address| !progress.kept.contains(&address)) {
            if draft.is_full_step() {
                return Ok(more(draft, progress));
            }
            draft.delete(kv.key);
        }
    }
    Ok(Plan {
        txn: draft.into_txn(),
        result: Step::Done(progress.refused),
    })
}

fn more(draft: Draft<'_>, progress: SyncProgress) -> Plan<Step<Vec<ClaimError>, SyncProgress>> {
    Plan {
        txn: draft.into_txn(),
        result: Step::More(progress),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::step::MAX_STEP_WRITES;
    use crate::test_support::{Lab, claim, commit, workload};

    /// More endpoints than one transaction may write.
    const ENDPOINTS: usize = 3 * MAX_STEP_WRITES;

    fn address(number: usize) -> String {
        format!("fd01::{:x}", 0x1000 + number)
    }

    fn lab() -> Lab {
        let mut lab = Lab::new();
        lab.node("n1", "192.0.2.1");
        for part in (0..ENDPOINTS).collect::<Vec<_>>().chunks(500) {
            let manifests: Vec<_> = part
                .iter()
                .map(|number| workload(&format!("w-{number}"), &[]))
                .collect();
            lab.apply(&manifests);
        }
        lab
    }

    fn sync(lab: &mut Lab, endpoints: impl Iterator<Item = usize>) -> (Vec<ClaimError>, usize) {
        let sync = SyncEndpoints {
            request_id: 1,
            endpoints: endpoints
                .map(|number| claim(&format!("w-{number}"), &[&address(number)]))
                .collect(),
        };
        let (mut progress, mut memo) = (SyncProgress::default(), NodeMemo::default());
        let mut steps = 0;
        loop {
            let plan =
                plan_sync(&lab.view, &lab.settings, "n1", &mut memo, &sync, &progress).unwrap();
            assert!(plan.txn.writes().len() < MAX_STEP_WRITES + 8);
            assert!(plan.txn.approximate_bytes() < 1 << 20);
            steps += 1;
            match commit(&mut lab.view, plan) {
                Step::Done(refused) => return (refused, steps),
                Step::More(next) => progress = next,
            }
        }
    }

    #[test]
    fn a_large_set_is_written_and_emptied_in_bounded_steps() {
        let mut lab = lab();
        let (refused, steps) = sync(&mut lab, 0..ENDPOINTS + 2);
        let text = refused.iter().fold(String::new(), |mut text, error| {
            let _ = write!(text, "{error};");
            text
        });
        assert_eq!(refused.len(), 2, "{text}");
        assert!(steps > 3);
        assert_eq!(lab.view.addresses_of("n1").len(), ENDPOINTS);

        let before = lab.view.revision();
        let (_, steps) = sync(&mut lab, 0..ENDPOINTS);
        assert!(steps > 1, "what is judged is bounded too");
        assert_eq!(lab.view.revision(), before, "nothing changed");

        let (refused, steps) = sync(&mut lab, 0..3);
        assert!(refused.is_empty() && steps > 2);
        assert_eq!(lab.view.addresses_of("n1").len(), 3);
        assert_eq!(lab.view.list(b"clustermesh.io/alloc/endpoints/").len(), 3);
    }
}
