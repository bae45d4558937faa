//! The etcd v3 services over the replica.

pub mod answers;
mod cluster;
mod kv;
mod lease;
mod maintenance;
mod watch;

use clustermesh_api::etcd::rpc::cluster_server::ClusterServer;
use clustermesh_api::etcd::rpc::kv_server::KvServer;
use clustermesh_api::etcd::rpc::lease_server::LeaseServer;
use clustermesh_api::etcd::rpc::maintenance_server::MaintenanceServer;
use clustermesh_api::etcd::rpc::watch_server::WatchServer;
use clustermesh_api::limits::MAX_GRPC_RECV_BYTES;
use clustermesh_process::Drain;
use tonic::codec::CompressionEncoding;
use tonic::service::RoutesBuilder;

use crate::metrics::Metrics;
use crate::store::Store;

use answers::AnswerBudget;

/// Adds KV, Watch, Lease, Cluster and Maintenance.
pub fn add_services(routes: &mut RoutesBuilder, store: &Store, metrics: &Metrics, drain: &Drain) {
    let answers = AnswerBudget::new(metrics.answers.clone());
    routes
        .add_service(
            KvServer::new(kv::KvService::new(store.clone(), answers.clone()))
                .max_decoding_message_size(MAX_GRPC_RECV_BYTES)
                .max_encoding_message_size(usize::MAX),
        )
        .add_service(
            WatchServer::new(watch::WatchService::new(
                store.clone(),
                metrics.watch.clone(),
                drain.clone(),
            ))
            .max_decoding_message_size(MAX_GRPC_RECV_BYTES)
            .max_encoding_message_size(usize::MAX)
            // Only for clients that take it, as peers do; the others get what etcd sends.
            .send_compressed(CompressionEncoding::Zstd),
        )
        .add_service(LeaseServer::new(lease::LeaseService::new(
            store.clone(),
            drain.clone(),
        )))
        .add_service(ClusterServer::new(cluster::ClusterService::new(
            store.clone(),
        )))
        .add_service(MaintenanceServer::new(
            maintenance::MaintenanceService::new(store.clone(), answers),
        ));
}
