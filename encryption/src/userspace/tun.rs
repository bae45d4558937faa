//! The TUN device: its queues, offloads and system calls.
#![expect(
    unsafe_code,
    reason = "TUN and interface ioctls and writev over a prepared vector have no safe wrapper"
)]

use std::ffi::{c_int, c_uint};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use clustermesh_encryption_core::merge::Joins;
use clustermesh_encryption_core::vnet::VNET_HEADER_BYTES;
use nix::errno::Errno;

/// Longest name of a network device, bytes.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;
/// MTU unless another is asked for: an underlay of 1,500 less the overhead over IPv6.
pub const MTU_DEFAULT: u32 = 1_420;

// linux/if_tun.h
const TUN_F_CSUM: c_uint = 0x01;
const TUN_F_TSO4: c_uint = 0x02;
const TUN_F_TSO6: c_uint = 0x04;
const TUN_F_TSO_ECN: c_uint = 0x08;
const TUN_F_USO4: c_uint = 0x20;
const TUN_F_USO6: c_uint = 0x40;
const TUN_F_UDP_TUNNEL_GSO: c_uint = 0x80;
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    /// `ifr_flags` or `ifr_mtu`.
    value: c_int,
    padding: [u8; 20],
}

impl IfReq {
    fn new(name: &str, value: c_int) -> io::Result<Self> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(['/', '\0']) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{name:?} is no name for a network device (1 to {NAME_BYTES_MAX} bytes, no slash)"
                ),
            ));
        }
        let mut request = Self {
            name: [0; libc::IFNAMSIZ],
            value,
            padding: [0; 20],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(request)
    }
}

/// One queue of the device.
#[derive(Debug)]
pub struct Queue {
    file: File,
}

/// A device that was opened.
#[derive(Debug)]
pub struct Tun {
    name: String,
    queues: Vec<Queue>,
    joins: Joins,
}

impl Tun {
    /// Opens the device of this name with so many queues, and makes it if there is none.
    ///
    /// # Errors
    /// When `/dev/net/tun` is missing, or the name is bad or taken by something else.
    pub fn open(name: &str, queues: usize) -> io::Result<Self> {
        let mut tun = Self {
            name: name.to_owned(),
            queues: Vec::new(),
            joins: Joins::default(),
        };
        for _ in 0..queues {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")
                .map_err(|error| {
                    io::Error::new(
                        error.kind(),
                        format!("/dev/net/tun: {error} (modprobe tun)"),
                    )
                })?;
            let flags =
                libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
            let mut request = IfReq::new(name, flags)?;
            // SAFETY: the descriptor is a tun file and the pointer is to a whole ifreq that outlives the call.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
            Errno::result(result).map_err(|error| {
                io::Error::new(
                    io::Error::from(error).kind(),
                    format!("TUNSETIFF {name}: {error}"),
                )
            })?;
            set_header_bytes(&file)?;
            tun.joins = set_offloads(&file)?;
            tun.queues.push(Queue { file });
        }
        Ok(tun)
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which super-packets beside those of TCP can be written.
    #[must_use]
    pub const fn joins(&self) -> Joins {
        self.joins
    }

    /// Hands out the queues.
    #[must_use]
    pub fn into_queues(self) -> Vec<Queue> {
        self.queues
    }
}

fn set_header_bytes(file: &File) -> io::Result<()> {
    let bytes = c_int::try_from(VNET_HEADER_BYTES).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a number that outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) };
    Errno::result(result)?;
    Ok(())
}

/// Asks for as much as the kernel knows: tunnels since Linux 6.17, segmentation of UDP since 6.2.
fn set_offloads(file: &File) -> io::Result<Joins> {
    let tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    let udp = TUN_F_USO4 | TUN_F_USO6;
    if set_offload(file, tcp | udp | TUN_F_UDP_TUNNEL_GSO).is_ok() {
        return Ok(Joins {
            udp: true,
            tunnels: true,
        });
    }
    let takes_udp = set_offload(file, tcp | udp).is_ok();
    if !takes_udp {
        set_offload(file, tcp)?;
    }
    Ok(Joins {
        udp: takes_udp,
        tunnels: false,
    })
}

fn set_offload(file: &File, offload: c_uint) -> io::Result<()> {
    // SAFETY: the argument of this call is a number.
    let result = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            TUNSETOFFLOAD,
            libc::c_ulong::from(offload),
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Reads or, with a value, sets a number of a device by an ioctl on any socket.
fn device_ioctl(name: &str, call: libc::Ioctl, value: c_int) -> io::Result<c_int> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut request = IfReq::new(name, value)?;
    // SAFETY: the descriptor is a socket and the pointer is to a whole ifreq that outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), call, &raw mut request) };
    Errno::result(result).map_err(|error| {
        io::Error::new(
            io::Error::from(error).kind(),
            format!("device {name}: {error}"),
        )
    })?;
    Ok(request.value)
}

/// MTU of a device, bytes.
///
/// # Errors
/// When there is no such device.
pub fn mtu(name: &str) -> io::Result<usize> {
    let mtu = device_ioctl(name, libc::SIOCGIFMTU as libc::Ioctl, 0)?;
    usize::try_from(mtu).map_err(io::Error::other)
}

/// Sets the MTU of a device, bytes.
///
/// # Errors
/// When there is no such device, or it takes no such MTU.
pub fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
    let mtu = c_int::try_from(mtu).map_err(io::Error::other)?;
    device_ioctl(name, libc::SIOCSIFMTU as libc::Ioctl, mtu).map(drop)
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Queue {
    /// Reads one packet with the header before it; 0 bytes when none waits.
    ///
    /// # Errors
    /// When the device is gone.
    #[inline]
    pub fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        match nix::unistd::read(&self.file, room) {
            Ok(length) => Ok(length),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}

/// Writes packets whose pieces lie in one buffer; keeps its vector for the next.
#[derive(Debug, Default)]
pub struct Writer {
    vector: Vec<libc::iovec>,
}

impl Writer {
    /// One with room for so many pieces.
    #[must_use]
    pub fn new(pieces: usize) -> Self {
        Self {
            vector: Vec::with_capacity(pieces + 1),
        }
    }

    /// Writes one packet: the header, then these pieces of `buffer`.
    ///
    /// # Errors
    /// When the device does not take it: it is down, or gone.
    #[inline]
    pub fn write(
        &mut self,
        queue: &Queue,
        header: &[u8; VNET_HEADER_BYTES],
        buffer: &[u8],
        pieces: impl Iterator<Item = Range<usize>>,
    ) -> io::Result<()> {
        let iovec = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        self.vector.clear();
        self.vector.push(iovec(header));
        for piece in pieces {
            self.vector.extend(buffer.get(piece).map(iovec));
        }
        let count = c_int::try_from(self.vector.len()).map_err(io::Error::other)?;
        // SAFETY: every entry points to bytes that are borrowed until the call returns; writev only reads them.
        let result = unsafe { libc::writev(queue.file.as_raw_fd(), self.vector.as_ptr(), count) };
        // No pointer outlives this call.
        self.vector.clear();
        Errno::result(result)?;
        Ok(())
    }
}

// SAFETY: the vector holds pointers only within one call.
unsafe impl Send for Writer {}
