//! etcd's Maintenance service: status, backups and alarms of a cluster's store.

use clustermesh_api::etcd::rpc::{
    AlarmMember, AlarmRequest, AlarmType, SnapshotRequest, SnapshotResponse, StatusRequest,
    StatusResponse, alarm_request::AlarmAction, maintenance_client::MaintenanceClient,
};
use tonic::transport::Channel;

use crate::{Client, ClientError, Messages, kv::timed};

impl Client {
    fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel())
    }

    /// What the replica that answers says of itself.
    ///
    /// # Errors
    /// The call failed.
    pub async fn store_status(&self) -> Result<StatusResponse, ClientError> {
        let answer = self.maintenance().status(timed(StatusRequest {})).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| self.fault(status))
    }

    /// A backup of all that the replica has applied, in pieces; the last 32 bytes are the SHA-256 of those before. The first piece comes
    /// once the replica has written the backup.
    ///
    /// # Errors
    /// The call failed.
    pub async fn snapshot(&self) -> Result<Messages<SnapshotResponse>, ClientError> {
        let answer = self.maintenance().snapshot(SnapshotRequest {}).await;
        let stream = answer.map_err(|status| self.fault(status))?.into_inner();
        Ok(Messages::new(self, stream))
    }

    async fn alarm(
        &self,
        action: AlarmAction,
        member_id: u64,
        kind: AlarmType,
    ) -> Result<Vec<AlarmMember>, ClientError> {
        let request = AlarmRequest {
            action: action.into(),
            member_id,
            alarm: kind.into(),
        };
        let answer = self.maintenance().alarm(timed(request)).await;
        answer
            .map(|answer| answer.into_inner().alarms)
            .map_err(|status| self.fault(status))
    }

    /// Alarms that stand.
    ///
    /// # Errors
    /// The call failed.
    pub async fn alarms(&self) -> Result<Vec<AlarmMember>, ClientError> {
        self.alarm(AlarmAction::Get, 0, AlarmType::None).await
    }

    /// Ends one alarm of one replica.
    ///
    /// # Errors
    /// The call failed.
    pub async fn disarm(&self, member_id: u64, kind: AlarmType) -> Result<(), ClientError> {
        self.alarm(AlarmAction::Deactivate, member_id, kind)
            .await
            .map(drop)
    }
}
