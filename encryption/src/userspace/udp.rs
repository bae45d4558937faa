//! UDP sockets with segmentation and coalescing by the kernel: system calls and their control messages.
#![expect(
    unsafe_code,
    reason = "sendmsg and recvmmsg with prepared buffers and UDP_SEGMENT, UDP_GRO, TOS have no safe wrapper without allocation"
)]

use std::ffi::c_int;
use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use clustermesh_encryption_core::message::TRANSPORT_OVERHEAD_BYTES;
use nix::errno::Errno;

/// Segments in one call (`UDP_MAX_SEGMENTS` of Linux before 6.9).
pub const SEGMENTS_MAX: usize = 64;
/// Bytes in one call: the longest UDP datagram over IPv4.
pub const SEND_BYTES_MAX: usize = 65_507;
/// Room for one received run of datagrams, bytes.
const SLOT_BYTES: usize = 65_536;
/// Messages that one call receives.
pub const MESSAGES_MAX: usize = 32;
/// What the kernel may hold for us in each direction, bytes.
const SOCKET_BUFFER_BYTES: c_int = 8 << 20;
/// Room for control messages, bytes.
const CONTROL_BYTES: usize = 64;
/// DSCP AF41: handshake messages are marked like this by all implementations.
pub const HANDSHAKE_TOS: u8 = 0x88;

// `AF_INET` and `AF_INET6` as they stand in an address.
const FAMILY_V4: libc::sa_family_t = 2;
const FAMILY_V6: libc::sa_family_t = 10;

// linux/udp.h
const UDP_SEGMENT: c_int = 103;
const UDP_GRO: c_int = 104;

/// Segments of `mtu` bytes that, sealed, go into one call: more would make every super-packet two calls, two wake-ups and
/// two acknowledgements at the other end.
#[must_use]
pub fn segments_per_call(mtu: usize) -> u32 {
    let segments = SEND_BYTES_MAX / (mtu + TRANSPORT_OVERHEAD_BYTES);
    u32::try_from(segments.clamp(1, SEGMENTS_MAX)).unwrap_or(1)
}

/// A buffer of control messages, aligned as they want it.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_BYTES]);

/// A socket of one family.
#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    is_v6: bool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn set(socket: &OwnedFd, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<c_int>()).map_err(io::Error::other)?;
    // SAFETY: the pointer is to an int of that length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            length,
        )
    };
    Errno::result(result)?;
    Ok(())
}

impl Socket {
    /// Opens a socket at `port` (0: any) that shares it with others of ours.
    ///
    /// # Errors
    /// When the port is taken, or the machine does not have the family.
    pub fn open(is_v6: bool, port: u16, mark: u32) -> io::Result<Self> {
        let family = if is_v6 { libc::AF_INET6 } else { libc::AF_INET };
        let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let descriptor = Errno::result(unsafe { libc::socket(family, kind, 0) })?;
        // SAFETY: the descriptor was just made and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        set(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        // Datagrams longer than the path takes are cut on the way, as the kernel's device has it.
        if is_v6 {
            set(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
            set(
                &socket,
                libc::IPPROTO_IPV6,
                libc::IPV6_MTU_DISCOVER,
                libc::IPV6_PMTUDISC_DONT,
            )?;
            set(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        } else {
            set(
                &socket,
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                libc::IP_PMTUDISC_DONT,
            )?;
            set(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        }
        for option in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            set(&socket, libc::SOL_SOCKET, option, SOCKET_BUFFER_BYTES)?;
        }
        if mark != 0 {
            set(&socket, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())?;
        }
        // Without it (Linux before 5.0) datagrams come one by one.
        let _ = set(&socket, libc::SOL_UDP, UDP_GRO, 1);
        let any = if is_v6 {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        let (name, length) = to_name(SocketAddr::new(any, port));
        // SAFETY: the pointer is to a socket address of at least that length.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const name).cast(), length) };
        Errno::result(result)?;
        Ok(Self { socket, is_v6 })
    }

    /// Whether the socket is one for IPv6.
    #[must_use]
    pub const fn is_v6(&self) -> bool {
        self.is_v6
    }

    /// The port.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn port(&self) -> io::Result<u16> {
        let copy = UdpSocket::from(self.socket.try_clone()?);
        copy.local_addr().map(|address| address.port())
    }

    /// Sets the mark of outgoing datagrams.
    ///
    /// # Errors
    /// Without the privilege.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        set(
            &self.socket,
            libc::SOL_SOCKET,
            libc::SO_MARK,
            mark.cast_signed(),
        )
    }

