//! Keeps packets in order when this device takes over from another: while keys change there are two on each side, and
//! what goes through the new one must not overtake what waits in the old one.
//!
//! The first packets to a peer, and the first from it, are held until the old device has said that nothing waits in it
//! any more of what it had at that moment: [`HOLD_MS_MAX`] and [`HELD_BYTES_MAX`](super::turn::HELD_BYTES_MAX) at most, then
//! they go on in any case. Nothing is dropped for it. A device that follows none, or whose predecessor is gone, holds nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use clustermesh_encryption_core::control_client::FENCE;
use parking_lot::{Condvar, Mutex};

use super::peer::Peer;
use super::turn::Way;
use crate::socket_client::ask;

/// Longest that the old device is waited for, milliseconds. Packets that begin to be held meanwhile wait for the next
/// answer, so that none is held longer than twice that.
pub const HOLD_MS_MAX: u64 = 200;

/// What is shared with the thread that lets packets go.
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

    /// Ends [`Self::next`].
    pub fn stop(&self) {
        self.waiting.lock().is_over = true;
        self.changed.notify_one();
    }

    /// Waits until the old device allows packets of some peers to go; `None` after [`Self::stop`].
    #[must_use]
    pub fn next(&self) -> Option<Vec<(Arc<Peer>, Way)>> {
        let peers = self.next_waiting()?;
        let deadline = Instant::now() + Duration::from_millis(HOLD_MS_MAX);
        if let Err(error) = ask(&self.predecessor, FENCE.as_bytes(), deadline) {
            let socket = self.predecessor.display();
            tracing::debug!(%socket, %error, "the device before gives no answer: packets are not held");
        }
        Some(peers)
    }

    fn next_waiting(&self) -> Option<Vec<(Arc<Peer>, Way)>> {
        let mut waiting = self.waiting.lock();
        while waiting.peers.is_empty() && !waiting.is_over {
            self.changed.wait(&mut waiting);
        }
        (!waiting.is_over).then(|| std::mem::take(&mut waiting.peers))
    }
}
