//! The session of a node whose agent was stopped, held by this process in its place.

use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clustermesh_api::v1::session_request::Message as Request;
use clustermesh_api::v1::session_response::Message as Response;
use clustermesh_api::v1::{DeleteEndpoint, Heartbeat, Hello, UpsertEndpoint};
use clustermesh_client::{Client, NodeSession};
use clustermesh_ebpf_abi::LAYOUT_VERSION;
use nix::sys::signal::Signal;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::lab::cluster::Cluster;
use crate::scenario::NAMESPACE;

/// The session is lost after so long without a message.
const TTL_SECONDS: u32 = 30;
/// Requests that wait for the connection.
const QUEUE_REQUESTS: usize = 1_024;
/// First host number in the pod CIDR that is claimed.
const FIRST_POD: u128 = 0x1000;

/// The session; its task ends with [`Session::end`].
pub(super) struct Session {
    requests: mpsc::Sender<Request>,
    /// Number of the last request that was acknowledged, and when.
    acknowledged: watch::Receiver<(u64, Instant)>,
    last_request: AtomicU64,
    network: u128,
    task: JoinHandle<Result<()>>,
}

/// Name of a workload by its number.
pub(super) fn workload_name(number: usize) -> String {
    format!("moving-{number}")
}

impl Session {
    /// Stops the agent of the cluster's first node and opens a session under that node's certificate.
    pub(super) async fn take_over(cluster: &mut Cluster) -> Result<Self> {
        let node = cluster.node_mut(0);
        let (v4, v6) = node.underlay_addresses();
        node.stop_agent(Signal::SIGTERM).await?;
        let name = node.name().to_owned();
        let hello = Hello {
            node: name.clone(),
            underlay_addresses: vec![v4, v6],
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            map_layout_version: LAYOUT_VERSION,
            session_ttl_seconds: TTL_SECONDS,
            instance_id: "bench".to_owned(),
            ..Hello::default()
        };
        let store = cluster.store_as(&name)?;
        let (requests, queue) = mpsc::channel(QUEUE_REQUESTS);
        let (welcomed, welcome) = oneshot::channel();
        let (acknowledge, acknowledged) = watch::channel((0, Instant::now()));
        let task = tokio::spawn(async move {
            store
                .call(move |client| talk(client, hello, queue, welcomed, acknowledge))
                .await
        });
        let Ok(network) = welcome.await else {
            task.await??;
            bail!("the session ended before it began");
        };
        Ok(Self {
            requests,
            acknowledged,
            last_request: AtomicU64::new(0),
            network: network.into(),
            task,
        })
    }

    /// The address that the workload of this number gets.
    pub(super) fn address(&self, number: usize) -> Ipv6Addr {
        Ipv6Addr::from(self.network + FIRST_POD + number as u128)
    }

    /// Claims the address of a workload; the number of the request.
    pub(super) async fn claim(&self, number: usize) -> Result<u64> {
        let request_id = self.next_request();
        self.send(Request::UpsertEndpoint(UpsertEndpoint {
            request_id,
            namespace: NAMESPACE.to_owned(),
            name: workload_name(number),
            addresses: vec![self.address(number).to_string()],
        }))
        .await?;
        Ok(request_id)
    }

    /// When the server had stored what a request claims; requests are acknowledged in their order.
    pub(super) async fn stored(&self, request_id: u64) -> Result<Instant> {
        let mut acknowledged = self.acknowledged.clone();
        let (_, at) = *acknowledged
            .wait_for(|(last, _)| *last >= request_id)
            .await
            .context("the session of the bench has ended")?;
        Ok(at)
    }

    fn next_request(&self) -> u64 {
        self.last_request.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Gives an address back.
    pub(super) async fn release(&self, address: Ipv6Addr) -> Result<()> {
        self.send(Request::DeleteEndpoint(DeleteEndpoint {
            request_id: self.next_request(),
            addresses: vec![address.to_string()],
        }))
        .await
    }

    async fn send(&self, request: Request) -> Result<()> {
        let sent = self.requests.send(request).await;
        sent.ok().context("the session of the bench has ended")
    }

    /// Closes the session; says why it broke if it did.
    pub(super) async fn end(self) -> Result<()> {
        drop(self.requests);
        self.task.await?
    }
}

/// Opens the session, says which IPv6 network the node has, and passes requests on until there are no more.
async fn talk(
    client: Client,
    hello: Hello,
    mut queue: mpsc::Receiver<Request>,
    welcomed: oneshot::Sender<Ipv6Addr>,
    acknowledge: watch::Sender<(u64, Instant)>,
) -> Result<()> {
    let NodeSession {
        sender,
        mut responses,
    } = client.node_session(hello).await?;
    let first = responses.next().await?.and_then(|first| first.message);
    let Some(Response::Welcome(welcome)) = first else {
        bail!("no Welcome but {first:?}");
    };
    let (network, _) = welcome
        .pod_cidr_v6
        .split_once('/')
        .context("the node has no IPv6 pod CIDR")?;
    // Whoever asked may have given up.
    let _ = welcomed.send(network.parse()?);
    let answers = async {
        loop {
            match responses.next().await?.and_then(|answer| answer.message) {
                Some(Response::Ack(ack)) => {
                    acknowledge.send_replace((ack.request_id, Instant::now()));
                }
                other => bail!("a claim was not taken: {other:?}"),
            }
        }
    };
    let passing = async {
        let mut beats = tokio::time::interval(Duration::from_secs(u64::from(TTL_SECONDS) / 3));
        loop {
            tokio::select! {
                request = queue.recv() => match request {
                    Some(request) => sender.send(request).await?,
                    None => return anyhow::Ok(()),
                },
                _ = beats.tick() => sender.send(Request::Heartbeat(Heartbeat {})).await?,
            }
        }
    };
    tokio::select! {
        ended = answers => ended,
        ended = passing => ended,
    }
}