    /// Sends `datagrams`, cut into such of `segment` bytes (the last may be shorter), to one place.
    ///
    /// # Errors
    /// As sendmsg(2): `EMSGSIZE` when a segment does not fit the path's first link, `EIO` when the link cannot cut.
    #[inline]
    pub fn send(
        &self,
        to: SocketAddr,
        tos: u8,
        datagrams: &[u8],
        segment: usize,
    ) -> Result<(), Errno> {
        let (mut name, name_len) = to_name(to);
        let mut iovec = libc::iovec {
            iov_base: datagrams.as_ptr().cast_mut().cast(),
            iov_len: datagrams.len(),
        };
        let mut control = Control([0; CONTROL_BYTES]);
        // SAFETY: a msghdr of zeros is an empty one.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_name = (&raw mut name).cast();
        message.msg_namelen = name_len;
        message.msg_iov = &raw mut iovec;
        message.msg_iovlen = 1;
        let mut used = 0;
        if segment < datagrams.len() {
            let segment = u16::try_from(segment).map_err(|_| Errno::EMSGSIZE)?;
            used += put(
                &mut control,
                used,
                libc::SOL_UDP,
                UDP_SEGMENT,
                &segment.to_ne_bytes(),
            );
        }
        if tos != 0 {
            let (level, kind) = if self.is_v6 {
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
            } else {
                (libc::IPPROTO_IP, libc::IP_TOS)
            };
            used += put(
                &mut control,
                used,
                level,
                kind,
                &c_int::from(tos).to_ne_bytes(),
            );
        }
        if used > 0 {
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = used;
        }
        loop {
            // SAFETY: all pointers in the message are to locals, or to `datagrams`, which sendmsg only reads.
            let result = unsafe {
                libc::sendmsg(
                    self.socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_DONTWAIT,
                )
            };
            match Errno::result(result) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Appends a control message at `at`; gives the bytes it takes.
fn put(control: &mut Control, at: usize, level: c_int, kind: c_int, data: &[u8]) -> usize {
    let header = size_of::<libc::cmsghdr>();
    let space = (header + data.len()).next_multiple_of(size_of::<usize>());
    let head = libc::cmsghdr {
        cmsg_len: header + data.len(),
        cmsg_level: level,
        cmsg_type: kind,
    };
    if at + space > CONTROL_BYTES {
        return 0;
    }
    // SAFETY: the buffer is aligned to 8, `at` is a multiple of 8, and header and data end within it.
    unsafe {
        let place = (&raw mut control.0).cast::<u8>().add(at);
        place.cast::<libc::cmsghdr>().write(head);
        place
            .add(header)
            .copy_from_nonoverlapping(data.as_ptr(), data.len());
    }
    space
}

/// A run of datagrams of one size (the last may be shorter) from one place.
#[derive(Clone, Debug)]
pub struct Received {
    /// Where it lies in the buffer.
    pub range: Range<usize>,
    /// Size of each datagram.
    pub segment: usize,
    /// From where.
    pub from: SocketAddr,
    /// Type of service or traffic class of the outer header.
    pub tos: u8,
}

/// Receives runs of datagrams into a buffer of its own.
pub struct Receiver {
    buffer: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    iovecs: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
    received: usize,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Receiver({} messages)", self.received)
    }
}

impl Default for Receiver {
    fn default() -> Self {
        // SAFETY: addresses, vectors and message headers of zeros are empty ones.
        let (name, iovec, message) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            buffer: vec![0; MESSAGES_MAX * SLOT_BYTES],
            names: vec![name; MESSAGES_MAX],
            controls: vec![Control([0; CONTROL_BYTES]); MESSAGES_MAX],
            iovecs: vec![iovec; MESSAGES_MAX],
            messages: vec![message; MESSAGES_MAX],
            received: 0,
        }
    }
}

impl Receiver {
    /// Receives what waits, up to `most` messages; gives their number.
    ///
    /// # Errors
    /// As recvmmsg(2).
    pub fn receive(&mut self, socket: &Socket, most: usize) -> io::Result<usize> {
        let most = most.clamp(1, MESSAGES_MAX);
        self.received = 0;
        let parts = self
            .messages
            .iter_mut()
            .zip(self.iovecs.iter_mut())
            .zip(self.names.iter_mut().zip(self.controls.iter_mut()))
            .zip(self.buffer.chunks_exact_mut(SLOT_BYTES))
            .take(most);
        for (((message, iovec), (name, control)), room) in parts {
            iovec.iov_base = room.as_mut_ptr().cast();
            iovec.iov_len = room.len();
            message.msg_hdr.msg_name = (&raw mut *name).cast();
            message.msg_hdr.msg_namelen =
                libc::socklen_t::try_from(size_of::<libc::sockaddr_storage>()).unwrap_or(0);
            message.msg_hdr.msg_iov = &raw mut *iovec;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_control = (&raw mut *control).cast();
            message.msg_hdr.msg_controllen = CONTROL_BYTES;
            message.msg_len = 0;
        }
        let count = libc::c_uint::try_from(most).unwrap_or(1);
        // SAFETY: the first `most` messages point into vectors of this struct, which nobody else touches meanwhile.
        let result = unsafe {
            libc::recvmmsg(
                socket.socket.as_raw_fd(),
                self.messages.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        match Errno::result(result) {
            Ok(count) => self.received = usize::try_from(count).unwrap_or(0),
            // An error that ICMP reported for an earlier datagram says nothing about this one.
            Err(
                Errno::EAGAIN
                | Errno::EINTR
                | Errno::ECONNREFUSED
                | Errno::EHOSTUNREACH
                | Errno::ENETUNREACH,
            ) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.received)
    }

    /// One of the messages that were received.
    #[must_use]
    pub fn message(&self, index: usize) -> Option<Received> {
        if index >= self.received {
            return None;
        }
        let message = self.messages.get(index)?;
        let length = usize::try_from(message.msg_len).ok()?.min(SLOT_BYTES);
        if message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 || length == 0 {
            return None;
        }
        let from = from_name(self.names.get(index)?)?;
        let controls = self.controls.get(index)?;
        let control = controls
            .0
            .get(..message.msg_hdr.msg_controllen)
            .unwrap_or_default();
        let (mut segment, mut tos) = (length, 0);
        each_control(control, |level, kind, data| {
            let number = match *data {
                [one] => i32::from(one),
                [a, b, c, d, ..] => i32::from_ne_bytes([a, b, c, d]),
                [a, b, ..] => i32::from(u16::from_ne_bytes([a, b])),
                [] => 0,
            };
            match (level, kind) {
                (libc::SOL_UDP, UDP_GRO) => segment = usize::try_from(number).unwrap_or(length),
                (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    tos = u8::try_from(number & 0xff).unwrap_or(0);
                }
                _ => {}
            }
        });
        let begin = index * SLOT_BYTES;
        Some(Received {
            range: begin..begin + length,
            segment: segment.clamp(1, length),
            from,
            tos,
        })
    }

    /// The buffer in which the messages lie.
    #[must_use]
    pub fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

/// Reads control messages without trusting their lengths.
fn each_control(mut control: &[u8], mut visit: impl FnMut(c_int, c_int, &[u8])) {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    while let Some((head, _)) = control.split_at_checked(HEADER) {
        let number =
            |at: usize| c_int::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut length = [0; size_of::<usize>()];
        length.copy_from_slice(&head[..size_of::<usize>()]);
        let length = usize::from_ne_bytes(length);
        let (level, kind) = (number(HEADER - 8), number(HEADER - 4));
        let Some(data) = control.get(HEADER..length) else {
            return;
        };
        visit(level, kind, data);
        control = control
            .get(length.next_multiple_of(size_of::<usize>())..)
            .unwrap_or_default();
    }
}

/// An address as the kernel wants it.
#[inline]
fn to_name(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: an address of zeros is one of no family.
    let mut name: libc::sockaddr_storage = unsafe { zeroed() };
    let length = match address {
        SocketAddr::V4(address) => {
            let v4 = libc::sockaddr_in {
                sin_family: FAMILY_V4,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(address.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage has room and alignment for every kind of address.
            unsafe { (&raw mut name).cast::<libc::sockaddr_in>().write(v4) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(address) => {
            let v6 = libc::sockaddr_in6 {
                sin6_family: FAMILY_V6,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: address.ip().octets(),
                },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: sockaddr_storage has room and alignment for every kind of address.
            unsafe { (&raw mut name).cast::<libc::sockaddr_in6>().write(v6) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (name, libc::socklen_t::try_from(length).unwrap_or(0))
}

/// An address from the kernel.
#[inline]
fn from_name(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that an address of this kind was written into the storage.
            let v4 = unsafe { (&raw const *name).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that an address of this kind was written into the storage.
            let v6 = unsafe { (&raw const *name).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let port = u16::from_be(v6.sin6_port);
            Some(SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
