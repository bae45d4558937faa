//! openraft's network over a [`Transport`](crate::Transport).

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use clustermesh_store::{Node, ReplicaId, SnapshotFile, SnapshotReader, Vote, wire};
use futures_util::{
    StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream, Stream},
};
use openraft::{
    OptionalSend, RaftNetworkFactory, RaftNetworkV2,
    async_runtime::{AsyncRuntime, Select2},
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::{RPCOption, stream_append_sequential},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
        StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse, VoteRequest,
        VoteResponse,
    },
    type_config::alias::SnapshotOf,
};

use crate::{
    Types,
    config::{APPEND_TIMEOUT, REOPEN_PAUSE, SNAPSHOT_BYTES_PER_SECOND_MIN, SNAPSHOT_IDLE_TIMEOUT},
    peer::{
        CallError, Links, Target, TransportError, append_result_from_wire, append_to_wire,
        snapshot_to_wire, target, vote_answer_from_wire, vote_to_wire,
    },
    wire::{
        AppendAnswer, AppendRequest, AppendResponse, SnapshotEnd, SnapshotPart, SnapshotStart,
        TransferLeader, append_response, call_request::Call, call_response::Answer,
    },
};

/// Makes connections to the other replicas.
pub(crate) struct Network<R: AsyncRuntime> {
    links: Arc<Links<R>>,
}

impl<R: AsyncRuntime> Network<R> {
    pub(crate) fn new(links: Arc<Links<R>>) -> Self {
        Self { links }
    }
}

/// One other replica.
pub(crate) struct Peer<R: AsyncRuntime> {
    links: Arc<Links<R>>,
    target: Target,
    /// Heartbeats are single questions: a stream for each would cost more.
    heartbeats: bool,
}

impl<R: AsyncRuntime> RaftNetworkFactory<Types<R>> for Network<R> {
    type Network = Peer<R>;

    async fn new_client(&mut self, id: ReplicaId, node: &Node) -> Peer<R> {
        Peer {
            links: self.links.clone(),
            target: target(id, node),
            heartbeats: false,
        }
    }

    async fn new_heartbeat_client(&mut self, id: ReplicaId, node: &Node) -> Peer<R> {
        Peer {
            heartbeats: true,
            ..self.new_client(id, node).await
        }
    }
}

type AppendResults<'s, R> = BoxStream<'s, Result<StreamAppendResult<Types<R>>, RPCError<Types<R>>>>;

fn rpc_error<R: AsyncRuntime>(error: &CallError) -> RPCError<Types<R>> {
    match error {
        // What broke may work again at once; the rest wants a pause.
        CallError::Transport(TransportError::Broken { .. }) => {
            RPCError::Network(NetworkError::from_string(error))
        }
        _ => RPCError::Unreachable(Unreachable::from_string(error)),
    }
}

impl<R: AsyncRuntime> Peer<R> {
    async fn call(&self, call: Call, timeout: Duration) -> Result<Answer, RPCError<Types<R>>> {
        self.links
            .call(&self.target, call, timeout)
            .await
            .map_err(|error| rpc_error(&error))
    }

    async fn ask_for_vote(
        &self,
        call: Call,
        timeout: Duration,
    ) -> Result<VoteResponse<Types<R>>, RPCError<Types<R>>> {
        match self.call(call, timeout).await? {
            Answer::Vote(answer) => vote_answer_from_wire(&answer)
                .map_err(|error| RPCError::Network(NetworkError::from_string(error))),
            _ => Err(rpc_error(&CallError::Mismatch)),
        }
    }

    async fn open_stream<S>(
        links: Arc<Links<R>>,
        target: Target,
        input: S,
    ) -> Result<AppendResults<'static, R>, RPCError<Types<R>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types<R>>> + OptionalSend + Unpin + 'static,
    {
        let unanswered = Arc::new(AtomicUsize::new(0));
        let reached = target.clone();
        let requests = {
            let (links, unanswered) = (links.clone(), unanswered.clone());
            let to = target.id;
            input.map(move |request| {
                unanswered.fetch_add(1, Ordering::Relaxed);
                AppendRequest {
                    header: Some(links.header(to)),
                    append: Some(append_to_wire(&request)),
                }
            })
        };
        let opened = R::timeout(
            APPEND_TIMEOUT,
            links.transport().append(target, requests.boxed()),
        )
        .await
        .map_err(|_| CallError::Timeout(APPEND_TIMEOUT))
        .and_then(|opened| opened.map_err(CallError::from));
        let responses = opened
            .inspect_err(|error| links.note_reached(&reached, Err(error)))
            .map_err(|error| rpc_error(&error))?;
        let answers = Answers {
            responses,
            links,
            target: reached,
            unanswered,
            answered: false,
        };
        let results = stream::unfold(Some(answers), |answers| async move {
            let mut answers = answers?;
            let result = answers.next_result().await?;
            let more = matches!(result, Ok(Ok(_)));
            Some((result, more.then_some(answers)))
        });
        Ok(results.boxed())
    }
}

