//! Clusters up, pods attached.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::report::Measured;
use super::scene::{BACKEND_PORT, NAMESPACE, PODS, SERVICE_PORT, Scene};

/// Longest that a convergence may take, seconds.
const CONVERGED_SECONDS_MAX: u32 = 20;

pub async fn up(scene: &mut Scene) -> Result<Measured> {
    if scene.sabotaged() {
        scene.lab.wan().cut();
    }
    let waited = scene.lab.cluster(0).wait_converged(5).await;
    let waited = match waited {
        Ok(()) => {
            scene
                .lab
                .cluster(1)
                .wait_converged(CONVERGED_SECONDS_MAX)
                .await
        }
        error => error,
    };
    scene.lab.wan().heal();
    waited?;
    let seconds = scene.begun.elapsed().as_secs_f64();
    let nodes: usize = scene.lab.clusters().iter().map(|c| c.nodes().len()).sum();
    Ok(Measured::new(
        seconds,
        "s until converged",
        format!("{nodes} nodes converged {seconds:.1} s after nothing"),
    ))
}

pub async fn attach(scene: &mut Scene) -> Result<Measured> {
    for index in 0..scene.lab.clusters().len() {
        let manifests = manifests(index)?;
        scene.lab.cluster(index).apply(&manifests).await?;
    }
    let mut slowest_ms: f64 = 0.0;
    for (name, ..) in PODS {
        let begun = Instant::now();
        scene.add_pod(name).await?;
        slowest_ms = slowest_ms.max(begun.elapsed().as_secs_f64() * 1e3);
    }
    for cluster in scene.lab.clusters() {
        cluster.wait_converged(CONVERGED_SECONDS_MAX).await?;
    }
    if scene.sabotaged() {
        // A name that no Workload bears.
        scene
            .lab
            .cluster(0)
            .node(0)
            .add_pod(NAMESPACE, "nobody")
            .await?;
    }
    let expected = PODS.len();
    let seen = scene.lab.cluster(1).endpoint_count().await?;
    ensure!(
        seen == expected,
        "cluster b lists {seen} endpoints, {expected} were attached"
    );
    Ok(Measured::new(
        slowest_ms,
        "ms, slowest ADD",
        format!(
            "{expected} pods, slowest ADD with its server {slowest_ms:.0} ms, known in both clusters"
        ),
    ))
}

/// The Workloads of one cluster, and the services that both declare.
fn manifests(cluster: usize) -> Result<String> {
    let mut text = String::new();
    for (name, ..) in PODS.iter().filter(|(_, of, ..)| *of == cluster) {
        let app = name.split('-').next().unwrap_or_default();
        write!(
            text,
            "apiVersion: clustermesh.io/v1\nkind: Workload\nmetadata:\n  namespace: {NAMESPACE}\n  name: {name}\n  labels:\n    app: {app}\n---\n"
        )?;
    }
    for (service, affinity) in [("cart", "none"), ("pay", "local")] {
        write!(
            text,
            "apiVersion: clustermesh.io/v1\nkind: Service\nmetadata:\n  namespace: {NAMESPACE}\n  name: {service}\n  annotations:\n    service.cilium.io/global: \"true\"\n    service.cilium.io/affinity: {affinity}\nspec:\n  selector:\n    app: web\n  ports:\n    - name: http\n      protocol: TCP\n      port: {SERVICE_PORT}\n      targetPort: {BACKEND_PORT}\n---\n"
        )?;
    }
    Ok(text)
}
