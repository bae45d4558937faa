//! `etcdserverpb.Maintenance`.

mod downgrade;
mod snapshot;

use clustermesh_api::etcd::rpc::alarm_request::AlarmAction;
use clustermesh_api::etcd::rpc::maintenance_server::Maintenance;
use clustermesh_api::etcd::rpc::{
    AlarmRequest, AlarmResponse, DefragmentRequest, DefragmentResponse, DowngradeRequest,
    DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest,
    MoveLeaderResponse, SnapshotRequest, SnapshotResponse, StatusRequest, StatusResponse,
};
use clustermesh_raft::MemberError;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::answers::AnswerBudget;
use crate::auth::Caller;
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct MaintenanceService {
    store: Store,
    answers: AnswerBudget,
}

impl MaintenanceService {
    /// Over `store`; snapshots on their way live on `answers`.
    pub fn new(store: Store, answers: AnswerBudget) -> Self {
        Self { store, answers }
    }
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    type SnapshotStream = ReceiverStream<Result<SnapshotResponse, Status>>;

    async fn alarm(
        &self,
        request: Request<AlarmRequest>,
    ) -> Result<Response<AlarmResponse>, Status> {
        let caller = Caller::of(&request)?;
        let store = self.store.asked_by(&request)?;
        let request = request.into_inner();
        if request.action() == AlarmAction::Get {
            caller.check_known()?;
        } else {
            caller.check_operator()?;
            store.permit_admin()?;
        }
        Ok(Response::new(store.alarm(request).await?))
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        Caller::of(&request)?.check_known()?;
        self.store.asked_by(&request)?.permit_named()?;
        Ok(Response::new(self.store.maintenance_status()))
    }

    /// History is dropped and memory given back as compactions go; the log is cut by snapshots. Nothing is left to do here.
    async fn defragment(
        &self,
        request: Request<DefragmentRequest>,
    ) -> Result<Response<DefragmentResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        // etcd sends no header here.
        Ok(Response::new(DefragmentResponse::default()))
    }

    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        let (hash, revision) = self.store.hash().await?;
        Ok(Response::new(HashResponse {
            header: Some(self.store.header(revision)),
            hash,
        }))
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        let revision = request.get_ref().revision;
        Ok(Response::new(self.store.hash_kv(revision).await?))
    }

    async fn snapshot(
        &self,
        request: Request<SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        let reservation = self.answers.reserve(snapshot::HELD_BYTES)?;
        let mut response = Response::new(snapshot::stream(self.store.clone()).await?);
        response.extensions_mut().insert(reservation);
        Ok(response)
    }

    async fn move_leader(
        &self,
        request: Request<MoveLeaderRequest>,
    ) -> Result<Response<MoveLeaderResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        let status = self.store.replica().status();
        if !status.is_leader {
            return Err(Status::failed_precondition("etcdserver: not leader"));
        }
        let target = request.get_ref().target_id;
        if target == status.replica_id {
            // etcd: moving it to where it is succeeds.
            return Ok(Response::new(MoveLeaderResponse::default()));
        }
        match self.store.replica().transfer_leader(target).await {
            // etcd sends no header here.
            Ok(()) => Ok(Response::new(MoveLeaderResponse::default())),
            Err(MemberError::NotFound) => Err(Status::failed_precondition(
                "etcdserver: bad leader transferee",
            )),
            Err(error) => {
                tracing::warn!(%error, target = format!("{target:016x}"), "the leader was not moved");
                // Clients know this text.
                Err(Status::unavailable(
                    "etcdserver: request timed out, leader transfer took too long",
                ))
            }
        }
    }

    async fn downgrade(
        &self,
        request: Request<DowngradeRequest>,
    ) -> Result<Response<DowngradeResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        downgrade::answer(&self.store, request.get_ref()).map(Response::new)
    }
}
