//! Handshakes and timers of all peers (the paper, 6), as a state machine: messages and time in, messages and keys out.
//!
//! The data path tells by [`Activity`] when it last sent and received; [`Engine::tick`] draws the conclusions, so that
//! no packet has to arm a timer. A tick every [`TICK`] keeps them all within their tolerance.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::key::{KEY_BYTES, PresharedKey, PrivateKey, PublicKey};
use crate::message::{COOKIE_REPLY_BYTES, INITIATION_BYTES, RESPONSE_BYTES, word};
use crate::noise::{Initiator, NoiseError, Responder, Seed, TIMESTAMP_BYTES};

mod peer;
mod sessions;

use peer::{Due, Initiation, Peer};
pub use sessions::Sessions;

/// How often [`Engine::tick`] is to be called.
pub const TICK: Duration = Duration::from_millis(100);
/// An unanswered initiation is sent again after this, and a little by chance.
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Data that is not answered for this long gets an empty message as answer.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Initiations until a peer is given up (90 s).
pub const HANDSHAKE_ATTEMPTS_MAX: u32 = 18;
/// Least time between two initiations that are taken from one peer (50 a second).
pub const INITIATION_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// Most that a retry is put off by chance, milliseconds.
const JITTER_MS_MAX: u64 = 333;
/// Bits of a session's index that count within a peer.
const INDEX_COUNTER_BITS: u32 = 8;
/// Seconds between TAI64 and the Unix epoch's label (the leap seconds before 1972 are all that is counted).
const TAI64_UNIX_EPOCH: u64 = 0x4000_0000_0000_000a;

/// Fills a slice with random bytes.
pub type Random<'a> = &'a mut dyn FnMut(&mut [u8]);

/// Place of a peer among all of a device; a removed peer's is used again.
pub type Slot = u32;

/// Now, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Since the device began; never goes back.
    pub monotonic: Duration,
    /// Since the Unix epoch; may jump.
    pub wall: Duration,
}

/// When the data path last did what, on the monotonic clock; zero: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Sent a packet.
    pub data_sent: Duration,
    /// Sent any sealed message or handshake message.
    pub any_sent: Duration,
    /// Received a packet.
    pub data_received: Duration,
    /// Received any authentic message.
    pub any_received: Duration,
}

/// What the device has to do.
#[derive(Debug)]
pub enum Output {
    /// Send a handshake message.
    Send {
        /// To whom.
        slot: Slot,
        /// Where: the source of what is answered, else the peer's endpoint.
        to: Option<SocketAddr>,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// An authentic message of the peer came from there.
    Heard {
        /// From whom.
        slot: Slot,
        /// From where.
        from: SocketAddr,
    },
    /// These sessions open messages from now on; the first of those that seal is the one in use.
    Sessions {
        /// Whose.
        slot: Slot,
        /// The sessions.
        sessions: Sessions,
    },
    /// A session that seals is there: send what waits.
    Flush {
        /// Whose.
        slot: Slot,
        /// If nothing waits, send an empty message: the peer sends nothing before it has heard from us.
        confirm: bool,
    },
    /// Send an empty message.
    Keepalive {
        /// To whom.
        slot: Slot,
    },
    /// The peer does not answer: drop what waits.
    GiveUp {
        /// Who.
        slot: Slot,
    },
}

/// Why a handshake message is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The device has no private key.
    #[error("the device has no private key")]
    NoPrivateKey,
    /// Not a peer of ours.
    #[error("{0} is no peer of this device")]
    UnknownPeer(PublicKey),
    /// No handshake of that index is under way.
    #[error("no handshake with this index is under way")]
    UnknownIndex,
    /// A replay, or a peer whose clock went back.
    #[error("the initiation of {0} is not newer than the last one")]
    NotNewer(PublicKey),
    /// Too fast.
    #[error("{0} sends initiations faster than every {INITIATION_INTERVAL_MIN:?}")]
    TooFast(PublicKey),
    /// The cryptography says no.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// A cookie that does not belong to our last message.
    #[error("the cookie is not authentic")]
    BadCookie,
}

