//! Global services: spread over clusters, and failing over.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::report::Measured;
use super::scene::Scene;

/// Connections of the spread check.
const CONNECTIONS: u32 = 200;
/// Least share that each cluster must get of evenly spread connections, percent.
const SHARE_PERCENT_MIN: f64 = 30.0;
/// Longest that a service may need to change over.
const CHANGE_OVER_SECONDS_MAX: u64 = 10;

pub async fn spread(scene: &mut Scene) -> Result<Measured> {
    if scene.sabotaged() {
        scene.stop_server("web-b", Signal::SIGKILL).await?;
        until_only(scene, "client-a", "cart", "web-a").await?;
    } else {
        until_both(scene, "client-a").await?;
        until_both(scene, "client-b").await?;
    }
    let result = spread_of_both(scene).await;
    if scene.sabotaged() {
        scene.start_server("web-b").await?;
        until_both(scene, "client-a").await?;
    }
    result
}

async fn spread_of_both(scene: &Scene) -> Result<Measured> {
    let mut figures = Vec::new();
    let mut least = 100.0_f64;
    for (cluster, client) in [(0, "client-a"), (1, "client-b")] {
        for v6 in [false, true] {
            let to = scene.service(cluster, "cart", v6).await?;
            let report = scene.probe(client, &to, CONNECTIONS).await?;
            ensure!(report["failed"] == 0, "{client} to {to}: {report}");
            let shares = ["web-a", "web-b"].map(|name| {
                report["by_name"][name].as_f64().unwrap_or(0.0) * 100.0 / f64::from(CONNECTIONS)
            });
            least = shares.into_iter().fold(least, f64::min);
            ensure!(
                least >= SHARE_PERCENT_MIN,
                "{client} to {to} is not spread: {report}"
            );
            if !v6 {
                let [a, b] = shares;
                figures.push(format!("{client}: a {a:.0} %, b {b:.0} %"));
            }
        }
    }
    let text = figures.join("; ");
    Ok(Measured::new(least, "% of connects, least share", text))
}

pub async fn failover_pod_deleted(scene: &mut Scene) -> Result<Measured> {
    before_failover(scene).await?;
    let begun = Instant::now();
    if !scene.sabotaged() {
        scene.delete_pod("web-a").await?;
    }
    let result = first_answer_of_b(scene, begun).await;
    if !scene.sabotaged() {
        scene.add_pod("web-a").await?;
    }
    until_only(scene, "client-a", "pay", "web-a").await?;
    result
}

pub async fn failover_process_killed(scene: &mut Scene) -> Result<Measured> {
    before_failover(scene).await?;
    let begun = Instant::now();
    if !scene.sabotaged() {
        scene.stop_server("web-a", Signal::SIGKILL).await?;
    }
    let result = first_answer_of_b(scene, begun).await;
    if !scene.sabotaged() {
        scene.start_server("web-a").await?;
    }
    until_only(scene, "client-a", "pay", "web-a").await?;
    result
}

pub async fn failover_listener_closed(scene: &mut Scene) -> Result<Measured> {
    before_failover(scene).await?;
    let begun = Instant::now();
    if !scene.sabotaged() {
        scene.signal_server("web-a", Signal::SIGUSR1)?;
    }
    let result = first_answer_of_b(scene, begun).await;
    if !scene.sabotaged() {
        scene.stop_server("web-a", Signal::SIGKILL).await?;
        scene.start_server("web-a").await?;
    }
    until_only(scene, "client-a", "pay", "web-a").await?;
    result
}

/// Before the fault, the local backend alone answers.
async fn before_failover(scene: &Scene) -> Result<()> {
    until_only(scene, "client-a", "pay", "web-a").await
}

/// Connects until the other cluster's backend answers; the time since the fault.
async fn first_answer_of_b(scene: &Scene, begun: Instant) -> Result<Measured> {
    let to = scene.service(0, "pay", false).await?;
    let mut failed = 0;
    let limit = Duration::from_secs(if scene.sabotaged() {
        2
    } else {
        CHANGE_OVER_SECONDS_MAX
    });
    while begun.elapsed() < limit {
        let report = scene.probe("client-a", &to, 5).await?;
        failed += report["failed"].as_u64().unwrap_or(0);
        if report["by_name"]["web-b"].as_u64().unwrap_or(0) > 0 {
            let ms = begun.elapsed().as_secs_f64() * 1e3;
            let text = format!(
                "first answer of cluster b after {ms:.0} ms, {failed} connects failed before"
            );
            return Ok(Measured::new(ms, "ms to first success", text));
        }
    }
    anyhow::bail!("cluster b did not answer within {} s", limit.as_secs())
}

async fn until_both(scene: &Scene, client: &str) -> Result<()> {
    until(scene, client, "cart", |a, b| a > 0 && b > 0).await
}

async fn until_only(scene: &Scene, client: &str, service: &str, name: &str) -> Result<()> {
    until(scene, client, service, |a, b| {
        if name == "web-a" {
            a > 0 && b == 0
        } else {
            a == 0 && b > 0
        }
    })
    .await
}

/// Waits until a service answers as wanted, for connects that all succeed.
async fn until(
    scene: &Scene,
    client: &str,
    service: &str,
    wanted: impl Fn(u64, u64) -> bool,
) -> Result<()> {
    let cluster = usize::from(client.ends_with("-b"));
    let to = scene.service(cluster, service, false).await?;
    let begun = Instant::now();
    let mut last = None;
    while begun.elapsed() < Duration::from_secs(CHANGE_OVER_SECONDS_MAX) {
        let report = scene.probe(client, &to, 20).await?;
        let of = |name: &str| report["by_name"][name].as_u64().unwrap_or(0);
        if report["failed"] == 0 && wanted(of("web-a"), of("web-b")) {
            return Ok(());
        }
        last = Some(report);
    }
    anyhow::bail!(
        "{service} from {client} did not settle: {}",
        last.context("no probe ended")?
    )
}
