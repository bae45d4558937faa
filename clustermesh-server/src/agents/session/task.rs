//! One session: introduction, claims answered in order, and what its loss means.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::limits::{
    SESSION_QUEUE_MESSAGES, SESSION_TTL_DEFAULT_SECONDS, SESSION_TTL_MAX_SECONDS,
    SESSION_TTL_MIN_SECONDS,
};
use clustermesh_api::records::SessionState;
use clustermesh_api::v1::refused::Reason;
use clustermesh_api::v1::session_request::Message as Asked;
use clustermesh_api::v1::session_response::Message as Answer;
use clustermesh_api::v1::{Ack, Hello, Refused, SessionRequest, SessionResponse, Welcome};
use clustermesh_mesh::View;
use clustermesh_mesh::allocate::Plan;
use clustermesh_mesh::claims::{
    ClaimError, NodeMemo, SyncProgress, is_connected, plan_delete_endpoint, plan_hello,
    plan_readiness, plan_session, plan_sync, plan_upsert,
};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Status, Streaming};
use tracing::{info, warn};

use super::Shared;
use crate::agents::registry::OpenSession;
use crate::agents::report::Report;
use crate::metrics::ReasonLabels;
use crate::planner::{CommitError, Done};
use crate::view::StateView;

/// The introduction must come by then.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent whose queue is full gets the reason of the end only if it reads by then.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(5);

type Responses = mpsc::Sender<Result<SessionResponse, Status>>;
type Pending = Pin<Box<dyn Future<Output = Result<Vec<Answer>, Status>> + Send>>;

/// The task of one stream.
pub(super) struct SessionTask {
    shared: Arc<Shared>,
    /// From the certificate.
    node: String,
    responses: Responses,
}

/// A session after its introduction.
struct Open {
    ttl: Duration,
    session: OpenSession,
    /// The node's record as its claims are judged by it.
    memo: Arc<Mutex<NodeMemo>>,
}

/// Why a session is over.
#[derive(Debug)]
enum End {
    /// The agent closed the stream or the connection broke.
    Disconnected,
    /// Nothing came for the whole time to live.
    Silent,
    /// A newer session of the same agent took over.
    Replaced,
    /// This server stops.
    Stopping,
    /// The store could not commit a claim; the agent comes back and tells everything again.
    Failed(Status),
}

impl SessionTask {
    pub(super) fn new(shared: Arc<Shared>, node: String, responses: Responses) -> Self {
        Self {
            shared,
            node,
            responses,
        }
    }

    pub(super) async fn run(self, mut requests: Streaming<SessionRequest>) {
        let (hello, session) = match self.greet(&mut requests).await {
            Ok(Ok(greeted)) => greeted,
            Ok(Err((reason, message))) => return self.refuse(reason, message).await,
            Err(status) => {
                self.last_word(Err(status)).await;
                return;
            }
        };
        let seconds = match hello.session_ttl_seconds {
            0 => SESSION_TTL_DEFAULT_SECONDS,
            asked => asked.clamp(SESSION_TTL_MIN_SECONDS, SESSION_TTL_MAX_SECONDS),
        };
        let ttl = Duration::from_secs(seconds.into());
        let instance_id = hello.instance_id.clone();
        let last_message = match self.admit(&hello, ttl).await {
            Ok(Ok(())) => match self.serve(hello, session, ttl, &mut requests).await {
                Some(last_message) => last_message,
                None => return,
            },
            Ok(Err((reason, message))) => {
                drop(session);
                self.refuse(reason, message).await;
                Instant::now()
            }
            Err(status) => {
                drop(session);
                self.last_word(Err(status)).await;
                Instant::now()
            }
        };
        let Self {
            shared,
            node,
            responses,
        } = self;
        // The agent must see the end of the stream now, not after the time to live.
        drop(responses);
        // Also after a failed introduction: it ended the agent's session before, or was recorded already.
        lose(&shared, &node, &instance_id, ttl, last_message + ttl).await;
    }

    /// The agent may be gone already, or read nothing.
    async fn last_word(&self, word: Result<SessionResponse, Status>) {
        let _ = timeout(LAST_WORD_TIMEOUT, self.responses.send(word)).await;
    }

