//! Encryption between nodes: this node's keys and WireGuard devices, kept equal to what the records say.

mod change;
pub mod keys;
mod peers;
pub mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use clustermesh_api::v1::{WireguardKey as KeyMessage, WireguardKeys};
use clustermesh_ebpf::abi::WIREGUARD_DEVICES_MAX;
use clustermesh_encryption::kernel::{self, KernelDevice};
use clustermesh_encryption::process::{ProcessDevice, ProcessOptions};
use clustermesh_encryption::{Backend, Device, DeviceError, DeviceStatus, Origin, Others};
use clustermesh_encryption_core::config::DeviceConfig;
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_node_core::rotation::EPOCH_ANY;
use clustermesh_node_core::{PeerState, WireguardPeer, WireguardState};
use clustermesh_process::Drain;
use nix::net::if_::if_nametoindex;
use rtnetlink::Handle;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::config::encryption::{BackendChoice, Encryption as Settings};
use crate::host::Underlay;
use crate::netlink;
use crate::reconcile;
use crate::shared::Shared;
use change::Turn;
use keys::StoredKey;
use report::Report;

/// The devices; a key that comes next has the one that is free.
pub const DEVICE_NAMES: [&str; WIREGUARD_DEVICES_MAX] = ["cm_wg0", "cm_wg1"];
/// `SO_MARK` of the devices' own datagrams: the programs let them through as they are.
pub const MARK: u32 = 0xe00;
/// How often the devices are looked at when no record changes.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// While keys change: time between keepalives on the device of the next key.
const CHANGE_KEEPALIVE_SECONDS: u16 = 2;
/// Changes of records are carried out together, at most this often.
const GATHER: Duration = Duration::from_millis(10);

/// A device that runs.
#[derive(Debug)]
struct OpenDevice {
    device: Box<dyn Device>,
    ifindex: u32,
    key: StoredKey,
    port: u16,
}

/// This node's keys and devices.
#[derive(Debug)]
pub struct Encryption {
    settings: Settings,
    backend: Backend,
    inner: Mutex<Inner>,
    /// Somebody wants new keys now.
    is_change_asked: AtomicBool,
}

#[derive(Debug)]
struct Inner {
    devices: Vec<OpenDevice>,
    /// Places that devices were told: a peer that has moved since is not sent back.
    told: HashMap<PublicKey, SocketAddr>,
    report: Report,
}

fn name_of(slot: usize) -> &'static str {
    let [first, second] = DEVICE_NAMES;
    if slot == 0 { first } else { second }
}

impl Encryption {
    /// Reads or makes the key, and finds the device running or starts it. `None` if nothing is to be encrypted.
    ///
    /// # Errors
    /// The key cannot be used, or the device not be had.
    pub async fn start(
        config: &Config,
        underlay: &Underlay,
        handle: &Handle,
    ) -> anyhow::Result<Option<Arc<Self>>> {
        let settings = &config.encryption;
        if !settings.is_on() {
            return Ok(None);
        }
        let current = keys::read_or_make(&config.state_dir)?;
        let next = keys::read_next(&config.state_dir, &current)?;
        let encryption = Self::new(settings)?;
        if next.is_none() {
            // Of a change of keys that was cut off at its end.
            netlink::delete_link(handle, name_of(1 - current.slot)).await?;
        }
        let device = encryption.open(current, underlay, handle).await;
        let device = device.context("encryption")?;
        encryption.lock().devices.push(device);
        if let Some(next) = next {
            let epoch = next.epoch;
            match encryption.open(next, underlay, handle).await {
                Ok(device) => encryption.lock().devices.push(device),
                // The present key works. The change begins again, for its reason or because others have begun.
                Err(error) => {
                    warn!(
                        epoch,
                        error = format!("{error:#}"),
                        "the next key has no device: the change of keys begins again"
                    );
                    keys::remove(&config.state_dir.join(keys::NEXT_KEY_FILE))?;
                }
            }
        }
        tokio::task::block_in_place(|| encryption.look())?;
        Ok(Some(Arc::new(encryption)))
    }

