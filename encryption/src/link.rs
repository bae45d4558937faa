//! Network devices by netlink (rtnetlink(7)): made, removed, and how many segments a super-packet may have.

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_GSO_MAX_SEGS: u16 = 40;
const IFLA_INFO_KIND: u16 = 1;
/// Bytes of `struct nlmsghdr`, and of `struct ifinfomsg`.
const HEADER_BYTES: usize = 16;

/// Limits the super-packets that the kernel hands to the device `name`.
///
/// # Errors
/// When there is no such device, or the kernel refuses.
pub fn set_segments_max(name: &str, segments: u32) -> io::Result<()> {
    let index = if_nametoindex(name)?;
    let attributes = attribute(IFLA_GSO_MAX_SEGS, &segments.to_ne_bytes());
    request(RTM_NEWLINK, 0, index, &attributes)
}

/// Makes the kernel's own WireGuard device.
///
/// # Errors
/// `EOPNOTSUPP` where the kernel has none; `EEXIST` when the name is taken.
pub fn create_wireguard(name: &str) -> io::Result<()> {
    let mut attributes = attribute(IFLA_IFNAME, &with_zero(name));
    let kind = attribute(IFLA_INFO_KIND, b"wireguard");
    attributes.extend(attribute(IFLA_LINKINFO, &kind));
    request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, 0, &attributes)
}

/// Removes a device; one that is not there is fine.
///
/// # Errors
/// When the kernel refuses.
pub fn delete(name: &str) -> io::Result<()> {
    let Ok(index) = if_nametoindex(name) else {
        return Ok(());
    };
    match request(RTM_DELLINK, 0, index, &[]) {
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
        result => result,
    }
}

/// Whether there is a device of this name.
#[must_use]
pub fn exists(name: &str) -> bool {
    if_nametoindex(name).is_ok()
}

fn with_zero(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// One attribute, padded to a multiple of four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(usize::from(length) + 3);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn request(kind: u16, flags: u16, index: u32, attributes: &[u8]) -> io::Result<()> {
    let length = 2 * HEADER_BYTES + attributes.len();
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    // Sequence and port: one request, one answer.
    message.extend_from_slice(&[0; 8]);
    // struct ifinfomsg: family and type, index, flags, change.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&index.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(attributes);
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
    fn a_device_that_is_not_there_is_an_error_to_change_and_fine_to_delete() {
        assert!(set_segments_max("cmwg-none", 45).is_err());
        assert!(delete("cmwg-none").is_ok());
        assert!(!exists("cmwg-none"));
    }

    #[test]
    fn attributes_are_padded_and_counted_without_the_padding() {
        assert_eq!(attribute(3, b"ab\0"), [7, 0, 3, 0, b'a', b'b', 0, 0]);
    }
}
