//! Expiry of leases: the leader proposes it as their deadlines pass.

use std::sync::Arc;

use clustermesh_core::{Outcome, pb, pb::proposal::Command};
use openraft::async_runtime::{AsyncRuntime, WatchReceiver};

use crate::{error::ProposeError, metrics::add, proposal::Proposer, shared::Shared, task::Stop};

/// Proposes the expiry of leases as their deadlines pass.
pub(crate) async fn expire<R: AsyncRuntime>(
    shared: Arc<Shared<R>>,
    proposer: Proposer<R>,
    stop: Stop<R>,
) {
    let mut changed = shared.leases.changes();
    loop {
        if let Some((term, ids)) = shared.leases.take_expired() {
            let command = Command::LeaseExpire(pb::LeaseExpire {
                term,
                ids: ids.clone(),
            });
            match stop
                .or(proposer.propose_as_leader(pb::Proposal::system(command)))
                .await
            {
                None => return,
                Some(Ok(committed)) => {
                    match committed.outcome {
                        Ok(Outcome::LeaseExpire { expired }) => {
                            add(&shared.metrics.leases_expired_total, expired.len());
                        }
                        // An alarm stops all changes; once it is gone they expire.
                        Ok(_) | Err(_) => shared.leases.retry(term, &ids),
                    }
                }
                Some(Err(ProposeError::Stopped)) => return,
                Some(Err(error)) => {
                    tracing::debug!(%error, leases = ids.len(), "lease expiry is tried again");
                    shared.leases.retry(term, &ids);
                }
            }
            continue;
        }
        let heard = match shared.leases.next_deadline() {
            Some(deadline) => {
                let wait = R::select2(changed.changed(), R::sleep_until(deadline));
                stop.or(async {
                    let _either = wait.await;
                })
                .await
            }
            None => {
                stop.or(async {
                    let _heard = changed.changed().await;
                })
                .await
            }
        };
        if heard.is_none() {
            return;
        }
    }
}