    async fn refuse(&self, reason: Reason, message: String) {
        count(&self.shared.metrics, reason);
        warn!(
            node = self.node,
            reason = reason.as_str_name(),
            message,
            "node session refused"
        );
        self.last_word(Ok(answer(Answer::Refused(refused(0, reason, message)))))
            .await;
    }

    /// The session after its introduction. When the last message came; `None` when no loss follows.
    async fn serve(
        &self,
        hello: Hello,
        session: OpenSession,
        ttl: Duration,
        requests: &mut Streaming<SessionRequest>,
    ) -> Option<Instant> {
        let (node, instance) = (&self.node, hello.instance_id);
        self.shared.metrics.open.inc();
        info!(node, instance, "node session opened");
        let mut open = Open {
            ttl,
            session,
            memo: Arc::default(),
        };
        let (end, last_message) = self.converse(&mut open, requests).await;
        drop(open);
        self.shared.metrics.open.dec();
        info!(node, instance, ?end, "node session ended");
        match end {
            End::Replaced => None,
            End::Stopping => {
                let status = Status::unavailable("etcdserver: server stopped");
                self.last_word(Err(status)).await;
                None
            }
            End::Failed(status) => {
                self.last_word(Err(status)).await;
                Some(last_message)
            }
            End::Disconnected | End::Silent => Some(last_message),
        }
    }

