//! This node's keys and WireGuard devices: found or started, configured, and asked how they are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clustermesh_api::v1::{WireguardKey as KeyMessage, WireguardKeys};
use clustermesh_ebpf::abi::WIREGUARD_DEVICES_MAX;
use clustermesh_encryption::kernel::{self, KernelDevice};
use clustermesh_encryption::process::{ProcessDevice, ProcessOptions, end_silent};
use clustermesh_encryption::{Backend, Device, DeviceError, DeviceStatus, Origin, Others};
use clustermesh_encryption_core::config::DeviceConfig;
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_node_core::rotation::EPOCH_ANY;
use clustermesh_node_core::{PeerState, WireguardPeer, WireguardState};
use rtnetlink::Handle;
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::keys::{self, StoredKey};
use super::peers;
use super::report::{self, Report};
use crate::config::Config;
use crate::config::encryption::{BackendChoice, Encryption as Settings};
use crate::host::Underlay;
use crate::netlink;

/// The devices; a key that comes next has the one that is free.
pub const DEVICE_NAMES: [&str; WIREGUARD_DEVICES_MAX] = ["cm_wg0", "cm_wg1"];
/// `SO_MARK` of the devices' own datagrams: the programs let them through as they are.
pub const MARK: u32 = 0xe00;
/// A device that gives no answer for so long is ended and started again.
pub(super) const SILENT_MAX: Duration = Duration::from_secs(15);
/// Until then it is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// While keys change: time between keepalives on the device of the next key.
const CHANGE_KEEPALIVE_SECONDS: u16 = 2;

/// A device that runs.
#[derive(Debug)]
pub(super) struct OpenDevice {
    pub(super) device: Box<dyn Device>,
    pub(super) ifindex: u32,
    pub(super) key: StoredKey,
    port: u16,
}

/// The device of a key that is over: it takes what others still send, until it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaving {
    pub(super) slot: usize,
    pub(super) ifindex: u32,
}

/// This node's keys and devices.
#[derive(Debug)]
pub struct Encryption {
    settings: Settings,
    backend: Backend,
    inner: Mutex<Inner>,
    /// One verification at a time.
    pub(super) verifications: Arc<Semaphore>,
    /// Somebody wants new keys now.
    pub(super) is_change_asked: AtomicBool,
}

#[derive(Debug)]
pub(super) struct Inner {
    /// That of the present key, and while keys change that of the next.
    pub(super) devices: Vec<Arc<OpenDevice>>,
    pub(super) leaving: Option<Leaving>,
    /// The next key, of an earlier run, while its device is not to be had.
    pub(super) unopened: Option<StoredKey>,
    /// Places that devices were told: a peer that has moved since is not sent back.
    pub(super) told: HashMap<PublicKey, SocketAddr>,
    pub(super) report: Report,
}

