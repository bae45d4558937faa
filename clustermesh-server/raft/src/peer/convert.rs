//! openraft's messages to protobuf and back.

use clustermesh_store::{
    LogId, SnapshotFile, SnapshotMeta,
    wire::{
        CodecError, entry_from_pb, entry_to_pb, log_id_from_pb, log_id_to_pb, membership_to_pb,
        stored_membership_from_pb, vote_from_pb, vote_to_pb,
    },
};
use openraft::{
    async_runtime::AsyncRuntime,
    raft::{
        AppendEntriesRequest, StreamAppendError, StreamAppendResult, VoteRequest, VoteResponse,
    },
};

use crate::{
    Types,
    wire::{Append, AppendAnswer, Matching, Snapshot, Vote, VoteAnswer, append_answer},
};

fn id_to_pb(id: Option<&LogId>) -> Option<clustermesh_store::pb::LogId> {
    id.map(log_id_to_pb)
}

fn id_from_pb(id: Option<&clustermesh_store::pb::LogId>) -> Option<LogId> {
    id.map(log_id_from_pb)
}

fn vote_of(
    vote: Option<&clustermesh_store::pb::Vote>,
) -> Result<clustermesh_store::Vote, CodecError> {
    vote.map(vote_from_pb).ok_or(CodecError::Missing("vote"))
}

pub(crate) fn append_to_wire<R: AsyncRuntime>(request: &AppendEntriesRequest<Types<R>>) -> Append {
    Append {
        vote: Some(vote_to_pb(&request.vote)),
        prev_log_id: id_to_pb(request.prev_log_id.as_ref()),
        entries: request.entries.iter().map(entry_to_pb).collect(),
        leader_commit: id_to_pb(request.leader_commit.as_ref()),
    }
}

pub(crate) fn append_from_wire<R: AsyncRuntime>(
    append: Append,
) -> Result<AppendEntriesRequest<Types<R>>, CodecError> {
    Ok(AppendEntriesRequest {
        vote: vote_of(append.vote.as_ref())?,
        prev_log_id: id_from_pb(append.prev_log_id.as_ref()),
        entries: append
            .entries
            .into_iter()
            .map(entry_from_pb)
            .collect::<Result<_, _>>()?,
        leader_commit: id_from_pb(append.leader_commit.as_ref()),
    })
}

pub(crate) fn append_result_to_wire<R: AsyncRuntime>(
    result: &StreamAppendResult<Types<R>>,
) -> AppendAnswer {
    let result = match result {
        Ok(matching) => append_answer::Result::Matching(Matching {
            log_id: id_to_pb(matching.as_ref()),
        }),
        Err(StreamAppendError::Conflict(at)) => append_answer::Result::Conflict(log_id_to_pb(at)),
        Err(StreamAppendError::HigherVote(vote)) => {
            append_answer::Result::HigherVote(vote_to_pb(vote))
        }
    };
    AppendAnswer {
        result: Some(result),
    }
}

pub(crate) fn append_result_from_wire<R: AsyncRuntime>(
    answer: AppendAnswer,
) -> Result<StreamAppendResult<Types<R>>, CodecError> {
    match answer.result {
        Some(append_answer::Result::Matching(matching)) => {
            Ok(Ok(id_from_pb(matching.log_id.as_ref())))
        }
        Some(append_answer::Result::Conflict(at)) => {
            Ok(Err(StreamAppendError::Conflict(log_id_from_pb(&at))))
        }
        Some(append_answer::Result::HigherVote(vote)) => {
            Ok(Err(StreamAppendError::HigherVote(vote_from_pb(&vote))))
        }
        None => Err(CodecError::Missing("result of an append")),
    }
}

pub(crate) fn vote_to_wire<R: AsyncRuntime>(request: &VoteRequest<Types<R>>) -> Vote {
    Vote {
        vote: Some(vote_to_pb(&request.vote)),
        last_log_id: id_to_pb(request.last_log_id.as_ref()),
        leadership_transfer: request.leadership_transfer,
    }
}

pub(crate) fn vote_from_wire<R: AsyncRuntime>(
    vote: &Vote,
) -> Result<VoteRequest<Types<R>>, CodecError> {
    let mut request = VoteRequest::new(
        vote_of(vote.vote.as_ref())?,
        id_from_pb(vote.last_log_id.as_ref()),
    );
    request.leadership_transfer = vote.leadership_transfer;
    Ok(request)
}

pub(crate) fn vote_answer_to_wire<R: AsyncRuntime>(
    response: &VoteResponse<Types<R>>,
) -> VoteAnswer {
    VoteAnswer {
        vote: Some(vote_to_pb(&response.vote)),
        granted: response.vote_granted,
        last_log_id: id_to_pb(response.last_log_id.as_ref()),
    }
}

pub(crate) fn vote_answer_from_wire<R: AsyncRuntime>(
    answer: &VoteAnswer,
) -> Result<VoteResponse<Types<R>>, CodecError> {
    Ok(VoteResponse::new(
        vote_of(answer.vote.as_ref())?,
        id_from_pb(answer.last_log_id.as_ref()),
        answer.granted,
    ))
}

pub(crate) fn snapshot_to_wire(snapshot: &SnapshotFile) -> Snapshot {
    let meta = snapshot.meta();
    Snapshot {
        last_log_id: id_to_pb(meta.last_log_id.as_ref()),
        membership_log_id: id_to_pb(meta.last_membership.log_id().as_ref()),
        membership: Some(membership_to_pb(meta.last_membership.membership())),
        size_bytes: snapshot.size_bytes(),
    }
}

pub(crate) fn snapshot_from_wire(snapshot: &Snapshot) -> Result<SnapshotMeta, CodecError> {
    Ok(SnapshotMeta {
        last_log_id: id_from_pb(snapshot.last_log_id.as_ref()),
        last_membership: stored_membership_from_pb(
            snapshot.membership_log_id.as_ref(),
            snapshot.membership.as_ref(),
        )?,
    })
}
