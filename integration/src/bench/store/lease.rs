//! What a put costs with a lease that holds very many keys.

use std::time::Instant;

use anyhow::Result;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::lease_client::LeaseClient;
use clustermesh_api::etcd::rpc::{LeaseGrantRequest, PutRequest};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::load::{Load, fill_with, key, micros, value};
use crate::judges::group::Group;

/// Keys of the large lease.
const LEASED_KEYS: u32 = 100_000;
/// Puts with each lease, in turns.
const PUTS: u32 = 1_000;
/// Lives through the measurement.
const TTL_SECONDS: i64 = 3_600;
const LARGE: i64 = 1;
const SMALL: i64 = 2;

/// Rows `lease-100k`, `lease-100k-etcd` and what the first is compared with: median latency of a put with each lease.
pub async fn measure(group: &Group) -> Result<Vec<(&'static str, f64)>> {
    let channel = group.connect(0).await?.channel();
    let mut leases = LeaseClient::new(channel.clone());
    for id in [LARGE, SMALL] {
        let grant = LeaseGrantRequest {
            ttl: TTL_SECONDS,
            id,
        };
        leases.lease_grant(grant).await?;
    }
    fill_with(group, LEASED_KEYS, LARGE).await?;
    let mut kv = KvClient::new(channel);
    let mut random = SmallRng::seed_from_u64(1);
    let mut latencies = [Vec::new(), Vec::new()];
    for number in 0..PUTS {
        // The small lease has one key, beside those of the large one.
        let of = [(LARGE, number), (SMALL, LEASED_KEYS)];
        for ((lease, key_number), latencies) in of.into_iter().zip(&mut latencies) {
            let request = PutRequest {
                key: key(key_number),
                value: value(&mut random),
                lease,
                ..PutRequest::default()
            };
            let sent = Instant::now();
            kv.put(request).await?;
            latencies.push(micros(sent.elapsed()));
        }
    }
    let [large, small] = latencies
        .map(|latencies| Load::new(std::time::Duration::ZERO, latencies).percentile_ms(0.5));
    Ok(vec![
        ("lease-100k", large),
        ("lease-100k-etcd", large),
        ("lease-one", small),
    ])
}
