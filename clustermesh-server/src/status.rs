//! Errors of the replica as gRPC statuses with etcd's codes and texts.

use clustermesh_core::KvError;
use clustermesh_raft::{ProposeError, ReadError};
use tonic::{Code, Status};

pub(crate) fn mixed_up() -> Status {
    Status::internal("clustermesh: the answer is of another kind than the request")
}

/// etcd's code and text of a refused request.
pub(crate) fn kv_status(error: &KvError) -> Status {
    Status::new(Code::from_i32(error.code()), error.to_string())
}

/// etcd's code and text of a read that cannot be served here.
pub(crate) fn read_status(error: &ReadError) -> Status {
    match error {
        ReadError::NotLeader { .. } => Status::unavailable("etcdserver: no leader"),
        ReadError::NoQuorum => Status::unavailable("etcdserver: request timed out"),
        ReadError::QueueFull { .. } => too_many_requests(),
        ReadError::Stopped => Status::unavailable("etcdserver: server stopped"),
        // Another replica can serve: clients go there.
        ReadError::Diverged => Status::unavailable(format!("clustermesh: {error}")),
    }
}

/// etcd's code and text of a proposal without an answer.
pub(crate) fn propose_status(error: &ProposeError) -> Status {
    match error {
        ProposeError::NotLeader { .. } => Status::unavailable("etcdserver: no leader"),
        // The outcome is open, which is what this text tells etcd's clients.
        ProposeError::Unknown => Status::unavailable(
            "etcdserver: request timed out, possibly due to previous leader failure",
        ),
        ProposeError::Timeout => Status::unavailable("etcdserver: request timed out"),
        ProposeError::QueueFull { .. } => too_many_requests(),
        ProposeError::TooLarge { .. } => kv_status(&KvError::RequestTooLarge),
        ProposeError::Stopped => Status::unavailable("etcdserver: server stopped"),
        // Another replica can serve: clients go there.
        ProposeError::Diverged => Status::unavailable(format!("clustermesh: {error}")),
    }
}

fn too_many_requests() -> Status {
    Status::resource_exhausted("etcdserver: too many requests")
}
