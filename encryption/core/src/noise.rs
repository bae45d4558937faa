//! The handshake `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s` (the paper, 5.4), run by the library `snow`; randomness comes in.

use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use crate::key::{KEY_BYTES, PresharedKey, PrivateKey, PublicKey};
use crate::message::{INITIATION_BYTES, RESPONSE_BYTES, TYPE_INITIATION, TYPE_RESPONSE, word};
use crate::session::{Role, SessionKeys};

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Where the preshared key is mixed in.
const PSK_PLACE: u8 = 2;
/// Bytes of a TAI64N time stamp.
pub const TIMESTAMP_BYTES: usize = 12;
/// Bytes of the two authentication codes at the end of a handshake message; see [`crate::mac`].
pub const MACS_BYTES: usize = 32;

/// Where Noise's part of an initiation begins and ends.
const INITIATION_NOISE: std::ops::Range<usize> = 8..INITIATION_BYTES - MACS_BYTES;
/// Where Noise's part of a response begins and ends.
const RESPONSE_NOISE: std::ops::Range<usize> = 12..RESPONSE_BYTES - MACS_BYTES;

/// 32 random bytes for an ephemeral key.
pub type Seed = Zeroizing<[u8; KEY_BYTES]>;

/// Why a handshake goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoiseError {
    /// Not for us, not from whom it claims, or damaged.
    #[error("the handshake message is not authentic")]
    NotAuthentic,
    /// The library refused keys or state; with valid keys it does not.
    #[error("the handshake cannot be carried out with these keys")]
    Unusable,
}

/// Gives the ephemeral key that came in, and all else from the default.
struct Resolver {
    seed: Seed,
}

struct Given(Seed);

impl Random for Given {
    fn try_fill_bytes(&mut self, room: &mut [u8]) -> Result<(), snow::Error> {
        if room.len() != KEY_BYTES {
            return Err(snow::Error::Rng);
        }
        room.copy_from_slice(&self.0[..]);
        Ok(())
    }
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Given(self.seed.clone())))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        DefaultResolver.resolve_dh(choice)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

fn builder<'a>(private: &'a PrivateKey, seed: Seed) -> Result<Builder<'a>, NoiseError> {
    let pattern: NoiseParams = PATTERN.parse().map_err(|_| NoiseError::Unusable)?;
    Builder::with_resolver(pattern, Box::new(Resolver { seed }))
        .prologue(PROLOGUE)
        .and_then(|builder| builder.local_private_key(private.bytes()))
        .map_err(|_| NoiseError::Unusable)
}

fn preshared(key: Option<&PresharedKey>) -> [u8; KEY_BYTES] {
    key.map_or([0; KEY_BYTES], |key| *key.bytes())
}

/// A handshake that we began.
#[derive(Debug)]
pub struct Initiator {
    state: HandshakeState,
    local_index: u32,
}

impl Initiator {
    /// Begins a handshake; the authentication codes of the message are still to be written.
    ///
    /// # Errors
    /// When the keys are unusable.
    pub fn begin(
        private: &PrivateKey,
        peer: &PublicKey,
        preshared_key: Option<&PresharedKey>,
        local_index: u32,
        timestamp: &[u8; TIMESTAMP_BYTES],
        seed: Seed,
    ) -> Result<(Self, [u8; INITIATION_BYTES]), NoiseError> {
        let key = Zeroizing::new(preshared(preshared_key));
        let mut state = builder(private, seed)?
            .remote_public_key(&peer.0)
            .and_then(|builder| builder.psk(PSK_PLACE, &key))
            .and_then(Builder::build_initiator)
            .map_err(|_| NoiseError::Unusable)?;
        let mut message = [0; INITIATION_BYTES];
        message[..4].copy_from_slice(&TYPE_INITIATION.to_le_bytes());
        message[4..8].copy_from_slice(&local_index.to_le_bytes());
        state
            .write_message(timestamp, &mut message[INITIATION_NOISE])
            .map_err(|_| NoiseError::Unusable)?;
        Ok((Self { state, local_index }, message))
    }

    /// Our number of the session to be.
    #[must_use]
    pub const fn local_index(&self) -> u32 {
        self.local_index
    }

    /// Reads the answer; a forged one spoils nothing.
    ///
    /// # Errors
    /// When it is not authentic.
    pub fn finish(&mut self, message: &[u8; RESPONSE_BYTES]) -> Result<SessionKeys, NoiseError> {
        self.state
            .read_message(&message[RESPONSE_NOISE], &mut [])
            .map_err(|_| NoiseError::NotAuthentic)?;
        let remote_index = word(message, 4).ok_or(NoiseError::NotAuthentic)?;
        let (sending, receiving) = self.state.dangerously_get_raw_split();
        Ok(SessionKeys {
            local_index: self.local_index,
            remote_index,
            sending,
            receiving,
            role: Role::Initiator,
        })
    }
}

/// A handshake that a peer began, its first message read.
#[derive(Debug)]
pub struct Responder {
    state: HandshakeState,
    peer: PublicKey,
    timestamp: [u8; TIMESTAMP_BYTES],
    remote_index: u32,
}

