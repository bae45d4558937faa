//! A cluster's store, read and written with the operator's certificate over etcd's API.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clustermesh_api::etcd::mvcc::KeyValue;
use clustermesh_api::etcd::rpc::{DeleteRangeRequest, PutRequest, RangeRequest};
use clustermesh_client::{Client, ClientConfig, TlsPaths};

use super::cluster::Cluster;
use super::host::netns_path;
use super::tap::in_netns;

/// Keys of one listing.
const LISTED_KEYS_MAX: usize = 100_000;

/// Calls on one cluster's store. Each call is made from inside the cluster's own network.
#[derive(Clone, Debug)]
pub struct Store {
    netns: PathBuf,
    config: ClientConfig,
}

/// Revisions at which records were made, by key.
pub type Made = BTreeMap<String, i64>;

/// Keys of what was deleted in between, also of what has been written again since.
#[must_use]
pub fn gone(before: &Made, after: &Made) -> Vec<String> {
    before
        .iter()
        .filter(|(key, made)| after.get(*key) != Some(*made))
        .map(|(key, _)| key.clone())
        .collect()
}

impl Cluster {
    /// The store of this cluster, for its operator.
    ///
    /// # Errors
    /// When the lab's folder is not there.
    pub fn store(&self) -> Result<Store> {
        self.store_as("admin")
    }

    /// The operator's view of one replica, and of no other.
    ///
    /// # Errors
    /// When the lab's folder is not there.
    pub fn store_at(&self, replica: usize) -> Result<Store> {
        let endpoint = self.replica(replica).endpoint();
        Ok(Store {
            netns: netns_path(self.router_netns()),
            config: self.client_config(vec![endpoint], "admin")?,
        })
    }

    /// How a client with one of this cluster's certificates reaches these endpoints.
    ///
    /// # Errors
    /// When the lab's folder is not there.
    pub fn client_config(&self, endpoints: Vec<String>, certificate: &str) -> Result<ClientConfig> {
        let folder = self.pki()?.join(self.name());
        Ok(ClientConfig {
            endpoints,
            tls: Some(TlsPaths {
                ca: self.pki()?.join("ca.crt"),
                cert: folder.join(format!("{certificate}.crt")),
                key: folder.join(format!("{certificate}.key")),
            }),
            server_name: None,
        })
    }

    /// The store of this cluster as the holder of one of its certificates sees it.
    ///
    /// # Errors
    /// When the lab's folder is not there.
    pub fn store_as(&self, certificate: &str) -> Result<Store> {
        Ok(Store {
            netns: netns_path(self.router_netns()),
            config: self.client_config(self.endpoints(), certificate)?,
        })
    }
}

impl Store {
    /// Writes a record and returns the revision of the write.
    ///
    /// # Errors
    /// When the server refuses it or does not answer.
    pub async fn put(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<i64> {
        let request = PutRequest {
            key: key.to_owned().into(),
            value: value.into().into(),
            ..PutRequest::default()
        };
        let response = self
            .call(move |client| async move { Ok(client.put(request).await?) })
            .await?;
        Ok(response
            .header
            .context("an answer without a header")?
            .revision)
    }

    /// The store's revision, by a linearizable read.
    ///
    /// # Errors
    /// When no quorum answers.
    pub async fn revision(&self) -> Result<i64> {
        let request = RangeRequest {
            key: "\0".into(),
            count_only: true,
            ..RangeRequest::default()
        };
        let response = self
            .call(move |client| async move { Ok(client.range(request).await?) })
            .await?;
        Ok(response
            .header
            .context("an answer without a header")?
            .revision)
    }

    /// Writes a record that hangs on a new lease of `ttl_seconds`, which nobody keeps alive.
    ///
    /// # Errors
    /// When the server refuses it or does not answer.
    pub async fn put_leased(&self, key: &str, ttl_seconds: i64) -> Result<()> {
        let key = key.to_owned();
        self.call(move |client| async move {
            let lease = client.lease_grant(ttl_seconds, 0).await?.id;
            let request = PutRequest {
                key: key.into(),
                lease,
                ..PutRequest::default()
            };
            client.put(request).await?;
            Ok(())
        })
        .await
    }

    /// Reads a record.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let key = key.to_owned();
        self.call(move |client| async move {
            Ok(client.get(key).await?.map(|record| record.value.to_vec()))
        })
        .await
    }

    /// Deletes a record.
    ///
    /// # Errors
    /// When the server refuses it or does not answer.
    pub async fn delete(&self, key: &str) -> Result<()> {
        let request = DeleteRangeRequest {
            key: key.to_owned().into(),
            ..DeleteRangeRequest::default()
        };
        self.call(move |client| async move {
            client.delete_range(request).await?;
            Ok(())
        })
        .await
    }

    /// All records below a prefix, in the order of their keys.
    ///
    /// # Errors
    /// When the server does not answer or there are too many.
    pub async fn list(&self, prefix: &str) -> Result<Vec<KeyValue>> {
        let prefix = prefix.to_owned();
        self.call(move |client| async move {
            Ok(client
                .list_prefix(&prefix)
                .collect(LISTED_KEYS_MAX)
                .await?
                .kvs)
        })
        .await
    }

    /// When each record below the prefixes was made, by key: one that was deleted and written again differs.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn made(&self, prefixes: &[&str]) -> Result<Made> {
        let mut made = Made::new();
        for prefix in prefixes {
            for record in self.list(prefix).await? {
                let key = String::from_utf8_lossy(&record.key).into_owned();
                made.insert(key, record.create_revision);
            }
        }
        Ok(made)
    }

    /// Makes calls with a client that lives in the cluster's network as long as they run.
    ///
    /// # Errors
    /// What `work` fails with, and a connection that cannot be made.
    pub async fn call<T, W, F>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(Client) -> F + Send + 'static,
        F: Future<Output = Result<T>>,
    {
        let (netns, config) = (self.netns.clone(), self.config.clone());
        tokio::task::spawn_blocking(move || {
            in_netns(&netns, move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                runtime.block_on(async { work(Client::connect(&config).await?).await })
            })
        })
        .await?
    }
}
