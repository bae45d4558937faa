//! What the threads of a device share: the routing table, counters, what wakes them.
//!
//! The table is replaced as a whole; workers keep the one they have until its number changes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clustermesh_encryption_core::allowed_ips::AllowedIps;
use clustermesh_encryption_core::engine::Slot;
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

use super::fence::Fence;
use super::handover::Handover;
use super::peer::Peer;
use super::turn::{Turn, Way};
use super::udp::Socket;

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
