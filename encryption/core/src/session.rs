//! The two keys of a finished handshake: seals and opens transport messages in place.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroize;

use crate::key::KEY_BYTES;
use crate::message::{TAG_BYTES, TRANSPORT_HEADER_BYTES, write_transport_header};
use crate::replay::{ReplayError, ReplayWindow};

/// After so many messages a new handshake is begun (the paper, 6.1).
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// After so many messages the key is no longer used (the paper, 6.1).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Age at which its initiator begins a new handshake.
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age after which a key is no longer used.
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);

/// Which side of the handshake a machine was on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Sent the first message.
    Initiator,
    /// Answered it.
    Responder,
}

/// Why a message cannot be sealed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The session has sent as many messages as it may.
    #[error("the session has sent as many messages as it may; a new handshake is due")]
    Exhausted,
    /// Refused by the replay window.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The tag does not fit: damaged, forged, or of another session.
    #[error("the message is not authentic")]
    NotAuthentic,
}

/// What a handshake yields.
pub struct SessionKeys {
    /// Our number of the session, which the peer writes into its messages.
    pub local_index: u32,
    /// The peer's number of it.
    pub remote_index: u32,
    /// Seals what we send.
    pub sending: [u8; KEY_BYTES],
    /// Opens what we receive.
    pub receiving: [u8; KEY_BYTES],
    /// Our side.
    pub role: Role,
}

impl Drop for SessionKeys {
    fn drop(&mut self) {
        self.sending.zeroize();
        self.receiving.zeroize();
    }
}

impl std::fmt::Debug for SessionKeys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "SessionKeys({:08x} {:08x} {:?})",
            self.local_index, self.remote_index, self.role
        )
    }
}

/// A session in use, shared by the threads that seal and open.
pub struct Session {
    local_index: u32,
    remote_index: u32,
    sender: LessSafeKey,
    receiver: LessSafeKey,
    role: Role,
    established: Duration,
    counter: AtomicU64,
    window: Mutex<ReplayWindow>,
    confirmed: AtomicBool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "Session({:08x} {:08x} {:?})",
            self.local_index, self.remote_index, self.role
        )
    }
}

impl Session {
    /// A session that begins at `established`. `None` never happens with keys of 32 bytes.
    #[must_use]
    pub fn new(keys: &SessionKeys, established: Duration) -> Option<Self> {
        let key = |bytes: &[u8]| {
            UnboundKey::new(&CHACHA20_POLY1305, bytes)
                .ok()
                .map(LessSafeKey::new)
        };
        Some(Self {
            local_index: keys.local_index,
            remote_index: keys.remote_index,
            sender: key(&keys.sending)?,
            receiver: key(&keys.receiving)?,
            role: keys.role,
            established,
            counter: AtomicU64::new(0),
            window: Mutex::default(),
            confirmed: AtomicBool::new(keys.role == Role::Initiator),
        })
    }

    /// Our number of the session.
    #[must_use]
    pub const fn local_index(&self) -> u32 {
        self.local_index
    }

    /// Our side of the handshake.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }

    /// When it began.
    #[must_use]
    pub const fn established(&self) -> Duration {
        self.established
    }

    /// Messages sealed so far.
    #[must_use]
    pub fn sealed(&self) -> u64 {
        self.counter.load(Ordering::Relaxed)
    }