    /// Without any device yet.
    fn new(settings: &Settings) -> anyhow::Result<Self> {
        Ok(Self {
            settings: settings.clone(),
            backend: choose(settings)?,
            inner: Mutex::new(Inner {
                devices: Vec::new(),
                told: HashMap::new(),
                report: Report::default(),
            }),
            is_change_asked: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The UDP port of a device.
    fn port_of(&self, slot: usize) -> u16 {
        self.settings.port + u16::from(slot != 0)
    }

    /// Finds or starts the device for a key, gives it the key, and sets it up.
    async fn open(
        &self,
        key: StoredKey,
        underlay: &Underlay,
        handle: &Handle,
    ) -> anyhow::Result<OpenDevice> {
        let name = name_of(key.slot);
        let (port, mtu) = (self.port_of(key.slot), underlay.wireguard_mtu);
        let (device, origin) = tokio::task::block_in_place(|| {
            let (device, origin) = open_device(&self.settings, self.backend, name, mtu)?;
            let wanted = device_config(&key, port, Vec::new());
            device.configure(&wanted, Others::Kept)?;
            anyhow::Ok((device, origin))
        })?;
        let link = netlink::link_by_name(handle, name)
            .await?
            .with_context(|| format!("interface {name} vanished"))?;
        // Packets from other nodes come in here, though routes to them lead to the underlay.
        netlink::write_sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0")?;
        // It needs no address of its own; what it would say on its link no peer takes.
        if let Err(error) =
            netlink::write_sysctl(&format!("net/ipv6/conf/{name}/addr_gen_mode"), "1")
        {
            warn!(%error, device = name, "the device gets an address of its own");
        }
        if !link.up || link.mtu != mtu {
            netlink::set_link(handle, link.index, mtu, false).await?;
        }
        info!(device = name, backend = %self.backend, port, mtu, adopted = origin == Origin::Adopted,
            public_key = %key.private.public(), epoch = key.epoch, "WireGuard device is ready");
        Ok(OpenDevice {
            device,
            ifindex: link.index,
            key,
            port,
        })
    }

    /// Interfaces of the devices, the one for the present key first.
    #[must_use]
    pub fn ifindexes(&self) -> Vec<u32> {
        self.lock().devices.iter().map(|d| d.ifindex).collect()
    }

    /// UDP ports of the devices, in the same order.
    #[must_use]
    pub fn ports(&self) -> Vec<u16> {
        self.lock().devices.iter().map(|d| d.port).collect()
    }

    /// What other nodes are told.
    #[must_use]
    pub fn announcement(&self) -> WireguardKeys {
        let inner = self.lock();
        let mut keys = inner.devices.iter().map(|device| KeyMessage {
            public_key: device.key.private.public().to_string(),
            port: device.port.into(),
            epoch: device.key.epoch,
        });
        WireguardKeys {
            current: keys.next(),
            next: keys.next(),
            nodes: self.settings.nodes,
        }
    }

    /// Asks for new keys; gives the epoch that they will have.
    pub fn ask_for_change(&self) -> u32 {
        let inner = self.lock();
        let epochs: Vec<u32> = inner.devices.iter().map(|d| d.key.epoch).collect();
        match *epochs.as_slice() {
            // One is under way.
            [_, next, ..] => next,
            [current] => {
                self.is_change_asked.store(true, Ordering::Relaxed);
                current.saturating_add(1)
            }
            [] => 0,
        }
    }

    /// What the devices are ready for, as of the last look.
    #[must_use]
    pub fn state(&self) -> WireguardState {
        self.lock().report.state.clone()
    }

    /// What is known of devices and peers, as of the last look.
    #[must_use]
    pub fn report(&self) -> Report {
        self.lock().report.clone()
    }

    /// Asks the devices how they are.
    fn look(&self) -> anyhow::Result<()> {
        let mut inner = self.lock();
        let mut state = WireguardState {
            epoch: inner.devices.first().map_or(0, |open| open.key.epoch),
            ..WireguardState::default()
        };
        let mut devices = Vec::new();
        for open in &inner.devices {
            let status = open.device.status()?;
            state.own_keys.insert(open.key.private.public().0);
            state.peers.extend(peer_states(&status, open.ifindex));
            devices.push(report::DeviceReport {
                name: open.device.name().to_owned(),
                backend: open.device.backend(),
                epoch: open.key.epoch,
                status,
            });
        }
        inner.report.state = state;
        inner.report.devices = devices;
        Ok(())
    }

    /// Makes the devices' peers those that are wanted; `is_settled`: whoever is not among them is gone.
    fn configure(&self, wanted: &[WireguardPeer], is_settled: bool) -> anyhow::Result<usize> {
        let mut inner = self.lock();
        let others = if is_settled {
            Others::Removed
        } else {
            Others::Kept
        };
        let mut steps = 0;
        let Inner { devices, told, .. } = &mut *inner;
        let mut told_now = HashMap::new();
        for (place, open) in devices.iter().enumerate() {
            let is_present = place == 0;
            let of_epoch = wanted.iter().filter(|peer| match peer.key.epoch {
                EPOCH_ANY => is_present,
                epoch => epoch == open.key.epoch,
            });
            // Under a new key somebody has to begin.
            let keepalive_seconds = if is_present {
                self.settings.keepalive_seconds
            } else {
                CHANGE_KEEPALIVE_SECONDS
            };
            let known: BTreeSet<PublicKey> = open
                .device
                .status()?
                .peers
                .iter()
                .map(|(key, _)| *key)
                .collect();
            let peers = of_epoch
                .map(|peer| {
                    let endpoint = peers::endpoint(peer);
                    let key = PublicKey(peer.key.key);
                    told_now.insert(key, endpoint);
                    let has_moved = told.get(&key) != Some(&endpoint) || !known.contains(&key);
                    peers::config(peer, has_moved, keepalive_seconds)
                })
                .collect();
            let wanted = device_config(&open.key, open.port, peers);
            steps += open.device.configure(&wanted, others)?;
        }
        *told = told_now;
        Ok(steps)
    }
}

fn device_config(
    key: &StoredKey,
    port: u16,
    peers: Vec<clustermesh_encryption_core::config::PeerConfig>,
) -> DeviceConfig {
    DeviceConfig {
        private_key: Some(key.private.clone()),
        listen_port: port,
        fwmark: MARK,
        peers,
    }
}

fn peer_states(
    status: &DeviceStatus,
    ifindex: u32,
) -> BTreeMap<clustermesh_node_core::change::WireguardKey, PeerState> {
    status
        .peers
        .iter()
        .map(|(key, peer)| {
            let state = PeerState {
                ifindex,
                has_answered: peer.last_handshake.is_some(),
            };
            (key.0, state)
        })
        .collect()
}

/// Which back end is to run the devices.
fn choose(settings: &Settings) -> anyhow::Result<Backend> {
    match (settings.backend, kernel::probe()) {
        (BackendChoice::Userspace, _) => Ok(Backend::Userspace),
        (_, Ok(())) => Ok(Backend::Kernel),
        (BackendChoice::Auto, Err(error)) => {
            info!(%error, "this kernel has no WireGuard: the device runs in user space");
            Ok(Backend::Userspace)
        }
        (BackendChoice::Kernel, Err(source)) => {
            Err(DeviceError::NoKernelDevice { source }).context("encryption.backend")
        }
    }
}

fn open_device(
    settings: &Settings,
    backend: Backend,
    name: &str,
    mtu: u32,
) -> Result<(Box<dyn Device>, Origin), DeviceError> {
    if backend == Backend::Kernel {
        let (device, origin) = KernelDevice::open(name)?;
        return Ok((Box::new(device), origin));
    }
    let options = ProcessOptions {
        program: settings.program(),
        socket_dir: settings.socket_dir.clone(),
        mtu,
    };
    let (device, origin) = ProcessDevice::open(name, &options)?;
    Ok((Box::new(device), origin))
}

/// Devices that an earlier run left, where nothing is encrypted any more: what others still send to them is taken.
///
/// # Errors
/// The kernel refused the question.
pub async fn left_over(handle: &Handle) -> anyhow::Result<Vec<u32>> {
    let mut found = Vec::new();
    for name in DEVICE_NAMES {
        found.extend(
            netlink::link_by_name(handle, name)
                .await?
                .map(|link| link.index),
        );
    }
    Ok(found)
}

/// Removes all devices, and with them what runs them.
///
/// # Errors
/// The kernel refused it.
pub async fn remove_devices(handle: &Handle) -> anyhow::Result<()> {
    for name in DEVICE_NAMES {
        netlink::delete_link(handle, name).await?;
    }
    Ok(())
}

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
        last_fault: String::new(),
        turn: Turn::new(),
    };
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            Ok(()) = changes.changed() => tokio::time::sleep(GATHER).await,
            Ok(()) = underlay.changed() => task.follow_underlay().await,
            () = drain.draining() => return,
        }
        changes.mark_unchanged();
        match task.round().await {
            Ok(()) => {
                if !std::mem::take(&mut task.last_fault).is_empty() {
                    info!("the WireGuard devices are as they should be again");
                }
                task.shared.metrics.encryption_fault.set(0);
            }
            Err(fault) => {
                task.shared.metrics.encryption_fault.set(1);
                let text = format!("{fault:#}");
                if text != task.last_fault {
                    error!(
                        fault = text,
                        "the WireGuard devices are not as they should be, trying again"
                    );
                }
                task.last_fault = text;
            }
        }
    }
}

