//! Echo requests to many addresses at once (ICMP, RFC 792; ICMPv6, RFC 4443): who answers, and how soon.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, sendto,
    socket,
};

/// Addresses that are asked at once.
pub const AT_ONCE_MAX: usize = 128;
/// Requests to one address.
pub const REQUESTS_MAX: u32 = 3;
/// Longest wait for the answer to one of them.
pub const ANSWER_MS_MAX: u64 = 1_000;
/// Bytes of a request's data: more than keepalives and handshakes have, so that it can be told from them by count.
const DATA_BYTES: usize = 512;
const HEADER_BYTES: usize = 8;
/// Bytes of a request with the smaller of the two IP headers.
pub const PACKET_BYTES_MIN: u64 = (20 + HEADER_BYTES + DATA_BYTES) as u64;
/// Room for one packet: others' may be larger, and are not looked at.
const ROOM_BYTES: usize = 2_048;
const ECHO_REQUEST: [u8; 2] = [8, 128];
const ECHO_REPLY: [u8; 2] = [0, 129];

/// Asks each address up to [`REQUESTS_MAX`] times; gives the time to the answer, `None` where there was none. Only the
/// first [`AT_ONCE_MAX`] are asked.
///
/// # Errors
/// The machine gives no raw sockets.
pub fn ask_all(addresses: &[IpAddr]) -> io::Result<Vec<Option<Duration>>> {
    let mut round = Round::new(addresses)?;
    for _ in 0..REQUESTS_MAX {
        if !round.ask() {
            break;
        }
        round.listen(Instant::now() + Duration::from_millis(ANSWER_MS_MAX))?;
    }
    Ok(round.answers)
}

struct Round {
    addresses: Vec<IpAddr>,
    answers: Vec<Option<Duration>>,
    asked: Vec<Instant>,
    v4: OwnedFd,
    /// A machine without IPv6 has none.
    v6: Option<OwnedFd>,
    /// Tells our requests from everybody else's.
    nonce: [u8; 8],
}

impl Round {
    fn new(addresses: &[IpAddr]) -> io::Result<Self> {
        let addresses: Vec<IpAddr> = addresses.iter().take(AT_ONCE_MAX).copied().collect();
        let open = |family, protocol| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(family, SockType::Raw, flags, protocol)
        };
        Ok(Self {
            answers: vec![None; addresses.len()],
            asked: vec![Instant::now(); addresses.len()],
            addresses,
            v4: open(AddressFamily::Inet, SockProtocol::Icmp)?,
            v6: open(AddressFamily::Inet6, SockProtocol::IcmpV6).ok(),
            nonce: rand::random(),
        })
    }

    /// Asks those that have not answered; false if all have.
    fn ask(&mut self) -> bool {
        let mut has_asked = false;
        for (place, address) in self.addresses.iter().enumerate() {
            if self.answers.get(place).is_none_or(Option::is_some) {
                continue;
            }
            has_asked = true;
            if let Some(asked) = self.asked.get_mut(place) {
                *asked = Instant::now();
            }
            let socket = match address {
                IpAddr::V4(_) => Some(&self.v4),
                IpAddr::V6(_) => self.v6.as_ref(),
            };
            let Some(socket) = socket else {
                continue;
            };
            let message = request(address.is_ipv4(), &self.nonce, place);
            let to = SockaddrStorage::from(SocketAddr::new(*address, 0));
            // Who cannot be sent to does not answer.
            let _ = sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty());
        }
        has_asked
    }

    /// Takes answers until then, or until all have come.
    fn listen(&mut self, deadline: Instant) -> io::Result<()> {
        while self.answers.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let second = self.v6.as_ref().unwrap_or(&self.v4);
            let mut fds = [&self.v4, second].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
            let timeout = u16::try_from(left.as_millis().max(1)).unwrap_or(u16::MAX);
            match poll(&mut fds, PollTimeout::from(timeout)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.take_all(true);
            self.take_all(false);
        }
        Ok(())
    }

    fn take_all(&mut self, is_v4: bool) {
        let mut room = [0; ROOM_BYTES];
        // No more than there can be of ours: others' traffic must not hold us.
        for _ in 0..4 * AT_ONCE_MAX {
            let socket = if is_v4 {
                Some(&self.v4)
            } else {
                self.v6.as_ref()
            };
            let Some(socket) = socket else {
                return;
            };
            let Ok((length, from)) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut room)
            else {
                return;
            };
            let packet = room.get(..length).unwrap_or_default();
            let Some(place) = reply(is_v4, &self.nonce, packet) else {
                continue;
            };
            let from = from.and_then(|from| source(&from));
            if from.is_some()
                && from == self.addresses.get(place).copied()
                && let Some(asked) = self.asked.get(place)
                && let Some(answer) = self.answers.get_mut(place)
            {
                answer.get_or_insert_with(|| asked.elapsed());
            }
        }
    }
}

