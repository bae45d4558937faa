//! Keeps packets in order when this device takes over from another: while keys change there are two on each side, and
//! what goes through the new one must not overtake what waits in the old one.
//!
//! The first packets to a peer, and the first from it, are held until the old device has said that nothing waits in it
//! any more of what it had at that moment: [`HOLD_MS_MAX`] and [`HELD_BYTES_MAX`] at most, then they go on in any case.
//! Nothing is dropped for it. A device that follows none, or whose predecessor is gone, holds nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clustermesh_encryption_core::control_client::FENCE;
use parking_lot::{Condvar, Mutex};

use super::events::{Event, Events};
use super::outbound::Outbound;
use super::shared::{Peer, Shared};
use crate::socket_client::ask;

/// Longest that the old device is waited for, milliseconds. Packets that begin to be held meanwhile wait for the next
/// answer, so that none is held longer than twice that.
pub const HOLD_MS_MAX: u64 = 200;
/// Bytes that are held of one peer in one direction: what TCP may have on the way by Linux's defaults.
pub const HELD_BYTES_MAX: usize = 8 << 20;
/// Bytes that a device holds of all peers.
pub const HELD_BYTES_TOTAL_MAX: usize = 64 << 20;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the peer.
    Outward,
    /// From it.
    Inward,
}

/// Whether it is this device's turn to carry a peer's packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// It carries them.
    #[default]
    Open,
    /// None has come yet.
    Fresh,
    /// They are held.
    Held,
}

/// Counts what one holder holds, and lets go of it when dropped.
#[derive(Debug)]
pub struct HeldBytes {
    total: Arc<AtomicUsize>,
    own: usize,
}

impl HeldBytes {
    /// Nothing yet, of this total.
    #[must_use]
    pub fn new(total: &Arc<AtomicUsize>) -> Self {
        Self {
            total: Arc::clone(total),
            own: 0,
        }
    }

    /// Counts more; false: it is more than may be held.
    #[must_use]
    pub fn add(&mut self, bytes: usize) -> bool {
        let total = self.total.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.own += bytes;
        self.own <= HELD_BYTES_MAX && total <= HELD_BYTES_TOTAL_MAX
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.total.fetch_sub(self.own, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Waiting {
    /// Each peer once for each direction.
    peers: Vec<(Arc<Peer>, Way)>,
    is_over: bool,
}

/// Who waits for the old device.
#[derive(Debug)]
pub struct Handover {
    /// Control socket of the old device.
    predecessor: PathBuf,
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Bytes that are held.
    pub held_bytes: Arc<AtomicUsize>,
}

impl Handover {
    /// From the device that serves this control socket.
    #[must_use]
    pub fn new(predecessor: PathBuf) -> Self {
        Self {
            predecessor,
            waiting: Mutex::default(),
            changed: Condvar::new(),
            held_bytes: Arc::default(),
        }
    }

    /// Adds a peer whose packets begin to be held.
    pub fn begin(&self, peer: &Arc<Peer>, way: Way) {
        self.waiting.lock().peers.push((Arc::clone(peer), way));
        self.changed.notify_one();
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.waiting.lock().is_over = true;
        self.changed.notify_one();
    }

    /// Waits for somebody who waits; `None` at the end.
    fn next(&self) -> Option<Vec<(Arc<Peer>, Way)>> {
        let mut waiting = self.waiting.lock();
        while waiting.peers.is_empty() && !waiting.is_over {
            self.changed.wait(&mut waiting);
        }
        (!waiting.is_over).then(|| std::mem::take(&mut waiting.peers))
    }

    /// Lets packets go as the old device allows it, until [`Self::stop`].
    pub fn run(&self, shared: &Arc<Shared>, events: &Events) {
        let mut outbound = Outbound::new(Arc::clone(shared), events.clone());
        while let Some(peers) = self.next() {
            let deadline = Instant::now() + Duration::from_millis(HOLD_MS_MAX);
            if let Err(error) = ask(&self.predecessor, FENCE.as_bytes(), deadline) {
                let socket = self.predecessor.display();
                tracing::debug!(%socket, %error, "the device before gives no answer: packets are not held");
            }
            outbound.reset();
            let table = shared.table();
            for (peer, way) in &peers {
                peer.open(*way);
                if *way == Way::Inward {
                    continue;
                }
                let ready = peer.read(|state| state.sessions.current.clone().zip(state.endpoint));
                if let (Some((session, to)), Some(sockets)) = (ready, table.sockets.first()) {
                    outbound.send_staged(peer, &session, to, sockets);
                } else {
                    // What waits goes when there is a session.
                    events.offer(Event::Wanted(peer.slot));
                }
            }
            // Workers hold what came in.
            shared.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_counted_for_each_and_for_all_and_let_go_with_its_holder() {
        let total = Arc::default();
        let mut all: Vec<HeldBytes> = (0..=HELD_BYTES_TOTAL_MAX / HELD_BYTES_MAX)
            .map(|_| HeldBytes::new(&total))
            .collect();
        let taken: Vec<bool> = all.iter_mut().map(|one| one.add(HELD_BYTES_MAX)).collect();
        let (last, before) = taken.split_last().unwrap();
        assert!(before.iter().all(|taken| *taken) && !last);
        drop(all);
        let mut one = HeldBytes::new(&total);
        assert!(one.add(HELD_BYTES_MAX) && !one.add(1));
        drop(one);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }
}
