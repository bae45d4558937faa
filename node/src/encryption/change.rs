//! Carries out what [`clustermesh_node_core::rotation`] decides: a second device for the next key, and the end of the first.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clustermesh_ebpf::abi::NODE_ENCRYPTED;
use clustermesh_encryption_core::control::PeerStatus;
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_node_core::WireguardPeer;
use clustermesh_node_core::change::NodeKey;
use clustermesh_node_core::rotation::{
    CHANGE_MS_MIN, Decision, EndStep, OwnKeys, PeerKeys, Remains, decide, end_step, is_data,
};
use rtnetlink::Handle;
use tracing::{info, warn};

use super::devices::{Encryption, Leaving, OpenDevice, name_of};
use super::handles::Handles;
use super::keys::{self, NEXT_KEY_FILE};
use crate::host::Underlay;
use crate::netlink;

/// Where the change of keys is in time, as far as it is not in files and devices.
#[derive(Debug)]
struct Turn {
    /// When the last change began or ended; none in this run: long ago.
    since: Option<Instant>,
    /// When this run began.
    started: Instant,
    /// When the present key came into use, as far as this run knows.
    key_since: Instant,
    /// What came from each peer of the present key's device.
    heard: HashMap<PublicKey, Heard>,
}

/// What came from a peer.
#[derive(Clone, Copy, Debug)]
struct Heard {
    bytes: u64,
    data: Option<u64>,
    looked: Instant,
    /// When packets last came, or it was first seen.
    data_at: Instant,
}

impl Heard {
    fn new(status: &PeerStatus, now: Instant) -> Self {
        Self {
            bytes: status.rx_bytes,
            data: status.received_data,
            looked: now,
            data_at: now,
        }
    }

    /// Looks again. A device that does not count packets is judged by its bytes.
    fn look(&mut self, status: &PeerStatus, now: Instant) {
        let has_data = match (self.data, status.received_data) {
            (Some(before), Some(after)) => before != after,
            _ => match status.rx_bytes.checked_sub(self.bytes) {
                Some(bytes) => is_data(bytes, millis(now.duration_since(self.looked))),
                // It counts from the beginning again.
                None => true,
            },
        };
        if has_data {
            self.data_at = now;
        }
        (self.bytes, self.data, self.looked) = (status.rx_bytes, status.received_data, now);
    }
}

impl Turn {
    /// At the start of the agent.
    fn new() -> Self {
        Self {
            since: None,
            started: Instant::now(),
            key_since: Instant::now(),
            heard: HashMap::new(),
        }
    }

    /// Age of the present key. What the file says may come from a clock that was set back: it cannot be younger than
    /// this run knows it.
    fn key_age_ms(&self, of_file: Duration) -> u64 {
        millis(of_file.max(self.key_since.elapsed()))
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
        let opened = self.open_patiently(key, underlay, handle).await;
        if opened.is_err() {
            tokio::task::block_in_place(|| keys::remove(&path))?;
        }
        opened
    }
}

/// Changes this node's keys, step by step.
pub(super) struct KeyChange {
    handles: Handles,
    turn: Turn,
    /// There are other devices since somebody last asked.
    has_news: bool,
}

impl KeyChange {
    /// At the start of the agent.
    pub(super) fn new(handles: Handles) -> Self {
        Self {
            handles,
            turn: Turn::new(),
            has_news: false,
        }
    }

    /// True once after there are other devices, or another one of them is the present one: peers must be told to them.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }

