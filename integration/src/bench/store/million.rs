//! Very many keys: memory, and the time back to serving after kill -9.

use std::time::{Duration, Instant};

use anyhow::Result;
use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_api::etcd::rpc::kv_client::KvClient;

use super::load::{fill, key};
use super::usage;
use crate::judges::group::Group;

/// What follows the load (snapshots, garbage collection) has ended by then.
const SETTLED: Duration = Duration::from_secs(5);

/// Rows `mem-1m` and `restart-1m`.
pub async fn measure(group: &mut Group, keys: u32) -> Result<Vec<(&'static str, f64)>> {
    fill(group, keys).await?;
    tokio::time::sleep(SETTLED).await;
    let memory = usage::resident_mib(group)?;
    group.kill().await?;
    let start = Instant::now();
    group.launch_all().await?;
    for member in 0..group.members().len() {
        let mut kv = KvClient::new(group.connect(member).await?.channel());
        let request = RangeRequest {
            key: key(keys.saturating_sub(1)),
            ..RangeRequest::default()
        };
        let answer = kv.range(request).await?.into_inner();
        anyhow::ensure!(
            answer.kvs.len() == 1,
            "the last key is gone after a restart"
        );
    }
    Ok(vec![
        ("mem-1m", memory),
        ("restart-1m", start.elapsed().as_secs_f64()),
    ])
}
