//! A peer as the data path sees it: its sessions and place, what waits for them, and what was counted.
//!
//! Sessions and place stand behind a lock that workers take only when the peer's epoch has moved on.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use clustermesh_encryption_core::engine::{Activity, Sessions, Slot};
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_encryption_core::session::Session;
use parking_lot::Mutex;

use super::turn::{HeldBytes, Turn, Way};

/// Packets that wait for a handshake with one peer; the eldest goes first.
pub const STAGED_PACKETS_MAX: usize = 128;
/// Their bytes.
pub const STAGED_BYTES_MAX: usize = 1 << 20;

/// A packet of the TUN device, with the header before it.
pub type StagedPacket = Vec<u8>;

/// Packets that wait for a session, or for their turn.
#[derive(Debug, Default)]
pub struct Staged {
    packets: VecDeque<StagedPacket>,
    bytes: usize,
    held: Option<HeldBytes>,
}

impl Staged {
    /// Adds one; gives how many old ones had to go.
    pub fn push(&mut self, packet: &[u8]) -> u64 {
        self.bytes += packet.len();
        self.packets.push_back(packet.to_vec());
        let mut dropped = 0;
        while self.packets.len() > STAGED_PACKETS_MAX || self.bytes > STAGED_BYTES_MAX {
            self.pop();
            dropped += 1;
        }
        dropped
    }

    /// Adds one that waits for its turn, after which none is dropped; false: it is not added, there are enough.
    pub fn hold(&mut self, packet: &[u8], total: &Arc<AtomicUsize>) -> bool {
        let held = self.held.get_or_insert_with(|| HeldBytes::new(total));
        let is_taken = held.add(packet.len());
        if is_taken {
            self.bytes += packet.len();
            self.packets.push_back(packet.to_vec());
        }
        is_taken
    }

    /// Nothing is held any more.
    pub fn end_hold(&mut self) {
        self.held = None;
    }

    /// Takes the eldest.
    pub fn pop(&mut self) -> Option<StagedPacket> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

/// Sessions and place of a peer.
#[derive(Debug, Default)]
pub struct PathState {
    /// What seals and opens.
    pub sessions: Sessions,
    /// Where the peer is.
    pub endpoint: Option<SocketAddr>,
    /// Whether packets to it are held.
    pub outward: Turn,
    /// Whether packets from it are.
    pub inward: Turn,
}

impl PathState {
    /// Of one direction.
    pub fn turn(&mut self, way: Way) -> &mut Turn {
        match way {
            Way::Outward => &mut self.outward,
            Way::Inward => &mut self.inward,
        }
    }
}

/// A peer as the data path sees it.
#[derive(Debug)]
pub struct Peer {
    /// Its place.
    pub slot: Slot,
    /// Its name.
    pub key: PublicKey,
    epoch: AtomicU32,
    state: Mutex<PathState>,
    /// Packets that wait.
    pub staged: Mutex<Staged>,
    /// Whether there are any.
    pub has_staged: AtomicBool,
    /// Whether the control thread was asked for a handshake and has not answered.
    pub is_handshake_wanted: AtomicBool,
    /// Shortest segment that the path refused to cut; [`usize::MAX`]: none.
    pub refused_segment: AtomicUsize,
    data_sent_ms: AtomicU64,
    any_sent_ms: AtomicU64,
    data_received_ms: AtomicU64,
    any_received_ms: AtomicU64,
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
    received_data: AtomicU64,
    /// Packets to and datagrams from it that did not pass.
    pub errors: AtomicU64,
}

impl Peer {
    /// A peer without sessions; `turn`: of a device that follows another, [`Turn::Fresh`].
    #[must_use]
    pub fn new(slot: Slot, key: PublicKey, turn: Turn) -> Self {
        let state = PathState {
            outward: turn,
            inward: turn,
            ..PathState::default()
        };
        Self {
            slot,
            key,
            epoch: AtomicU32::new(1),
            state: Mutex::new(state),
            staged: Mutex::default(),
            has_staged: AtomicBool::new(false),
            is_handshake_wanted: AtomicBool::new(false),
            refused_segment: AtomicUsize::new(usize::MAX),
            data_sent_ms: AtomicU64::new(0),
            any_sent_ms: AtomicU64::new(0),
            data_received_ms: AtomicU64::new(0),
            any_received_ms: AtomicU64::new(0),
            rx_bytes: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            received_data: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        }
    }