impl Responder {
    /// Reads an initiation.
    ///
    /// # Errors
    /// When it is not authentic.
    pub fn read(
        private: &PrivateKey,
        message: &[u8; INITIATION_BYTES],
        seed: Seed,
    ) -> Result<Self, NoiseError> {
        let mut state = builder(private, seed)?
            .build_responder()
            .map_err(|_| NoiseError::Unusable)?;
        // The library wants room for the sealed form.
        let mut payload = [0; TIMESTAMP_BYTES + 16];
        let length = state
            .read_message(&message[INITIATION_NOISE], &mut payload)
            .map_err(|_| NoiseError::NotAuthentic)?;
        let timestamp = payload
            .get(..length)
            .and_then(|payload| payload.try_into().ok())
            .ok_or(NoiseError::NotAuthentic)?;
        let peer = state
            .get_remote_static()
            .and_then(|key| key.try_into().ok())
            .map(PublicKey)
            .ok_or(NoiseError::NotAuthentic)?;
        Ok(Self {
            peer,
            timestamp,
            remote_index: word(message, 4).ok_or(NoiseError::NotAuthentic)?,
            state,
        })
    }

    /// Who began it; proven, but perhaps a replay: see [`Self::timestamp`].
    #[must_use]
    pub const fn peer(&self) -> &PublicKey {
        &self.peer
    }

    /// TAI64N of the initiation; a peer's must grow.
    #[must_use]
    pub const fn timestamp(&self) -> &[u8; TIMESTAMP_BYTES] {
        &self.timestamp
    }

    /// The peer's number of the session.
    #[must_use]
    pub const fn remote_index(&self) -> u32 {
        self.remote_index
    }

    /// Answers; the authentication codes of the message are still to be written.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn answer(
        mut self,
        preshared_key: Option<&PresharedKey>,
        local_index: u32,
    ) -> Result<(SessionKeys, [u8; RESPONSE_BYTES]), NoiseError> {
        let key = Zeroizing::new(preshared(preshared_key));
        let mut message = [0; RESPONSE_BYTES];
        message[..4].copy_from_slice(&TYPE_RESPONSE.to_le_bytes());
        message[4..8].copy_from_slice(&local_index.to_le_bytes());
        message[8..12].copy_from_slice(&self.remote_index.to_le_bytes());
        self.state
            .set_psk(PSK_PLACE.into(), &key[..])
            .and_then(|()| self.state.write_message(&[], &mut message[RESPONSE_NOISE]))
            .map_err(|_| NoiseError::Unusable)?;
        let (receiving, sending) = self.state.dangerously_get_raw_split();
        let keys = SessionKeys {
            local_index,
            remote_index: self.remote_index,
            sending,
            receiving,
            role: Role::Responder,
        };
        Ok((keys, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> (PrivateKey, PrivateKey) {
        (
            PrivateKey::from_bytes([1; 32]),
            PrivateKey::from_bytes([2; 32]),
        )
    }

    fn seed(byte: u8) -> Seed {
        Zeroizing::new([byte; KEY_BYTES])
    }

    #[test]
    fn both_sides_get_the_same_keys() {
        let (ours, theirs) = keys();
        let shared = PresharedKey::from_bytes([9; 32]);
        let (mut initiator, first) = Initiator::begin(
            &ours,
            &theirs.public(),
            shared.as_ref(),
            7,
            &[5; 12],
            seed(3),
        )
        .unwrap();
        let responder = Responder::read(&theirs, &first, seed(4)).unwrap();
        assert_eq!(responder.peer(), &ours.public());
        assert_eq!(responder.timestamp(), &[5; 12]);
        let (their_keys, second) = responder.answer(shared.as_ref(), 8).unwrap();
        let our_keys = initiator.finish(&second).unwrap();
        assert_eq!(our_keys.sending, their_keys.receiving);
        assert_eq!(our_keys.receiving, their_keys.sending);
        assert_eq!((our_keys.local_index, our_keys.remote_index), (7, 8));
        assert_eq!((their_keys.local_index, their_keys.remote_index), (8, 7));
    }

    #[test]
    fn a_forged_answer_is_refused_and_the_right_one_still_taken() {
        let (ours, theirs) = keys();
        let (mut initiator, first) =
            Initiator::begin(&ours, &theirs.public(), None, 7, &[5; 12], seed(3)).unwrap();
        let responder = Responder::read(&theirs, &first, seed(4)).unwrap();
        let (_, second) = responder.answer(None, 8).unwrap();
        for place in [12, 45, 55] {
            let mut forged = second;
            forged[place] ^= 1;
            assert_eq!(
                initiator.finish(&forged).unwrap_err(),
                NoiseError::NotAuthentic
            );
        }
        assert!(initiator.finish(&second).is_ok());
    }

    #[test]
    fn another_preshared_key_or_recipient_does_not_do() {
        let (ours, theirs) = keys();
        let (mut initiator, first) =
            Initiator::begin(&ours, &theirs.public(), None, 7, &[5; 12], seed(3)).unwrap();
        assert!(Responder::read(&ours, &first, seed(4)).is_err());
        let responder = Responder::read(&theirs, &first, seed(4)).unwrap();
        let other = PresharedKey::from_bytes([9; 32]);
        let (_, second) = responder.answer(other.as_ref(), 8).unwrap();
        assert!(initiator.finish(&second).is_err());
    }
}
