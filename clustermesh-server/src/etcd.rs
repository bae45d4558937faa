//! The etcd v3 services over the replica.

mod auth;
mod cluster;
mod election;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod recipe;
mod watch;

use std::time::Duration;

use clustermesh_api::FILE_DESCRIPTOR_SET;
use clustermesh_api::etcd::election::election_server::ElectionServer;
use clustermesh_api::etcd::lock::lock_server::LockServer;
use clustermesh_api::etcd::rpc::auth_server::AuthServer;
use clustermesh_api::etcd::rpc::cluster_server::ClusterServer;
use clustermesh_api::etcd::rpc::kv_server::KvServer;
use clustermesh_api::etcd::rpc::lease_server::LeaseServer;
use clustermesh_api::etcd::rpc::maintenance_server::MaintenanceServer;
use clustermesh_api::limits::MAX_VALUE_BYTES;
use clustermesh_process::Drain;
use tonic::service::RoutesBuilder;

use crate::answers::AnswerBudget;
use crate::metrics::Metrics;
use crate::store::Store;

/// A message of a client has at most so many bytes: etcd's limit of a request, with room for what surrounds it.
const MAX_MESSAGE_BYTES: usize = MAX_VALUE_BYTES + (512 << 10);

/// Whether a client asks for an error instead of a replica that hears of nothing.
#[must_use]
pub fn needs_leader(headers: &http::HeaderMap) -> bool {
    headers
        .get("hasleader")
        .is_some_and(|value| value == "true")
}

/// Adds etcd's services.
pub fn add_services(
    routes: &mut RoutesBuilder,
    store: &Store,
    answers: &AnswerBudget,
    metrics: &Metrics,
    drain: &Drain,
    watch_progress_notify_interval: Duration,
) {
    routes
        .add_service(
            KvServer::new(kv::KvService::new(store.clone(), answers.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(usize::MAX),
        )
        .add_service(watch::WatchService::new(
            store.clone(),
            metrics.watch.clone(),
            drain.clone(),
            watch_progress_notify_interval,
        ))
        .add_service(
            LeaseServer::new(lease::LeaseService::new(store.clone(), drain.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            AuthServer::new(auth::AuthService::new(store.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            ClusterServer::new(cluster::ClusterService::new(store.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            MaintenanceServer::new(maintenance::MaintenanceService::new(
                store.clone(),
                answers.clone(),
            ))
            .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            LockServer::new(lock::LockService::new(store.clone(), drain.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            ElectionServer::new(election::ElectionService::new(store.clone(), drain.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        );
}

/// Adds `grpc.health.v1` and both versions of gRPC reflection.
///
/// # Errors
/// When the descriptors of the contract cannot be read.
pub fn add_reflection(routes: &mut RoutesBuilder) -> anyhow::Result<()> {
    // As in etcd, a server that answers is healthy: /readyz says more.
    let (_, health) = tonic_health::server::health_reporter();
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    routes
        .add_service(health)
        .add_service(builder().build_v1()?)
        .add_service(builder().build_v1alpha()?);
    Ok(())
}
