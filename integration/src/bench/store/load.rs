//! Closed loops of clients that put or read, and their latencies.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::request_op::Request;
use clustermesh_api::etcd::rpc::{PutRequest, RangeRequest, RequestOp, TxnRequest};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::{CLIENTS_PER_CONNECTION, KEYS, VALUE_BYTES};
use crate::judges::group::Group;

/// Clients of the read rows.
const READERS: usize = 64;
/// Load before anything counts.
const WARM_UP: Duration = Duration::from_millis(500);
/// Puts of one transaction while keys are loaded.
pub(in crate::bench) const PUTS_PER_TXN: u32 = 100;
/// Clients that load keys.
const LOADERS: u32 = 16;

/// What a closed loop did.
#[derive(Debug)]
pub struct Load {
    time: Duration,
    /// Latencies in microseconds, sorted.
    latencies_us: Vec<u32>,
}

impl Load {
    pub(super) fn new(time: Duration, mut latencies_us: Vec<u32>) -> Self {
        latencies_us.sort_unstable();
        Self { time, latencies_us }
    }

    /// Latencies in microseconds, sorted.
    pub fn latencies_us(&self) -> &[u32] {
        &self.latencies_us
    }

    /// Calls that ended, those of the warm-up at the same rate among them.
    pub fn calls_with_warm_up(&self) -> f64 {
        self.per_second() * (self.time + WARM_UP).as_secs_f64()
    }

    /// Calls that ended, by second.
    pub fn per_second(&self) -> f64 {
        count(self.latencies_us.len()) / self.time.as_secs_f64()
    }

    /// Latency that `share` of the calls did not exceed.
    pub fn percentile_ms(&self, share: f64) -> f64 {
        percentile_us(&self.latencies_us, share) / 1_000.0
    }
}

/// The value below which `share` of sorted values lie; 0 of none.
pub(super) fn percentile_us(sorted: &[u32], share: f64) -> f64 {
    let rank = (count(sorted.len()) * share).ceil();
    let place = (0..sorted.len()).find(|place| count(place + 1) >= rank);
    place.map_or(0.0, |place| f64::from(sorted[place]))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "numbers of calls stay far below 2^52"
)]
pub(in crate::bench) const fn count(number: usize) -> f64 {
    number as f64
}

pub(super) fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// As many connections as `clients` need, spread over the replicas.
pub(super) async fn connections(group: &Group, clients: usize) -> Result<Vec<Channel>> {
    let mut channels = Vec::new();
    for number in 0..clients.div_ceil(CLIENTS_PER_CONNECTION).max(1) {
        channels.push(group.connect(number).await?.channel());
    }
    Ok(channels)
}

pub(in crate::bench) fn key(number: u32) -> Bytes {
    format!("bench/{number:08}").into()
}

/// A value that compresses as badly as data does.
pub(super) fn value(random: &mut SmallRng) -> Bytes {
    let mut bytes = vec![0; VALUE_BYTES];
    random.fill_bytes(&mut bytes);
    bytes.into()
}

/// Clients that each put, wait for the answer, and put again.
pub async fn puts(group: &Group, clients: usize, time: Duration) -> Result<Load> {
    closed_loop(group, clients, time, |random| {
        let request = PutRequest {
            key: key(random.random_range(0..KEYS)),
            value: value(random),
            ..PutRequest::default()
        };
        Call::Put(request)
    })
    .await
}

/// Clients that each read one of the keys that are there, wait for the answer, and read again.
pub async fn gets(group: &Group, serializable: bool, time: Duration) -> Result<Load> {
    closed_loop(group, READERS, time, move |random| {
        let request = RangeRequest {
            key: key(random.random_range(0..KEYS)),
            serializable,
            ..RangeRequest::default()
        };
        Call::Range(request)
    })
    .await
}

enum Call {
    Put(PutRequest),
    Range(RangeRequest),
}