    /// Hello, and the place in the registry. The inner error is a refusal.
    async fn greet(
        &self,
        requests: &mut Streaming<SessionRequest>,
    ) -> Result<Result<(Hello, OpenSession), (Reason, String)>, Status> {
        let first = timeout(HELLO_TIMEOUT, requests.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no Hello came"))??;
        let Some(Asked::Hello(hello)) = first.and_then(|request| request.message) else {
            return Ok(Err((
                Reason::Invalid,
                "a session begins with Hello".to_owned(),
            )));
        };
        if hello.node != self.node {
            let message = format!(
                "the certificate is node {:?}'s, Hello says {:?}; use that node's certificate or name",
                self.node, hello.node
            );
            return Ok(Err((Reason::NotOwned, message)));
        }
        if hello.instance_id.is_empty() {
            return Ok(Err((
                Reason::Invalid,
                "Hello needs an instance_id".to_owned(),
            )));
        }
        let report = Report {
            agent_version: hello.agent_version.clone(),
            map_layout_version: hello.map_layout_version,
            underlay_addresses: hello.underlay_addresses.clone(),
            ..Report::default()
        };
        let opened = self
            .shared
            .registry
            .open(&self.node, &hello.instance_id, report);
        Ok(match opened {
            Ok(session) => Ok((hello, session)),
            Err(error) => Err((Reason::Conflict, error.to_string())),
        })
    }

    /// Pod CIDRs, records and Welcome. The inner error is a refusal.
    async fn admit(
        &self,
        hello: &Hello,
        ttl: Duration,
    ) -> Result<Result<(), (Reason, String)>, Status> {
        let settings = Arc::clone(&self.shared.settings);
        let claim = hello.clone();
        let cidrs = match self
            .shared
            .planner
            .commit(move |view: &dyn View, _| plan_hello(view, &settings, &claim))
            .await
        {
            Ok(done) => done.result,
            Err(CommitError::Refused(error)) => {
                return Ok(Err((error.reason(), error.to_string())));
            }
            Err(CommitError::Store(status)) => return Err(status),
        };
        record_state(
            &self.shared,
            &self.node,
            SessionState::Connected,
            &hello.instance_id,
            ttl,
        )
        .await?;
        let text = |cidr: Option<ipnetwork::IpNetwork>| {
            cidr.map(|cidr| cidr.to_string()).unwrap_or_default()
        };
        let settings = &self.shared.settings;
        let welcome = Welcome {
            store_id: self.shared.store.cluster_id(),
            cluster: settings.name.clone(),
            cluster_id: settings.id,
            max_connected_clusters: settings.split.max_cluster_id(),
            pod_cidr_v4: text(cidrs.v4),
            pod_cidr_v6: text(cidrs.v6),
            cluster_pod_cidrs: settings.pod_cidrs.iter().map(ToString::to_string).collect(),
            service_cidrs: settings
                .service_cidrs
                .iter()
                .map(ToString::to_string)
                .collect(),
            session_ttl_seconds: u32::try_from(ttl.as_secs()).unwrap_or(SESSION_TTL_MAX_SECONDS),
        };
        self.responses
            .send(Ok(answer(Answer::Welcome(welcome))))
            .await
            .map_err(|_| Status::cancelled("the agent is gone"))?;
        Ok(Ok(()))
    }

    /// Takes messages until the end; also says when the last one came.
    async fn converse(
        &self,
        open: &mut Open,
        requests: &mut Streaming<SessionRequest>,
    ) -> (End, Instant) {
        let mut pending: FuturesOrdered<Pending> = FuturesOrdered::new();
        let mut last = Instant::now();
        let end = loop {
            let deadline = last + open.ttl;
            tokio::select! {
                biased;
                // First: what an agent said before its newer session must not undo what it says there.
                _ = &mut open.session.replaced => break End::Replaced,
                () = self.shared.drain.draining() => break End::Stopping,
                Some(outcome) = pending.next() => match outcome {
                    Ok(answers) => {
                        // An agent that reads nothing for its whole time to live is as good as silent.
                        for message in answers {
                            match timeout(open.ttl, self.responses.send(Ok(answer(message)))).await {
                                Ok(Ok(())) => {}
                                Ok(Err(_)) => return (End::Disconnected, last),
                                Err(_) => return (End::Silent, last),
                            }
                        }
                    }
                    Err(status) => break End::Failed(status),
                },
                request = timeout_at(deadline, requests.message()), if pending.len() < SESSION_QUEUE_MESSAGES => {
                    let message = match request {
                        Err(_) => break End::Silent,
                        Ok(Ok(Some(request))) => request.message,
                        Ok(Ok(None) | Err(_)) => break End::Disconnected,
                    };
                    last = Instant::now();
                    match self.take(open, message).await {
                        Ok(Some(outcome)) => pending.push_back(outcome),
                        Ok(None) => {}
                        Err(status) => break End::Failed(status),
                    }
                }
            }
        };
        (end, last)
    }

    /// Queues a claim; its answers come in the order of the claims.
    async fn take(&self, open: &Open, message: Option<Asked>) -> Result<Option<Pending>, Status> {
        let settings = Arc::clone(&self.shared.settings);
        let node = self.node.clone();
        let planner = &self.shared.planner;
        let metrics = self.shared.metrics.clone();
        let memo = Arc::clone(&open.memo);
        Ok(match message {
            // Nothing but a sign of life, or a message of a newer agent.
            Some(Asked::Heartbeat(_)) | None => None,
            Some(Asked::Hello(_)) => {
                let message = "this session has begun already".to_owned();
                let refusal = Answer::Refused(refused(0, Reason::Invalid, message));
                Some(Box::pin(async move { Ok(vec![refusal]) }))
            }
            Some(Asked::ReportApplied(report)) => {
                open.session.applied(report);
                None
            }
            Some(Asked::UpsertEndpoint(claim)) => {
                let id = claim.request_id;
                let outcome = planner
                    .submit(move |view: &dyn View, _| {
                        plan_upsert(view, &settings, &node, &mut memo.lock(), &claim)
                    })
                    .await?;
                Some(Box::pin(
                    async move { answers(id, outcome.await, &metrics) },
                ))
            }
            Some(Asked::DeleteEndpoint(claim)) => {
                let id = claim.request_id;
                let outcome = planner
                    .submit(move |view: &dyn View, _| plan_delete_endpoint(view, &node, &claim))
                    .await?;
                Some(Box::pin(
                    async move { answers(id, outcome.await, &metrics) },
                ))
            }
            Some(Asked::ReportReadiness(report)) => {
                let id = report.request_id;
                let outcome = planner
                    .submit(move |view: &dyn View, _| plan_readiness(view, &node, &report))
                    .await?;
                Some(Box::pin(
                    async move { answers(id, outcome.await, &metrics) },
                ))
            }
            Some(Asked::SyncEndpoints(sync)) => {
                let id = sync.request_id;
                let outcome = planner
                    .submit_steps(move |view: &dyn View, _, progress: &SyncProgress| {
                        plan_sync(view, &settings, &node, &mut memo.lock(), &sync, progress)
                    })
                    .await?;
                Some(Box::pin(async move {
                    let (refusals, outcome) = match outcome.await {
                        Ok(Done { result, revision }) => (
                            result,
                            Ok(Done {
                                result: (),
                                revision,
                            }),
                        ),
                        Err(error) => (Vec::new(), Err(error)),
                    };
                    let mut messages: Vec<Answer> = refusals
                        .iter()
                        .map(|error| refusal(id, error, &metrics))
                        .collect();
                    messages.extend(answers(id, outcome, &metrics)?);
                    Ok(messages)
                }))
            }
        })
    }
}

/// After the time to live without a successor the node is marked stale. Nothing is deleted.
async fn lose(shared: &Shared, node: &str, instance_id: &str, ttl: Duration, deadline: Instant) {
    let is_lost = || {
        !shared.registry.is_open(node)
            && shared
                .store
                .read(|state| is_connected(&StateView(state), node))
    };
    if !is_lost() {
        return;
    }
    let superseded = shared.begin_losing(node);
    tokio::select! {
        () = tokio::time::sleep_until(deadline) => {}
        // A later session of the node has ended, too: its end counts.
        _ = superseded => return,
        () = shared.drain.draining() => return,
    }
    if !is_lost() {
        return;
    }
    shared.metrics.lost.inc();
    warn!(
        node,
        "node session lost, the node is stale; its records stay"
    );
    if let Err(status) = record_state(shared, node, SessionState::Stale, instance_id, ttl).await {
        warn!(
            node,
            error = status.message(),
            "the stale node could not be recorded"
        );
    }
}

async fn record_state(
    shared: &Shared,
    node: &str,
    state: SessionState,
    instance_id: &str,
    ttl: Duration,
) -> Result<(), Status> {
    let ttl_seconds = u32::try_from(ttl.as_secs()).unwrap_or(SESSION_TTL_MAX_SECONDS);
    let (node, instance_id) = (node.to_owned(), instance_id.to_owned());
    let registry = shared.registry.clone();
    shared
        .planner
        .commit(move |view: &dyn View, now| {
            // Decided when it is planned: the agent may have come back while this waited.
            if state == SessionState::Stale && registry.is_open(&node) {
                return Ok(Plan {
                    txn: clustermesh_mesh::Txn::new(),
                    result: (),
                });
            }
            Ok::<_, Infallible>(plan_session(
                view,
                &node,
                state,
                &instance_id,
                ttl_seconds,
                now,
            ))
        })
        .await?;
    Ok(())
}

fn count(metrics: &crate::metrics::SessionMetrics, reason: Reason) {
    metrics
        .refused
        .get_or_create(&ReasonLabels {
            reason: reason.as_str_name().to_lowercase(),
        })
        .inc();
}

fn answers(
    request_id: u64,
    outcome: Result<Done<()>, CommitError<ClaimError>>,
    metrics: &crate::metrics::SessionMetrics,
) -> Result<Vec<Answer>, Status> {
    match outcome {
        Ok(Done { revision, .. }) => Ok(vec![Answer::Ack(Ack {
            request_id,
            revision,
        })]),
        Err(CommitError::Refused(error)) => Ok(vec![refusal(request_id, &error, metrics)]),
        Err(CommitError::Store(status)) => Err(status),
    }
}

fn refusal(
    request_id: u64,
    error: &ClaimError,
    metrics: &crate::metrics::SessionMetrics,
) -> Answer {
    count(metrics, error.reason());
    Answer::Refused(refused(request_id, error.reason(), error.to_string()))
}

fn refused(request_id: u64, reason: Reason, message: String) -> Refused {
    Refused {
        request_id,
        reason: reason.into(),
        message,
    }
}

fn answer(message: Answer) -> SessionResponse {
    SessionResponse {
        message: Some(message),
    }
}