    /// Looks whether keys are to change, and does the next step of it. `configured` are the peers that the devices were
    /// last told, if they are still the same devices, and whether everything was known then.
    pub(super) async fn step(
        &mut self,
        configured: Option<&(Vec<WireguardPeer>, bool)>,
    ) -> anyhow::Result<()> {
        // Programs of before know only the devices of before, and their maps say what they send to.
        if *self.handles.signals.is_taking_over.borrow() {
            self.turn.since = Some(Instant::now());
            return Ok(());
        }
        self.open_kept().await?;
        let leaving = self.handles.encryption.lock().leaving;
        if let Some(leaving) = leaving {
            return self.end_change(leaving).await;
        }
        let Some((peers, is_settled)) = configured.filter(|_| !self.has_news) else {
            return Ok(());
        };
        // Others learn of keys by the records: without a session nothing begins, and nobody's silence counts.
        if !*self.handles.signals.connected.borrow() {
            self.turn.since = Some(Instant::now());
            return Ok(());
        }
        let state_dir = self.handles.config.state_dir.clone();
        let (epochs, slot) = {
            let inner = self.handles.encryption.lock();
            let epochs: Vec<u32> = inner.devices.iter().map(|d| d.key.epoch).collect();
            (epochs, inner.devices.first().map_or(0, |d| d.key.slot))
        };
        let Some(current) = epochs.first().copied() else {
            return Ok(());
        };
        let next = epochs.get(1).copied();
        let own = OwnKeys {
            current,
            age_ms: self.turn.key_age_ms(keys::age(&state_dir)?),
            next,
            since_ms: self.turn.since_ms(next.is_some()),
            is_settled: *is_settled,
        };
        let others = self.peer_keys(peers, current, next);
        let every_ms = u64::from(self.handles.config.encryption.rotate_hours) * 60 * 60 * 1_000;
        let is_asked = self
            .handles
            .encryption
            .is_change_asked
            .load(Ordering::Relaxed);
        match decide(own, &others, every_ms, is_asked) {
            Decision::Wait => Ok(()),
            Decision::Begin { epoch } => self.begin(&state_dir, epoch, 1 - slot).await,
            Decision::Finish { left_behind } => {
                self.finish(left_behind);
                Ok(())
            }
        }
    }

    /// Where every other node is, by the last look at the devices.
    fn peer_keys(
        &mut self,
        peers: &[WireguardPeer],
        current: u32,
        next: Option<u32>,
    ) -> Vec<PeerKeys> {
        let report = self.handles.encryption.report();
        let now = Instant::now();
        let heard = &mut self.turn.heard;
        if let Some(device) = report.devices.first() {
            for (key, status) in &device.status.peers {
                let before = heard.entry(*key).or_insert_with(|| Heard::new(status, now));
                before.look(status, now);
            }
            let present: std::collections::HashSet<PublicKey> =
                device.status.peers.iter().map(|(key, _)| *key).collect();
            heard.retain(|key, _| present.contains(key));
        }
        let mut by_node: HashMap<(&str, &str), Vec<NodeKey>> = HashMap::new();
        for peer in peers {
            let node = (&*peer.cluster, &*peer.node);
            by_node.entry(node).or_default().push(peer.key);
        }
        let own_cluster = &*self.handles.config.cluster;
        by_node
            .iter()
            .filter_map(|((cluster, _), keys)| {
                let newest = PeerKeys::newest_of(keys)?;
                let of = |epoch: u32| keys.iter().find(|key| key.epoch == epoch);
                let has_answered = next.and_then(of).is_some_and(|key| {
                    let state = report.state.peers.get(&key.key);
                    state.is_some_and(|state| state.has_answered)
                });
                // Whom the old device does not know cannot send to it.
                let heard = of(current).and_then(|key| heard.get(&PublicKey(key.key)));
                let silent_ms =
                    heard.map_or(u64::MAX, |heard| millis(now.duration_since(heard.data_at)));
                Some(PeerKeys {
                    is_own: *cluster == own_cluster,
                    newest,
                    has_answered,
                    silent_ms,
                })
            })
            .collect()
    }

    /// A next key of an earlier run whose device could not be had yet: nothing else is begun before it is there.
    async fn open_kept(&mut self) -> anyhow::Result<()> {
        let Some(key) = self.handles.encryption.lock().unopened.clone() else {
            return Ok(());
        };
        let (epoch, slot) = (key.epoch, key.slot);
        let underlay = self.handles.signals.underlay.borrow().clone();
        let open = self
            .handles
            .encryption
            .open(key, &underlay, &self.handles.netlink)
            .await;
        let open = open.context("the device of the next key")?;
        self.handles.encryption.lock().unopened = None;
        self.add_next(open, epoch, slot);
        Ok(())
    }

