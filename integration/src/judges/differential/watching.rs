//! The watches of one server: what each of them was sent, compared as sequences.
//!
//! Three streams, because etcd answers a progress request only while every watch of the stream has caught up: watches
//! that wait for a future revision and watches that a compaction ended never do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::watch_client::WatchClient;
use clustermesh_api::etcd::rpc::watch_request::RequestUnion;
use clustermesh_api::etcd::rpc::{
    PutRequest, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest,
    WatchResponse,
};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::access::Tokens;
use super::answer::{Answer, set_ids_aside};

/// Requests waiting to be sent.
const REQUESTS_QUEUED: usize = 64;
/// Responses are taken up to this size.
const RESPONSE_BYTES_MAX: usize = 64 << 20;
/// Longest wait for what must come.
const WAIT_MAX: Duration = Duration::from_secs(15);
/// A progress request without an answer is repeated after this.
const PROGRESS_REPEATED: Duration = Duration::from_millis(20);
/// After a cancel that gets no answer, what is still on its way.
const QUIET: Duration = Duration::from_millis(30);
/// A watch that there never is.
pub(super) const UNKNOWN_WATCH: i64 = 777;
/// After the last write, what a watch has not got by then does not come.
const LAST_EVENTS: Duration = Duration::from_millis(400);
/// Written only to see that watches have got everything before it.
pub(super) const SENTINEL_KEY: &[u8] = b"zz-sentinel";
/// Id of the watch that sees the sentinel.
const SENTINEL_WATCH: i64 = 100_000;

/// Which stream a watch is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Begins now or in the past.
    Caught,
    /// Begins at a revision that is not there yet.
    Future,
    /// Begins at a revision that is compacted.
    Compacted,
}

const LANES: [Lane; 3] = [Lane::Caught, Lane::Future, Lane::Compacted];

/// An operation about watches.
#[derive(Clone, Debug)]
pub enum WatchOp {
    /// Begins one; the answer says whether and with which id.
    Create(Lane, WatchCreateRequest),
    /// The same on a stream of its own, for one user, only to see whether it may begin.
    Try(WatchCreateRequest),
    /// Ends one.
    Cancel(Lane, i64),
    /// Everything that watches got since the last time; at least up to `revision`.
    Barrier {
        /// Newest revision.
        revision: i64,
        /// Also of those that began in the future: only the end of a wait shows that they have got everything.
        last: bool,
    },
}

/// What one watch was sent, in order.
type Sequences = BTreeMap<(Lane, i64), Vec<String>>;

/// The streams of one server.
pub struct Watching {
    kv: KvClient<Channel>,
    attempts: WatchClient<Channel>,
    streams: BTreeMap<Lane, Stream>,
    sequences: Sequences,
    /// Watches that the server must end by itself.
    doomed: BTreeSet<i64>,
    /// Watches that take responses in fragments.
    fragmented: BTreeSet<(Lane, i64)>,
}

struct Stream {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Stream {
    async fn send(&mut self, request: RequestUnion) -> Result<()> {
        let request = WatchRequest {
            request_union: Some(request),
        };
        if self.requests.send(request).await.is_ok() {
            return Ok(());
        }
        // What the server said last is why.
        while let Some(response) = self.next().await? {
            drop(response);
        }
        bail!("the server took no more requests of a watch stream and ended it without a reason")
    }

    async fn receive(&mut self) -> Result<WatchResponse> {
        self.next().await?.context("the watch stream ended")
    }