struct Task {
    shared: Arc<Shared>,
    encryption: Arc<Encryption>,
    handle: Handle,
    /// What the devices were last made to be, and whether everything was known then.
    configured: Option<(Vec<WireguardPeer>, bool)>,
    last_fault: String,
    turn: Turn,
}

impl Task {
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

    /// Starts devices again that have ended.
    async fn revive(&mut self) -> anyhow::Result<()> {
        let dead: Vec<StoredKey> = tokio::task::block_in_place(|| {
            let inner = self.encryption.lock();
            let is_dead = |open: &&OpenDevice| {
                let index = if_nametoindex(open.device.name());
                index != Ok(open.ifindex) || open.device.status().is_err()
            };
            inner
                .devices
                .iter()
                .filter(is_dead)
                .map(|open| open.key.clone())
                .collect()
        });
        for key in dead {
            warn!(
                device = name_of(key.slot),
                "the WireGuard device has ended, starting it again"
            );
            let underlay = self.shared.underlay.borrow().clone();
            let open = self
                .encryption
                .open(key.clone(), &underlay, &self.handle)
                .await?;
            {
                let mut inner = self.encryption.lock();
                if let Some(place) = inner.devices.iter_mut().find(|held| held.key == key) {
                    *place = open;
                }
                inner.told.clear();
            }
            self.configured = None;
            // Programs first: what peers send is taken from then on.
            self.shared
                .wireguard_changes
                .send_modify(|n| *n = n.wrapping_add(1));
        }
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
