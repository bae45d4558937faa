//! Shapes of WireGuard's four messages (the paper, 5.4): lengths, types and the fields that are read before decryption.

/// Bytes of an initiation.
pub const INITIATION_BYTES: usize = 148;
/// Bytes of a response.
pub const RESPONSE_BYTES: usize = 92;
/// Bytes of a cookie reply.
pub const COOKIE_REPLY_BYTES: usize = 64;
/// Bytes before the sealed packet of a transport message: type, receiver, counter.
pub const TRANSPORT_HEADER_BYTES: usize = 16;
/// Bytes of the authentication tag behind a sealed packet.
pub const TAG_BYTES: usize = 16;
/// Bytes that a transport message adds to a packet, padding aside.
pub const TRANSPORT_OVERHEAD_BYTES: usize = TRANSPORT_HEADER_BYTES + TAG_BYTES;
/// A packet is padded to a multiple of this (the paper, 5.4.6).
pub const PADDING_BYTES: usize = 16;

/// Message types, each followed by three zero bytes.
pub(crate) const TYPE_INITIATION: u32 = 1;
pub(crate) const TYPE_RESPONSE: u32 = 2;
pub(crate) const TYPE_COOKIE_REPLY: u32 = 3;
pub(crate) const TYPE_TRANSPORT: u32 = 4;

/// A datagram whose type and length fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// The first of a handshake.
    Initiation(&'a [u8; INITIATION_BYTES]),
    /// Its answer.
    Response(&'a [u8; RESPONSE_BYTES]),
    /// The answer of a peer under load.
    CookieReply(&'a [u8; COOKIE_REPLY_BYTES]),
    /// A sealed packet; an empty one is a keepalive.
    Transport {
        /// Session of the receiver.
        receiver: u32,
        /// Number of the message within the session.
        counter: u64,
    },
}

/// Why a datagram is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a datagram of {length} bytes is no WireGuard message")]
pub struct MalformedMessage {
    /// Its length, bytes.
    pub length: usize,
}

/// Tells what a datagram is by type and length.
///
/// # Errors
/// When it is nothing of WireGuard.
pub fn parse(datagram: &[u8]) -> Result<Message<'_>, MalformedMessage> {
    let malformed = MalformedMessage {
        length: datagram.len(),
    };
    let kind = word(datagram, 0).ok_or(malformed)?;
    match kind {
        // By far the most frequent.
        TYPE_TRANSPORT if datagram.len() >= TRANSPORT_OVERHEAD_BYTES => {
            let receiver = word(datagram, 4).ok_or(malformed)?;
            let low = word(datagram, 8).ok_or(malformed)?;
            let high = word(datagram, 12).ok_or(malformed)?;
            let counter = u64::from(high) << 32 | u64::from(low);
            Ok(Message::Transport { receiver, counter })
        }
        TYPE_INITIATION => datagram.try_into().map(Message::Initiation),
        TYPE_RESPONSE => datagram.try_into().map(Message::Response),
        TYPE_COOKIE_REPLY => datagram.try_into().map(Message::CookieReply),
        _ => return Err(malformed),
    }
    .map_err(|_: std::array::TryFromSliceError| malformed)
}

/// The little-endian word at `offset`.
pub(crate) fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let four = bytes.get(offset..offset + 4)?;
    four.try_into().ok().map(u32::from_le_bytes)
}

/// Writes a transport header into the first 16 bytes of `datagram`.
#[inline]
pub(crate) fn write_transport_header(
    header: &mut [u8; TRANSPORT_HEADER_BYTES],
    receiver: u32,
    counter: u64,
) {
    header[..4].copy_from_slice(&TYPE_TRANSPORT.to_le_bytes());
    header[4..8].copy_from_slice(&receiver.to_le_bytes());
    header[8..].copy_from_slice(&counter.to_le_bytes());
}

/// Length of a packet once padded, on a device of this MTU: to 16 bytes, but never beyond the MTU.
#[must_use]
#[inline]
pub const fn padded_len(length: usize, mtu: usize) -> usize {
    let padded = length.next_multiple_of(PADDING_BYTES);
    if padded <= mtu || length > mtu {
        padded
    } else if mtu > length {
        mtu
    } else {
        length
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn type_and_length_must_fit() {
        let mut datagram = [0; INITIATION_BYTES];
        datagram[0] = 1;
        assert!(matches!(parse(&datagram), Ok(Message::Initiation(_))));
        assert!(parse(&datagram[..147]).is_err());
        // The three bytes behind the type are zero.
        datagram[1] = 1;
        assert!(parse(&datagram).is_err());
        let mut sealed = [0; 32];
        write_transport_header(sealed.first_chunk_mut().unwrap(), 7, 1 << 33);
        let (receiver, counter) = (7, 1 << 33);
        assert_eq!(parse(&sealed), Ok(Message::Transport { receiver, counter }));
        assert!(parse(&sealed[..31]).is_err());
    }

    #[test]
    fn padding_stops_at_the_mtu() {
        assert_eq!(padded_len(0, 1420), 0);
        assert_eq!(padded_len(1, 1420), 16);
        assert_eq!(padded_len(1409, 1420), 1420);
        assert_eq!(padded_len(1420, 1420), 1420);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..6) {
            let mut bytes = bytes;
            if let [first, second, third, fourth, ..] = &mut bytes[..] {
                (*first, *second, *third, *fourth) = (kind, 0, 0, 0);
            }
            let _ = parse(&bytes);
        }
    }
}