    async fn next(&mut self) -> Result<Option<WatchResponse>> {
        timeout(WAIT_MAX, self.responses.message())
            .await
            .context("a watch response did not come")?
            .context("the server ended a watch stream")
    }
}

impl Watching {
    pub async fn start(channel: Channel, kv: KvClient<Channel>) -> Result<Self> {
        let mut streams = BTreeMap::new();
        for lane in LANES {
            let (requests, queue) = mpsc::channel(REQUESTS_QUEUED);
            let mut client =
                WatchClient::new(channel.clone()).max_decoding_message_size(RESPONSE_BYTES_MAX);
            // Servers answer the call only with its first message, so there must be one.
            let create = WatchCreateRequest {
                key: Bytes::from_static(SENTINEL_KEY),
                watch_id: SENTINEL_WATCH,
                ..WatchCreateRequest::default()
            };
            let first = WatchRequest {
                request_union: Some(RequestUnion::CreateRequest(create)),
            };
            requests.send(first).await?;
            let responses = client.watch(ReceiverStream::new(queue)).await?.into_inner();
            let mut stream = Stream {
                requests,
                responses,
            };
            let created = stream.receive().await?;
            ensure!(
                created.created && !created.canceled,
                "the watch of the sentinel was refused: {created:?}"
            );
            streams.insert(lane, stream);
        }
        Ok(Self {
            kv,
            attempts: WatchClient::new(channel),
            streams,
            sequences: Sequences::new(),
            doomed: BTreeSet::new(),
            fragmented: BTreeSet::new(),
        })
    }

    pub async fn perform(
        &mut self,
        op: &WatchOp,
        tokens: &Tokens,
        user: Option<&str>,
    ) -> Result<Answer> {
        match op {
            WatchOp::Create(lane, create) => self.create(*lane, create).await,
            WatchOp::Try(create) => self.attempt(create, tokens, user).await,
            WatchOp::Cancel(lane, id) => self.cancel(*lane, *id).await,
            WatchOp::Barrier { revision, last } => self.barrier(*revision, *last).await,
        }
    }