/// The handshakes of one device.
#[derive(Debug)]
pub struct Engine {
    private_key: Option<PrivateKey>,
    peers: Vec<Option<Peer>>,
    /// Empty places among them.
    free: Vec<usize>,
    slots: HashMap<PublicKey, Slot>,
    /// Makes indices hard to tell for others.
    index_mask: u32,
    last_timestamp: Duration,
}

impl Engine {
    /// One without key and peers.
    pub fn new(random: Random<'_>) -> Self {
        let mut mask = [0; 4];
        random(&mut mask);
        Self {
            private_key: None,
            peers: Vec::new(),
            free: Vec::new(),
            slots: HashMap::new(),
            index_mask: u32::from_le_bytes(mask),
            last_timestamp: Duration::ZERO,
        }
    }

    /// The slot of the peer whose session has this index, if it is one of ours.
    #[must_use]
    #[inline]
    pub const fn slot_of_index(index_mask: u32, index: u32) -> Slot {
        (index ^ index_mask) >> INDEX_COUNTER_BITS
    }

    /// For [`Self::slot_of_index`].
    #[must_use]
    pub const fn index_mask(&self) -> u32 {
        self.index_mask
    }

    /// Sets or takes away our key; all sessions end.
    pub fn set_private_key(&mut self, key: Option<PrivateKey>, out: &mut Vec<Output>) {
        if self.private_key == key {
            return;
        }
        self.private_key = key;
        for (slot, peer) in (0..).zip(self.peers.iter_mut()) {
            if let Some(peer) = peer {
                peer.initiation = None;
                peer.sessions = Sessions::default();
                let sessions = Sessions::default();
                out.push(Output::Sessions { slot, sessions });
            }
        }
    }

    /// Adds a peer, or gives the slot of one that is there.
    pub fn add_peer(&mut self, key: PublicKey, random: Random<'_>) -> Slot {
        if let Some(slot) = self.slots.get(&key) {
            return *slot;
        }
        let mut counter = [0; 4];
        random(&mut counter);
        let peer = Peer::new(key, u32::from_le_bytes(counter));
        let place = self.free.pop().unwrap_or_else(|| {
            self.peers.push(None);
            self.peers.len() - 1
        });
        self.peers[place] = Some(peer);
        let slot = Slot::try_from(place).unwrap_or(Slot::MAX);
        self.slots.insert(key, slot);
        slot
    }

    /// Removes a peer with all its keys; gives the slot it had.
    pub fn remove_peer(&mut self, key: &PublicKey) -> Option<Slot> {
        let slot = self.slots.remove(key)?;
        let place = slot as usize;
        if let Some(peer) = self.peers.get_mut(place) {
            *peer = None;
            self.free.push(place);
        }
        Some(slot)
    }

    /// Sets what only the next handshake uses, and the interval of keepalives.
    pub fn set_peer(
        &mut self,
        slot: Slot,
        preshared_key: Option<PresharedKey>,
        keepalive: Option<Duration>,
    ) {
        if let Some(peer) = self.peer_mut(slot) {
            peer.preshared_key = preshared_key;
            peer.keepalive = keepalive;
        }
    }

    /// The slot of a peer.
    #[must_use]
    pub fn slot(&self, key: &PublicKey) -> Option<Slot> {
        self.slots.get(key).copied()
    }

    /// When the last handshake with a peer was finished, since the Unix epoch.
    #[must_use]
    pub fn last_handshake(&self, slot: Slot) -> Option<Duration> {
        self.peers.get(slot as usize)?.as_ref()?.last_handshake
    }

    /// How often a handshake with a peer was finished.
    #[must_use]
    pub fn handshakes(&self, slot: Slot) -> u64 {
        let peer = self.peers.get(slot as usize).and_then(Option::as_ref);
        peer.map_or(0, |peer| peer.handshakes)
    }

    fn peer_mut(&mut self, slot: Slot) -> Option<&mut Peer> {
        self.peers.get_mut(slot as usize)?.as_mut()
    }

