use clustermesh_store::LogId;

use super::*;
use crate::{
    error::refuse,
    peer::append_result_to_wire,
    test_support::R,
    wire::{CallRequest, CallResponse, refusal::Reason},
};

/// How the other replica takes a stream of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Other {
    Answers,
    Refuses,
    Ends,
    IsSilent,
}

impl crate::Transport for Other {
    fn call(
        &self,
        _target: Target,
        _request: CallRequest,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        Box::pin(std::future::pending())
    }

    fn append(
        &self,
        _target: Target,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxFuture<
        'static,
        Result<BoxStream<'static, Result<AppendResponse, TransportError>>, TransportError>,
    > {
        let this = *self;
        let answered = requests
            .then(move |_| async move {
                let answer = match this {
                    Self::Answers => {
                        append_response::Answer::Append(append_result_to_wire::<R>(&Ok(None)))
                    }
                    Self::Refuses => append_response::Answer::Refusal(refuse(
                        Reason::WrongReplica,
                        "another data folder",
                    )),
                    Self::Ends => return None,
                    Self::IsSilent => std::future::pending().await,
                };
                Some(AppendResponse {
                    answer: Some(answer),
                })
            })
            .take_while(|answer| std::future::ready(answer.is_some()))
            .filter_map(|answer| std::future::ready(answer.map(Ok)));
        Box::pin(async move { Ok(answered.boxed()) })
    }

    fn install_snapshot(
        &self,
        _target: Target,
        _parts: BoxStream<'static, SnapshotPart>,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        Box::pin(std::future::pending())
    }
}

fn request() -> AppendEntriesRequest<Types<R>> {
    AppendEntriesRequest {
        vote: Vote::new_committed(1, 1),
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None::<LogId>,
    }
}

/// Whether the other replica counts as lost once a stream is open, and once its first result is there.
async fn lost(other: Other, requests: usize, before: bool) -> (bool, bool) {
    let links = Arc::new(Links::<R>::new(Arc::new(other), 1, Arc::default()));
    let target = Target {
        id: 2,
        peer_url: "https://b:2380".into(),
    };
    if before {
        links.note_reached(&target, Err(&CallError::Ended));
    }
    let input = stream::iter(std::iter::repeat_with(request).take(requests));
    let mut results = Peer::open_stream(links.clone(), target, input)
        .await
        .unwrap();
    let opened = links.is_lost(2);
    let result = results.next().await;
    assert_eq!(
        matches!(result, Some(Ok(_))),
        other == Other::Answers,
        "{result:?}"
    );
    (opened, links.is_lost(2))
}

#[tokio::test]
async fn a_replica_is_reached_with_its_first_answer_and_lost_where_one_is_owed() {
    for (other, is_lost) in [
        (Other::Answers, false),
        (Other::Refuses, true),
        (Other::Ends, true),
        (Other::IsSilent, true),
    ] {
        let (opened, answered) = tokio::join!(lost(other, 1, false), lost(other, 1, true));
        assert_eq!(opened, (false, is_lost), "{other:?}");
        assert_eq!(answered, (true, is_lost), "{other:?}");
    }
}

#[tokio::test]
async fn a_stream_that_ends_unused_says_nothing() {
    assert_eq!(lost(Other::Ends, 0, false).await, (false, false));
}