pub(super) fn name_of(slot: usize) -> &'static str {
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
            // Of a change of keys that was cut off at its end. The kernel may still send to it.
            let slot = 1 - current.slot;
            let link = netlink::link_by_name(handle, name_of(slot)).await?;
            encryption.lock().leaving = link.map(|link| Leaving {
                slot,
                ifindex: link.index,
            });
        }
        let device = encryption.open_patiently(current, underlay, handle).await;
        let device = device.context("encryption")?;
        encryption.lock().devices.push(Arc::new(device));
        if let Some(next) = next {
            let epoch = next.epoch;
            match encryption
                .open_patiently(next.clone(), underlay, handle)
                .await
            {
                Ok(device) => encryption.lock().devices.push(Arc::new(device)),
                // The present key works. Others may know the next one: it is kept, and its device is tried again.
                Err(error) => {
                    warn!(
                        epoch,
                        error = format!("{error:#}"),
                        "the next key has no device yet, trying again"
                    );
                    encryption.lock().unopened = Some(next);
                }
            }
        }
        tokio::task::block_in_place(|| encryption.look())?;
        Ok(Some(Arc::new(encryption)))
    }

    /// Without any device yet.
    pub(super) fn new(settings: &Settings) -> anyhow::Result<Self> {
        Ok(Self {
            settings: settings.clone(),
            backend: choose(settings)?,
            inner: Mutex::new(Inner {
                devices: Vec::new(),
                leaving: None,
                unopened: None,
                told: HashMap::new(),
                report: Report::default(),
            }),
            verifications: Arc::new(Semaphore::new(1)),
            is_change_asked: AtomicBool::new(false),
        })
    }

    /// Held for short moments, never while a device is asked: others wait for it that must not hang with a device.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn devices(&self) -> Vec<Arc<OpenDevice>> {
        self.lock().devices.clone()
    }

    /// As [`Self::open`]; one that gives no answer at all gets [`SILENT_MAX`] to find its voice, and is replaced then.
    pub(super) async fn open_patiently(
        &self,
        key: StoredKey,
        underlay: &Underlay,
        handle: &Handle,
    ) -> anyhow::Result<OpenDevice> {
        let begun = Instant::now();
        loop {
            match self.open(key.clone(), underlay, handle).await {
                Err(error) if is_silent(&error) => {
                    warn!(error = format!("{error:#}"), "waiting for a device");
                    if begun.elapsed() >= SILENT_MAX {
                        self.end_silent(key.slot)?;
                    }
                    // One whose queue of connections is full says so at once.
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                other => return other,
            }
        }
    }

    /// Ends what runs a device that gives no answer.
    pub(super) fn end_silent(&self, slot: usize) -> anyhow::Result<()> {
        warn!(
            device = name_of(slot),
            "the WireGuard device gave no answer for too long, ending it"
        );
        let socket_dir = &self.settings.socket_dir;
        tokio::task::block_in_place(|| end_silent(name_of(slot), socket_dir))?;
        Ok(())
    }

    /// The UDP port of a device.
    fn port_of(&self, slot: usize) -> u16 {
        self.settings.port + u16::from(slot != 0)
    }

    /// Finds or starts the device for a key, gives it the key, and sets it up.
    pub(super) async fn open(
        &self,
        key: StoredKey,
        underlay: &Underlay,
        handle: &Handle,
    ) -> anyhow::Result<OpenDevice> {
        let name = name_of(key.slot);
        let (port, mtu) = (self.port_of(key.slot), underlay.wireguard_mtu);
        let (device, origin) = tokio::task::block_in_place(|| {
            let (device, origin) = open_device(&self.settings, self.backend, key.slot, mtu)?;
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

    /// Interfaces of the devices, the one for the present key first, also of one that is about to go.
    #[must_use]
    pub fn ifindexes(&self) -> Vec<u32> {
        let inner = self.lock();
        let leaving = inner.leaving.map(|leaving| leaving.ifindex);
        inner
            .devices
            .iter()
            .map(|d| d.ifindex)
            .chain(leaving)
            .collect()
    }

    /// UDP ports of the devices, in the same order.
    #[must_use]
    pub fn ports(&self) -> Vec<u16> {
        let inner = self.lock();
        let leaving = inner.leaving.map(|leaving| self.port_of(leaving.slot));
        inner
            .devices
            .iter()
            .map(|d| d.port)
            .chain(leaving)
            .collect()
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
        let epochs = inner.devices.iter().map(|open| &open.key);
        let epochs = epochs.chain(&inner.unopened).map(|key| key.epoch);
        match *epochs.collect::<Vec<_>>().as_slice() {
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
    pub(super) fn look(&self) -> anyhow::Result<()> {
        let open_devices = self.devices();
        let mut state = WireguardState {
            epoch: open_devices.first().map_or(0, |open| open.key.epoch),
            ..WireguardState::default()
        };
        let mut devices = Vec::new();
        for open in &open_devices {
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
        let mut inner = self.lock();
        inner.report.state = state;
        inner.report.devices = devices;
        Ok(())
    }

    /// Makes the devices' peers those that are wanted; `is_settled`: whoever is not among them is gone.
    pub(super) fn configure(
        &self,
        wanted: &[WireguardPeer],
        is_settled: bool,
    ) -> anyhow::Result<usize> {
        let (devices, told) = {
            let inner = self.lock();
            (inner.devices.clone(), inner.told.clone())
        };
        let others = if is_settled {
            Others::Removed
        } else {
            Others::Kept
        };
        let mut steps = 0;
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
        self.lock().told = told_now;
        Ok(steps)
    }
}

/// Whether a device gave no answer at all.
fn is_silent(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<DeviceError>(),
        Some(DeviceError::Silent { .. })
    )
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
    slot: usize,
    mtu: u32,
) -> Result<(Box<dyn Device>, Origin), DeviceError> {
    let name = name_of(slot);
    if backend == Backend::Kernel {
        let (device, origin) = KernelDevice::open(name)?;
        return Ok((Box::new(device), origin));
    }
    let options = ProcessOptions {
        program: settings.program(),
        socket_dir: settings.socket_dir.clone(),
        mtu,
        follows: Some(name_of(1 - slot).to_owned()),
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
