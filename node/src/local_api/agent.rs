//! What people and tools ask: status, flow records, and encryption: its status, other keys, a proof.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use clustermesh_api::v1::agent_server::Agent;
use clustermesh_api::v1::{
    AgentStatusRequest, AgentStatusResponse, EncryptionProof, EncryptionStatusRequest,
    EncryptionStatusResponse, Flow, FlowsRequest, LocalEndpoint, RotateKeysRequest,
    RotateKeysResponse, TrafficCounter, VerifyEncryptionRequest,
};
use clustermesh_ebpf::Maps;
use clustermesh_ebpf::abi::{LAYOUT_VERSION, WireTraffic};
use clustermesh_process::Drain;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::encryption::{Encryption, verify};
use crate::endpoints::Endpoints;
use crate::flows::{Flows, flow};
use crate::paths::Paths;
use crate::readiness::{Prober, port_readiness};
use crate::records::Reconciler;
use crate::signals::Signals;

/// Records that wait in one stream's socket.
const FLOWS_IN_STREAM_MAX: usize = 256;

/// Answers people and tools: how the agent is, what flows, and what encryption does.
pub struct AgentService {
    /// Settings.
    pub config: Arc<Config>,
    /// How programs are attached.
    pub attach_mode: &'static str,
    /// Kernel maps.
    pub maps: Maps,
    /// What the kernel holds.
    pub reconciler: Arc<Reconciler>,
    /// The latest word on this node.
    pub signals: Arc<Signals>,
    /// Local endpoints.
    pub endpoints: Arc<Endpoints>,
    /// Readiness of their ports.
    pub prober: Arc<Prober>,
    /// What is known of the paths to other nodes.
    pub paths: Arc<Paths>,
    /// Keys and devices; `None` where nothing is encrypted.
    pub encryption: Option<Arc<Encryption>>,
    /// Flow records.
    pub flows: Flows,
    /// Ends streams.
    pub drain: Drain,
}

impl AgentService {
    fn encryption(&self) -> Result<&Arc<Encryption>, Status> {
        self.encryption.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "this node encrypts nothing: set encryption.mode in its configuration",
            )
        })
    }
}

fn internal(error: &impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

#[tonic::async_trait]
impl Agent for AgentService {
    async fn status(
        &self,
        _: Request<AgentStatusRequest>,
    ) -> Result<Response<AgentStatusResponse>, Status> {
        let Self {
            config,
            maps,
            signals,
            ..
        } = self;
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
        let applied = self.reconciler.applied.borrow().clone();
        let registered = signals.registered.borrow().clone();
        let endpoints = self.endpoints.watch().borrow().clone();
        let response = AgentStatusResponse {
            node: config.node.clone(),
            cluster: config.cluster.clone(),
            server_connected: *signals.connected.borrow(),
            applied: applied.source_revisions(),
            attach_mode: self.attach_mode.to_owned(),
            routing_mode: config.routing.name().to_owned(),
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
                        .map(|ip| port_readiness(&self.prober.ports_of(*ip)))
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
            pod_cidrs: signals
                .facts
                .borrow()
                .iter()
                .flat_map(|facts| [facts.pod_cidr_v4, facts.pod_cidr_v6])
                .flatten()
                .map(|cidr| cidr.to_string())
                .collect(),
            paths: self.paths.statuses(),
            underlay_addresses: signals.underlay.borrow().address_texts(),
            refused_records: applied.refused_records(),
        };
        Ok(Response::new(response))
    }

    async fn encryption_status(
        &self,
        _: Request<EncryptionStatusRequest>,
    ) -> Result<Response<EncryptionStatusResponse>, Status> {
        let config = &self.config;
        let settings = &config.encryption;
        let report = self.encryption.as_ref().map(|e| e.report());
        let mut response = report.unwrap_or_default().to_message(
            settings.mode.name(),
            settings.strict,
            settings.nodes,
        );
        response.node.clone_from(&config.node);
        response.cluster.clone_from(&config.cluster);
        let paths = self.paths.statuses().into_iter();
        response.black_holes = paths.filter(|path| path.black_hole).collect();
        for (way, value) in self.maps.wire_traffic().map_err(|e| internal(&e))? {
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
        let epoch = self.encryption()?.ask_for_change();
        Ok(Response::new(RotateKeysResponse { epoch }))
    }

    type VerifyEncryptionStream =
        Pin<Box<dyn Stream<Item = Result<EncryptionProof, Status>> + Send>>;

    async fn verify_encryption(
        &self,
        _: Request<VerifyEncryptionRequest>,
    ) -> Result<Response<Self::VerifyEncryptionStream>, Status> {
        let proofs = verify::begin(&self.reconciler, self.encryption()?)?;
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
