//! Echo requests of given size that may not be cut, and their answers (ICMP, RFC 792; ICMPv6, RFC 4443).
#![expect(unsafe_code, reason = "socket options that no safe wrapper knows")]

pub mod ask;

use std::io;
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recv,
    sendto, setsockopt, socket, sockopt,
};
use tokio::io::unix::AsyncFd;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
/// Type, code, checksum, identifier, sequence; then the token.
const HEADER_BYTES: usize = 16;
/// Room for an answer: only its beginning is looked at.
const ROOM_BYTES: usize = 128;
// linux/icmp.h and linux/icmpv6.h
const ICMP_FILTER: libc::c_int = 1;
const ICMPV6_FILTER: libc::c_int = 1;
const SOL_RAW: libc::c_int = 255;

/// Who asks, so that answers to others are not taken for ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Identifier of the messages.
    pub id: u16,
    /// Stands in every request, and in its answer.
    pub token: [u8; 8],
}

/// A raw socket for echo requests of one family.
#[derive(Debug)]
pub struct EchoSocket {
    fd: AsyncFd<OwnedFd>,
    v6: bool,
}

fn set_option<T>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the value is as long as is said.
    let status = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            length,
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl EchoSocket {
    /// Opens the socket. What it sends has `mark`, is never cut, and goes out whatever size the routes say.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn open(v6: bool, mark: u32) -> io::Result<Self> {
        let (family, protocol) = if v6 {
            (AddressFamily::Inet6, SockProtocol::IcmpV6)
        } else {
            (AddressFamily::Inet, SockProtocol::Icmp)
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(family, SockType::Raw, flags, protocol)?;
        setsockopt(&fd, sockopt::Mark, &mark)?;
        // Bits of what is not wanted.
        if v6 {
            let probe = libc::IPV6_PMTUDISC_PROBE;
            set_option(&fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, &probe)?;
            let mut filter = [u32::MAX; 8];
            if let Some(word) = filter.get_mut(usize::from(ECHO_REPLY_V6 / 32)) {
                *word &= !(1 << (ECHO_REPLY_V6 % 32));
            }
            set_option(&fd, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, &filter)?;
        } else {
            let probe = libc::IP_PMTUDISC_PROBE;
            set_option(&fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &probe)?;
            set_option(&fd, SOL_RAW, ICMP_FILTER, &!(1_u32 << ECHO_REPLY))?;
        }
        // SAFETY: the socket is owned by what it is registered with, and is not closed or replaced before that goes.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { fd, v6 })
    }

    /// Sends a request of `size_bytes`, IP header included.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn send(&self, to: IpAddr, size_bytes: u16, asker: Asker, sequence: u16) -> io::Result<()> {
        let message = request(self.v6, size_bytes, asker, sequence);
        let fd = self.fd.get_ref().as_raw_fd();
        match to {
            IpAddr::V4(ip) => {
                let to = SockaddrIn::from(SocketAddrV4::new(ip, 0));
                sendto(fd, &message, &to, MsgFlags::empty())?;
            }
            IpAddr::V6(ip) => {
                let to = SockaddrIn6::from(SocketAddrV6::new(ip, 0, 0, 0));
                sendto(fd, &message, &to, MsgFlags::empty())?;
            }
        }
        Ok(())
    }

    /// Waits for an answer to one of our requests: its sequence number.
    ///
    /// # Errors
    /// The socket is unusable.
    pub async fn answer(&self, asker: Asker) -> io::Result<u16> {
        let mut room = [0; ROOM_BYTES];
        loop {
            let mut ready = self.fd.readable().await?;
            let read = ready.try_io(|fd| {
                recv(fd.get_ref().as_raw_fd(), &mut room, MsgFlags::empty()).map_err(Into::into)
            });
            match read {
                Ok(Ok(length)) => {
                    let packet = room.get(..length.min(ROOM_BYTES)).unwrap_or_default();
                    if let Some(sequence) = answered(self.v6, packet, asker) {
                        return Ok(sequence);
                    }
                }
                Ok(Err(error)) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }
}

/// An echo request; the kernel puts the IP header in front, and with IPv6 the checksum in.
fn request(v6: bool, size_bytes: u16, asker: Asker, sequence: u16) -> Vec<u8> {
    let (kind, ip_bytes) = if v6 {
        (ECHO_REQUEST_V6, IPV6_BYTES)
    } else {
        (ECHO_REQUEST, IPV4_BYTES)
    };
    let length = usize::from(size_bytes)
        .saturating_sub(ip_bytes)
        .max(HEADER_BYTES);
    let mut message = Vec::with_capacity(length);
    message.extend([kind, 0, 0, 0]);
    message.extend(asker.id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend(asker.token);
    if !v6 {
        // What follows is zeros.
        let sum = checksum(&message).to_be_bytes();
        message.splice(2..4, sum);
    }
    message.resize(length, 0);
    message
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter();
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

/// The sequence number, if the packet is an answer to `asker`. IPv4 comes with its header, IPv6 without.
fn answered(v6: bool, packet: &[u8], asker: Asker) -> Option<u16> {
    let message = if v6 {
        packet
    } else {
        let header_bytes = usize::from(packet.first()? & 0xf) * 4;
        packet.get(header_bytes..)?
    };
    let wanted = if v6 { ECHO_REPLY_V6 } else { ECHO_REPLY };
    let head: &[u8; HEADER_BYTES] = message.first_chunk()?;
    let [kind, code, _, _, id0, id1, s0, s1, token @ ..] = *head;
    let is_ours =
        kind == wanted && code == 0 && [id0, id1] == asker.id.to_be_bytes() && token == asker.token;
    is_ours.then(|| u16::from_be_bytes([s0, s1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKER: Asker = Asker {
        id: 0x1234,
        token: *b"whoasked",
    };

    fn answer_to(v6: bool, size_bytes: u16) -> Vec<u8> {
        let mut message = request(v6, size_bytes, ASKER, 0x0102);
        message[0] = if v6 { ECHO_REPLY_V6 } else { ECHO_REPLY };
        if v6 {
            message
        } else {
            [&[0x45][..], &[0; 19], &message].concat()
        }
    }

    #[test]
    fn a_request_has_the_size_that_is_asked_for_and_a_right_checksum() {
        for size in [128, 1_280, 1_391] {
            let message = request(false, size, ASKER, 7);
            assert_eq!(message.len() + IPV4_BYTES, usize::from(size));
            let mut even = message.clone();
            even.resize(message.len().next_multiple_of(2), 0);
            assert_eq!(checksum(&even), 0);
            let message = request(true, size, ASKER, 7);
            assert_eq!(message.len() + IPV6_BYTES, usize::from(size));
        }
    }

    #[test]
    fn only_answers_to_ourselves_are_taken() {
        for v6 in [false, true] {
            let answer = answer_to(v6, 200);
            assert_eq!(answered(v6, &answer, ASKER), Some(0x0102));
            let other = Asker {
                token: *b"somebody",
                ..ASKER
            };
            assert_eq!(answered(v6, &answer, other), None);
            let other = Asker { id: 1, ..ASKER };
            assert_eq!(answered(v6, &answer, other), None);
            for length in 0..36 {
                let cut = &answer[..length];
                let whole = if v6 {
                    HEADER_BYTES
                } else {
                    IPV4_BYTES + HEADER_BYTES
                };
                assert_eq!(answered(v6, cut, ASKER).is_some(), length >= whole);
            }
            let mut request = answer;
            request[if v6 { 0 } else { 20 }] = if v6 { ECHO_REQUEST_V6 } else { ECHO_REQUEST };
            assert_eq!(answered(v6, &request, ASKER), None);
        }
    }
}
