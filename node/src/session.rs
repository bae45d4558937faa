//! The session with the cluster's server: the only way in which this node writes.

mod claims;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clustermesh_api::address::parse_cidr;
use clustermesh_api::v1::session_request::Message as Request;
use clustermesh_api::v1::session_response::Message as Response;
use clustermesh_api::v1::{
    EndpointReadiness, Heartbeat, Hello, ReportApplied, ReportReadiness, Welcome, WireguardKeys,
};
use clustermesh_client::{Client, NodeSession};
use clustermesh_ebpf::abi::LAYOUT_VERSION;
use clustermesh_process::Drain;
use ipnetwork::IpNetwork;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::config::Config;
use crate::encryption::Encryption;
use crate::endpoints::Endpoints;
use crate::host::Underlay;
use crate::metrics::{Metrics, label};
use crate::readiness::{AddressReadiness, Prober, port_readiness};
use crate::records::{Applied, Reconciler};
use crate::signals::Signals;
use crate::state_files::NodeFacts;
use claims::Claims;

/// Applied revisions are reported at most this often.
const REPORT_EVERY: Duration = Duration::from_millis(50);
/// The server's Welcome is waited for so long.
const WELCOME_WAIT: Duration = Duration::from_secs(10);
/// First wait before a new session.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest wait before a new session.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Refused claims are looked at again this often.
const CLAIMS_RETRIED_EVERY: Duration = Duration::from_secs(1);

/// What does not change over sessions.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Id of this boot of the machine.
    pub boot_id: String,
    /// Distinguishes this run of the agent.
    pub instance_id: String,
}

/// What a session speaks of, and where the server's word goes.
#[derive(Clone)]
pub struct Handles {
    /// Settings.
    pub config: Arc<Config>,
    /// The underlay; takes the server's word about this node.
    pub signals: Arc<Signals>,
    /// What the kernel holds.
    pub reconciler: Arc<Reconciler>,
    /// What is claimed.
    pub endpoints: Arc<Endpoints>,
    /// Readiness of their ports.
    pub prober: Arc<Prober>,
    /// Keys and devices; `None` where nothing is encrypted.
    pub encryption: Option<Arc<Encryption>>,
    /// Counters.
    pub metrics: Metrics,
}

impl Handles {
    fn announcement(&self) -> Option<WireguardKeys> {
        self.encryption.as_ref().map(|e| e.announcement())
    }
}

