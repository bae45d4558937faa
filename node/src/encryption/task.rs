//! Keeps keys and devices as the records want them, in rounds: what fails is tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_api::v1::EncryptionReport;
use clustermesh_encryption::DeviceError;
use clustermesh_node_core::WireguardPeer;
use clustermesh_process::Drain;
use nix::net::if_::if_nametoindex;
use rtnetlink::Handle;
use tracing::{error, info, warn};

use super::change::Turn;
use super::devices::{Encryption, OpenDevice, SILENT_MAX, name_of};
use super::peers;
use crate::netlink;
use crate::records::reconcile;
use crate::shared::Shared;

/// How often the devices are looked at when no record changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Changes of records are carried out together, at most this often.
const GATHER: Duration = Duration::from_millis(10);

/// Keeps the devices as the records want them, until the drain.
pub async fn run(shared: Arc<Shared>, encryption: Arc<Encryption>, handle: Handle, drain: Drain) {
    let mut changes = shared.peer_changes.subscribe();
    let mut underlay = shared.underlay.subscribe();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut task = Task {
        shared,
        encryption,
        handle,
        configured: None,
        turn: Turn::new(),
        last_fault: String::new(),
        told_server: EncryptionReport::default(),
        silent: None,
    };
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            Ok(()) = changes.changed() => tokio::time::sleep(GATHER).await,
            Ok(()) = underlay.changed() => task.follow_underlay().await,
            () = drain.draining() => return,
        }
        changes.mark_unchanged();
        let ended = task.round().await;
        task.note_fault(ended.err().map(|error| format!("{error:#}")));
        task.tell_server();
    }
}

/// One task that alone changes the devices.
pub(super) struct Task {
    pub(super) shared: Arc<Shared>,
    pub(super) encryption: Arc<Encryption>,
    pub(super) handle: Handle,
    /// What the devices were last made to be, and whether everything was known then.
    pub(super) configured: Option<(Vec<WireguardPeer>, bool)>,
    pub(super) turn: Turn,
    last_fault: String,
    told_server: EncryptionReport,
    /// Since when a device gives no answer.
    silent: Option<(usize, Instant)>,
}

impl Task {
    /// Says in metric, status and log how the last round ended; the log once.
    fn note_fault(&mut self, fault: Option<String>) {
        let metric = &self.shared.metrics.encryption_fault;
        metric.set(i64::from(fault.is_some()));
        let fault = fault.unwrap_or_default();
        if fault == self.last_fault {
            return;
        }
        if fault.is_empty() {
            info!("the WireGuard devices are as they should be again");
        } else {
            error!(
                fault,
                "the WireGuard devices are not as they should be, trying again"
            );
        }
        self.encryption.lock().report.fault.clone_from(&fault);
        self.last_fault = fault;
    }

    /// Makes the session report how packets travel, when that has changed.
    fn tell_server(&mut self) {
        let summary = self.encryption.report().summary();
        if summary != self.told_server {
            self.told_server = summary;
            self.shared.applied.send_modify(|_| ());
        }
    }

    async fn round(&mut self) -> anyhow::Result<()> {
        self.revive().await?;
        let wanted = {
            let model = self.shared.model();
            let listed = model.as_ref().filter(|model| model.is_listed());
            listed.map(|model| {
                let without = model.nodes_without_key();
                (model.wireguard_peers(), without, model.is_settled())
            })
        };
        tokio::task::block_in_place(|| {
            if let Some((wanted, without, is_settled)) = wanted {
                self.configure(&wanted, is_settled)?;
                self.encryption.lock().report.set_nodes(wanted, without);
            }
            self.publish_state()
        })?;
        self.change_keys().await
    }

    /// Tells the model what the devices know now, and makes the kernel follow.
    fn publish_state(&self) -> anyhow::Result<()> {
        self.encryption.look()?;
        let state = self.encryption.state();
        self.encryption
            .report()
            .publish(&self.shared.metrics.encryption);
        let is_news = match self.shared.model().as_mut() {
            Some(model) if *model.wireguard() != state => {
                model.set_wireguard(state);
                model.is_listed()
            }
            _ => false,
        };
        if is_news {
            // What fails is tried again by whoever follows the records.
            reconcile::round(&self.shared);
        }
        Ok(())
    }

    fn configure(&mut self, wanted: &[WireguardPeer], is_settled: bool) -> anyhow::Result<()> {
        let is_same = self.configured.as_ref().is_some_and(|(peers, settled)| {
            *settled == is_settled && peers::are_same_to_a_device(peers, wanted)
        });
        if is_same {
            return Ok(());
        }
        let steps = self.encryption.configure(wanted, is_settled)?;
        if steps > 0 {
            info!(
                steps,
                peers = wanted.len(),
                "peers of the WireGuard devices changed"
            );
        }
        self.shared.metrics.encryption.clear_peers();
        self.configured = Some((wanted.to_vec(), is_settled));
        Ok(())
    }

    /// Starts devices again that have ended, and those that have been silent for too long.
    async fn revive(&mut self) -> anyhow::Result<()> {
        for open in self.encryption.devices() {
            let slot = open.key.slot;
            let answer = tokio::task::block_in_place(|| open.device.status());
            match answer {
                Err(error @ DeviceError::Silent { .. }) => {
                    let since = match self.silent {
                        Some((silent, since)) if silent == slot => since,
                        _ => Instant::now(),
                    };
                    self.silent = Some((slot, since));
                    if since.elapsed() < SILENT_MAX {
                        return Err(error.into());
                    }
                    self.encryption.end_silent(slot)?;
                }
                Ok(_) if if_nametoindex(open.device.name()) == Ok(open.ifindex) => {
                    self.silent = self.silent.filter(|(silent, _)| *silent != slot);
                    continue;
                }
                _ => {}
            }
            self.replace(&open).await?;
            self.silent = None;
        }
        Ok(())
    }

    async fn replace(&mut self, ended: &Arc<OpenDevice>) -> anyhow::Result<()> {
        warn!(
            device = name_of(ended.key.slot),
            "the WireGuard device has ended, starting it again"
        );
        let underlay = self.shared.underlay.borrow().clone();
        let open = self
            .encryption
            .open(ended.key.clone(), &underlay, &self.handle)
            .await?;
        {
            let mut inner = self.encryption.lock();
            let mut places = inner.devices.iter_mut();
            if let Some(place) = places.find(|held| held.key == ended.key) {
                *place = Arc::new(open);
            }
            inner.told.clear();
        }
        self.configured = None;
        // Programs first: what peers send is taken from then on.
        self.shared
            .wireguard_changes
            .send_modify(|n| *n = n.wrapping_add(1));
        Ok(())
    }

    async fn follow_underlay(&self) {
        let mtu = self.shared.underlay.borrow().wireguard_mtu;
        for ifindex in self.encryption.ifindexes() {
            if let Err(error) = netlink::set_link(&self.handle, ifindex, mtu, false).await {
                warn!(%error, "the WireGuard device keeps its MTU");
            }
        }
    }
}
