//! What the device's threads and the control socket tell the control thread.

use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::time::{Duration, Instant};

use clustermesh_encryption_core::config::{Change, ConfigError};
use clustermesh_encryption_core::control::Secrets;
use clustermesh_encryption_core::engine::Slot;
use clustermesh_encryption_core::message::INITIATION_BYTES;
use clustermesh_encryption_core::secret_text::SecretText;

/// Events that wait for the control thread.
pub const EVENTS_MAX: usize = 4_096;
/// Longest that somebody waits for the control thread's answer.
pub const ANSWER_MAX: Duration = Duration::from_secs(6);
/// Until there is room in a full queue, it is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A handshake message and where it came from.
#[derive(Clone, Debug)]
pub struct Handshake {
    bytes: [u8; INITIATION_BYTES],
    length: usize,
    /// Where it came from.
    pub from: SocketAddr,
}

impl Handshake {
    /// `None` for what is longer than any handshake message.
    #[must_use]
    pub fn new(datagram: &[u8], from: SocketAddr) -> Option<Self> {
        let mut bytes = [0; INITIATION_BYTES];
        bytes.get_mut(..datagram.len())?.copy_from_slice(datagram);
        let length = datagram.len();
        Some(Self {
            bytes,
            length,
            from,
        })
    }

    /// Its bytes.
    #[must_use]
    pub fn datagram(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// Why a change is refused.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A limit.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The port cannot be had.
    #[error("UDP port {port}: {source}")]
    Port {
        /// Which.
        port: u16,
        /// Why.
        source: io::Error,
    },
    /// The device was closed.
    #[error("the device is closed")]
    Closed,
    /// The control thread gives no answer; it may still carry the change out.
    #[error("the device's control thread gives no answer within {ANSWER_MAX:?}")]
    Silent,
}

/// What the control thread is told.
#[derive(Debug)]
pub enum Event {
    /// A handshake message came.
    Handshake(Handshake),
    /// A packet waits for a session with this peer.
    Wanted(Slot),
    /// A peer used its new keys.
    Confirmed,
    /// Carry out these steps.
    Apply(Vec<Change>, SyncSender<Result<(), ApplyError>>),
    /// Say how things are, as text of the control socket.
    Describe(Secrets, SyncSender<SecretText>),
    /// A thread of the device ended with this.
    Broken(io::Error),
    /// End.
    Stop,
}

/// Where events go.
#[derive(Clone, Debug)]
pub struct Events(SyncSender<Event>);

impl Events {
    /// A queue of [`EVENTS_MAX`] and its end.
    #[must_use]
    pub fn queue() -> (Self, Receiver<Event>) {
        let (sender, receiver) = std::sync::mpsc::sync_channel(EVENTS_MAX);
        (Self(sender), receiver)
    }

    /// Offers an event without waiting; false: the queue is full.
    pub fn offer(&self, event: Event) -> bool {
        self.0.try_send(event).is_ok()
    }

    /// Asks and waits for the answer, at most [`ANSWER_MAX`].
    ///
    /// # Errors
    /// When the device was closed, or no answer came.
    pub fn ask<T>(&self, event: impl FnOnce(SyncSender<T>) -> Event) -> Result<T, ApplyError> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let deadline = Instant::now() + ANSWER_MAX;
        let mut event = event(sender);
        loop {
            match self.0.try_send(event) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => return Err(ApplyError::Closed),
                Err(TrySendError::Full(_)) if Instant::now() >= deadline => {
                    return Err(ApplyError::Silent);
                }
                Err(TrySendError::Full(back)) => event = back,
            }
            std::thread::park_timeout(LOOK_AGAIN);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        receiver.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => ApplyError::Silent,
            RecvTimeoutError::Disconnected => ApplyError::Closed,
        })
    }

    /// Sends an event, and waits for room.
    pub fn send(&self, event: Event) {
        // The control thread has ended: nobody needs it.
        let _ = self.0.send(event);
    }
}
