//! How long no put is acknowledged when a replica is killed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::{PutRequest, StatusRequest};
use nix::sys::signal::Signal;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::transport::Channel;

use super::load::{key, value};
use crate::bench::compare::median;
use crate::judges::group::Group;

/// A put begins at every replica this often, answered or not.
const PACE: Duration = Duration::from_millis(10);
/// A put that is not answered by then is given up: its client goes elsewhere.
const PATIENCE: Duration = Duration::from_secs(2);
/// Puts at one replica that wait for their answers.
const MAX_WAITING_PUTS: usize = 256;
/// Time with all replicas before and after.
const SETTLED: Duration = Duration::from_secs(2);
/// Time without the replica.
const AWAY: Duration = Duration::from_secs(4);
/// Kills of each kind in one round.
const KILLS: usize = 3;

/// Rows `gap-leader` and `gap-follower`: medians of a few kills.
pub async fn measure(group: &mut Group) -> Result<Vec<(&'static str, f64)>> {
    let mut gaps = [Vec::new(), Vec::new()];
    for _ in 0..KILLS {
        let leader = leader(group).await?;
        gaps[0].push(gap(group, leader).await?);
        let leader = self::leader(group).await?;
        let follower = (leader + 1) % group.members().len();
        gaps[1].push(gap(group, follower).await?);
    }
    let [leader, follower] = gaps;
    Ok(vec![
        ("gap-leader", median(&leader)),
        ("gap-follower", median(&follower)),
    ])
}

/// Kills a replica and starts it again; the longest time without an acknowledged put, ms.
async fn gap(group: &mut Group, member: usize) -> Result<f64> {
    let (acknowledged, mut times) = mpsc::unbounded_channel();
    let mut clients = JoinSet::new();
    for number in 0..group.members().len() {
        let channel = group.connect(number).await?.channel();
        clients.spawn(put_on(channel, number, acknowledged.clone()));
    }
    drop(acknowledged);
    sleep(SETTLED).await;
    let begin = Instant::now();
    group.stop(member, Signal::SIGKILL).await?;
    sleep(AWAY).await;
    group.launch_all().await?;
    sleep(SETTLED).await;
    let end = Instant::now();
    clients.shutdown().await;
    let mut seen = vec![begin];
    while let Ok(time) = times.try_recv() {
        if (begin..end).contains(&time) {
            seen.push(time);
        }
    }
    seen.sort_unstable();
    seen.push(end);
    let longest = seen.windows(2).map(|pair| pair[1] - pair[0]).max();
    let longest = longest.context("no put was acknowledged")?;
    Ok(longest.as_secs_f64() * 1_000.0)
}

/// Puts at an even pace until it is ended.
async fn put_on(channel: Channel, client: usize, acknowledged: mpsc::UnboundedSender<Instant>) {
    let mut random = SmallRng::seed_from_u64(client as u64);
    let mut waiting = JoinSet::new();
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for number in 0.. {
        pace.tick().await;
        while waiting.try_join_next().is_some() {}
        if waiting.len() >= MAX_WAITING_PUTS {
            continue;
        }
        let request = PutRequest {
            key: key(number % 1_000),
            value: value(&mut random),
            ..PutRequest::default()
        };
        let mut kv = KvClient::new(channel.clone());
        let acknowledged = acknowledged.clone();
        waiting.spawn(async move {
            if let Ok(Ok(_)) = timeout(PATIENCE, kv.put(request)).await {
                // Whoever counts may have ended.
                let _ = acknowledged.send(Instant::now());
            }
        });
    }
}

/// The replica that leads.
async fn leader(group: &Group) -> Result<usize> {
    let asked = async {
        loop {
            for number in 0..group.members().len() {
                let channel = group.connect(number).await?.channel();
                let status = MaintenanceClient::new(channel)
                    .status(StatusRequest::default())
                    .await?
                    .into_inner();
                let own = status.header.map_or(0, |header| header.member_id);
                if own != 0 && status.leader == own {
                    return anyhow::Ok(number);
                }
            }
            sleep(PACE).await;
        }
    };
    timeout(Duration::from_secs(30), asked)
        .await
        .context("no replica leads")?
}
