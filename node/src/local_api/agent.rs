//! Status and flows.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};

use clustermesh_api::v1::agent_server::Agent;
use clustermesh_api::v1::{
    AgentStatusRequest, AgentStatusResponse, EncryptionProof, EncryptionStatusRequest,
    EncryptionStatusResponse, Flow, FlowsRequest, LocalEndpoint, RotateKeysRequest,
    RotateKeysResponse, TrafficCounter, VerifyEncryptionRequest,
};
use clustermesh_ebpf::abi::{LAYOUT_VERSION, WireTraffic};
use clustermesh_process::Drain;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::encryption::verify;
use crate::flows::{Flows, flow};
use crate::session::{port_readiness, source_revisions};
use crate::shared::Shared;

/// Records that wait in one stream's socket.
const FLOWS_IN_STREAM_MAX: usize = 256;

pub(super) struct AgentService {
    shared: Arc<Shared>,
    flows: Flows,
    drain: Drain,
}

impl AgentService {
    pub(super) fn new(shared: Arc<Shared>, flows: Flows, drain: Drain) -> Self {
        Self {
            shared,
            flows,
            drain,
        }
    }
}

fn internal(error: &impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

fn encrypts_nothing() -> Status {
    Status::failed_precondition(
        "this node encrypts nothing: set encryption.mode in its configuration",
    )
}

#[tonic::async_trait]
impl Agent for AgentService {
    async fn status(
        &self,
        _: Request<AgentStatusRequest>,
    ) -> Result<Response<AgentStatusResponse>, Status> {
        let shared = &self.shared;
        let maps = &shared.maps;
        let drops = maps.drops().map_err(|error| internal(&error))?;
        let traffic = maps.traffic().map_err(|error| internal(&error))?;
        let mut map_entries = BTreeMap::new();
        for (name, entries) in [
            ("nodes", maps.nodes.len()),
            ("node_addresses", maps.node_addresses.len()),
            ("ipcache", maps.ipcache.len()),
            ("mesh", maps.mesh.len()),
            ("endpoints", maps.endpoints.len()),
            ("interfaces", maps.interfaces.len()),
            ("frontends", maps.frontends.len()),
            ("backends", maps.backends.len()),
        ] {
            let entries = entries.map_err(|error| internal(&error))?;
            map_entries.insert(name.to_owned(), entries as u64);
        }
        let applied = shared.applied.borrow().clone();
        let registered = shared
            .registered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let endpoints = shared.endpoints.watch().borrow().clone();
        let response = AgentStatusResponse {
            node: shared.config.node.clone(),
            cluster: shared.config.cluster.clone(),
            server_connected: *shared.connected.borrow(),
            applied: source_revisions(&applied),
            attach_mode: shared.attach_mode.to_owned(),
            routing_mode: shared.config.routing.name().to_owned(),
            map_layout_version: LAYOUT_VERSION,
            endpoints: endpoints
                .iter()
                .map(|endpoint| LocalEndpoint {
                    namespace: endpoint.namespace.clone(),
                    name: endpoint.name.clone(),
                    addresses: endpoint.addresses.iter().map(ToString::to_string).collect(),
                    identity: endpoint.identity,
                    interface: endpoint.host_interface.clone(),
                    container_id: endpoint.attachment.container_id.clone(),
                    // The same ports of either family: the first address speaks for the endpoint.
                    ports: endpoint
                        .addresses
                        .first()
                        .map(|ip| port_readiness(&shared.prober.ports_of(*ip)))
                        .unwrap_or_default(),
                    registered: registered.contains(&endpoint.attachment),
                })
                .collect(),
            drops: drops
                .into_iter()
                .map(|(reason, count)| (reason.name().to_owned(), count))
                .collect(),
            traffic: traffic
                .into_iter()
                .map(|(path, value)| {
                    let counter = TrafficCounter {
                        packets: value.packets,
                        bytes: value.bytes,
                    };
                    (path.name().to_owned(), counter)
                })
                .collect(),
            map_entries,
            pod_cidrs: shared
                .facts
                .borrow()
                .iter()
                .flat_map(|facts| [facts.pod_cidr_v4, facts.pod_cidr_v6])
                .flatten()
                .map(|cidr| cidr.to_string())
                .collect(),
            paths: shared.paths.statuses(),
            underlay_addresses: shared.underlay.borrow().address_texts(),
            refused_records: applied
                .refused
                .iter()
                .map(|(reason, count)| ((*reason).to_owned(), *count))
                .collect(),
        };
        Ok(Response::new(response))
    }

    async fn encryption_status(
        &self,
        _: Request<EncryptionStatusRequest>,
    ) -> Result<Response<EncryptionStatusResponse>, Status> {
        let shared = &self.shared;
        let settings = &shared.config.encryption;
        let report = shared.encryption.as_ref().map(|e| e.report());
        let mut response = report.unwrap_or_default().to_message(
            settings.mode.name(),
            settings.strict,
            settings.nodes,
        );
        response.node.clone_from(&shared.config.node);
        response.cluster.clone_from(&shared.config.cluster);
        let paths = shared.paths.statuses().into_iter();
        response.black_holes = paths.filter(|path| path.black_hole).collect();
        for (way, value) in shared.maps.wire_traffic().map_err(|e| internal(&e))? {
            match way {
                WireTraffic::EncryptedIn | WireTraffic::EncryptedOut => {
                    response.encrypted_bytes += value.bytes;
                }
                WireTraffic::ClearIn | WireTraffic::ClearOut => response.clear_bytes += value.bytes,
            }
        }
        Ok(Response::new(response))
    }

    async fn rotate_keys(
        &self,
        _: Request<RotateKeysRequest>,
    ) -> Result<Response<RotateKeysResponse>, Status> {
        let encryption = self
            .shared
            .encryption
            .as_ref()
            .ok_or_else(encrypts_nothing)?;
        let epoch = encryption.ask_for_change();
        Ok(Response::new(RotateKeysResponse { epoch }))
    }

    type VerifyEncryptionStream =
        Pin<Box<dyn Stream<Item = Result<EncryptionProof, Status>> + Send>>;

    async fn verify_encryption(
        &self,
        _: Request<VerifyEncryptionRequest>,
    ) -> Result<Response<Self::VerifyEncryptionStream>, Status> {
        let encryption = self
            .shared
            .encryption
            .as_ref()
            .ok_or_else(encrypts_nothing)?;
        let proofs = verify::begin(&self.shared, encryption)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(proofs))))
    }

    type FlowsStream = Pin<Box<dyn Stream<Item = Result<Flow, Status>> + Send>>;

    async fn flows(&self, _: Request<FlowsRequest>) -> Result<Response<Self::FlowsStream>, Status> {
        let mut records = self
            .flows
            .listen()
            .map_err(|error| Status::internal(format!("{error:#}")))?;
        let (sender, receiver) = mpsc::channel(FLOWS_IN_STREAM_MAX);
        let drain = self.drain.clone();
        tokio::spawn(async move {
            let mut lost = 0;
            loop {
                let received = tokio::select! {
                    received = records.recv() => received,
                    () = sender.closed() => return,
                    () = drain.draining() => return,
                };
                match received {
                    Ok(record) => {
                        if sender.send(Ok(flow(&record, lost))).await.is_err() {
                            return;
                        }
                        lost = 0;
                    }
                    Err(RecvError::Lagged(count)) => lost += count,
                    Err(RecvError::Closed) => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
