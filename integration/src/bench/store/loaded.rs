//! The rows of puts and watches again: very many keys, users checked, a snapshot being read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clustermesh_api::etcd::auth::UserAddOptions;
use clustermesh_api::etcd::rpc::auth_client::AuthClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::{
    AuthEnableRequest, AuthRoleAddRequest, AuthUserAddRequest, AuthUserGrantRoleRequest,
    SnapshotRequest,
};
use tokio::task::JoinHandle;

use super::load::{self, fill};
use super::{PERCENTILE, watch};
use crate::bench::compare::median;
use crate::judges::group::Group;

/// The role that may do everything.
const ROOT: &str = "root";
/// Common name in the certificate of the load's clients.
const USER: &str = "admin-judged";
/// What follows the load has ended by then.
const SETTLED: Duration = Duration::from_secs(5);

/// All rows of part `Loaded`.
pub async fn measure(group: &Group, keys: u32, time: Duration) -> Result<Vec<(&'static str, f64)>> {
    fill(group, keys).await?;
    check_users(group).await?;
    tokio::time::sleep(SETTLED).await;
    let mut values = Vec::new();
    for (clients, latency) in [(64, "quiet-put-64-p99"), (256, "quiet-put-256-p99")] {
        let load = load::puts(group, clients, time).await?;
        values.push((latency, load.percentile_ms(PERCENTILE)));
    }
    let snapshots = Snapshots::begin(group).await?;
    for (clients, rate, latency, again) in [
        (1, "loaded-put-1", "loaded-put-1-p99", None),
        (
            64,
            "loaded-put-64",
            "loaded-put-64-p99",
            Some("snapshot-put-64-p99"),
        ),
        (
            256,
            "loaded-put-256",
            "loaded-put-256-p99",
            Some("snapshot-put-256-p99"),
        ),
    ] {
        let load = load::puts(group, clients, time).await?;
        values.push((rate, load.per_second()));
        let p99 = load.percentile_ms(PERCENTILE);
        values.extend(
            [Some(latency), again]
                .into_iter()
                .flatten()
                .map(|id| (id, p99)),
        );
    }
    let watched = watch::run(group, watch::THOUSAND, time).await?;
    values.extend([
        ("loaded-watch-1000", watched.load.per_second()),
        (
            "loaded-watch-1000-p99",
            watched.load.percentile_ms(PERCENTILE),
        ),
        ("loaded-watch-cpu", watched.cpu_per_million),
    ]);
    values.push(("loaded-snapshot", snapshots.end().await?));
    Ok(values)
}

/// From now on every call is checked against its user, whom the certificate names.
async fn check_users(group: &Group) -> Result<()> {
    let mut auth = AuthClient::new(group.connect(0).await?.channel());
    auth.role_add(AuthRoleAddRequest {
        name: ROOT.to_owned(),
    })
    .await?;
    for name in [ROOT, USER] {
        let user = AuthUserAddRequest {
            name: name.to_owned(),
            options: Some(UserAddOptions { no_password: true }),
            ..AuthUserAddRequest::default()
        };
        auth.user_add(user).await?;
        let grant = AuthUserGrantRoleRequest {
            user: name.to_owned(),
            role: ROOT.to_owned(),
        };
        auth.user_grant_role(grant).await?;
    }
    auth.auth_enable(AuthEnableRequest {}).await?;
    Ok(())
}

/// Reads one snapshot after the other.
struct Snapshots {
    stop: Arc<AtomicBool>,
    reading: JoinHandle<Result<Vec<f64>>>,
}

impl Snapshots {
    async fn begin(group: &Group) -> Result<Self> {
        let mut client = MaintenanceClient::new(group.connect(0).await?.channel())
            .max_decoding_message_size(usize::MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reading = tokio::spawn(async move {
            let mut seconds = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                let begin = Instant::now();
                let mut parts = client.snapshot(SnapshotRequest {}).await?.into_inner();
                while parts
                    .message()
                    .await
                    .context("reading a snapshot")?
                    .is_some()
                {}
                seconds.push(begin.elapsed().as_secs_f64());
            }
            Ok(seconds)
        });
        Ok(Self { stop, reading })
    }

    /// Median of the times that they took, seconds.
    async fn end(self) -> Result<f64> {
        self.stop.store(true, Ordering::Release);
        Ok(median(&self.reading.await??))
    }
}
