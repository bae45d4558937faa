//! Keys of WireGuard: 32 bytes each, base64 for people, hexadecimal on the control socket.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// Bytes of every key.
pub const KEY_BYTES: usize = 32;

/// Why a text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text does not decode to 32 bytes.
    #[error("a key is 32 bytes: 44 characters of base64, or 64 hexadecimal digits")]
    Malformed,
}

/// A Curve25519 public key: the name of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey(pub [u8; KEY_BYTES]);

impl PublicKey {
    /// Reads base64.
    ///
    /// # Errors
    /// When the text is no key.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        decode_base64(text).map(|bytes| Self(*bytes))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PublicKey({self})")
    }
}

/// A Curve25519 private key; zeroised when dropped and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey(Zeroizing<[u8; KEY_BYTES]>);

impl PrivateKey {
    /// A key of these bytes, clamped as Curve25519 wants (RFC 7748, section 5).
    #[must_use]
    pub fn from_bytes(mut bytes: [u8; KEY_BYTES]) -> Self {
        bytes[0] &= 248;
        bytes[31] = (bytes[31] & 127) | 64;
        Self(Zeroizing::new(bytes))
    }

    /// Reads base64.
    ///
    /// # Errors
    /// When the text is no key.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        decode_base64(text).map(|bytes| Self::from_bytes(*bytes))
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The public key that belongs to it.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(*self.0);
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PrivateKey(..)")
    }
}

/// A secret that two peers share beside their key pairs; zeroised when dropped and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey(Zeroizing<[u8; KEY_BYTES]>);

impl PresharedKey {
    /// A key of these bytes; all zero means "none" (the paper, 5.2).
    #[must_use]
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Option<Self> {
        (bytes != [0; KEY_BYTES]).then(|| Self(Zeroizing::new(bytes)))
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PresharedKey(..)")
    }
}

fn decode_base64(text: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyError> {
    let bytes = Zeroizing::new(
        STANDARD
            .decode(text.trim())
            .map_err(|_| KeyError::Malformed)?,
    );
    let bytes: [u8; KEY_BYTES] = bytes[..].try_into().map_err(|_| KeyError::Malformed)?;
    Ok(Zeroizing::new(bytes))
}

/// Hexadecimal digits, lower case.
#[must_use]
pub fn to_hex(bytes: &[u8; KEY_BYTES]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads 64 hexadecimal digits.
///
/// # Errors
/// When the text is anything else.
pub fn from_hex(text: &str) -> Result<[u8; KEY_BYTES], KeyError> {
    let digits = text.as_bytes();
    if digits.len() != 2 * KEY_BYTES {
        return Err(KeyError::Malformed);
    }
    let mut bytes = [0; KEY_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let (high, low) = (digit(pair[0])?, digit(pair[1])?);
        *byte = high << 4 | low;
    }
    Ok(bytes)
}

fn digit(character: u8) -> Result<u8, KeyError> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        b'A'..=b'F' => Ok(character - b'A' + 10),
        _ => Err(KeyError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_keys_read_back() {
        let private = PrivateKey::from_bytes([0xa7; KEY_BYTES]);
        let public = private.public();
        assert_eq!(PublicKey::from_base64(&public.to_string()), Ok(public));
        assert_eq!(from_hex(&to_hex(&public.0)), Ok(public.0));
        assert_eq!(PublicKey::from_base64("AAAA"), Err(KeyError::Malformed));
        assert_eq!(from_hex(&"0g".repeat(32)), Err(KeyError::Malformed));
    }

    // RFC 7748, section 6.1.
    #[test]
    fn public_key_of_the_private_key_in_the_rfc() {
        let private = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb";
        let public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f";
        let derived = PrivateKey::from_bytes(from_hex(private).unwrap()).public();
        assert_eq!(to_hex(&derived.0), public);
    }

    #[test]
    fn secrets_are_not_shown() {
        let private = PrivateKey::from_bytes([0xa7; KEY_BYTES]);
        let preshared = PresharedKey::from_bytes([0xa7; KEY_BYTES]);
        let shown = format!("{private:?} {preshared:?}");
        assert_eq!(shown, "PrivateKey(..) Some(PresharedKey(..))");
        assert_eq!(PresharedKey::from_bytes([0; KEY_BYTES]), None);
    }
}