/// Keeps a session open until the drain.
pub async fn run(handles: Handles, client: Client, identity: Identity, drain: Drain) {
    let mut backoff = BACKOFF_MIN;
    let mut last = String::new();
    loop {
        let started = Instant::now();
        let ended = tokio::select! {
            ended = serve(&handles, &client, &identity) => ended,
            () = drain.draining() => return,
        };
        let was_open = handles.signals.connected.send_replace(false);
        handles
            .metrics
            .reconnects
            .get_or_create(&label("stream", "session"))
            .inc();
        if let Err(error) = ended {
            let text = format!("{error:#}");
            // The same failure every second says nothing new.
            if was_open || text != last {
                warn!(error = text, "no session, opening one; traffic goes on");
            }
            last = text;
        }
        if started.elapsed() > BACKOFF_MAX {
            backoff = BACKOFF_MIN;
        }
        // Jitter: the agents of a cluster whose server comes back do not all knock at once.
        let pause = backoff.mul_f64(rand::random_range(0.5..1.0));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = drain.draining() => return,
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn serve(handles: &Handles, client: &Client, identity: &Identity) -> anyhow::Result<()> {
    let mut underlay = handles.signals.underlay.subscribe();
    let mut announcements = handles.signals.announcements.subscribe();
    announcements.mark_unchanged();
    let keys = handles.announcement();
    let underlay_addresses = underlay.borrow_and_update().address_texts();
    let hello = Hello {
        node: handles.config.node.clone(),
        boot_id: identity.boot_id.clone(),
        underlay_addresses,
        labels: handles.config.labels.clone().into_iter().collect(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        map_layout_version: LAYOUT_VERSION,
        session_ttl_seconds: handles.config.session_ttl_seconds,
        pod_cidrs_held: handles.endpoints.cidrs_held().await,
        instance_id: identity.instance_id.clone(),
        wireguard: keys.clone(),
    };
    let mut session = client.node_session(hello).await?;
    let welcome = tokio::time::timeout(WELCOME_WAIT, welcome(&mut session))
        .await
        .context("the server does not answer the Hello")??;
    let facts = facts(handles, &welcome)?;
    let ttl = match welcome.session_ttl_seconds {
        0 => handles.config.session_ttl_seconds,
        granted => granted,
    };
    info!(
        cluster = welcome.cluster,
        pod_cidr_v4 = welcome.pod_cidr_v4,
        pod_cidr_v6 = welcome.pod_cidr_v6,
        ttl_seconds = ttl,
        "session open"
    );
    handles.signals.facts.send_if_modified(|held| {
        let changed = held.as_ref() != Some(&facts);
        *held = Some(facts);
        changed
    });
    handles.signals.connected.send_replace(true);
    let beat = Duration::from_secs(u64::from(ttl)) / 3;
    let news = News {
        underlay,
        announcements,
        keys,
    };
    talk(handles, session, beat, news).await
}

/// What makes another Hello necessary.
struct News {
    underlay: watch::Receiver<Underlay>,
    announcements: watch::Receiver<()>,
    /// What the Hello said.
    keys: Option<WireguardKeys>,
}

async fn welcome(session: &mut NodeSession) -> anyhow::Result<Welcome> {
    let first = session
        .responses
        .next()
        .await?
        .context("the server ended the session")?;
    match first.message {
        Some(Response::Welcome(welcome)) => Ok(welcome),
        Some(Response::Refused(refused)) => bail!(
            "the server refuses this node ({:?}): {}",
            refused.reason(),
            refused.message
        ),
        _ => bail!("the server's first answer is no Welcome"),
    }
}

fn facts(handles: &Handles, welcome: &Welcome) -> anyhow::Result<NodeFacts> {
    if welcome.cluster != handles.config.cluster {
        bail!(
            "the server is of cluster {:?}, this node of {:?}: check server.endpoints",
            welcome.cluster,
            handles.config.cluster
        );
    }
    let one = |text: &str| -> anyhow::Result<Option<IpNetwork>> {
        if text.is_empty() {
            return Ok(None);
        }
        Ok(Some(parse_cidr(text).context("pod CIDR of the Welcome")?))
    };
    Ok(NodeFacts {
        cluster_id: u16::try_from(welcome.cluster_id).context("cluster id of the Welcome")?,
        max_connected_clusters: welcome.max_connected_clusters,
        pod_cidr_v4: one(&welcome.pod_cidr_v4)?,
        pod_cidr_v6: one(&welcome.pod_cidr_v6)?,
        cluster_pod_cidrs: welcome
            .cluster_pod_cidrs
            .iter()
            .map(|text| parse_cidr(text).context("cluster pod CIDR of the Welcome"))
            .collect::<Result<_, _>>()?,
    })
}

async fn talk(
    handles: &Handles,
    session: NodeSession,
    beat: Duration,
    mut news: News,
) -> anyhow::Result<()> {
    let NodeSession {
        sender,
        mut responses,
    } = session;
    let mut claims = Claims::default();
    let mut endpoints = handles.endpoints.watch();
    let present = endpoints.borrow_and_update().clone();
    sender.send(claims.sync(&present)).await?;
    // A new session knows nothing of earlier reports.
    handles.prober.take_changes();
    if let Some(report) = readiness(&mut claims, handles.prober.all()) {
        sender.send(report).await?;
    }
    let mut applied = handles.reconciler.applied.subscribe();
    applied.mark_changed();
    let mut applied_waits = false;
    let mut next_report = Instant::now();
    let mut beats = tokio::time::interval(beat);
    beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut retries = tokio::time::interval(CLAIMS_RETRIED_EVERY);
    retries.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            response = responses.next() => {
                let response = response?.context("the server ended the session")?;
                claims.answer(response.message);
                handles.signals.registered.send_modify(|held| held.clone_from(claims.stored()));
            }
            Ok(()) = news.announcements.changed() => {
                let keys = handles.announcement();
                if keys != news.keys {
                    info!("WireGuard keys have changed, opening a session that says so");
                    return Ok(());
                }
            }
            Ok(()) = news.underlay.changed() => {
                info!("the underlay has changed, opening a session that says so");
                return Ok(());
            }
            _ = beats.tick() => sender.send(Request::Heartbeat(Heartbeat {})).await?,
            changed = endpoints.changed() => {
                changed.context("the agent ends")?;
                let present = endpoints.borrow_and_update().clone();
                for request in claims.update(&present) {
                    sender.send(request).await?;
                }
            }
            _ = retries.tick() => {
                claims.forget_refused();
                let present = endpoints.borrow().clone();
                for request in claims.update(&present) {
                    sender.send(request).await?;
                }
            }
            () = handles.prober.changed.notified() => {
                if let Some(report) = readiness(&mut claims, handles.prober.take_changes()) {
                    sender.send(report).await?;
                }
            }
            changed = applied.changed(), if !applied_waits => {
                changed.context("the agent ends")?;
                applied_waits = true;
            }
            () = tokio::time::sleep_until(next_report), if applied_waits => {
                applied_waits = false;
                next_report = Instant::now() + REPORT_EVERY;
                let mut report = report(&applied.borrow_and_update());
                report.encryption = handles.encryption.as_ref().map(|e| e.report().summary());
                sender.send(Request::ReportApplied(report)).await?;
            }
        }
    }
}

fn report(applied: &Applied) -> ReportApplied {
    ReportApplied {
        sources: applied.source_revisions(),
        refused_records: applied.refused_records(),
        encryption: None,
    }
}

fn readiness(claims: &mut Claims, changes: Vec<AddressReadiness>) -> Option<Request> {
    if changes.is_empty() {
        return None;
    }
    Some(Request::ReportReadiness(ReportReadiness {
        request_id: claims.readiness_request(),
        endpoints: changes
            .into_iter()
            .map(|(address, ports)| EndpointReadiness {
                address: address.to_string(),
                ports: port_readiness(&ports),
            })
            .collect(),
    }))
}