async fn closed_loop(
    group: &Group,
    clients: usize,
    time: Duration,
    next: impl Fn(&mut SmallRng) -> Call + Send + Sync + 'static,
) -> Result<Load> {
    let channels = connections(group, clients).await?;
    let next = Arc::new(next);
    let begin = Instant::now() + WARM_UP;
    let end = begin + time;
    let mut running = JoinSet::new();
    for (seed, client) in (0..).zip(0..clients) {
        let mut kv = KvClient::new(channels[client % channels.len()].clone());
        let next = Arc::clone(&next);
        running.spawn(async move {
            let mut random = SmallRng::seed_from_u64(seed);
            let mut latencies = Vec::new();
            loop {
                let call = next(&mut random);
                let sent = Instant::now();
                match call {
                    Call::Put(request) => {
                        kv.put(request).await?;
                    }
                    Call::Range(request) => {
                        let answer = kv.range(request).await?.into_inner();
                        anyhow::ensure!(answer.kvs.len() == 1, "a key that was put is not there");
                    }
                }
                let ended = Instant::now();
                if ended >= end {
                    return anyhow::Ok(latencies);
                }
                if ended >= begin {
                    latencies.push(micros(ended - sent));
                }
            }
        });
    }
    let mut all = Vec::new();
    while let Some(latencies) = running.join_next().await {
        all.extend(latencies??);
    }
    Ok(Load::new(time, all))
}

/// One loader's share of many keys, many a transaction.
#[derive(Debug)]
pub(in crate::bench) struct Batches {
    random: SmallRng,
    first: u32,
    step: u32,
}

impl Batches {
    /// The share of `loader` of so many.
    pub(in crate::bench) fn new(loader: u32, loaders: u32) -> Self {
        Self {
            random: SmallRng::seed_from_u64(loader.into()),
            first: loader * PUTS_PER_TXN,
            step: loaders * PUTS_PER_TXN,
        }
    }

    /// Number of puts and the transaction of the next keys below `keys`.
    pub(in crate::bench) fn next(&mut self, keys: u32, lease: i64) -> Option<(u64, TxnRequest)> {
        if self.first >= keys {
            return None;
        }
        let last = self.first.saturating_add(PUTS_PER_TXN).min(keys);
        let put = |number| RequestOp {
            request: Some(Request::RequestPut(PutRequest {
                key: key(number),
                value: value(&mut self.random),
                lease,
                ..PutRequest::default()
            })),
        };
        let request = TxnRequest {
            success: (self.first..last).map(put).collect(),
            ..TxnRequest::default()
        };
        let count = u64::from(last - self.first);
        self.first += self.step;
        Some((count, request))
    }
}

/// Puts keys 0 to `keys`, many a transaction.
pub async fn fill(group: &Group, keys: u32) -> Result<()> {
    fill_with(group, keys, 0).await
}

/// As [`fill`], all with one lease.
pub async fn fill_with(group: &Group, keys: u32, lease: i64) -> Result<()> {
    let loaders = usize::try_from(LOADERS)?;
    let channels = connections(group, loaders).await?;
    let mut running = JoinSet::new();
    for loader in 0..LOADERS {
        let channel = &channels[usize::try_from(loader)? % channels.len()];
        let mut kv = KvClient::new(channel.clone());
        running.spawn(async move {
            let mut batches = Batches::new(loader, LOADERS);
            while let Some((_, request)) = batches.next(keys, lease) {
                kv.txn(request).await.context("loading keys")?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(loaded) = running.join_next().await {
        loaded??;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<u32> = (1..=100).collect();
        assert!((percentile_us(&values, 0.99) - 99.0).abs() < 1e-9);
        assert!((percentile_us(&values, 0.5) - 50.0).abs() < 1e-9);
        assert!((percentile_us(&[7], 0.99) - 7.0).abs() < 1e-9);
        assert!(percentile_us(&[], 0.99).abs() < 1e-9);
    }

    #[test]
    fn a_load_gives_calls_by_second() {
        let load = Load::new(Duration::from_secs(2), vec![3_000, 1_000, 2_000, 4_000]);
        assert!((load.per_second() - 2.0).abs() < 1e-9);
        assert!((load.percentile_ms(0.99) - 4.0).abs() < 1e-9);
    }
}
