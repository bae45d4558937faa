//! A WireGuard device without WireGuard: a TUN device whose other end is the test, which hands packets on as they are.
#![expect(unsafe_code, reason = "TUN ioctls have no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::net::{inside, ip};

/// Longest wait for a packet that must come.
const PATIENCE: Duration = Duration::from_secs(10);
/// A super-packet and its header.
const ROOM_BYTES: usize = 70_000;
/// Largest packet of the device: an underlay of 1,500 less WireGuard's headers over IPv6.
const MTU: u32 = 1420;
/// Segments that the device says it takes at best: fewer than any long packet has.
const SEGMENTS: u32 = 2;

// linux/if_tun.h
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const CSUM: libc::c_ulong = 1;
const TSO: libc::c_ulong = 2 | 4 | 8;
const USO: libc::c_ulong = 0x20 | 0x40;
const UDP_TUNNEL_GSO: libc::c_ulong = 0x80;
/// `struct virtio_net_hdr`.
const HEADER_BYTES: usize = 10;
/// `struct virtio_net_hdr_v1_hash_tunnel`.
const TUNNEL_HEADER_BYTES: i32 = 24;

/// What the device takes and gives in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offloads {
    /// Packets only, with their checksums.
    None,
    /// Super-packets of TCP and UDP; those in a tunnel are cut by the kernel before.
    Plain,
    /// Those in a tunnel too (Linux 6.17).
    Tunnel,
}

/// The device `wg0` of a node.
pub struct Wireguard {
    file: File,
    header_bytes: usize,
}

impl Wireguard {
    /// Makes it in a namespace; `None` if this kernel does not know those offloads.
    pub fn new(namespace: &str, offloads: Offloads) -> Option<Self> {
        let header_bytes = match offloads {
            Offloads::None => 0,
            Offloads::Plain => HEADER_BYTES,
            Offloads::Tunnel => TUNNEL_HEADER_BYTES as usize,
        };
        let file = inside(namespace, || open(offloads))?;
        ip(&format!(
            "-n {namespace} link set wg0 mtu {MTU} gso_max_segs {SEGMENTS} up"
        ));
        Some(Self { file, header_bytes })
    }

    /// As if this packet had come from a peer, opened.
    pub fn receive(&self, packet: &[u8]) {
        let message = [&vec![0; self.header_bytes][..], packet].concat();
        (&self.file).write_all(&message).expect("the device is up");
    }

    /// The next packet that the host sends through the device.
    pub fn sent(&self) -> Vec<u8> {
        self.next(PATIENCE).expect("a packet leaves by WireGuard")
    }

    /// The next packet, if one waits.
    pub fn waiting(&self) -> Option<Vec<u8>> {
        self.next(Duration::ZERO)
    }

    fn next(&self, patience: Duration) -> Option<Vec<u8>> {
        let message = self.read(patience)?;
        let packet = message[self.header_bytes..].to_vec();
        // What the kernel itself says when a device comes up (router solicitation, multicast reports).
        if packet[0] >> 4 == 6 && packet[24] == 0xff {
            return self.next(patience);
        }
        Some(packet)
    }

    fn read(&self, patience: Duration) -> Option<Vec<u8>> {
        let mut waiting = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).expect("a short time");
        if poll(&mut waiting, timeout).expect("poll") == 0 {
            return None;
        }
        let mut room = vec![0; ROOM_BYTES];
        let length = (&self.file).read(&mut room).expect("the device is there");
        room.truncate(length);
        Some(room)
    }
}

fn open(offloads: Offloads) -> Option<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("TUN devices can be made");
    let mut request = [0_u8; 40];
    request[..3].copy_from_slice(b"wg0");
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI;
    if offloads != Offloads::None {
        flags |= libc::IFF_VNET_HDR;
    }
    request[16..20].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the pointer is to a whole ifreq that outlives the call.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(status, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    let wanted = match offloads {
        Offloads::None => return Some(file),
        // Linux before 6.2 knows no segmentation of UDP.
        Offloads::Plain => [CSUM | TSO | USO, CSUM | TSO],
        Offloads::Tunnel => [CSUM | TSO | USO | UDP_TUNNEL_GSO; 2],
    };
    if offloads == Offloads::Tunnel {
        let bytes = TUNNEL_HEADER_BYTES;
        // SAFETY: the pointer is to a number that outlives the call.
        let status = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) };
        assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    }
    let takes = |offloads: libc::c_ulong| {
        // SAFETY: the argument is a number.
        let status = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offloads) };
        status == 0
    };
    let is_set = wanted.into_iter().any(takes);
    is_set.then_some(file)
}

/// The kernel wants the place of the outer UDP header behind an Ethernet header too, which it does not say itself for a
/// device that has none.
fn as_received(mut message: Vec<u8>, header_bytes: usize) -> Vec<u8> {
    const TUNNEL_BITS: u8 = 0x60;
    const GSO_TYPE: usize = 1;
    const OUTER_TRANSPORT: usize = 20;
    const ETHERNET_BYTES: u8 = 14;
    if header_bytes == TUNNEL_HEADER_BYTES as usize && message[GSO_TYPE] & TUNNEL_BITS != 0 {
        message[OUTER_TRANSPORT] += ETHERNET_BYTES;
    }
    message
}

/// Hands on between two devices what each sends, as long as it lives.
pub struct Link {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<usize>>,
}

impl Link {
    pub fn between(a: Wireguard, b: Wireguard) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (a, b) = (Arc::new(a), Arc::new(b));
        let pump = |from: &Arc<Wireguard>, to: &Arc<Wireguard>| {
            let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut longest = 0;
                while !stop.load(Ordering::Relaxed) {
                    let Some(message) = from.read(Duration::from_millis(20)) else {
                        continue;
                    };
                    longest = longest.max(message.len() - from.header_bytes);
                    let message = as_received(message, to.header_bytes);
                    (&to.file).write_all(&message).unwrap_or_else(|error| {
                        let head = &message[..message.len().min(120)];
                        panic!("write of {head:x?}: {error}")
                    });
                }
                longest
            })
        };
        let threads = vec![pump(&a, &b), pump(&b, &a)];
        Self { stop, threads }
    }

    /// Ends it; the longest packet that either side sent in one piece.
    pub fn longest(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let longest = self.threads.drain(..).map(|t| t.join().expect("a pump"));
        longest.max().unwrap_or(0)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
