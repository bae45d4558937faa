//! `clustermesh.v1.Mesh`: the operator's API.

mod report;
mod wait;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::v1::mesh_server::Mesh;
use clustermesh_api::v1::{
    ApplyRequest, ApplyResponse, DeleteRequest, DeleteResponse, MeshStatusRequest,
    MeshStatusResponse, ObjectOutcome, WaitProgress, WaitRequest,
};
use clustermesh_mesh::allocate::Plan;
use clustermesh_mesh::manifests::{ApplyError, plan_apply, plan_delete_step};
use clustermesh_mesh::{ClusterSettings, Txn, View};
use clustermesh_process::Drain;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::agents::registry::Registry;
use crate::auth::Caller;
use crate::peering::PeerStatuses;
use crate::planner::{CommitError, Done, Planner};
use crate::store::Store;

/// A status that may be stale waits so long for a quorum.
const QUORUM_PATIENCE: Duration = Duration::from_secs(2);

/// Progress messages queued for one waiter.
const WAIT_QUEUE_MESSAGES: usize = 4;

/// The service.
#[derive(Debug)]
pub struct MeshService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    settings: Arc<ClusterSettings>,
    planner: Planner,
    registry: Registry,
    peers: PeerStatuses,
    drain: Drain,
}

impl MeshService {
    /// The operator's API of `settings`' cluster.
    #[must_use]
    pub fn new(
        store: Store,
        settings: Arc<ClusterSettings>,
        planner: Planner,
        registry: Registry,
        peers: PeerStatuses,
        drain: Drain,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                settings,
                planner,
                registry,
                peers,
                drain,
            }),
        }
    }
}

#[tonic::async_trait]
impl Mesh for MeshService {
    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let ApplyRequest {
            manifests_json,
            dry_run,
        } = request.into_inner();
        let manifests: Vec<Bytes> = manifests_json;
        let settings = Arc::clone(&self.shared.settings);
        let done = self
            .shared
            .planner
            .commit(move |view: &dyn View, now| {
                plan_apply(view, &settings, &manifests, now)
                    .map(|plan| if dry_run { without_writes(plan) } else { plan })
            })
            .await
            .map_err(refused)?;
        let Done { result, revision } = done;
        Ok(Response::new(ApplyResponse {
            objects: result,
            revision,
        }))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let objects = request.into_inner().objects;
        let settings = Arc::clone(&self.shared.settings);
        let Done { result, revision } = self
            .shared
            .planner
            .submit_steps(move |view: &dyn View, now, (): &()| {
                plan_delete_step(view, &settings, &objects, now)
            })
            .await?
            .await
            .map_err(refused)?;
        Ok(Response::new(DeleteResponse {
            objects: result,
            revision,
        }))
    }

    async fn status(
        &self,
        request: Request<MeshStatusRequest>,
    ) -> Result<Response<MeshStatusResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let store = &self.shared.store;
        let stale = if request.get_ref().accept_stale {
            !store.linearize_within(QUORUM_PATIENCE).await?
        } else {
            store.linearize().await?;
            false
        };
        Ok(Response::new(MeshStatusResponse {
            stale,
            ..report::status(&self.shared)
        }))
    }

    type WaitStream = ReceiverStream<Result<WaitProgress, Status>>;

    async fn wait(
        &self,
        request: Request<WaitRequest>,
    ) -> Result<Response<Self::WaitStream>, Status> {
        Caller::of(&request)?.check_operator()?;
        let timeout_ms = request.into_inner().timeout_ms;
        let (progress, stream) = mpsc::channel(WAIT_QUEUE_MESSAGES);
        tokio::spawn(wait::run(Arc::clone(&self.shared), timeout_ms, progress));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// What a dry run would do, without doing it.
fn without_writes(plan: Plan<Vec<ObjectOutcome>>) -> Plan<Vec<ObjectOutcome>> {
    Plan {
        txn: Txn::new(),
        result: plan.result,
    }
}

fn refused(error: CommitError<Vec<ApplyError>>) -> Status {
    match error {
        CommitError::Refused(errors) => {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            Status::invalid_argument(lines.join("\n"))
        }
        CommitError::Store(status) => status,
    }
}