    /// A packet for the peer waits, and there is no session: begins a handshake, unless one is under way.
    pub fn wanted(&mut self, slot: Slot, now: Now, random: Random<'_>, out: &mut Vec<Output>) {
        let Some(peer) = self.peer_mut(slot) else {
            return;
        };
        if peer.sessions.current.is_some() {
            // It came about meanwhile.
            out.push(Output::Flush {
                slot,
                confirm: false,
            });
        } else if let Some(initiation) = &mut peer.initiation {
            // Somebody still waits: the attempts count from now.
            initiation.attempts = initiation.attempts.min(1);
        } else {
            self.initiate(slot, 0, now, random, out);
        }
    }

    fn initiate(
        &mut self,
        slot: Slot,
        attempts: u32,
        now: Now,
        random: Random<'_>,
        out: &mut Vec<Output>,
    ) {
        let timestamp = self.timestamp(now.wall);
        let (index_mask, private_key) = (self.index_mask, self.private_key.clone());
        let Some(peer) = self.peer_mut(slot) else {
            return;
        };
        // Until it can be: a tick looks again.
        peer.is_initiation_wanted = true;
        let Some(private_key) = private_key else {
            return;
        };
        let is_early = peer
            .last_initiation_sent
            .is_some_and(|sent| now.monotonic < sent + REKEY_TIMEOUT);
        if is_early {
            return;
        }
        let index = peer.next_index(slot, index_mask);
        let begun = Initiator::begin(
            &private_key,
            &peer.key,
            peer.preshared_key.as_ref(),
            index,
            &timestamp,
            seed(random),
        );
        // Keys of 32 bytes are always usable.
        let Ok((noise, mut datagram)) = begun else {
            return;
        };
        peer.stamper.stamp(&mut datagram, now.monotonic);
        peer.is_initiation_wanted = false;
        peer.last_initiation_sent = Some(now.monotonic);
        peer.initiation = Some(Initiation {
            noise,
            attempts: attempts + 1,
            retry_at: now.monotonic + REKEY_TIMEOUT + jitter(random),
        });
        out.push(Output::Send {
            slot,
            to: None,
            datagram: datagram.to_vec(),
        });
    }

    /// TAI64N of now, but always newer than the last one, also when the clock goes back.
    fn timestamp(&mut self, wall: Duration) -> [u8; TIMESTAMP_BYTES] {
        self.last_timestamp = wall.max(self.last_timestamp + Duration::from_nanos(1));
        let mut stamp = [0; TIMESTAMP_BYTES];
        let seconds = TAI64_UNIX_EPOCH.wrapping_add(self.last_timestamp.as_secs());
        stamp[..8].copy_from_slice(&seconds.to_be_bytes());
        stamp[8..].copy_from_slice(&self.last_timestamp.subsec_nanos().to_be_bytes());
        stamp
    }

    /// Takes an initiation whose first authentication code is right.
    ///
    /// # Errors
    /// When it is not answered.
    pub fn take_initiation(
        &mut self,
        message: &[u8; INITIATION_BYTES],
        from: SocketAddr,
        now: Now,
        random: Random<'_>,
        out: &mut Vec<Output>,
    ) -> Result<Slot, HandshakeError> {
        let private_key = self
            .private_key
            .as_ref()
            .ok_or(HandshakeError::NoPrivateKey)?;
        let responder = Responder::read(private_key, message, seed(random))?;
        let key = *responder.peer();
        let unknown = HandshakeError::UnknownPeer(key);
        let slot = *self.slots.get(&key).ok_or(unknown)?;
        let index_mask = self.index_mask;
        let peer = self.peer_mut(slot).ok_or(unknown)?;
        if *responder.timestamp() <= peer.newest_timestamp {
            return Err(HandshakeError::NotNewer(key));
        }
        if peer
            .last_initiation_taken
            .is_some_and(|last| now.monotonic < last + INITIATION_INTERVAL_MIN)
        {
            return Err(HandshakeError::TooFast(key));
        }
        peer.newest_timestamp = *responder.timestamp();
        peer.last_initiation_taken = Some(now.monotonic);
        let index = peer.next_index(slot, index_mask);
        let (keys, mut datagram) = responder.answer(peer.preshared_key.as_ref(), index)?;
        peer.stamper.stamp(&mut datagram, now.monotonic);
        peer.last_response_index = Some(index);
        peer.install(&keys, now);
        out.push(Output::Sessions {
            slot,
            sessions: peer.sessions.clone(),
        });
        out.push(Output::Heard { slot, from });
        out.push(Output::Send {
            slot,
            to: Some(from),
            datagram: datagram.to_vec(),
        });
        Ok(slot)
    }

