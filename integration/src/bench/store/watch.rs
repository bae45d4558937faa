//! 1,000 watchers of one prefix: events delivered, how late, and what they cost the servers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::watch_client::WatchClient;
use clustermesh_api::etcd::rpc::watch_request::RequestUnion;
use clustermesh_api::etcd::rpc::{PutRequest, WatchCreateRequest, WatchRequest, WatchResponse};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::load::{Load, connections, count, micros};
use super::{CLIENTS_PER_CONNECTION, PERCENTILE, VALUE_BYTES, usage};
use crate::judges::group::Group;

/// Who watches and who writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Watchers, each on a stream of its own.
    pub(super) watchers: u32,
    /// Writers. Each puts again once all watchers have got its last event: without that bound, what is measured is the
    /// length of a queue.
    pub(super) writers: u32,
}

/// What the rows of 1,000 watchers are taken with.
pub(super) const THOUSAND: Plan = Plan {
    watchers: 1_000,
    writers: 16,
};

/// What was seen.
#[derive(Debug)]
pub(super) struct Watched {
    /// Events delivered, with their latencies.
    pub(super) load: Load,
    /// CPU seconds of all servers for a million delivered events.
    pub(super) cpu_per_million: f64,
    /// Mean resident memory of the servers at the end.
    pub(super) resident_mib: f64,
}

/// Connections that the watchers share.
const CONNECTIONS: usize = 20;
/// Load before anything counts.
const WARM_UP: Duration = Duration::from_secs(1);
/// Longest that one event may take to all watchers.
const DELIVERED_MAX: Duration = Duration::from_secs(30);
/// What the watchers watch.
const PREFIX: &str = "bench/watched/";
/// End of the range.
const PREFIX_END: &str = "bench/watched0";
/// In place of a writer's number: the watchers end.
const STOP: u32 = u32::MAX;

/// The put of one writer that is being delivered.
#[derive(Debug, Default)]
struct Writer {
    /// From the start to the call.
    sent_us: AtomicU64,
    /// Watchers that have not got it.
    missing: AtomicU32,
    delivered: Notify,
}

#[derive(Debug)]
struct Shared {
    start: Instant,
    begin: Instant,
    end: Instant,
    watchers: u32,
    writers: Vec<Writer>,
}

/// Rows `watch-1000`, `watch-1000-p99` and `watch-cpu`.
pub async fn measure(group: &Group, time: Duration) -> Result<Vec<(&'static str, f64)>> {
    let watched = run(group, THOUSAND, time).await?;
    Ok(vec![
        ("watch-1000", watched.load.per_second()),
        ("watch-1000-p99", watched.load.percentile_ms(PERCENTILE)),
        ("watch-cpu", watched.cpu_per_million),
    ])
}

/// Watches and writes for `time`.
pub(super) async fn run(group: &Group, plan: Plan, time: Duration) -> Result<Watched> {
    let channels = connections(group, CONNECTIONS * CLIENTS_PER_CONNECTION).await?;
    let mut streams = Vec::new();
    for number in 0..usize::try_from(plan.watchers)? {
        streams.push(open_watch(channels[number % channels.len()].clone()).await?);
    }
    let start = Instant::now();
    let begin = start + WARM_UP;
    let shared = Arc::new(Shared {
        start,
        begin,
        end: begin + time,
        watchers: plan.watchers,
        writers: (0..plan.writers).map(|_| Writer::default()).collect(),
    });
    let mut watchers = JoinSet::new();
    for stream in streams {
        let shared = Arc::clone(&shared);
        watchers.spawn(async move { follow(stream, &shared).await });
    }
    let mut writers = JoinSet::new();
    for number in 0..plan.writers {
        let kv = KvClient::new(group.connect(usize::try_from(number)?).await?.channel());
        let shared = Arc::clone(&shared);
        writers.spawn(async move { write(kv, &shared, number).await });
    }
    tokio::time::sleep_until(shared.begin.into()).await;
    let cpu_before = usage::cpu_seconds(group)?;
    tokio::time::sleep_until(shared.end.into()).await;
    let cpu = usage::cpu_seconds(group)? - cpu_before;
    let resident_mib = usage::resident_mib(group)?;
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    let mut kv = KvClient::new(channels[0].clone());
    kv.put(request(STOP)).await?;
    let mut latencies = Vec::new();
    while let Some(seen) = timeout(DELIVERED_MAX, watchers.join_next())
        .await
        .context("a watcher did not get the last event")?
    {
        latencies.extend(seen??);
    }
    ensure!(!latencies.is_empty(), "no event was delivered");
    let events = count(latencies.len());
    Ok(Watched {
        load: Load::new(time, latencies),
        cpu_per_million: cpu / events * 1e6,
        resident_mib,
    })
}

/// An open watch: its requests must stay open as long as its responses are wanted.
type OpenWatch = (mpsc::Sender<WatchRequest>, Streaming<WatchResponse>);

async fn open_watch(channel: Channel) -> Result<OpenWatch> {
    let (requests, queue) = mpsc::channel(1);
    let create = WatchCreateRequest {
        key: PREFIX.into(),
        range_end: PREFIX_END.into(),
        ..WatchCreateRequest::default()
    };
    requests
        .send(WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        })
        .await?;
    let mut responses = WatchClient::new(channel)
        .watch(ReceiverStream::new(queue))
        .await?
        .into_inner();
    let created = responses.message().await?.context("the watch ended")?;
    ensure!(
        created.created && !created.canceled,
        "the watch was refused"
    );
    Ok((requests, responses))
}

/// Reads until the last event; latencies of the events that came while it counted.
async fn follow((_requests, mut responses): OpenWatch, shared: &Shared) -> Result<Vec<u32>> {
    let mut latencies = Vec::new();
    loop {
        let response = responses.message().await?.context("the watch ended")?;
        let now = Instant::now();
        for event in response.events {
            let value = event.kv.context("an event without a key")?.value;
            let number = value.first_chunk().context("a value of another writer")?;
            let number = u32::from_be_bytes(*number);
            if number == STOP {
                return Ok(latencies);
            }
            let writer = shared
                .writers
                .get(usize::try_from(number)?)
                .context("an unknown writer")?;
            if (shared.begin..shared.end).contains(&now) {
                let sent = Duration::from_micros(writer.sent_us.load(Ordering::Acquire));
                latencies.push(micros((now - shared.start).saturating_sub(sent)));
            }
            if writer.missing.fetch_sub(1, Ordering::AcqRel) == 1 {
                writer.delivered.notify_one();
            }
        }
    }
}

async fn write(mut kv: KvClient<Channel>, shared: &Shared, number: u32) -> Result<()> {
    let writer = &shared.writers[usize::try_from(number)?];
    while Instant::now() < shared.end {
        writer.missing.store(shared.watchers, Ordering::Release);
        let sent = u64::try_from(shared.start.elapsed().as_micros())?;
        writer.sent_us.store(sent, Ordering::Release);
        kv.put(request(number)).await?;
        timeout(DELIVERED_MAX, writer.delivered.notified())
            .await
            .context("an event was not delivered to all watchers")?;
    }
    Ok(())
}

fn request(writer: u32) -> PutRequest {
    let mut value = BytesMut::with_capacity(VALUE_BYTES);
    value.put_u32(writer);
    value.resize(VALUE_BYTES, b'v');
    PutRequest {
        key: format!("{PREFIX}{writer}").into(),
        value: Bytes::from(value),
        ..PutRequest::default()
    }
}
