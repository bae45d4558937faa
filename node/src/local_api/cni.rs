//! CNI calls: what the plugin asks, with errors in the specification's form.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::v1::cni_server::Cni;
use clustermesh_api::v1::{
    CniAddResponse, CniAddress, CniCheckRequest, CniCheckResponse, CniDelResponse,
    CniError as WireError, CniGcRequest, CniGcResponse, CniRequest, CniRoute, CniStatusRequest,
    CniStatusResponse,
};
use clustermesh_encryption::userspace::udp::segments_per_call;
use clustermesh_node_core::change::WorkloadName;
use clustermesh_node_core::cni::{CniError, code};
use clustermesh_node_core::ipam::{Attachment, Ipam, IpamError};
use prost::Message as _;
use tonic::{Code, Request, Response, Status};
use tracing::{info, warn};

use crate::config::Config;
use crate::endpoints::{AddRequest, DelQueue, EndpointError, Endpoints};
use crate::metrics::Metrics;
use crate::records::{WORKLOAD_WAIT, Workloads};
use crate::signals::Signals;
use crate::state_files::{NodeFacts, StoredEndpoint};
use crate::strict_mode::MeshGuard;

/// ADD waits so long for strict mode.
const GUARD_WAIT: Duration = Duration::from_secs(5);

/// Answers the CNI plugin.
pub struct CniService {
    /// Settings.
    pub config: Arc<Config>,
    /// The underlay, and the server's word about this node.
    pub signals: Arc<Signals>,
    /// Which workloads there are.
    pub workloads: Arc<Workloads>,
    /// What the calls change.
    pub endpoints: Arc<Endpoints>,
    /// DELs that came while no agent answered.
    pub queue: Arc<DelQueue>,
    /// Says when pods may come up; `None` without strict mode.
    pub guard: Option<Arc<MeshGuard>>,
    /// Counters.
    pub metrics: Metrics,
}

impl CniService {
    /// Logs and counts the outcome of a call, and gives it the form of the wire.
    fn outcome<T>(
        &self,
        command: &'static str,
        attachment: &Attachment,
        result: Result<T, CniError>,
    ) -> Result<Response<T>, Status> {
        let code = result.as_ref().map_or_else(|error| error.code, |_| 0);
        let labels = vec![
            ("command".to_owned(), command.to_owned()),
            ("code".to_owned(), code.to_string()),
        ];
        self.metrics.cni_calls.get_or_create(&labels).inc();
        let container = &attachment.container_id;
        result.map(Response::new).map_err(|error| {
            warn!(
                command,
                container,
                code = error.code,
                details = error.details,
                "{}",
                error.msg
            );
            status(&error)
        })
    }

    /// Carries a change out even if the plugin goes away meanwhile: half of one would contradict the state folder.
    async fn to_its_end<T>(
        change: impl Future<Output = Result<T, EndpointError>> + Send + 'static,
    ) -> Result<T, CniError>
    where
        T: Send + 'static,
    {
        match tokio::spawn(change).await {
            Ok(result) => result.map_err(|error| cni_error(&error)),
            Err(error) => Err(CniError::new(
                code::TRY_AGAIN_LATER,
                "the agent ended in the middle of the call",
                error.to_string(),
            )),
        }
    }

    fn facts(&self) -> Result<NodeFacts, CniError> {
        self.signals.facts.borrow().clone().ok_or_else(|| {
            CniError::new(
                code::TRY_AGAIN_LATER,
                "this node has no pod CIDR yet",
                "it gets one with its first session to the cluster's server; see `clustermesh-node status`",
            )
        })
    }

    async fn attach(&self, request: &CniRequest) -> Result<CniAddResponse, CniError> {
        let facts = self.facts()?;
        let workload = WorkloadName {
            namespace: request.namespace.as_str().into(),
            name: request.name.as_str().into(),
        };
        let Some(identity) = self.workloads.wait_for(&workload).await else {
            return Err(CniError::new(
                code::TRY_AGAIN_LATER,
                format!("Workload {workload} is not known"),
                format!(
                    "waited {} s; store it with `clustermesh apply`{}",
                    WORKLOAD_WAIT.as_secs(),
                    if *self.signals.connected.borrow() {
                        ""
                    } else {
                        " (the server cannot be reached at present)"
                    }
                ),
            ));
        };
        if let Some(guard) = &self.guard
            && !guard.wait_ready(GUARD_WAIT).await
        {
            return Err(CniError::new(
                code::TRY_AGAIN_LATER,
                "strict mode is not in force yet: the node does not know the mesh's addresses",
                "it learns them from the first complete list of records, or has them from an earlier run; \
                 see `clustermesh-node status`",
            ));
        }
        let underlay = self.signals.underlay.borrow().clone();
        // Packets that are redirected into the device of user space should fit one call there.
        let mtu = usize::try_from(underlay.wireguard_mtu).unwrap_or(usize::MAX);
        let is_encrypted = self.config.encryption.is_on();
        let segments_max = is_encrypted.then(|| segments_per_call(mtu));
        let request = AddRequest {
            attachment: attachment(request),
            netns: request.netns.clone(),
            workload,
            identity,
            mtu: underlay.pod_mtu,
            segments_max,
        };
        let (queue, endpoints) = (Arc::clone(&self.queue), Arc::clone(&self.endpoints));
        let endpoint = Self::to_its_end(async move {
            queue.drop_before_add(&request.attachment).await;
            endpoints.add(request).await
        })
        .await?;
        info!(
            workload = %format!("{}/{}", endpoint.namespace, endpoint.name),
            container = endpoint.attachment.container_id,
            addresses = ?endpoint.addresses,
            "endpoint attached"
        );
        Ok(response(&endpoint, &facts))
    }
}