/// What comes back on a stream of entries.
struct Answers<R: AsyncRuntime> {
    responses: BoxStream<'static, Result<AppendResponse, TransportError>>,
    links: Arc<Links<R>>,
    target: Target,
    unanswered: Arc<AtomicUsize>,
    /// Some came. That a stream opens says nothing of what the other replica does with entries.
    answered: bool,
}

impl<R: AsyncRuntime> Answers<R> {
    async fn next_result(
        &mut self,
    ) -> Option<Result<StreamAppendResult<Types<R>>, RPCError<Types<R>>>> {
        Some(match self.next_answer().await? {
            Ok(answer) => {
                if !std::mem::replace(&mut self.answered, true) {
                    self.links.note_reached(&self.target, Ok(()));
                }
                append_result_from_wire(answer)
                    .map_err(|error| RPCError::Network(NetworkError::from_string(error)))
            }
            Err(error) => Err(rpc_error(&error)),
        })
    }

    /// The next answer; one that is owed for too long is an error. `None` at an end with nothing owed.
    async fn next_answer(&mut self) -> Option<Result<AppendAnswer, CallError>> {
        let response = loop {
            let owed = self.unanswered.load(Ordering::Relaxed) > 0;
            match R::timeout(APPEND_TIMEOUT, self.responses.next()).await {
                Ok(Some(response)) => break response.map_err(CallError::from),
                // An end with answers owed is a broken connection: openraft must hear of it, or it keeps the log for ever.
                Ok(None) if self.unanswered.load(Ordering::Relaxed) > 0 => {
                    break Err(CallError::Ended);
                }
                Ok(None) => return None,
                Err(_) if owed => break Err(CallError::Timeout(APPEND_TIMEOUT)),
                Err(_) => {}
            }
        };
        let answer = response.and_then(|response| match response.answer {
            Some(append_response::Answer::Append(answer)) => Ok(answer),
            Some(append_response::Answer::Refusal(refusal)) => {
                self.links.heed(&refusal);
                Err(CallError::Refused(refusal))
            }
            None => Err(CallError::Mismatch),
        });
        // A stream on which nothing was sent says nothing when it ends.
        if self.unanswered.load(Ordering::Relaxed) > 0 {
            self.unanswered.fetch_sub(1, Ordering::Relaxed);
            if let Err(error) = &answer {
                self.links.note_reached(&self.target, Err(error));
            }
        }
        Some(answer)
    }
}