fn source(from: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = from.as_sockaddr_in().map(|from| IpAddr::from(from.ip()));
    v4.or_else(|| from.as_sockaddr_in6().map(|from| IpAddr::from(from.ip())))
}

/// Sum of RFC 1071 over an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|two| match two {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

/// A request whose data names the place of the address. The kernel sums up ICMPv6 itself.
fn request(is_v4: bool, nonce: &[u8; 8], place: usize) -> Vec<u8> {
    let mut message = vec![0; HEADER_BYTES + DATA_BYTES];
    let number = u32::try_from(place).unwrap_or(u32::MAX).to_be_bytes();
    let fields: [(usize, &[u8]); 4] = [
        (0, &[ECHO_REQUEST[usize::from(!is_v4)]]),
        (4, &nonce[..4]),
        (HEADER_BYTES, nonce),
        (HEADER_BYTES + nonce.len(), &number),
    ];
    for (at, bytes) in fields {
        if let Some(room) = message.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    }
    if is_v4 {
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    message
}

/// The place that a packet answers for, if it is an answer to us. IPv4's come with their IP header.
fn reply(is_v4: bool, nonce: &[u8; 8], packet: &[u8]) -> Option<usize> {
    let message = if is_v4 {
        let words = packet.first()? & 0x0f;
        packet.get(usize::from(words) * 4..)?
    } else {
        packet
    };
    let is_reply = message.first() == Some(&ECHO_REPLY[usize::from(!is_v4)]);
    let data = message.get(HEADER_BYTES..)?;
    let (said, rest) = data.split_first_chunk::<8>()?;
    let (number, _) = rest.split_first_chunk::<4>()?;
    let is_ours = is_reply && said == nonce && data.len() == DATA_BYTES;
    is_ours.then(|| u32::from_be_bytes(*number) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONCE: [u8; 8] = [7; 8];

    /// The answer to a request as a raw socket gives it.
    fn answer_to(is_v4: bool, request: &[u8]) -> Vec<u8> {
        let mut packet = if is_v4 { vec![0; 24] } else { Vec::new() };
        if is_v4 {
            // One word of options.
            packet[0] = 0x46;
        }
        let at = packet.len();
        packet.extend_from_slice(request);
        packet[at] = ECHO_REPLY[usize::from(!is_v4)];
        packet
    }

    #[test]
    fn an_answer_is_known_by_its_data() {
        for is_v4 in [true, false] {
            let request = request(is_v4, &NONCE, 77);
            if is_v4 {
                assert_eq!(checksum(&request), 0, "the sum over all is right");
            }
            let answer = answer_to(is_v4, &request);
            assert_eq!(reply(is_v4, &NONCE, &answer), Some(77));
            assert_eq!(reply(is_v4, &[8; 8], &answer), None, "another's");
            // Our own request, which loopback shows us too.
            let mut own = answer;
            let at = if is_v4 { 24 } else { 0 };
            own[at] = ECHO_REQUEST[usize::from(!is_v4)];
            assert_eq!(reply(is_v4, &NONCE, &own), None);
        }
    }

    #[test]
    fn who_is_there_answers_and_who_is_not_is_not_waited_for_without_end() {
        let addresses = ["127.0.0.1", "240.0.0.1", "127.0.0.9"].map(|ip| ip.parse().unwrap());
        let begun = Instant::now();
        let answers = ask_all(&addresses).unwrap();
        assert!(answers[0].is_some() && answers[2].is_some(), "{answers:?}");
        assert_eq!(answers[1], None, "an address of nobody");
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert_eq!(ask_all(&[]).unwrap(), []);
    }

    proptest! {
        #[test]
        fn any_packet_is_an_answer_or_none(packet in prop::collection::vec(any::<u8>(), 0..600), is_v4: bool) {
            prop_assert_eq!(reply(is_v4, &NONCE, &packet), None);
        }
    }
}
