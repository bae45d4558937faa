//! Keeps keys and devices as the records want them, in rounds: what fails is tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_api::v1::EncryptionReport;
use clustermesh_encryption::DeviceError;
use clustermesh_node_core::WireguardPeer;
use clustermesh_process::Drain;
use nix::net::if_::if_nametoindex;
use tracing::{error, info, warn};

use super::change::KeyChange;
use super::devices::{OpenDevice, SILENT_MAX, name_of};
use super::handles::Handles;
use super::peers;
use crate::netlink;

/// How often the devices are looked at when no record changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Changes of records are carried out together, at most this often.
const GATHER: Duration = Duration::from_millis(10);

/// Keeps the devices as the records want them, until the drain.
pub async fn run(handles: Handles, drain: Drain) {
    let mut changes = handles.reconciler.peer_changes.subscribe();
    let mut underlay = handles.signals.underlay.subscribe();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut task = Task {
        change: KeyChange::new(handles.clone()),
        handles,
        configured: None,
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
struct Task {
    handles: Handles,
    /// What the devices were last made to be, and whether everything was known then.
    configured: Option<(Vec<WireguardPeer>, bool)>,
    change: KeyChange,
    last_fault: String,
    told_server: EncryptionReport,
    /// Since when a device gives no answer.
    silent: Option<(usize, Instant)>,
}

impl Task {
    /// Says in metric, status and log how the last round ended; the log once.
    fn note_fault(&mut self, fault: Option<String>) {
        let metric = &self.handles.metrics.encryption_fault;
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
        self.handles
            .encryption
            .lock()
            .report
            .fault
            .clone_from(&fault);
        self.last_fault = fault;
    }

    /// Makes the session report how packets travel, when that has changed.
    fn tell_server(&mut self) {
        let summary = self.handles.encryption.report().summary();
        if summary != self.told_server {
            self.told_server = summary;
            self.handles.reconciler.applied.send_modify(|_| ());
        }
    }

    async fn round(&mut self) -> anyhow::Result<()> {
        self.revive().await?;
        let wanted = {
            let model = self.handles.reconciler.model();
            let listed = model.as_ref().filter(|model| model.is_listed());
            listed.map(|model| {
                let without = model.nodes_without_key();
                (model.wireguard_peers(), without, model.is_settled())
            })
        };
        tokio::task::block_in_place(|| {
            if let Some((wanted, without, is_settled)) = wanted {
                self.configure(&wanted, is_settled)?;
                self.handles
                    .encryption
                    .lock()
                    .report
                    .set_nodes(wanted, without);
            }
            self.publish_state()
        })?;
        let ended = self.change.step(self.configured.as_ref()).await;
        if self.change.take_news() {
            self.configured = None;
        }
        ended
    }

    /// Tells the model what the devices know now, and makes the kernel follow.
    fn publish_state(&self) -> anyhow::Result<()> {
        self.handles.encryption.look()?;
        let state = self.handles.encryption.state();
        self.handles
            .encryption
            .report()
            .publish(&self.handles.metrics.encryption);
        let is_news = match self.handles.reconciler.model().as_mut() {
            Some(model) if *model.wireguard() != state => {
                model.set_wireguard(state);
                model.is_listed()
            }
            _ => false,
        };
        if is_news {
            // What fails is tried again by whoever follows the records.
            self.handles.reconciler.round();
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
        let steps = self.handles.encryption.configure(wanted, is_settled)?;
        if steps > 0 {
            info!(
                steps,
                peers = wanted.len(),
                "peers of the WireGuard devices changed"
            );
        }
        self.handles.metrics.encryption.clear_peers();
        self.configured = Some((wanted.to_vec(), is_settled));
        Ok(())
    }

    /// Starts devices again that have ended, and those that have been silent for too long.
    async fn revive(&mut self) -> anyhow::Result<()> {
        for open in self.handles.encryption.devices() {
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
                    self.handles.encryption.end_silent(slot)?;
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
        let underlay = self.handles.signals.underlay.borrow().clone();
        let open = self
            .handles
            .encryption
            .open(ended.key.clone(), &underlay, &self.handles.netlink)
            .await?;
        {
            let mut inner = self.handles.encryption.lock();
            let mut places = inner.devices.iter_mut();
            if let Some(place) = places.find(|held| held.key == ended.key) {
                *place = Arc::new(open);
            }
            inner.told.clear();
        }
        self.configured = None;
        // Programs first: what peers send is taken from then on.
        self.handles.signals.wireguard_changes.send_replace(());
        Ok(())
    }

    async fn follow_underlay(&self) {
        let mtu = self.handles.signals.underlay.borrow().wireguard_mtu;
        for ifindex in self.handles.encryption.ifindexes() {
            if let Err(error) = netlink::set_link(&self.handles.netlink, ifindex, mtu, false).await
            {
                warn!(%error, "the WireGuard device keeps its MTU");
            }
        }
    }
}