    /// Whether the peer is known to have the keys too: at once for the initiator, with the first message for the other.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Acquire)
    }

    /// Notes that the peer has the keys; true for the first to say so.
    pub fn confirm(&self) -> bool {
        !self.confirmed.load(Ordering::Acquire) && !self.confirmed.swap(true, Ordering::AcqRel)
    }

    /// Takes the next `count` counters; gives the first of them.
    ///
    /// # Errors
    /// When the session has sent as many messages as it may.
    #[inline]
    pub fn reserve(&self, count: u64) -> Result<u64, SessionError> {
        // Threads that pass this check together take far fewer than the 2^13 that are left.
        if self.counter.load(Ordering::Relaxed) >= REJECT_AFTER_MESSAGES - count {
            return Err(SessionError::Exhausted);
        }
        Ok(self.counter.fetch_add(count, Ordering::Relaxed))
    }

    /// Seals in place what lies between the room for the header (16 bytes) and that for the tag (16 bytes).
    ///
    /// # Errors
    /// When `datagram` has no room for header and tag.
    #[inline]
    pub fn seal(&self, counter: u64, datagram: &mut [u8]) -> Result<(), SessionError> {
        let (header, rest) = datagram
            .split_first_chunk_mut::<TRANSPORT_HEADER_BYTES>()
            .ok_or(SessionError::NotAuthentic)?;
        let (packet, tag_room) = rest
            .split_last_chunk_mut::<TAG_BYTES>()
            .ok_or(SessionError::NotAuthentic)?;
        write_transport_header(header, self.remote_index, counter);
        let tag = self
            .sender
            .seal_in_place_separate_tag(nonce(counter), Aad::empty(), packet)
            .map_err(|_| SessionError::NotAuthentic)?;
        tag_room.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Begins to open a batch: nobody else opens messages of this session meanwhile.
    #[must_use]
    pub fn opener(&self) -> Opener<'_> {
        Opener {
            session: self,
            // A panic cannot leave a window half changed that matters: bits are set last.
            window: self.window.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// Opens messages of one session.
#[derive(Debug)]
pub struct Opener<'a> {
    session: &'a Session,
    window: std::sync::MutexGuard<'a, ReplayWindow>,
}

impl Opener<'_> {
    /// Opens a transport message in place and takes its counter; the packet then lies at
    /// [`TRANSPORT_HEADER_BYTES`] and has the returned length, padding included.
    ///
    /// # Errors
    /// When it was seen before or is not authentic; the datagram's bytes are then undefined.
    #[inline]
    pub fn open(&mut self, counter: u64, datagram: &mut [u8]) -> Result<usize, SessionError> {
        if counter >= REJECT_AFTER_MESSAGES {
            return Err(SessionError::Exhausted);
        }
        self.window.check(counter)?;
        let sealed = datagram
            .get_mut(TRANSPORT_HEADER_BYTES..)
            .ok_or(SessionError::NotAuthentic)?;
        let packet = self
            .session
            .receiver
            .open_in_place(nonce(counter), Aad::empty(), sealed)
            .map_err(|_| SessionError::NotAuthentic)?;
        self.window.accept(counter)?;
        Ok(packet.len())
    }
}

#[inline]
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Session, Session) {
        let keys = |sending, receiving, local_index, remote_index, role| SessionKeys {
            local_index,
            remote_index,
            sending: [sending; KEY_BYTES],
            receiving: [receiving; KEY_BYTES],
            role,
        };
        let ours = Session::new(&keys(1, 2, 10, 20, Role::Initiator), Duration::ZERO).unwrap();
        let theirs = Session::new(&keys(2, 1, 20, 10, Role::Responder), Duration::ZERO).unwrap();
        (ours, theirs)
    }

    #[test]
    fn a_sealed_packet_opens_once() {
        let (ours, theirs) = pair();
        let mut datagram = vec![0; 16 + 20 + 16];
        datagram[16..36].copy_from_slice(&[9; 20]);
        let counter = ours.reserve(1).unwrap();
        ours.seal(counter, &mut datagram).unwrap();
        let sealed = datagram.clone();
        let length = theirs.opener().open(counter, &mut datagram).unwrap();
        assert_eq!(&datagram[16..16 + length], &[9; 20]);
        let again = theirs.opener().open(counter, &mut sealed.clone());
        assert_eq!(again, Err(SessionError::Replay(ReplayError::Seen)));
    }

    #[test]
    fn a_changed_message_is_refused_and_does_not_use_up_its_counter() {
        let (ours, theirs) = pair();
        let mut datagram = vec![0; 16 + 20 + 16];
        ours.seal(5, &mut datagram).unwrap();
        let mut damaged = datagram.clone();
        damaged[20] ^= 1;
        let refused = theirs.opener().open(5, &mut damaged);
        assert_eq!(refused, Err(SessionError::NotAuthentic));
        assert_eq!(theirs.opener().open(5, &mut datagram), Ok(20));
        assert!(ours.seal(0, &mut [0; 31]).is_err());
        assert!(theirs.opener().open(9, &mut [0; 3]).is_err());
    }

    #[test]
    fn a_session_ends_before_its_counters_do() {
        let (ours, theirs) = pair();
        ours.counter
            .store(REJECT_AFTER_MESSAGES - 8, Ordering::Relaxed);
        assert!(ours.reserve(4).is_ok());
        assert_eq!(ours.reserve(4), Err(SessionError::Exhausted));
        let refused = theirs.opener().open(REJECT_AFTER_MESSAGES, &mut [0; 64]);
        assert_eq!(refused, Err(SessionError::Exhausted));
    }

    #[test]
    fn the_responder_is_confirmed_by_the_first_message() {
        let (ours, theirs) = pair();
        assert!(ours.is_confirmed() && !theirs.is_confirmed());
        assert!(theirs.confirm() && !theirs.confirm() && theirs.is_confirmed());
    }
}
