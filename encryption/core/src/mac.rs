//! The authentication codes of handshake messages and the cookies of a peer under load (the paper, 5.4.4 and 5.4.7).

use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};

use crate::key::PublicKey;
use crate::message::COOKIE_REPLY_BYTES;

/// Bytes of a code or cookie.
pub const MAC_BYTES: usize = 16;
/// How long a cookie is good: its maker's secret changes every 120 s, and messages travel up to 5 s.
const COOKIE_USABLE: Duration = Duration::from_secs(115);

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

/// Writes the codes of messages to one peer, and keeps the cookie that it sent.
#[derive(Clone, Debug)]
pub struct Stamper {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    last_mac1: Option<[u8; MAC_BYTES]>,
    cookie: Option<([u8; MAC_BYTES], Duration)>,
}

impl Stamper {
    /// For messages to this peer.
    #[must_use]
    pub fn new(peer: &PublicKey) -> Self {
        Self {
            mac1_key: hash(LABEL_MAC1, &peer.0),
            cookie_key: hash(LABEL_COOKIE, &peer.0),
            last_mac1: None,
            cookie: None,
        }
    }

    /// Writes both codes at the end of a handshake message; `now` tells whether the cookie is still good.
    pub fn stamp(&mut self, message: &mut [u8], now: Duration) {
        let Some(at) = message.len().checked_sub(2 * MAC_BYTES) else {
            return;
        };
        let (body, macs) = message.split_at_mut(at);
        let mac1 = keyed(&self.mac1_key, body, &[]);
        macs[..MAC_BYTES].copy_from_slice(&mac1);
        self.last_mac1 = Some(mac1);
        let usable = self
            .cookie
            .filter(|(_, received)| now < *received + COOKIE_USABLE);
        let mac2 = usable.map_or([0; MAC_BYTES], |(cookie, _)| keyed(&cookie, body, &mac1));
        macs[MAC_BYTES..].copy_from_slice(&mac2);
    }

    /// Takes the cookie out of a reply to our last message; false: the reply is not authentic.
    pub fn take_cookie(&mut self, reply: &[u8; COOKIE_REPLY_BYTES], now: Duration) -> bool {
        let Some(mac1) = self.last_mac1 else {
            return false;
        };
        let payload = Payload {
            msg: &reply[32..],
            aad: &mac1,
        };
        let opened = XChaCha20Poly1305::new(&self.cookie_key.into())
            .decrypt(XNonce::from_slice(&reply[8..32]), payload)
            .ok()
            .and_then(|cookie| cookie.try_into().ok());
        if let Some(cookie) = opened {
            self.cookie = Some((cookie, now));
            // One reply to one message.
            self.last_mac1 = None;
        }
        opened.is_some()
    }

    /// Whether a cookie is at hand.
    #[must_use]
    pub const fn has_cookie(&self) -> bool {
        self.cookie.is_some()
    }
}

fn hash(label: &[u8], key: &[u8]) -> [u8; 32] {
    let mut hasher = Blake2s256::new();
    Digest::update(&mut hasher, label);
    Digest::update(&mut hasher, key);
    hasher.finalize().into()
}

fn keyed(key: &[u8], first: &[u8], second: &[u8]) -> [u8; MAC_BYTES] {
    // Keys are 16 or 32 bytes: the library takes up to 32.
    let Ok(mut mac) = <Blake2sMac<U16> as KeyInit>::new_from_slice(key) else {
        return [0; MAC_BYTES];
    };
    Update::update(&mut mac, first);
    Update::update(&mut mac, second);
    mac.finalize_fixed().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PrivateKey;
    use crate::message::INITIATION_BYTES;
    use boringtun::noise::TunnResult;
    use boringtun::noise::rate_limiter::RateLimiter;
    use std::net::{IpAddr, Ipv4Addr};

    const SOURCE: Option<IpAddr> = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));

    #[test]
    fn a_peer_under_load_takes_the_message_with_its_cookie() {
        let peer = PrivateKey::from_bytes([2; 32]).public();
        let limiter = RateLimiter::new(&peer.0.into(), 0);
        let mut stamper = Stamper::new(&peer);
        let mut message = [7; INITIATION_BYTES];
        message[..4].copy_from_slice(&[1, 0, 0, 0]);
        stamper.stamp(&mut message, Duration::ZERO);
        let mut room = [0; 64];
        let reply = match limiter.verify_packet(SOURCE, &message, &mut room) {
            Err(TunnResult::WriteToNetwork(reply)) => <[u8; 64]>::try_from(&reply[..]).unwrap(),
            other => panic!("{other:?}"),
        };
        let mut forged = reply;
        forged[40] ^= 1;
        assert!(!stamper.take_cookie(&forged, Duration::ZERO));
        assert!(stamper.take_cookie(&reply, Duration::ZERO));
        assert!(!stamper.take_cookie(&reply, Duration::ZERO));
        stamper.stamp(&mut message, Duration::from_secs(114));
        assert!(limiter.verify_packet(SOURCE, &message, &mut room).is_ok());
        stamper.stamp(&mut message, Duration::from_secs(115));
        assert!(limiter.verify_packet(SOURCE, &message, &mut room).is_err());
    }
}