    async fn begin(&mut self, state_dir: &Path, epoch: u32, slot: usize) -> anyhow::Result<()> {
        let underlay = self.handles.signals.underlay.borrow().clone();
        let open = self
            .handles
            .encryption
            .open_next(state_dir, epoch, slot, &underlay, &self.handles.netlink)
            .await?;
        self.handles
            .encryption
            .is_change_asked
            .store(false, Ordering::Relaxed);
        self.add_next(open, epoch, slot);
        Ok(())
    }

    fn add_next(&mut self, open: OpenDevice, epoch: u32, slot: usize) {
        self.handles.encryption.lock().devices.push(Arc::new(open));
        self.turn.since = Some(Instant::now());
        self.has_news = true;
        info!(
            epoch,
            device = name_of(slot),
            "keys change: the next one has its device"
        );
        // The programs first, then the record: who reads it sends to the new device.
        self.handles.signals.wireguard_changes.send_replace(());
    }

    /// The next key is the one in use from here on, for this run. What there is of the old one goes in [`Self::end_change`].
    fn finish(&mut self, left_behind: usize) {
        if left_behind > 0 {
            warn!(
                nodes = left_behind,
                "keys change without nodes that were silent for ten minutes, or, in other clusters, have not come over \
                 within a day: nothing encrypted reaches them until their agents run again"
            );
        }
        let mut inner = self.handles.encryption.lock();
        let old = inner.devices.remove(0);
        inner.leaving = Some(Leaving {
            slot: old.key.slot,
            ifindex: old.ifindex,
        });
        drop(inner);
        // Peers that count no epochs go to the device that is the present one now.
        self.has_news = true;
        self.turn.since = Some(Instant::now());
        self.turn.key_since = Instant::now();
        self.turn.heard.clear();
    }

    /// Goes on with the end of a change, of this run or of one that was cut off, as far as it comes. A round has made
    /// the devices and the kernel follow before.
    async fn end_change(&mut self, leaving: Leaving) -> anyhow::Result<()> {
        let state_dir = self.handles.config.state_dir.clone();
        let Some(present) = self.handles.encryption.devices().first().cloned() else {
            return Ok(());
        };
        loop {
            let remains = Remains {
                is_sent_to: self.is_sent_to(leaving.ifindex),
                is_stored_as_next: keys::is_next(&state_dir, &present.key)?,
                has_device: self.handles.encryption.lock().leaving.is_some(),
            };
            match end_step(remains) {
                // The next round sees to packets that still go there, or whoever follows the records.
                None | Some(EndStep::Redirect) => return Ok(()),
                Some(EndStep::Promote) => {
                    tokio::task::block_in_place(|| keys::promote(&state_dir))?;
                }
                Some(EndStep::Remove) => {
                    let device = name_of(leaving.slot);
                    netlink::delete_link(&self.handles.netlink, device).await?;
                    self.handles.encryption.lock().leaving = None;
                    self.turn.since = Some(Instant::now());
                    let epoch = present.key.epoch;
                    info!(epoch, device, "keys have changed: the old one is gone");
                    self.handles.signals.wireguard_changes.send_replace(());
                }
            }
        }
    }