impl<R: AsyncRuntime> RaftNetworkV2<Types<R>> for Peer<R> {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types<R>>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types<R>>, RPCError<Types<R>>> {
        let call = Call::Append(append_to_wire(&request));
        let Answer::Append(answer) = self.call(call, option.hard_ttl()).await? else {
            return Err(rpc_error(&CallError::Mismatch));
        };
        let result = append_result_from_wire::<R>(answer)
            .map_err(|error| RPCError::Network(NetworkError::from_string(error)))?;
        Ok(match result {
            Ok(matching) => AppendEntriesResponse::PartialSuccess(matching),
            Err(StreamAppendError::Conflict(_)) => AppendEntriesResponse::Conflict,
            Err(StreamAppendError::HigherVote(vote)) => AppendEntriesResponse::HigherVote(vote),
        })
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<AppendResults<'s, R>, RPCError<Types<R>>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types<R>>> + OptionalSend + Unpin + 'static,
    {
        if self.heartbeats {
            return stream_append_sequential(self, input, option);
        }
        let opening = Self::open_stream(self.links.clone(), self.target.clone(), input);
        Box::pin(async move {
            let results: Result<AppendResults<'s, R>, _> = opening.await;
            if results.is_err() {
                // openraft pauses where it takes requests from the stream, which a stream that never opened does not do.
                R::sleep(REOPEN_PAUSE).await;
            }
            results
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types<R>>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types<R>>, RPCError<Types<R>>> {
        self.ask_for_vote(Call::Vote(vote_to_wire(&request)), option.hard_ttl())
            .await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types<R>>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types<R>>, RPCError<Types<R>>> {
        self.ask_for_vote(Call::PreVote(vote_to_wire(&request)), option.hard_ttl())
            .await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<Types<R>, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types<R>>, StreamingError<Types<R>>> {
        let sending = send_snapshot(&self.links, &self.target, vote, snapshot.snapshot);
        match R::select2(cancel, sending).await {
            Select2::First(closed) => Err(StreamingError::Closed(closed)),
            Select2::Second(Ok(vote)) => Ok(SnapshotResponse::new(vote)),
            Select2::Second(Err(error)) => {
                tracing::warn!(replica = self.target.id, %error, "a snapshot was not installed, it is tried again");
                Err(rpc_error::<R>(&error).into())
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types<R>>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types<R>>, RPCError<Types<R>>> {
        let call = Call::TransferLeader(TransferLeader {
            from_leader: Some(wire::vote_to_pb(request.from_leader())),
            to: *request.to_node_id(),
            last_log_id: request.last_log_id().map(wire::log_id_to_pb),
        });
        match self.call(call, option.hard_ttl()).await? {
            Answer::Done(_) => Ok(Ok(())),
            _ => Err(rpc_error(&CallError::Mismatch)),
        }
    }
}

/// Chunks of a snapshot from one on, read as they are asked for.
fn parts<R: AsyncRuntime>(
    reader: SnapshotReader,
    blocking: bool,
    sent: Arc<AtomicU64>,
    first: u64,
) -> impl Stream<Item = SnapshotPart> + Send + 'static {
    stream::unfold(Some((reader, 0_u64)), move |state| {
        let sent = sent.clone();
        async move {
            let (mut reader, mut number) = state?;
            let step = move || {
                loop {
                    match reader.next() {
                        Some(Ok(_)) if number < first => number += 1,
                        Some(Ok(chunk)) => return Some((Some(chunk), reader, number)),
                        Some(Err(error)) => {
                            // The stream ends without its last part: the other side does not take it.
                            tracing::error!(%error, "the snapshot cannot be read");
                            return None;
                        }
                        None => return Some((None, reader, number)),
                    }
                }
            };
            let (chunk, reader, number) = if blocking {
                R::spawn_blocking(step).await.ok()??
            } else {
                step()?
            };
            sent.fetch_add(1, Ordering::Relaxed);
            Some(match chunk {
                Some(chunk) => {
                    let part = SnapshotPart {
                        number,
                        chunk,
                        ..SnapshotPart::default()
                    };
                    (part, Some((reader, number + 1)))
                }
                None => {
                    let end = SnapshotPart {
                        end: Some(SnapshotEnd { chunks: number }),
                        ..SnapshotPart::default()
                    };
                    (end, None)
                }
            })
        }
    })
}

async fn send_snapshot<R: AsyncRuntime>(
    links: &Links<R>,
    target: &Target,
    vote: Vote,
    snapshot: SnapshotFile,
) -> Result<Vote, CallError> {
    let description = snapshot_to_wire(&snapshot);
    let offset = links
        .call(
            target,
            Call::SnapshotOffset(description.clone()),
            APPEND_TIMEOUT,
        )
        .await?;
    let Answer::SnapshotOffset(offset) = offset else {
        return Err(CallError::Mismatch);
    };
    tracing::info!(
        replica = target.id,
        bytes = snapshot.size_bytes(),
        from_chunk = offset.chunks,
        "sending a snapshot"
    );
    let reader = snapshot.read().map_err(|error| {
        CallError::Refused(crate::error::refuse(
            crate::wire::refusal::Reason::Storage,
            error.to_string(),
        ))
    })?;
    let start = SnapshotPart {
        start: Some(SnapshotStart {
            header: Some(links.header(target.id)),
            snapshot: Some(description),
            vote: Some(wire::vote_to_pb(&vote)),
        }),
        ..SnapshotPart::default()
    };
    let sent = Arc::new(AtomicU64::new(0));
    let chunks = parts::<R>(reader, !snapshot.is_memory(), sent.clone(), offset.chunks);
    let stream = stream::once(async move { start }).chain(chunks).boxed();
    let sending = links.transport().install_snapshot(target.clone(), stream);
    // While chunks flow it may take as long as it takes; then the receiver has time by the size to check and load it.
    let patience = SNAPSHOT_IDLE_TIMEOUT
        + Duration::from_secs(snapshot.size_bytes() / SNAPSHOT_BYTES_PER_SECOND_MIN);
    let watchdog = async {
        let mut seen = 0;
        loop {
            R::sleep(patience).await;
            let now = sent.load(Ordering::Relaxed);
            if now == seen {
                return;
            }
            seen = now;
        }
    };
    let response = match R::select2(watchdog, sending).await {
        Select2::First(()) => return Err(CallError::Timeout(patience)),
        Select2::Second(response) => response?,
    };
    match links.answer(response)? {
        Answer::Snapshot(answer) => answer
            .vote
            .map(|vote| wire::vote_from_pb(&vote))
            .ok_or(CallError::Mismatch),
        _ => Err(CallError::Mismatch),
    }
}

#[cfg(test)]
mod tests;