fn attachment(request: &CniRequest) -> Attachment {
    Attachment {
        container_id: request.container_id.clone(),
        ifname: request.ifname.clone(),
    }
}

fn response(endpoint: &StoredEndpoint, facts: &NodeFacts) -> CniAddResponse {
    let mut ipam = Ipam::default();
    ipam.set_ranges(facts.pod_cidr_v4, facts.pod_cidr_v6);
    let routers = ipam.routers();
    let router_of = |ip: &IpAddr| {
        let router = routers.iter().find(|r| r.is_ipv4() == ip.is_ipv4());
        router.map(ToString::to_string).unwrap_or_default()
    };
    CniAddResponse {
        addresses: endpoint
            .addresses
            .iter()
            .map(|ip| CniAddress {
                address: format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }),
                gateway: router_of(ip),
            })
            .collect(),
        host_interface: endpoint.host_interface.clone(),
        host_mac: mac(endpoint.host_mac),
        container_mac: mac(endpoint.pod_mac),
        mtu: endpoint.mtu,
        routes: endpoint
            .addresses
            .iter()
            .map(|ip| CniRoute {
                destination: if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" }.to_owned(),
                gateway: router_of(ip),
            })
            .collect(),
    }
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// The specification's code for a failure of ours.
fn cni_error(error: &EndpointError) -> CniError {
    let (code, msg) = match error {
        EndpointError::Ipam(IpamError::Exhausted { .. }) => {
            (code::ADDRESSES_EXHAUSTED, "no address is left")
        }
        EndpointError::Ipam(IpamError::NoRange) => {
            (code::TRY_AGAIN_LATER, "this node has no pod CIDR yet")
        }
        EndpointError::Netlink(_) | EndpointError::Datapath(_) => {
            (code::KERNEL, "the container's network cannot be set up")
        }
        EndpointError::State(_) => (code::IO_FAILURE, "the agent's state cannot be stored"),
        EndpointError::Unknown(_) => (code::UNKNOWN_CONTAINER, "the container is not attached"),
        EndpointError::Changed(_) => (
            code::CHECK_FAILED,
            "the container's network is not as it was left",
        ),
    };
    CniError::new(code, msg, error.to_string())
}

fn status(error: &CniError) -> Status {
    let details = WireError {
        code: error.code,
        msg: error.msg.clone(),
        details: error.details.clone(),
    };
    let code = match error.code {
        code::TRY_AGAIN_LATER | code::NOT_AVAILABLE => Code::Unavailable,
        _ => Code::Internal,
    };
    Status::with_details(code, error.to_string(), details.encode_to_vec().into())
}

#[tonic::async_trait]
impl Cni for CniService {
    async fn add(&self, request: Request<CniRequest>) -> Result<Response<CniAddResponse>, Status> {
        let request = request.into_inner();
        let result = self.attach(&request).await;
        self.outcome("ADD", &attachment(&request), result)
    }

    async fn del(&self, request: Request<CniRequest>) -> Result<Response<CniDelResponse>, Status> {
        let attachment = attachment(&request.into_inner());
        let gone = attachment.clone();
        let endpoints = Arc::clone(&self.endpoints);
        let result = Self::to_its_end(async move { endpoints.del(&gone).await }).await;
        if result.is_ok() {
            info!(container = attachment.container_id, "endpoint detached");
        }
        let result = result.map(|()| CniDelResponse {});
        self.outcome("DEL", &attachment, result)
    }

    async fn check(
        &self,
        request: Request<CniCheckRequest>,
    ) -> Result<Response<CniCheckResponse>, Status> {
        let request = request.into_inner();
        let call = request.attachment.unwrap_or_default();
        let attachment = attachment(&call);
        // An address that cannot be read is not one of the container's.
        let addresses: Result<Vec<IpAddr>, _> = request
            .addresses
            .iter()
            .map(|text| text.split('/').next().unwrap_or_default().parse())
            .collect();
        let result = match addresses {
            Ok(addresses) => self
                .endpoints
                .check(&attachment, &call.netns, &addresses)
                .await
                .map(|()| CniCheckResponse {})
                .map_err(|error| cni_error(&error)),
            Err(error) => Err(CniError::new(
                code::INVALID_CONFIG,
                "prevResult has an address that is none",
                format!("{error}: {:?}", request.addresses),
            )),
        };
        self.outcome("CHECK", &attachment, result)
    }

    async fn gc(&self, request: Request<CniGcRequest>) -> Result<Response<CniGcResponse>, Status> {
        let valid: HashSet<Attachment> = request
            .into_inner()
            .valid_attachments
            .into_iter()
            .map(|a| Attachment {
                container_id: a.container_id,
                ifname: a.ifname,
            })
            .collect();
        let endpoints = Arc::clone(&self.endpoints);
        let result = Self::to_its_end(async move { endpoints.gc(&valid).await })
            .await
            .map(|removed| CniGcResponse { removed });
        self.outcome(
            "GC",
            &Attachment {
                container_id: String::new(),
                ifname: String::new(),
            },
            result,
        )
    }

    async fn status(
        &self,
        _: Request<CniStatusRequest>,
    ) -> Result<Response<CniStatusResponse>, Status> {
        let result = self
            .facts()
            .map(|_| CniStatusResponse {})
            .map_err(|error| CniError::new(code::NOT_AVAILABLE, error.msg, error.details));
        self.outcome(
            "STATUS",
            &Attachment {
                container_id: String::new(),
                ifname: String::new(),
            },
            result,
        )
    }
}
