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

use crate::endpoints::{AddRequest, EndpointError};
use crate::shared::{Shared, WORKLOAD_WAIT};
use crate::state_files::{NodeFacts, StoredEndpoint};

/// ADD waits so long for strict mode.
const GUARD_WAIT: Duration = Duration::from_secs(5);

pub(super) struct CniService {
    shared: Arc<Shared>,
}

impl CniService {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

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
        self.shared.metrics.cni_calls.get_or_create(&labels).inc();
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
    async fn to_its_end<T, F>(&self, change: impl FnOnce(Arc<Shared>) -> F) -> Result<T, CniError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EndpointError>> + Send + 'static,
    {
        match tokio::spawn(change(Arc::clone(&self.shared))).await {
            Ok(result) => result.map_err(|error| cni_error(&error)),
            Err(error) => Err(CniError::new(
                code::TRY_AGAIN_LATER,
                "the agent ended in the middle of the call",
                error.to_string(),
            )),
        }
    }

    fn facts(&self) -> Result<NodeFacts, CniError> {
        self.shared.facts.borrow().clone().ok_or_else(|| {
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
        let Some(identity) = self.shared.wait_for_workload(&workload).await else {
            return Err(CniError::new(
                code::TRY_AGAIN_LATER,
                format!("Workload {workload} is not known"),
                format!(
                    "waited {} s; store it with `clustermesh apply`{}",
                    WORKLOAD_WAIT.as_secs(),
                    if *self.shared.connected.borrow() {
                        ""
                    } else {
                        " (the server cannot be reached at present)"
                    }
                ),
            ));
        };
        if let Some(mesh) = &self.shared.mesh
            && !mesh.wait_ready(GUARD_WAIT).await
        {
            return Err(CniError::new(
                code::TRY_AGAIN_LATER,
                "strict mode is not in force yet: the node does not know the mesh's addresses",
                "it learns them from the first complete list of records, or has them from an earlier run; \
                 see `clustermesh-node status`",
            ));
        }
        let underlay = self.shared.underlay.borrow().clone();
        // Packets that are redirected into the device of user space should fit one call there.
        let mtu = usize::try_from(underlay.wireguard_mtu).unwrap_or(usize::MAX);
        let is_encrypted = self.shared.config.encryption.is_on();
        let segments_max = is_encrypted.then(|| segments_per_call(mtu));
        let request = AddRequest {
            attachment: attachment(request),
            netns: request.netns.clone(),
            workload,
            identity,
            mtu: underlay.pod_mtu,
            segments_max,
        };
        let endpoint = self
            .to_its_end(|shared| async move {
                shared.queue.drop_before_add(&request.attachment).await;
                shared.endpoints.add(request).await
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
        let result = self
            .to_its_end(|shared| async move { shared.endpoints.del(&gone).await })
            .await;
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
                .shared
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
        let result = self
            .to_its_end(|shared| async move { shared.endpoints.gc(&valid).await })
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