    /// Takes a response whose first authentication code is right.
    ///
    /// # Errors
    /// When it belongs to no handshake of ours.
    pub fn take_response(
        &mut self,
        message: &[u8; RESPONSE_BYTES],
        from: SocketAddr,
        now: Now,
        out: &mut Vec<Output>,
    ) -> Result<Slot, HandshakeError> {
        let index = word(message, 8).ok_or(HandshakeError::UnknownIndex)?;
        let slot = Self::slot_of_index(self.index_mask, index);
        let peer = self.peer_mut(slot).ok_or(HandshakeError::UnknownIndex)?;
        let initiation = peer
            .initiation
            .as_mut()
            .filter(|initiation| initiation.noise.local_index() == index)
            .ok_or(HandshakeError::UnknownIndex)?;
        let keys = initiation.noise.finish(message)?;
        peer.initiation = None;
        peer.is_initiation_wanted = false;
        peer.install(&keys, now);
        peer.note_handshake(now);
        out.push(Output::Sessions {
            slot,
            sessions: peer.sessions.clone(),
        });
        out.push(Output::Heard { slot, from });
        out.push(Output::Flush {
            slot,
            confirm: true,
        });
        Ok(slot)
    }

    /// Takes the cookie of a peer under load: the next retry carries it.
    ///
    /// # Errors
    /// When it does not answer our last message.
    pub fn take_cookie(
        &mut self,
        message: &[u8; COOKIE_REPLY_BYTES],
        now: Now,
    ) -> Result<Slot, HandshakeError> {
        let index = word(message, 4).ok_or(HandshakeError::UnknownIndex)?;
        let slot = Self::slot_of_index(self.index_mask, index);
        let peer = self.peer_mut(slot).ok_or(HandshakeError::UnknownIndex)?;
        let initiation = peer.initiation.as_ref();
        let is_ours = initiation.map(|initiation| initiation.noise.local_index()) == Some(index)
            || peer.last_response_index == Some(index);
        if !is_ours {
            return Err(HandshakeError::UnknownIndex);
        }
        if peer.stamper.take_cookie(message, now.monotonic) {
            Ok(slot)
        } else {
            Err(HandshakeError::BadCookie)
        }
    }

    /// Looks at every timer of every peer.
    pub fn tick(
        &mut self,
        now: Now,
        activity: impl Fn(Slot) -> Activity,
        random: Random<'_>,
        out: &mut Vec<Output>,
    ) {
        if self.private_key.is_none() {
            return;
        }
        for place in 0..self.peers.len() {
            let slot = Slot::try_from(place).unwrap_or(Slot::MAX);
            let Some(peer) = self.peer_mut(slot) else {
                continue;
            };
            match peer.due(slot, now, activity(slot), out) {
                Due::Nothing => {}
                Due::Initiation { attempts } => self.initiate(slot, attempts, now, random, out),
                Due::Keepalive => out.push(Output::Keepalive { slot }),
            }
        }
    }
}

fn seed(random: Random<'_>) -> Seed {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    random(&mut bytes[..]);
    bytes
}

fn jitter(random: Random<'_>) -> Duration {
    let mut bytes = [0; 8];
    random(&mut bytes);
    Duration::from_millis(u64::from_le_bytes(bytes) % (JITTER_MS_MAX + 1))
}

#[cfg(test)]
mod tests;
