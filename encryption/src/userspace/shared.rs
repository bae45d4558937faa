//! What the threads of a device share: peers as the data path sees them, the routing table, counters.
//!
//! The table is replaced as a whole; workers keep the one they have until its number changes. A peer's sessions and
//! place stand behind a lock that workers take only when the peer's epoch has moved on.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clustermesh_encryption_core::allowed_ips::AllowedIps;
use clustermesh_encryption_core::engine::{Activity, Sessions, Slot};
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_encryption_core::session::Session;
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

use super::fence::Fence;
use super::handover::{Handover, HeldBytes, Turn, Way};
use super::udp::Socket;

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
    fn turn(&mut self, way: Way) -> &mut Turn {
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

/// The sockets of one worker.
#[derive(Debug)]
pub struct Sockets {
    /// For IPv4.
    pub v4: Socket,
    /// For IPv6, where the machine has it.
    pub v6: Option<Socket>,
}

impl Sockets {
    /// The one that reaches this address.
    #[must_use]
    #[inline]
    pub fn towards(&self, to: SocketAddr) -> Option<&Socket> {
        match to {
            SocketAddr::V4(_) => Some(&self.v4),
            SocketAddr::V6(_) => self.v6.as_ref(),
        }
    }
}

/// Everything that a worker looks up.
#[derive(Debug, Default)]
pub struct Table {
    /// Prefix → slot.
    pub allowed_ips: AllowedIps<Slot>,
    /// Peers by slot.
    pub peers: Vec<Option<Arc<Peer>>>,
    /// Sockets by worker; empty while the device is down.
    pub sockets: Vec<Arc<Sockets>>,
}

impl Table {
    /// A peer by its slot.
    #[must_use]
    #[inline]
    pub fn peer(&self, slot: Slot) -> Option<&Arc<Peer>> {
        self.peers.get(slot as usize)?.as_ref()
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What became of packets that did not pass, and of handshakes.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }

        impl Counters {
            /// Names and numbers.
            #[must_use]
            pub fn read(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Packets to addresses that no peer has.
    no_peer,
    /// Packets to a peer whose place is not known.
    no_endpoint,
    /// Packets of the device that make no sense.
    malformed_packets,
    /// Packets that waited too long for a handshake.
    staged_dropped,
    /// Runs of datagrams that the kernel did not take.
    send_errors,
    /// Runs of datagrams that had to be sent one by one.
    unsegmented_sends,
    /// Datagrams that are no messages.
    malformed_messages,
    /// Messages of sessions that are not there.
    unknown_sessions,
    /// Messages that were seen before or came far too late.
    replayed,
    /// Messages with a wrong tag.
    not_authentic,
    /// Packets with a source that their peer may not use.
    wrong_source,
    /// Packets that the device did not take.
    write_errors,
    /// Packets dropped because congestion could not be reported to their sender (RFC 6040).
    congestion_dropped,
    /// Handshake messages that came faster than they could be looked at.
    handshakes_dropped,
    /// Handshake messages that were refused.
    handshakes_refused,
    /// Cookies sent to peers while under load.
    cookies_sent,
}

/// Adds one.
#[inline]
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What all threads of a device share.
#[derive(Debug)]
pub struct Shared {
    table: Mutex<Arc<Table>>,
    version: AtomicU64,
    /// Set when the device is closed.
    pub is_stopping: AtomicBool,
    /// MTU of the device, bytes.
    pub mtu: AtomicUsize,
    /// See there.
    pub counters: Counters,
    /// Makes session indices hard to tell for others.
    pub index_mask: u32,
    began: Instant,
    wakes: Vec<EventFd>,
    /// See there.
    pub fence: Fence,
    /// From the device that this one follows.
    pub handover: Option<Handover>,
}

impl Shared {
    /// For a device of so many workers.
    ///
    /// # Errors
    /// When the process has too many files open.
    pub fn new(
        workers: usize,
        index_mask: u32,
        mtu: usize,
        handover: Option<Handover>,
    ) -> nix::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wakes = (0..workers)
            .map(|_| EventFd::from_value_and_flags(0, flags))
            .collect::<nix::Result<_>>()?;
        Ok(Self {
            table: Mutex::default(),
            version: AtomicU64::new(0),
            is_stopping: AtomicBool::new(false),
            mtu: AtomicUsize::new(mtu),
            counters: Counters::default(),
            index_mask,
            began: Instant::now(),
            wakes,
            fence: Fence::new(workers),
            handover,
        })
    }

    /// Number of the table; moves on with each.
    #[must_use]
    #[inline]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The table as it is now.
    #[must_use]
    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.lock())
    }

    /// Replaces the table and wakes the workers.
    pub fn publish(&self, table: Table) {
        *self.table.lock() = Arc::new(table);
        self.version.fetch_add(1, Ordering::Release);
        self.wake_all();
    }

    /// Waits until everything that waits in the device's queues now has passed; false: it has not by the deadline.
    pub fn pass_fence(&self, deadline: Instant) -> bool {
        let number = self.fence.ask();
        self.wake_all();
        self.fence.wait(number, deadline)
    }

    /// What packets of a new peer have to do.
    #[must_use]
    pub const fn first_turn(&self) -> Turn {
        match self.handover {
            Some(_) => Turn::Fresh,
            None => Turn::Open,
        }
    }

    /// Whether packets of a peer are held; the first one begins it.
    pub fn holds(&self, peer: &Arc<Peer>, way: Way) -> bool {
        let Some(handover) = &self.handover else {
            return false;
        };
        match peer.read(|state| match way {
            Way::Outward => state.outward,
            Way::Inward => state.inward,
        }) {
            Turn::Open => false,
            Turn::Held => true,
            Turn::Fresh => {
                let is_first = peer.change(|state| {
                    let turn = state.turn(way);
                    let is_first = *turn == Turn::Fresh;
                    if is_first {
                        *turn = Turn::Held;
                    }
                    is_first
                });
                if is_first {
                    handover.begin(peer, way);
                }
                true
            }
        }
    }

    /// Makes every worker look around.
    pub fn wake_all(&self) {
        for wake in &self.wakes {
            // Full is awake, too.
            let _ = wake.write(1);
        }
    }

    /// What worker `index` is woken by.
    #[must_use]
    pub fn wake(&self, index: usize) -> Option<&EventFd> {
        self.wakes.get(index)
    }

    /// Since the device began, never zero.
    #[must_use]
    #[inline]
    pub fn now(&self) -> Duration {
        self.began.elapsed() + Duration::from_millis(1)
    }

    /// The same in milliseconds.
    #[must_use]
    #[inline]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.now().as_millis()).unwrap_or(u64::MAX)
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
