//! `clustermesh.v1.NodeSession`: the only way in which an agent writes.

mod task;

use std::collections::BTreeMap;
use std::sync::Arc;

use clustermesh_api::limits::SESSION_QUEUE_MESSAGES;
use clustermesh_api::v1::node_session_server::NodeSession;
use clustermesh_api::v1::{SessionRequest, SessionResponse};
use clustermesh_mesh::ClusterSettings;
use clustermesh_process::Drain;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::agents::registry::Registry;
use crate::auth::{Caller, PERMISSION_DENIED, Role};
use crate::metrics::SessionMetrics;
use crate::planner::Planner;
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct NodeSessionService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    settings: Arc<ClusterSettings>,
    planner: Planner,
    registry: Registry,
    metrics: SessionMetrics,
    drain: Drain,
    /// Nodes whose sessions have ended, until they are back or lost: one wait for each, which ends when its sender does.
    losing: Mutex<BTreeMap<String, oneshot::Sender<()>>>,
}

impl Shared {
    /// Begins to wait for a node; a wait before it ends.
    fn begin_losing(&self, node: &str) -> oneshot::Receiver<()> {
        let (replaced_by_drop, wait) = oneshot::channel();
        let mut losing = self.losing.lock();
        losing.retain(|_, wait| !wait.is_closed());
        losing.insert(node.to_owned(), replaced_by_drop);
        wait
    }
}

impl NodeSessionService {
    /// Sessions of the nodes of `settings`' cluster.
    #[must_use]
    pub fn new(
        store: Store,
        settings: Arc<ClusterSettings>,
        planner: Planner,
        registry: Registry,
        metrics: SessionMetrics,
        drain: Drain,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                settings,
                planner,
                registry,
                metrics,
                drain,
                losing: Mutex::default(),
            }),
        }
    }
}

#[tonic::async_trait]
impl NodeSession for NodeSessionService {
    type OpenStream = ReceiverStream<Result<SessionResponse, Status>>;

    async fn open(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::OpenStream>, Status> {
        let caller = Caller::of(&request)?;
        caller.check_known()?;
        let Role::Node { name } = caller.role() else {
            return Err(Status::permission_denied(format!(
                "{PERMISSION_DENIED}: a node session needs a node's certificate"
            )));
        };
        let (responses, stream) = mpsc::channel(SESSION_QUEUE_MESSAGES);
        let task = task::SessionTask::new(Arc::clone(&self.shared), name.clone(), responses);
        tokio::spawn(task.run(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
