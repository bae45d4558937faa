//! `Maintenance.Downgrade`: validates a target as etcd does, and refuses to go there, because there is no older format to go back to.

use clustermesh_api::etcd::rpc::downgrade_request::DowngradeAction;
use clustermesh_api::etcd::rpc::{DowngradeRequest, DowngradeResponse};
use tonic::Status;

use crate::store::Store;
use crate::version::ETCD_CLUSTER_VERSION;

/// Answers one request.
///
/// # Errors
/// etcd's for a target that is no version or not one minor below; `FailedPrecondition` when going there is to begin.
pub(super) fn answer(
    store: &Store,
    request: &DowngradeRequest,
) -> Result<DowngradeResponse, Status> {
    let action = DowngradeAction::try_from(request.action)
        .map_err(|_| Status::unknown("etcdserver: unknown method"))?;
    if action == DowngradeAction::Cancel {
        // Nothing is in progress: etcd answers that with success, too.
        return Ok(response(store));
    }
    check(&request.version)?;
    if action == DowngradeAction::Validate {
        return Ok(response(store));
    }
    Err(Status::failed_precondition(format!(
        "clustermesh: the stored format does not depend on the etcd version; go back by starting an older clustermesh-server, not by a downgrade to {}",
        request.version
    )))
}

fn response(store: &Store) -> DowngradeResponse {
    DowngradeResponse {
        header: Some(store.header(store.revision())),
        version: ETCD_CLUSTER_VERSION
            .rsplit_once('.')
            .map_or(ETCD_CLUSTER_VERSION, |(cluster, _)| cluster)
            .to_owned(),
    }
}

/// The only target that etcd takes is the minor release before its own.
fn check(version: &str) -> Result<(), Status> {
    let target = parse(version).ok_or_else(|| {
        Status::invalid_argument("etcdserver: wrong downgrade target version format")
    })?;
    let allowed = parse(ETCD_CLUSTER_VERSION).map(|(major, minor)| (major, minor.wrapping_sub(1)));
    if Some(target) == allowed {
        Ok(())
    } else {
        Err(Status::invalid_argument(
            "etcdserver: invalid downgrade target version",
        ))
    }
}

/// Major and minor of `major.minor` or a semantic version.
fn parse(version: &str) -> Option<(u64, u64)> {
    let core = version.split(['-', '+']).next()?;
    let numbers: Vec<u64> = core
        .split('.')
        .map(|part| part.parse().ok())
        .collect::<Option<_>>()?;
    match numbers[..] {
        [major, minor, _] => Some((major, minor)),
        [major, minor] if core == version => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_judged_as_etcd_does() {
        for target in ["3.6", "3.6.0", "3.6.7-rc.1"] {
            assert!(check(target).is_ok(), "{target}");
        }
        for target in ["3.7", "3.5.0", "2.6", "4.0.0"] {
            let error = check(target).unwrap_err();
            assert!(error.message().contains("invalid downgrade"), "{target}");
        }
        for target in ["", "3", "x.y", "3.6.1.2", "3.6-rc"] {
            let error = check(target).unwrap_err();
            assert!(error.message().contains("wrong downgrade"), "{target}");
        }
    }
}
