//! What a cluster's store says, read through the operator's command as an operator would.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use super::cluster::Cluster;

impl Cluster {
    /// The objects of one kind that the cluster knows, its own and its peers'.
    ///
    /// # Errors
    /// When the command fails or prints no JSON list.
    pub async fn get(&self, kind: &str) -> Result<Vec<Value>> {
        let text = self.run_cli(&["get", kind, "-o", "json"]).await?;
        serde_json::from_str(&text).with_context(|| format!("get {kind} of {}", self.name()))
    }

    /// The operator's view of the cluster.
    ///
    /// # Errors
    /// When the command fails or prints no JSON.
    pub async fn status(&self) -> Result<Value> {
        let text = self.run_cli(&["status", "-o", "json"]).await?;
        serde_json::from_str(&text).with_context(|| format!("status of {}", self.name()))
    }

    /// The store's revision.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn revision(&self) -> Result<i64> {
        let status = self.status().await?;
        status["revision"]
            .as_i64()
            .with_context(|| format!("no revision in {status}"))
    }

    /// Pods that the cluster knows, its own and its peers'.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn endpoint_count(&self) -> Result<usize> {
        let mut pods: Vec<String> = self
            .get("endpoints")
            .await?
            .iter()
            .map(|endpoint| {
                format!(
                    "{}/{}/{}",
                    endpoint["cluster"], endpoint["namespace"], endpoint["name"]
                )
            })
            .collect();
        pods.sort_unstable();
        pods.dedup();
        Ok(pods.len())
    }

    /// The virtual address of a service of this cluster.
    ///
    /// # Errors
    /// When the service has none of that family.
    pub async fn service_address(&self, namespace: &str, name: &str, v6: bool) -> Result<String> {
        let services = self.get("services").await?;
        services
            .iter()
            .filter(|service| {
                service["cluster"] == self.name()
                    && service["namespace"] == namespace
                    && service["name"] == name
            })
            .filter_map(|service| service["addresses"].as_array())
            .flatten()
            .filter_map(Value::as_str)
            .find(|address| address.contains(':') == v6)
            .map(str::to_owned)
            .with_context(|| {
                format!(
                    "service {namespace}/{name} of {} has no such address",
                    self.name()
                )
            })
    }

    /// The identity of the workload that a pod of this cluster runs.
    ///
    /// # Errors
    /// When no endpoint or identity of that name is known.
    pub async fn workload_identity(&self, namespace: &str, name: &str) -> Result<u64> {
        let endpoints = self.get("endpoints").await?;
        endpoints
            .iter()
            .find(|endpoint| {
                endpoint["cluster"] == self.name()
                    && endpoint["namespace"] == namespace
                    && endpoint["name"] == name
            })
            .and_then(|endpoint| endpoint["identity"].as_u64())
            .with_context(|| format!("no endpoint {namespace}/{name} in {}", self.name()))
    }

    /// The identity with a label that ends in `label`, wherever it was made.
    ///
    /// # Errors
    /// When none does.
    pub async fn identity_labelled(&self, label: &str) -> Result<u64> {
        let identities = self.get("identities").await?;
        identities
            .iter()
            .find(|identity| {
                identity["labels"].as_array().is_some_and(|labels| {
                    labels
                        .iter()
                        .any(|l| l.as_str().is_some_and(|l| l.ends_with(label)))
                })
            })
            .and_then(|identity| identity["id"].as_u64())
            .with_context(|| format!("no identity with {label} is known to {}", self.name()))
    }

    /// Where the first replica keeps its data.
    #[must_use]
    pub fn server_data(&self) -> PathBuf {
        self.replica(0).data()
    }
}
