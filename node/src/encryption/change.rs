//! Carries out what [`clustermesh_node_core::rotation`] decides: a second device for the next key, and the end of the first.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clustermesh_encryption_core::key::PublicKey;
use clustermesh_node_core::WireguardPeer;
use clustermesh_node_core::change::NodeKey;
use clustermesh_node_core::rotation::{CHANGE_MS_MIN, Decision, OwnKeys, PeerKeys, decide};
use rtnetlink::Handle;
use tracing::{info, warn};

use super::keys::{self, NEXT_KEY_FILE};
use super::{Encryption, OpenDevice, Task, name_of};
use crate::host::Underlay;

/// Where the change of keys is, as far as it is not in files and devices.
#[derive(Debug)]
pub struct Turn {
    /// When the last change began or ended; none in this run: long ago.
    since: Option<Instant>,
    /// When this run began.
    started: Instant,
    /// Bytes from each peer of the present key's device, and when they last grew or were first seen.
    received: HashMap<PublicKey, (u64, Instant)>,
}

impl Turn {
    /// At the start of the agent.
    pub fn new() -> Self {
        Self {
            since: None,
            started: Instant::now(),
            received: HashMap::new(),
        }
    }

    /// A change that an earlier run began counts from this run's start; one that is to begin need not wait.
    fn since_ms(&self, is_changing: bool) -> u64 {
        let since = match self.since {
            Some(since) => since.elapsed(),
            None if is_changing => self.started.elapsed(),
            None => Duration::from_millis(CHANGE_MS_MIN),
        };
        millis(since)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Encryption {
    /// Makes the next key and its device. A key that got no device is not kept: nobody was told of it.
    async fn open_next(
        &self,
        state_dir: &Path,
        epoch: u32,
        slot: usize,
        underlay: &Underlay,
        handle: &Handle,
    ) -> anyhow::Result<OpenDevice> {
        let path = state_dir.join(NEXT_KEY_FILE);
        let key = tokio::task::block_in_place(|| keys::make(&path, epoch, slot))?;
        let opened = self.open(key, underlay, handle).await;
        if opened.is_err() {
            tokio::task::block_in_place(|| keys::remove(&path))?;
        }
        opened
    }
}

impl Task {
    /// Looks whether keys are to change, and does the next step of it.
    pub(super) async fn change_keys(&mut self) -> anyhow::Result<()> {
        let Some((peers, is_settled)) = self.configured.clone() else {
            return Ok(());
        };
        // Others learn of keys by the records: without a session nothing begins, and nobody's silence counts.
        if !*self.shared.connected.borrow() {
            self.turn.since = Some(Instant::now());
            return Ok(());
        }
        let state_dir = self.shared.config.state_dir.clone();
        let (epochs, slot) = {
            let inner = self.encryption.lock();
            let epochs: Vec<u32> = inner.devices.iter().map(|d| d.key.epoch).collect();
            (epochs, inner.devices.first().map_or(0, |d| d.key.slot))
        };
        let Some(current) = epochs.first().copied() else {
            return Ok(());
        };
        let next = epochs.get(1).copied();
        let own = OwnKeys {
            current,
            age_ms: millis(keys::age(&state_dir)?),
            next,
            since_ms: self.turn.since_ms(next.is_some()),
            is_settled,
        };
        let others = self.peer_keys(&peers, current, next);
        let every_ms = u64::from(self.shared.config.encryption.rotate_hours) * 60 * 60 * 1_000;
        let is_asked = self.encryption.is_change_asked.load(Ordering::Relaxed);
        match decide(own, &others, every_ms, is_asked) {
            Decision::Wait => Ok(()),
            Decision::Begin { epoch } => self.begin(&state_dir, epoch, 1 - slot).await,
            Decision::Finish { left_behind } => self.finish(&state_dir, left_behind),
        }
    }

    /// Where every other node is, by the last look at the devices.
    fn peer_keys(
        &mut self,
        peers: &[WireguardPeer],
        current: u32,
        next: Option<u32>,
    ) -> Vec<PeerKeys> {
        let report = self.encryption.report();
        let now = Instant::now();
        let received = &mut self.turn.received;
        if let Some(device) = report.devices.first() {
            for (key, status) in &device.status.peers {
                let (bytes, grew) = received.entry(*key).or_insert((status.rx_bytes, now));
                if *bytes != status.rx_bytes {
                    (*bytes, *grew) = (status.rx_bytes, now);
                }
            }
            let present: std::collections::HashSet<PublicKey> =
                device.status.peers.iter().map(|(key, _)| *key).collect();
            received.retain(|key, _| present.contains(key));
        }
        let mut by_node: HashMap<(&str, &str), Vec<NodeKey>> = HashMap::new();
        for peer in peers {
            let node = (&*peer.cluster, &*peer.node);
            by_node.entry(node).or_default().push(peer.key);
        }
        by_node
            .values()
            .filter_map(|keys| {
                let newest = PeerKeys::newest_of(keys)?;
                let of = |epoch: u32| keys.iter().find(|key| key.epoch == epoch);
                let has_answered = next.and_then(of).is_some_and(|key| {
                    let state = report.state.peers.get(&key.key);
                    state.is_some_and(|state| state.has_answered)
                });
                // Whom the old device does not know cannot send to it.
                let heard = of(current).and_then(|key| received.get(&PublicKey(key.key)));
                let silent_ms =
                    heard.map_or(u64::MAX, |(_, grew)| millis(now.duration_since(*grew)));
                Some(PeerKeys {
                    newest,
                    has_answered,
                    silent_ms,
                })
            })
            .collect()
    }

    async fn begin(&mut self, state_dir: &Path, epoch: u32, slot: usize) -> anyhow::Result<()> {
        let underlay = self.shared.underlay.borrow().clone();
        let open = self
            .encryption
            .open_next(state_dir, epoch, slot, &underlay, &self.handle)
            .await?;
        self.encryption.lock().devices.push(open);
        self.encryption
            .is_change_asked
            .store(false, Ordering::Relaxed);
        self.turn.since = Some(Instant::now());
        self.configured = None;
        info!(
            epoch,
            device = name_of(slot),
            "keys change: the next one has its device"
        );
        // The programs first, then the record: who reads it sends to the new device.
        self.shared
            .wireguard_changes
            .send_modify(|n| *n = n.wrapping_add(1));
        Ok(())
    }

    fn finish(&mut self, state_dir: &Path, left_behind: usize) -> anyhow::Result<()> {
        if left_behind > 0 {
            warn!(
                nodes = left_behind,
                "keys change without nodes that were silent for ten minutes: nothing encrypted reaches them until their \
                 agents run again"
            );
        }
        tokio::task::block_in_place(|| {
            keys::promote(state_dir)?;
            let old = self.encryption.lock().devices.remove(0);
            // Peers that count no epochs go to the device that is the present one now.
            if let Some((peers, is_settled)) = self.configured.take() {
                self.configure(&peers, is_settled)?;
            }
            // Nothing is sent to the old device any more before it goes.
            self.publish_state()?;
            self.turn.since = Some(Instant::now());
            self.turn.received.clear();
            self.shared
                .wireguard_changes
                .send_modify(|n| *n = n.wrapping_add(1));
            info!(
                epoch = old.key.epoch,
                device = old.device.name(),
                "keys have changed: the old one goes"
            );
            old.device.remove()?;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::encryption::{BackendChoice, Encryption as Settings};
    use crate::netlink;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_next_key_that_gets_no_device_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        // No folder: a socket in there cannot be asked, and nothing is deleted or started.
        let no_folder = dir.path().join("file");
        std::fs::write(&no_folder, b"").unwrap();
        let settings = Settings {
            backend: BackendChoice::Userspace,
            socket_dir: no_folder,
            ..Settings::default()
        };
        let encryption = Encryption::new(&settings).unwrap();
        let current = keys::read_or_make(dir.path()).unwrap();
        let handle = netlink::connect().unwrap();
        let underlay = Underlay {
            devices: Vec::new(),
            addresses: Vec::new(),
            path_v4: None,
            path_v6: None,
            pod_mtu: 1_390,
            pod_mtu_v6: 1_390,
            wireguard_mtu: 1_440,
        };
        let opened = encryption
            .open_next(dir.path(), 1, 1, &underlay, &handle)
            .await;
        let error = format!("{:#}", opened.unwrap_err());
        assert!(error.contains("cm_wg1"), "{error}");
        assert!(!dir.path().join(NEXT_KEY_FILE).exists());
        assert_eq!(keys::read_or_make(dir.path()).unwrap(), current);
    }
}