    /// Whether the kernel sends to this device; where that is not known yet, it may.
    fn is_sent_to(&self, ifindex: u32) -> bool {
        self.handles
            .reconciler
            .model()
            .as_ref()
            .is_none_or(|model| {
                let mut nodes = model.actual().nodes.values();
                nodes.any(|node| node.flags & NODE_ENCRYPTED != 0 && node.egress_ifindex == ifindex)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::encryption::{BackendChoice, Encryption as Settings};

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

    #[test]
    fn keepalives_do_not_keep_the_old_device() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        // Once by a device that counts packets, once by its bytes.
        for counted in [Some(7), None] {
            let mut status = PeerStatus {
                rx_bytes: 5_000,
                received_data: counted,
                ..PeerStatus::default()
            };
            let mut heard = Heard::new(&status, began);
            for second in 1..=1_200 {
                // A keepalive every two seconds, and now and then a handshake before it.
                status.rx_bytes += match second % 120 {
                    0 => 148 + 32,
                    even if even % 2 == 0 => 32,
                    _ => 0,
                };
                heard.look(&status, at(second));
            }
            assert_eq!(heard.data_at, began, "{counted:?}");
            status.rx_bytes += 112;
            status.received_data = counted.map(|count| count + 1);
            heard.look(&status, at(1_201));
            assert_eq!(heard.data_at, at(1_201));
        }
    }

    #[test]
    fn a_clock_that_was_set_back_does_not_keep_a_key_young() {
        let dir = tempfile::tempdir().unwrap();
        keys::read_or_make(dir.path()).unwrap();
        let file = std::fs::File::options()
            .append(true)
            .open(dir.path().join(keys::KEY_FILE))
            .unwrap();
        let year = Duration::from_secs(365 * 24 * 60 * 60);
        file.set_modified(std::time::SystemTime::now() + year)
            .unwrap();
        let of_file = keys::age(dir.path()).unwrap();
        assert_eq!(of_file, Duration::ZERO);
        let hour = Duration::from_secs(60 * 60);
        let mut turn = Turn::new();
        turn.key_since = Instant::now().checked_sub(hour).unwrap();
        assert!(turn.key_age_ms(of_file) >= millis(hour));
        assert_eq!(turn.key_age_ms(year), millis(year));
    }

    /// What ends a change, with real key files and devices that are only names.
    struct World {
        dir: tempfile::TempDir,
        /// By slot.
        devices: [bool; 2],
        /// Slot of the device that the kernel sends to.
        sends_to: usize,
    }

    /// What a run of the agent knows.
    struct Run {
        present: keys::StoredKey,
        next: Option<keys::StoredKey>,
        leaving: Option<usize>,
    }

    impl World {
        /// As [`Encryption::start`] finds it.
        fn start(&self) -> Run {
            let present = keys::read_or_make(self.dir.path()).unwrap();
            let next = keys::read_next(self.dir.path(), &present).unwrap();
            let other = 1 - present.slot;
            let leaving = (next.is_none() && self.devices[other]).then_some(other);
            Run {
                present,
                next,
                leaving,
            }
        }

        /// One step as [`KeyChange::end_change`] does it; false at the end.
        fn step(&mut self, run: &mut Run) -> bool {
            if let Some(next) = run.next.take() {
                run.leaving = Some(run.present.slot);
                run.present = next;
                return true;
            }
            let Some(slot) = run.leaving else {
                return false;
            };
            let remains = Remains {
                is_sent_to: self.sends_to == slot,
                is_stored_as_next: keys::is_next(self.dir.path(), &run.present).unwrap(),
                has_device: true,
            };
            match end_step(remains) {
                Some(EndStep::Redirect) => self.sends_to = run.present.slot,
                Some(EndStep::Promote) => keys::promote(self.dir.path()).unwrap(),
                Some(EndStep::Remove) => {
                    self.devices[slot] = false;
                    run.leaving = None;
                }
                None => {}
            }
            assert!(
                self.devices[self.sends_to],
                "packets to a device that is gone"
            );
            let stored = keys::read_or_make(self.dir.path()).unwrap();
            assert!(self.devices[stored.slot], "the stored key has no device");
            true
        }
    }

    #[test]
    fn a_change_that_was_cut_off_anywhere_is_ended_by_the_next_run() {
        // Any number of steps, then another run; and a second time.
        for (first, second) in (0..6).flat_map(|first| (0..6).map(move |second| (first, second))) {
            let dir = tempfile::tempdir().unwrap();
            let old = keys::read_or_make(dir.path()).unwrap();
            let next = keys::make(&dir.path().join(NEXT_KEY_FILE), 1, 1).unwrap();
            let mut world = World {
                dir,
                devices: [true; 2],
                sends_to: old.slot,
            };
            for steps in [first, second, usize::MAX] {
                let mut run = world.start();
                let mut done = 0;
                while done < steps && world.step(&mut run) {
                    done += 1;
                }
            }
            let run = world.start();
            assert_eq!(run.present, next, "cut off after {first} and {second}");
            assert!(run.next.is_none() && run.leaving.is_none());
            assert_eq!((world.devices, world.sends_to), ([false, true], 1));
            assert!(!world.dir.path().join(NEXT_KEY_FILE).exists());
        }
    }
}
