//! Leases as the services use them.

use std::time::Duration;

use clustermesh_api::etcd::rpc::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse,
};
use clustermesh_core::auth::Access;
use clustermesh_core::pb::proposal::Command;
use clustermesh_core::{Outcome, check};
use tonic::Status;

use super::Store;
use crate::status::{kv_status, mixed_up, read_status};

impl Store {
    /// `Lease.LeaseGrant`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn lease_grant(
        &self,
        request: LeaseGrantRequest,
    ) -> Result<LeaseGrantResponse, Status> {
        check::check_lease_grant(&request).map_err(|error| kv_status(&error))?;
        match self.propose(Command::LeaseGrant(request)).await? {
            (Outcome::LeaseGrant(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `Lease.LeaseRevoke`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn lease_revoke(
        &self,
        request: LeaseRevokeRequest,
    ) -> Result<LeaseRevokeResponse, Status> {
        match self.propose(Command::LeaseRevoke(request)).await? {
            (Outcome::LeaseRevoke(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// One message of `Lease.LeaseKeepAlive`; an unknown lease gets TTL 0, as in etcd.
    ///
    /// # Errors
    /// No leader.
    pub async fn lease_keep_alive(&self, id: i64) -> Result<LeaseKeepAliveResponse, Status> {
        self.permit(|state, actor| {
            state.auth().check_named(actor)?;
            state.check_lease_permitted(actor, id, Access::Write)
        })?;
        let ttl = self
            .replica
            .keep_alive(id)
            .await
            .map_err(|error| read_status(&error))?;
        Ok(LeaseKeepAliveResponse {
            header: Some(self.header(self.revision())),
            id,
            ttl: ttl.map_or(0, seconds),
        })
    }

    /// `Lease.LeaseTimeToLive`; an unknown lease gets TTL -1, as in etcd.
    ///
    /// # Errors
    /// No leader.
    pub async fn lease_time_to_live(
        &self,
        request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Status> {
        self.permit(|state, actor| {
            state.auth().check_named(actor)?;
            if request.keys {
                state.check_lease_permitted(actor, request.id, Access::Read)?;
            }
            Ok(())
        })?;
        let lease = self
            .replica
            .time_to_live(request.id)
            .await
            .map_err(|error| read_status(&error))?;
        let header = Some(self.header(self.revision()));
        Ok(match lease {
            Some(lease) => LeaseTimeToLiveResponse {
                header,
                id: request.id,
                ttl: seconds(lease.remaining),
                granted_ttl: lease.granted_ttl_s,
                keys: if request.keys { lease.keys } else { Vec::new() },
            },
            None => LeaseTimeToLiveResponse {
                header,
                id: request.id,
                ttl: -1,
                ..Default::default()
            },
        })
    }

    /// `Lease.LeaseLeases`.
    ///
    /// # Errors
    /// No leader.
    pub async fn lease_leases(&self) -> Result<LeaseLeasesResponse, Status> {
        self.linearize().await?;
        self.permit(|state, actor| {
            state.auth().check_named(actor)?;
            state
                .leases()
                .try_for_each(|(id, _)| state.check_lease_permitted(actor, id, Access::Read))
        })?;
        let (leases, revision) = self.read(|state| {
            let leases = state.leases().map(|(id, _)| LeaseStatus { id }).collect();
            (leases, state.revision())
        });
        Ok(LeaseLeasesResponse {
            header: Some(self.header(revision)),
            leases,
        })
    }
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}