    /// Grows whenever sessions or place change.
    #[must_use]
    #[inline]
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Reads sessions and place.
    pub fn read<T>(&self, read: impl FnOnce(&PathState) -> T) -> T {
        read(&self.state.lock())
    }

    /// Changes sessions or place.
    pub fn change<T>(&self, change: impl FnOnce(&mut PathState) -> T) -> T {
        let mut state = self.state.lock();
        let result = change(&mut state);
        // A new place or key: what the old path refused may pass now.
        self.refused_segment.store(usize::MAX, Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::Release);
        result
    }

    /// Nothing is held any more.
    pub fn open(&self, way: Way) {
        self.change(|state| *state.turn(way) = Turn::Open);
    }

    /// Notes that `bytes` were sent under a session; `is_data`: more than a keepalive.
    #[inline]
    pub fn note_sent(&self, now_ms: u64, bytes: usize, is_data: bool) {
        self.any_sent_ms.store(now_ms, Ordering::Relaxed);
        if is_data {
            self.data_sent_ms.store(now_ms, Ordering::Relaxed);
        }
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Notes that `bytes` of authentic messages were received.
    #[inline]
    pub fn note_received(&self, now_ms: u64, bytes: usize, is_data: bool) {
        self.any_received_ms.store(now_ms, Ordering::Relaxed);
        if is_data {
            self.data_received_ms.store(now_ms, Ordering::Relaxed);
            self.received_data.fetch_add(1, Ordering::Relaxed);
        }
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// For the timers.
    #[must_use]
    pub fn activity(&self) -> Activity {
        let read = |time: &AtomicU64| Duration::from_millis(time.load(Ordering::Relaxed));
        Activity {
            data_sent: read(&self.data_sent_ms),
            any_sent: read(&self.any_sent_ms),
            data_received: read(&self.data_received_ms),
            any_received: read(&self.any_received_ms),
        }
    }

    /// How often packets came, not counting keepalives and handshakes.
    #[must_use]
    pub fn received_data(&self) -> u64 {
        self.received_data.load(Ordering::Relaxed)
    }

    /// Bytes received and sent.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.rx_bytes.load(Ordering::Relaxed),
            self.tx_bytes.load(Ordering::Relaxed),
        )
    }
}

/// The session that seals, and where to; what a worker remembers of a peer between two changes of it.
#[derive(Clone, Debug)]
pub struct Route {
    /// The peer.
    pub peer: Arc<Peer>,
    /// What seals.
    pub session: Option<Arc<Session>>,
    /// Where to.
    pub endpoint: Option<SocketAddr>,
    /// Whether packets may have to wait for their turn.
    pub is_held: bool,
    epoch: u32,
}

impl Route {
    /// Looks a peer up.
    #[must_use]
    pub fn new(peer: &Arc<Peer>) -> Self {
        // First the epoch: what changes after it makes the route stale at worst.
        let epoch = peer.epoch();
        let (session, endpoint, turn) = peer.read(|state| {
            (
                state.sessions.current.clone(),
                state.endpoint,
                state.outward,
            )
        });
        Self {
            peer: Arc::clone(peer),
            session,
            endpoint,
            is_held: turn != Turn::Open,
            epoch,
        }
    }

    /// Whether it is still so.
    #[must_use]
    #[inline]
    pub fn is_fresh(&self) -> bool {
        self.epoch == self.peer.epoch()
    }
}
