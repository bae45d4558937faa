//! Keys as the services use them: ranges, puts, deletes, transactions, compactions.

use clustermesh_api::etcd::rpc::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse, request_op,
};
use clustermesh_core::auth::Access;
use clustermesh_core::pb::proposal::Command;
use clustermesh_core::{Outcome, check, is_read_only};
use prost::Message;
use tonic::Status;

use super::Store;
use crate::status::{kv_status, mixed_up};

impl Store {
    /// `KV.Range`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Status> {
        check::check_range(request).map_err(|error| kv_status(&error))?;
        if request.serializable {
            self.check_not_diverged()?;
        } else {
            self.linearize().await?;
        }
        let (response, revision) = self.read(|state| {
            self.permit_on(state, |state, actor| {
                let (key, range_end) = (&request.key, &request.range_end);
                state
                    .auth()
                    .check_range(actor, key, range_end, Access::Read)
            })?;
            Ok::<_, Status>((state.range(request), state.revision()))
        })?;
        let mut response = response.map_err(|error| kv_status(&error))?;
        response.header = Some(self.header(revision));
        Ok(response)
    }

    /// `KV.Put`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn put(&self, request: PutRequest) -> Result<PutResponse, Status> {
        check::check_put(&request).map_err(|error| kv_status(&error))?;
        check_size(&request)?;
        match self.propose(Command::Put(request)).await? {
            (Outcome::Put(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `KV.DeleteRange`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn delete_range(
        &self,
        request: DeleteRangeRequest,
    ) -> Result<DeleteRangeResponse, Status> {
        check::check_delete_range(&request).map_err(|error| kv_status(&error))?;
        check_size(&request)?;
        match self.propose(Command::DeleteRange(request)).await? {
            (Outcome::DeleteRange(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `KV.Txn`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        check::check_txn(&request).map_err(|error| kv_status(&error))?;
        check_size(&request)?;
        if is_read_only(&request) {
            if is_serializable(&request) {
                self.check_not_diverged()?;
            } else {
                self.linearize().await?;
            }
            let (response, revision) = self.read(|state| {
                self.permit_on(state, |state, actor| {
                    state.check_txn_permitted(actor, &request)
                })?;
                Ok::<_, Status>((state.read_txn(&request), state.revision()))
            })?;
            let mut response = response.map_err(|error| kv_status(&error))?;
            response.header = Some(self.header(revision));
            return Ok(response);
        }
        self.txn_planned(request).await
    }

    /// A transaction that the server itself planned: bound by the log's limits only.
    ///
    /// # Errors
    /// etcd's.
    pub async fn txn_planned(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        match self.propose(Command::Txn(request)).await? {
            (Outcome::Txn(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// [`Self::txn_planned`] for what only the leader writes, while this replica leads.
    ///
    /// # Errors
    /// etcd's; `Unavailable` where another replica leads.
    pub async fn txn_as_leader(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        match self.propose_as_leader(Command::Txn(request)).await? {
            (Outcome::Txn(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }

    /// `KV.Compact`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse, Status> {
        self.permit_admin()?;
        match self.propose(Command::Compact(request)).await? {
            (Outcome::Compact(mut response), header) => {
                response.header = Some(header);
                Ok(response)
            }
            _ => Err(mixed_up()),
        }
    }
}

/// Every range of the transaction may be served from what is applied here.
fn is_serializable(request: &TxnRequest) -> bool {
    // etcd: compares are always linearizable here.
    request.compare.is_empty()
        && request
            .success
            .iter()
            .chain(&request.failure)
            .all(is_serializable_op)
}

fn is_serializable_op(op: &RequestOp) -> bool {
    match &op.request {
        Some(request_op::Request::RequestRange(range)) => range.serializable,
        Some(request_op::Request::RequestTxn(txn)) => is_serializable(txn),
        _ => false,
    }
}

fn check_size(request: &impl Message) -> Result<(), Status> {
    check::check_size(request.encoded_len()).map_err(|error| kv_status(&error))
}
