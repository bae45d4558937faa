//! One setting of the network device by netlink: how many segments a super-packet may have (rtnetlink(7)).

use std::io;
use std::os::fd::AsRawFd;

use clustermesh_encryption_core::message::TRANSPORT_OVERHEAD_BYTES;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use super::udp::{SEGMENTS_MAX, SEND_BYTES_MAX};

const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const IFLA_GSO_MAX_SEGS: u16 = 40;
const MESSAGE_BYTES: u32 = 16 + 16 + 8;

/// Segments of `mtu` bytes that, sealed, go into one call: more would make every super-packet two calls, two wake-ups and
/// two acknowledgements at the other end.
#[must_use]
pub fn segments_per_call(mtu: usize) -> u32 {
    let segments = SEND_BYTES_MAX / (mtu + TRANSPORT_OVERHEAD_BYTES);
    u32::try_from(segments.clamp(1, SEGMENTS_MAX)).unwrap_or(1)
}

/// Limits the super-packets that the kernel hands to the device `name`.
///
/// # Errors
/// When there is no such device, or the kernel refuses.
pub fn set_segments_max(name: &str, segments: u32) -> io::Result<()> {
    let index = if_nametoindex(name)?;
    let mut message = Vec::with_capacity(64);
    message.extend_from_slice(&MESSAGE_BYTES.to_ne_bytes());
    message.extend_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    // Sequence and port: one request, one answer.
    message.extend_from_slice(&[0; 8]);
    // struct ifinfomsg: family and type, index, flags, change.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&index.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&8_u16.to_ne_bytes());
    message.extend_from_slice(&IFLA_GSO_MAX_SEGS.to_ne_bytes());
    message.extend_from_slice(&segments.to_ne_bytes());
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 4_096];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = answer.get(..length).unwrap_or_default();
    match answer {
        // Length, then type; behind the header of 16 bytes the negative error number.
        [_, _, _, _, a, b, ..] if u16::from_ne_bytes([*a, *b]) == NLMSG_ERROR => {
            let number = answer.get(16..20).and_then(|four| four.try_into().ok());
            match number.map(i32::from_ne_bytes) {
                Some(0) => Ok(()),
                Some(error) => Err(Errno::from_raw(-error).into()),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        _ => Err(io::Error::other("netlink did not answer as expected")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_holds_what_fits() {
        assert_eq!(segments_per_call(1_420), 45);
        assert_eq!(segments_per_call(65_535), 1);
        assert_eq!(segments_per_call(100), 64);
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        assert!(set_segments_max("cmwg-none", 45).is_err());
    }
}