    async fn attempt(
        &mut self,
        create: &WatchCreateRequest,
        tokens: &Tokens,
        user: Option<&str>,
    ) -> Result<Answer> {
        let request = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create.clone())),
        };
        // The other end stays open: a stream that is ended gets no answer of every server.
        let (requests, queue) = mpsc::channel(1);
        requests.send(request).await?;
        let asked = tokens.asked_by(user, ReceiverStream::new(queue))?;
        let mut responses = match self.attempts.watch(asked).await {
            Ok(responses) => responses.into_inner(),
            Err(status) => return Ok(Answer::refused(&status)),
        };
        match timeout(WAIT_MAX, responses.message()).await? {
            Ok(Some(mut response)) => {
                let revision = set_ids_aside(&mut response.header);
                Ok(Answer::ok(format!("{response:#?}"), revision))
            }
            Ok(None) => Ok(Answer::ok("the end".to_owned(), 0)),
            Err(status) => Ok(Answer::refused(&status)),
        }
    }

    fn stream(&mut self, lane: Lane) -> Result<&mut Stream> {
        self.streams.get_mut(&lane).context("no such stream")
    }

    async fn create(&mut self, lane: Lane, create: &WatchCreateRequest) -> Result<Answer> {
        self.stream(lane)?
            .send(RequestUnion::CreateRequest(create.clone()))
            .await?;
        loop {
            let mut response = self.stream(lane)?.receive().await?;
            if !response.created {
                self.note(lane, response);
                continue;
            }
            let revision = set_ids_aside(&mut response.header);
            let running = (!response.canceled).then_some(response.watch_id);
            let text = format!("{response:#?}");
            let watch = (lane, response.watch_id);
            if create.fragment {
                self.fragmented.insert(watch);
            } else {
                self.fragmented.remove(&watch);
            }
            if lane == Lane::Compacted {
                self.doomed.extend(running);
            }
            return Ok(Answer::Ok {
                text,
                revision,
                // A doomed one ends by itself.
                watch: running.filter(|_| lane != Lane::Compacted),
                leader: None,
            });
        }
    }

    async fn cancel(&mut self, lane: Lane, id: i64) -> Result<Answer> {
        self.stream(lane)?
            .send(RequestUnion::CancelRequest(WatchCancelRequest {
                watch_id: id,
            }))
            .await?;
        loop {
            let wait = if id == UNKNOWN_WATCH { QUIET } else { WAIT_MAX };
            let stream = self.stream(lane)?;
            let Ok(response) = timeout(wait, stream.receive()).await else {
                return Ok(Answer::ok("no answer".to_owned(), 0));
            };
            let mut response = response?;
            if !(response.canceled && response.watch_id == id) {
                self.note(lane, response);
                continue;
            }
            let revision = set_ids_aside(&mut response.header);
            return Ok(Answer::ok(format!("{response:#?}"), revision));
        }
    }

    /// Writes the sentinel, waits until everything before it has come, and hands out what came.
    async fn barrier(&mut self, revision: i64, last: bool) -> Result<Answer> {
        let put = PutRequest {
            key: Bytes::from_static(SENTINEL_KEY),
            ..PutRequest::default()
        };
        let written = self.kv.put(put).await?.into_inner();
        let written = written.header.map_or(0, |header| header.revision);
        ensure!(
            written > revision,
            "the sentinel got revision {written} after {revision}"
        );
        while !self.doomed.is_empty() {
            let response = self.stream(Lane::Compacted)?.receive().await?;
            self.note(Lane::Compacted, response);
        }
        self.until_progress(written).await?;
        if last {
            self.until_quiet(Lane::Future).await?;
        }
        let (ripe, unripe) = std::mem::take(&mut self.sequences)
            .into_iter()
            .partition(|((lane, _), _)| last || *lane != Lane::Future);
        self.sequences = unripe;
        let text = Sequences::into_iter(ripe)
            .filter(|(_, items)| !items.is_empty())
            .map(|((lane, id), items)| format!("{lane:?} watch {id}:\n{}", items.join("\n")))
            .collect::<Vec<_>>()
            .join("\n");
        Ok(Answer::ok(format!("revision {written}\n{text}"), written))
    }

    async fn until_quiet(&mut self, lane: Lane) -> Result<()> {
        while let Ok(response) = timeout(LAST_EVENTS, self.stream(lane)?.responses.message()).await
        {
            let response = response?.context("the watch stream ended")?;
            self.note(lane, response);
        }
        Ok(())
    }

    async fn until_progress(&mut self, revision: i64) -> Result<()> {
        let asked = tokio::time::Instant::now();
        loop {
            let stream = self.stream(Lane::Caught)?;
            stream
                .send(RequestUnion::ProgressRequest(WatchProgressRequest {}))
                .await?;
            // Until it is quiet: a request that comes too early is not answered at all.
            while let Ok(response) = timeout(
                PROGRESS_REPEATED,
                self.stream(Lane::Caught)?.responses.message(),
            )
            .await
            {
                let response = response?.context("the watch stream ended")?;
                let reached = response
                    .header
                    .as_ref()
                    .is_some_and(|header| header.revision >= revision);
                if is_progress(&response) && reached {
                    return Ok(());
                }
                self.note(Lane::Caught, response);
            }
            ensure!(
                asked.elapsed() < WAIT_MAX,
                "no progress up to revision {revision}"
            );
        }
    }

    /// Adds a response to the sequence of its watch. How events are cut into responses is the server's affair, and
    /// with it the revision in their headers.
    fn note(&mut self, lane: Lane, response: WatchResponse) {
        if is_progress(&response) {
            return;
        }
        let watch = (lane, response.watch_id);
        let sequence = self.sequences.entry(watch).or_default();
        if response.fragment && !self.fragmented.contains(&watch) {
            sequence.push("a fragment that was not asked for".to_owned());
        }
        if response.watch_id != SENTINEL_WATCH {
            let newest = response.header.as_ref().map_or(0, |header| header.revision);
            for event in &response.events {
                sequence.push(format!("{event:#?}"));
                let revision = event.kv.as_ref().map_or(0, |kv| kv.mod_revision);
                if newest < revision {
                    sequence.push(format!("but the header's revision is {newest}"));
                }
            }
        }
        if response.created || response.canceled {
            if lane == Lane::Compacted {
                self.doomed.remove(&response.watch_id);
            }
            let mut end = WatchResponse {
                events: Vec::new(),
                ..response
            };
            set_ids_aside(&mut end.header);
            sequence.push(format!("{end:#?}"));
        }
    }
}

/// Neither events nor the beginning or end of a watch.
fn is_progress(response: &WatchResponse) -> bool {
    response.events.is_empty() && !response.created && !response.canceled
}
